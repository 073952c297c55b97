"""Answer every row of a file with a model, and write the same rows with the answers."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.score import COMMAND

if __name__ == "__main__":
    run_script(COMMAND)
