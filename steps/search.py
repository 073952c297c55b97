"""Try the quantizations that the profile lists, and keep the best that fits its budget."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.search import STEP

if __name__ == "__main__":
    run_script(STEP)
