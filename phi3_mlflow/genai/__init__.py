"""From a checkpoint to the directory that onnxruntime-genai opens, and a look at what was built."""

import os

# Before ONNX Runtime is imported, which would report its use; whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
