"""What answers inside a logged model: requests, answers, sampling, scheduling and the engines.

This folder is copied into every logged model, next to the models-from-code file that loads it.
It therefore stands alone: the standard library, numpy, mlflow, jinja2 and tokenizers, and inside
the engine that needs it the engine's own library (onnxruntime_genai with the onnxruntime that it
stands on, or torch with transformers); nothing else of this project, and no absolute import of
itself.
"""
