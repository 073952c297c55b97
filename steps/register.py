"""Register the logged model as a new version, with its provenance as tags and a model card."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.register import STEP

if __name__ == "__main__":
    run_script(STEP)
