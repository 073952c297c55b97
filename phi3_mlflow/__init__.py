"""Take a Phi-3 model from its source to production with MLflow.

The scripts in `steps/` hold the sequence, this package the logic.
"""

__version__ = "0.1.0"
