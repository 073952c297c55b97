"""Training speed and memory against a plain script of trl and peft with the same settings.

    python benchmarks/train_speed.py                # the default model, fetched before
    python benchmarks/train_speed.py --tiny         # a random tiny one: shows that it works

Each run is a process of its own, and the two take turns. Tokens per second count from the first
step, which warms up, to the last; loading and merging are no part of it. Checkpoints are. trl
trains on a token more per row: the line break that the chat template writes after the end of a
turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from _result import write_result
from _train_processes import SETTINGS, checkpoint_of, finish, rows_of, start


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--checkpoint", type=Path, help="a float checkpoint")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--runs", type=int, default=3, help="of each")
    parser.add_argument("--out", type=Path, help="folder of the result")
    args = parser.parse_args()
    speeds: dict[str, list[float]] = {"ours": [], "trl": []}
    peaks: dict[str, list[float]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint, rows = checkpoint_of(args, folder), rows_of(args, folder)
        tokens = {}
        for number in range(args.runs):
            for who in ("ours", "trl")[:: 1 if number % 2 == 0 else -1]:
                job = {"checkpoint": str(checkpoint), "rows": str(rows), "settings": SETTINGS}
                place = folder / f"{who}-{number}"
                told, times = finish(start(who, job | {"place": str(place)}))
                tokens[who] = told["tokens"]
                steps = {step: moment for step, moment in times if step}
                share = (len(steps) - 1) / len(steps)
                elapsed = steps[max(steps)] - steps[min(steps)]
                speeds[who].append(share * told["tokens"] / elapsed)
                peaks[who].append(told["peak_rss_bytes"] / 1e9)
                print(who, number, speeds[who][-1], peaks[who][-1], flush=True)
    if tokens["trl"] - tokens["ours"] not in (0, args.rows * SETTINGS["num_train_epochs"]):
        raise SystemExit(f"the two did not train on the same tokens: {tokens}")
    speed = {who: statistics.median(found) for who, found in speeds.items()}
    peak = {who: statistics.median(found) for who, found in peaks.items()}
    write_result(
        "train_speed_tiny" if args.tiny else "train_speed",
        f"LoRA training, {args.rows} tickets, batches of 8, {SETTINGS['threads']} threads",
        ["who", "tokens/s", "peak memory GB"],
        [
            ["this project", speed["ours"], peak["ours"]],
            ["trl and peft", speed["trl"], peak["trl"]],
            ["ratio", speed["ours"] / speed["trl"], peak["ours"] / peak["trl"]],
        ],
        notes=f"Median of {args.runs} runs of each, in turn, in processes of their own.",
        extra={"tokens_per_second": speeds, "peak_gb": peaks},
        directory=args.out,
    )


if __name__ == "__main__":
    main()
