"""Answer every row of a file with a model, and write the same rows with the answers."""

from phi3_mlflow.pipeline.command_line import command
from phi3_mlflow.stages import score

if __name__ == "__main__":
    command("score", score.PARAMETERS, score.__doc__, score.main, score.CHOICES).main(
        prog_name="python -m steps.score"
    )
