"""Export a checkpoint to a directory that onnxruntime-genai opens, and check what was built."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.export import STEP

if __name__ == "__main__":
    run_script(STEP)
