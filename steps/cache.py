"""Look after the cache of step outputs: list it, check it, make it smaller."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.cache import COMMAND

if __name__ == "__main__":
    run_script(COMMAND)
