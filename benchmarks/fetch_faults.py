"""Inject every fault of the test suite into a fetch, and count what is wrong afterwards.

    python benchmarks/fetch_faults.py
    python benchmarks/fetch_faults.py --no-result

The faults are those of `tests/sources/faults.py`: a local server that speaks the hub's API and
cuts, stalls, throttles, lies or serves what must not be loaded. What is counted is what was found
on the disk and in the messages after every one of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _result import write_result  # noqa: E402

from tests.sources.faults import FAULTS, RECOVERS, REFUSED, Fault, Result, run_fault  # noqa: E402

COLUMNS = [
    "kind of fault",
    "injected",
    "recovered, right bytes",
    "refused, clear message",
    "files wrong afterwards",
    "left over",
    "tracebacks",
    "token shown",
]


def run(one: Fault) -> Result:
    """Inject one fault in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as name:
        return run_fault(one, Path(name))


def main() -> None:
    """Inject all, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args()
    kinds: dict[str, Counter[str]] = {}
    log = []
    for one in FAULTS:
        result = run(one)
        count = kinds.setdefault(one.kind, Counter())
        count["injected"] += 1
        count["recovered"] += result.outcome == RECOVERS and not result.wrong_files
        count["refused"] += result.outcome == REFUSED and result.exit_code != 0
        count["wrong"] += len(result.wrong_files)
        count["left"] += len(result.leftovers)
        count["tracebacks"] += result.outcome == "crashed" or result.had_traceback
        count["token"] += result.token_seen
        log.append({"kind": one.kind, "fault": one.name, "ended": result.outcome})
        print(f"{one.kind}: {one.name}: {result.outcome}", flush=True)
    keys = ("injected", "recovered", "refused", "wrong", "left", "tracebacks", "token")
    rows: list[list[str | int]] = [
        [kind, *(int(count[key]) for key in keys)] for kind, count in kinds.items()
    ]
    rows.append(["all", *(sum(int(count[key]) for count in kinds.values()) for key in keys)])
    if options.no_result:
        for row in rows:
            print(*row)
    else:
        write_result(
            "fetch_faults",
            "Faults injected into a fetch, and what was wrong afterwards",
            COLUMNS,
            rows,
            notes="Every fault in a fresh directory, against a local server that speaks the hub's "
            "API. A fetch ends with exactly the right bytes or with a message and an empty output.",
            extra={"faults": log},
        )
    bad = sum(int(count[key]) for count in kinds.values() for key in keys[3:])
    neither = sum(c["injected"] - c["recovered"] - c["refused"] for c in kinds.values())
    sys.exit(1 if bad or neither else 0)


if __name__ == "__main__":
    main()
