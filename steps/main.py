"""Take a model all the way: fetch, train, quantize, export, log, register, evaluate, promote."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.main import COMMAND

if __name__ == "__main__":
    run_script(COMMAND)
