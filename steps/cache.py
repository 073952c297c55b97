"""Look after the cache of step outputs: list it, check it, make it smaller."""

from phi3_mlflow.pipeline.command_line import command
from phi3_mlflow.stages import cache

if __name__ == "__main__":
    command("cache", cache.PARAMETERS, cache.__doc__, cache.main).main(
        prog_name="python -m steps.cache"
    )
