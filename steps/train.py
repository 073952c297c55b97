"""Fine-tune a checkpoint on rows of your own with LoRA, and merge the adapter into it."""

from phi3_mlflow.pipeline.command_line import run_script
from phi3_mlflow.stages.train import STEP

if __name__ == "__main__":
    run_script(STEP)
