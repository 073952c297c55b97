"""Write a first profile for a model of your own, with the choices there are as comments."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.init import COMMAND

if __name__ == "__main__":
    run_script(COMMAND)
