"""Make a registered version again from its recipe, and say whether the bytes are the same."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.reproduce import STEP

if __name__ == "__main__":
    run_script(STEP)
