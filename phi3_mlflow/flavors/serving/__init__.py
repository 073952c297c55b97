"""What answers inside a logged model: requests, answers, sampling, scheduling and the two engines.

This folder is copied into every logged model, next to the models-from-code file that loads it.
It therefore stands alone: the standard library, numpy and mlflow, and the engine's own library
(onnxruntime_genai, or torch with transformers) inside the engine that needs it; nothing else of
this project, and no absolute import of itself.
"""
