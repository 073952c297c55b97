"""Kill the tiny line again and again, and see whether the next run makes good: `make soak`.

    python benchmarks/soak_kills.py [--kills 56] [--seed 7]

Every step is killed with SIGKILL and SIGTERM, all processes or main's alone, at random moments.
After one to four kills a run goes to its end; what it leaves is compared with what an undisturbed
run leaves. Ends with code 1 when anything differed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from _result import write_result  # noqa: E402

REGISTRY = ("versions", "aliases", "gate", "models", "code")
BYTES = ("bytes", "artifact", "damaged", "code")


def main() -> int:
    from tests.conftest import Workspace
    from tests.fixtures.kill_campaign import SIGNALS, STEPS, kill_campaign, state
    from tests.fixtures.tiny_line import write_profile

    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=56)
    options.add_argument("--seed", type=int, default=7)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        undisturbed, disturbed = Path(folder, "undisturbed"), Path(folder, "killed")
        for each in (undisturbed, disturbed):
            each.mkdir()
        profile = write_profile(undisturbed)
        place = Workspace(undisturbed)
        done = place.step("main", "--profile", str(profile))
        if done.returncode != 0:
            print(done.stdout + done.stderr)
            return 1
        campaign = kill_campaign(
            Workspace(disturbed), profile, chosen.kills, chosen.seed, state(place), told
        )
    rows = []
    for step in STEPS:
        for name in SIGNALS:
            mine = [k for k in campaign.kills if (k.step, k.signal) == (step, name)]
            wrong = [campaign.wrong.get(kill.round, {}) for kill in mine]

            def sound(keys: tuple[str, ...], wrong: list[dict[str, str]] = wrong) -> int:
                return sum(not any(key in found for key in keys) for found in wrong)

            rows.append([
                step, name, len(mine), sound(REGISTRY), sound(BYTES),
                len(mine) - sound(("debris", "code")), len(mine) - sound(("processes", "code")),
                len(mine) - sound(("running", "code")),
            ])  # fmt: skip
    whom = Counter(kill.whom for kill in campaign.kills)
    write_result(
        "soak_kills",
        f"{len(campaign.kills)} kills at random moments",
        ["step killed in", "signal", "kills", "same registry", "same bytes", "debris",
         "processes left", "runs left RUNNING"],
        rows,
        notes=f"Tiny random model, seed {chosen.seed}; {whom['all']} times all processes were "
        f"killed, {whom['main']} times main's alone. After one to four kills a run goes to its end "
        "and is compared with one that nobody disturbed: versions, aliases, verdict and logged "
        "models; the hashes of every output; unfinished or unowned files in cache and artifact "
        "store; programs still at work; runs that MLflow shows as RUNNING.",
        extra={
            "kills": [vars(kill) for kill in campaign.kills],
            "problems": campaign.problems,
        },
    )  # fmt: skip
    print("\n".join(campaign.problems))
    return 1 if campaign.problems else 0


def told(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
