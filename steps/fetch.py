"""Fetch a model from its source into the cache, checked, as a Hugging Face checkpoint."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.fetch import STEP

if __name__ == "__main__":
    run_script(STEP)
