"""Run the project from its git URL; the task of the Databricks job in job.json.

    run_project.py GIT_URL VERSION EXPERIMENT [NAME=VALUE ...]

MLflow makes the project's own environment with uv, apart from the cluster's.
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    if len(arguments) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    url, version, experiment, *given = arguments
    parameters: dict[str, str] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or not name:
            print(f"expected NAME=VALUE, found {text!r}", file=sys.stderr)
            return 2
        parameters[name] = value

    import mlflow

    try:
        mlflow.projects.run(
            url,
            version=version,
            parameters=parameters,
            experiment_name=experiment,
            env_manager="uv",
        )
    except mlflow.exceptions.ExecutionException as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
