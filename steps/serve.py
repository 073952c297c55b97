"""Serve a registered model: OpenAI's protocol, MLflow's protocol, and a chat page."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.serve import COMMAND

if __name__ == "__main__":
    run_script(COMMAND)
