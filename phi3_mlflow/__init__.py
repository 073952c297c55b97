"""Take a Phi-3 model from its source to production with MLflow.

The scripts in `steps/` hold the sequence, this package the logic.
"""

import os

# Before mlflow is imported, which would report its use; whoever wants that sets it to false.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

__version__ = "0.2.0"
