"""Check a version or a folder: files, signature, provenance, verdict, registry."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.verify import COMMAND

if __name__ == "__main__":
    run_script(COMMAND)
