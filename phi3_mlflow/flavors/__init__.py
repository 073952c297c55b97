"""The MLflow flavors that a model is logged in: ONNX and transformers, with one chat contract."""
