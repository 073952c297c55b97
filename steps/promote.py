"""Move the alias `champion` to a version that passed the gate, or back to the one before."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.promote import STEP

if __name__ == "__main__":
    run_script(STEP)
