"""Serve a registered model: OpenAI's protocol, MLflow's protocol, and a chat page."""

from phi3_mlflow.pipeline.command_line import command
from phi3_mlflow.stages import serve

if __name__ == "__main__":
    command("serve", serve.PARAMETERS, serve.__doc__, serve.main).main(
        prog_name="python -m steps.serve"
    )
