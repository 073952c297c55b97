"""Measure versions against the full-precision checkpoint, and say whether they pass the gate."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.evaluate import STEP

if __name__ == "__main__":
    run_script(STEP)
