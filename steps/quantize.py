"""Quantize a checkpoint to int4, tensor by tensor."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.quantize import STEP

if __name__ == "__main__":
    run_script(STEP)
