"""Take a model all the way: fetch, quantize, export, log, register, evaluate, promote."""

from phi3_mlflow.pipeline.command_line import command
from phi3_mlflow.stages import main

if __name__ == "__main__":
    command("main", main.PARAMETERS, main.__doc__, main.main, main.CHOICES).main(
        prog_name="python -m steps.main"
    )
