"""How long `main` takes when there is nothing to do, and of what that is made.

    python benchmarks/main_again.py [PROFILE]

Runs the line once to fill the cache, then measures in one go: `mlflow run` of an entry point that
does nothing (the floor), `main` again through `mlflow run`, and `main` again without it. Median of
three each.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _result import write_result

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 3

EMPTY = """name: empty
entry_points:
  main:
    command: "true"
"""


def seconds(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """The wall time of a command that has to succeed."""
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return time.monotonic() - start


def main() -> None:
    profile = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "empty").mkdir()
        (folder / "empty" / "MLproject").write_text(EMPTY)
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
            "PHI3_MLFLOW_CACHE": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        run = ["mlflow", "run", "--env-manager", "local", "--experiment-name", "phi3-mlflow"]
        python = [sys.executable, "-c"]
        commands = {
            "`mlflow run` of an empty entry point": [*run, str(folder / "empty")],
            "`main` with nothing to do, through `mlflow run`": [
                *run, str(ROOT), "-P", f"profile={profile}",
            ],
            "`main` with nothing to do, as a script": [
                sys.executable, "-m", "steps.main", "--profile", profile,
            ],
            "of it: `import mlflow`": [*python, "import mlflow"],
            "of it: finding all outputs whole": [
                *python,
                "from phi3_mlflow.artifacts.cache import StepCache; s = StepCache();"
                f"[s.latest('{profile}', x) for x in ('fetch', 'quantize', 'export')]",
            ],
        }  # fmt: skip
        first = seconds(list(commands.values())[1], folder, environment)
        taken = {
            label: statistics.median(seconds(command, folder, environment) for _ in range(REPEATS))
            for label, command in commands.items()
        }
    floor = taken["`mlflow run` of an empty entry point"]
    rows: list[list[str | float]] = [
        ["`main` with everything to do", round(first, 1), first / floor]
    ]
    rows += [[label, round(value, 2), value / floor] for label, value in taken.items()]
    write_result(
        "main_again",
        f"`main` again on {profile}, nothing changed",
        ["what", "seconds", "times the floor"],
        [[row[0], row[1], round(float(row[2]), 2)] for row in rows],
        notes=f"SQLite tracking store; median of {REPEATS}; the floor is `mlflow run` of nothing.",
    )


if __name__ == "__main__":
    main()
