"""Training that is killed at random moments: does it end with the bytes of one that was not?

    python benchmarks/train_kills.py                # a tiny random model, twenty kills
    python benchmarks/train_kills.py --default      # the default model, fetched before

A run is started, killed with SIGKILL in or between steps, and started again, until it has been
killed as often as it should; then it is left to end. The same is done to a plain script of trl and
peft, which goes on with trl's own `resume_from_checkpoint` from the last checkpoint that it finds.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from _result import write_result
from _train_processes import SETTINGS, checkpoint_of, finish, rows_of, start

NAMES = {"ours": "this project", "trl": "trl and peft"}


def kill_once(who: str, job: dict[str, Any], draw: random.Random) -> int | None:
    """Start a run and kill it after some steps; gives the last step, None when it was faster."""
    process = start(who, job, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    wanted, seen, began = draw.randrange(0, 2 * job["settings"]["save_steps"]), 0, 0.0
    reached = 0
    for line in process.stdout:
        word, _, rest = line.partition(" ")
        if word == "begin":
            began = float(rest)
        if word == "step":
            seen, reached = seen + 1, int(rest.split()[0])
            each = (time.monotonic() - began) / seen
            if seen > wanted:
                # Somewhere in the next step, or while the checkpoint of this one is written.
                time.sleep(draw.random() * each)
                process.kill()
                process.wait()
                return reached
    process.wait()
    return None


def campaign(
    who: str, job: dict[str, Any], folder: Path, kills: int, rounds: int, seed: int
) -> dict[str, Any]:
    """Kill runs until there were as many kills as wanted.

    Returns:
        `kills`, `rounds`, how many of them ended `equal` to one that was left alone, and how many
        `failed` to go on.
    """
    draw = random.Random(seed)
    undisturbed, _ = finish(start(who, job | {"place": str(folder / f"{who}-alone")}))
    counts = {"kills": 0, "rounds": 0, "equal": 0, "failed": 0}
    number = 0
    while counts["kills"] < kills:
        place = {"place": str(folder / f"{who}-{number}")}
        number += 1
        wanted = min(-(-kills // rounds), kills - counts["kills"])
        done = 0
        for _ in range(wanted):
            reached = kill_once(who, job | place, draw)
            if reached is None:
                break
            done += 1
            print(f"{who}: killed after step {reached}", flush=True)
        counts["kills"] += done
        counts["rounds"] += 1
        try:
            ended, _ = finish(start(who, job | place))
        except RuntimeError as error:
            print(f"{who}: {error}", flush=True)
            counts["failed"] += 1
            continue
        counts["equal"] += ended["sha256"] == undisturbed["sha256"]
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--default", action="store_true", help="the default model")
    parser.add_argument("--checkpoint", type=Path, help="a float checkpoint")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="runs that share the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the result")
    args = parser.parse_args()
    args.tiny = not args.default and args.checkpoint is None
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint, file = checkpoint_of(args, folder), rows_of(args, folder)
        # Dropout shows whether the random state is taken up as well.
        settings = SETTINGS | {"lora_dropout": 0.1}
        job = {"checkpoint": str(checkpoint), "rows": str(file), "settings": settings}
        for who, name in NAMES.items():
            found = campaign(who, job, folder, args.kills, args.rounds, args.seed)
            rows.append([name, found["kills"], found["rounds"], found["equal"], found["failed"]])
    write_result(
        "train_kills",
        f"Training killed at random moments, {'a tiny' if args.tiny else 'the default'} model",
        ["who", "kills", "runs", "runs with equal bytes", "runs that could not go on"],
        rows,
        notes=f"{args.rows} rows, a checkpoint every {settings['save_steps']} steps; seed "
        f"{args.seed}.",
        directory=args.out,
    )


if __name__ == "__main__":
    main()
