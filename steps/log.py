"""Log the model to MLflow, in the ONNX flavor, the transformers flavor, or both."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.log import STEP

if __name__ == "__main__":
    run_script(STEP)
