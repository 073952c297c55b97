"""The whole line on a model of Phi-3's real size: memory, time and bytes of every step.

    python benchmarks/main_full.py phi-3-mini-4k --work DIR
    python benchmarks/main_full.py phi-3-medium-4k --work DIR --tokenizer PHI3_TOKENIZER_DIR
    python benchmarks/main_full.py phi-3-mini-4k --work DIR --widened SMALL_CHECKPOINT

Writes a checkpoint in the real shapes into DIR (unless there is one) and runs `main` on it with the
model's own profile, an empty step cache and an empty tracking store, as a user would. Weights are
random, and the gate refuses what says nothing sensible; or they are a small model's, widened
(widened_checkpoint.py), whose answers and perplexity have to be the small model's own. --tokenizer
gives the texts the length in tokens that they have for Phi-3; without one random weights read them
byte by byte, which is three to four times as many.

Memory is that of all processes of the line together at their highest point within the step: what is
resident and no mapped file (which the system takes back when it is wanted), and with those besides.
Bytes are those that passed through read and write calls of the step's own process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _result import Cell, write_result  # noqa: E402
from random_checkpoint import MODELS, write_random_checkpoint  # noqa: E402
from widened_checkpoint import write_widened_checkpoint  # noqa: E402

from phi3_mlflow.core.errors import EXIT_DONE, EXIT_GATE  # noqa: E402

_BEGUN = re.compile(r"^(fetch|quantize|export|log|register|evaluate|promote): ")
_ENDED = re.compile(r"^step=(\w+) status=(\w+) .*?\bseconds=([\d.]+)")


@dataclass
class Memory:
    """The most that a step took, in bytes."""

    anonymous: int = 0
    resident: int = 0


@dataclass
class Line:
    """What is seen of the line from outside while it runs."""

    process: subprocess.Popen[str]
    step: str = "start"
    memory: dict[str, Memory] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    ended: bool = False

    def watch(self) -> None:
        """Note the memory of all its processes until it ends."""
        import psutil

        root = psutil.Process(self.process.pid)
        while not self.ended:
            anonymous = resident = 0
            with contextlib.suppress(psutil.Error):
                for one in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(OSError):
                        status = Path(f"/proc/{one.pid}/status").read_text()
                        # A process that has just ended has no sizes.
                        sizes = dict(re.findall(r"^(RssAnon|VmRSS):\s+(\d+)", status, re.M))
                        anonymous += 1024 * int(sizes.get("RssAnon", 0))
                        resident += 1024 * int(sizes.get("VmRSS", 0))
            found = self.memory.setdefault(self.step, Memory())
            found.anonymous = max(found.anonymous, anonymous)
            found.resident = max(found.resident, resident)
            time.sleep(0.1)

    def read(self) -> None:
        """Show what it prints, and take the steps and their times from it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(time.strftime("%H:%M:%S"), line, end="", flush=True)
            if begun := _BEGUN.match(line):
                self.step = begun[1]
            elif ended := _ENDED.match(line):
                self.seconds[ended[1]] = float(ended[3])


def run(profile: Path, work: Path) -> tuple[int, Line, float]:
    """`main` with this profile: its exit code, what was seen of it, and the seconds it took."""
    environment = {
        **os.environ,
        "PHI3_MLFLOW_CACHE": str(work / "cache"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{work / 'mlflow.db'}",
        "PYTHONUNBUFFERED": "1",
    }
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "steps.main", "--profile", str(profile)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    line = Line(process)
    watcher = threading.Thread(target=line.watch, daemon=True)
    watcher.start()
    line.read()
    code = process.wait()
    line.ended = True
    watcher.join()
    return code, line, time.monotonic() - start


def profile_of(model: str, checkpoint: Path, work: Path) -> Path:
    """The model's own profile, with this folder as its source and the sizes that it has."""
    import yaml

    settings = yaml.safe_load((ROOT / "configs" / f"{model}.yaml").read_text(encoding="utf-8"))
    settings["source"] = f"file:{checkpoint}"
    settings.pop("remote_code", None)
    settings.pop("sha256", None)
    settings.pop("train", None)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    settings["architecture"] = {key: config[key] for key in settings["architecture"]}
    path = work / f"{model}-random.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def recorded(work: Path) -> dict[str, dict[str, float]]:
    """The metrics of each step's last run, by the name of the step."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{work / 'mlflow.db'}")
    runs = mlflow.search_runs(
        search_all_experiments=True, output_format="list", order_by=["attributes.start_time ASC"]
    )
    return {run.info.run_name.split()[0]: run.data.metrics for run in runs if run.info.run_name}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--work", type=Path, required=True, help="an empty folder on a roomy disk")
    parser.add_argument("--tokenizer", type=Path, help="directory with tokenizer files to copy")
    parser.add_argument("--widened", type=Path, help="a small checkpoint to take for the weights")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--name", help="of the result; main_full_MODEL when left out")
    parser.add_argument("--out", type=Path, help="folder of the result")
    args = parser.parse_args()
    work = args.work.resolve()
    checkpoint = work / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        if args.widened:
            write_widened_checkpoint(args.widened, args.model, checkpoint, args.layers)
        else:
            write_random_checkpoint(args.model, checkpoint, args.tokenizer, args.layers)
    code, line, seconds = run(profile_of(args.model, checkpoint, work), work)
    if code not in (EXIT_DONE, EXIT_GATE):
        sys.exit(f"main ended with code {code}")
    metrics = recorded(work)
    rows: list[list[Cell]] = []
    for step, taken in line.seconds.items():
        if step == "main":
            continue
        memory, found = line.memory.get(step, Memory()), metrics.get(step, {})
        rows.append(
            [
                step,
                memory.anonymous / 1e9,
                memory.resident / 1e9,
                taken,
                found.get("bytes_read", 0) / 1e9,
                found.get("bytes_written", 0) / 1e9,
            ]
        )
    most = max(line.memory.values(), key=lambda one: one.anonymous)
    resident = max(one.resident for one in line.memory.values())
    rows.append(["all", most.anonymous / 1e9, resident / 1e9, round(seconds, 1), None, None])
    layers = args.layers or MODELS[args.model]["num_hidden_layers"]
    weights = "A small model, widened" if args.widened else "Random weights"
    verdict = "refused" if code else "promoted"
    write_result(
        args.name or f"main_full_{args.model.replace('-', '_')}",
        f"`main` on {args.model}'s shapes, {layers} layers, from fetch to verdict",
        ["step", "peak GB", "with mapped files GB", "seconds", "GB read", "GB written"],
        rows,
        notes=f"{weights}; the gate {verdict} it. Memory of all processes together; GB: 10^9.",
        extra={"metrics": metrics},
        directory=args.out,
    )


if __name__ == "__main__":
    main()
