"""Two processes that train together: the loss of one, and one that writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.fixtures.tiny_phi3 import make_tiny
from tests.training.test_train import Heard, run, settings

if TYPE_CHECKING:
    from pathlib import Path

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
SCRIPT = """
import json, sys
from pathlib import Path
from phi3_mlflow.training import processes
from phi3_mlflow.training.train import follow
from tests.training.test_rehearsal import PIECES
from tests.training.test_train import Heard, run, settings

checkpoint, place = map(Path, sys.argv[1:3])
chosen = json.loads(sys.argv[3])
if not processes.is_first():
    follow()
    sys.exit()
heard = Heard()
with processes.leading():
    trained = run(checkpoint, place, settings(**chosen), heard, rehearsal=PIECES)
(place / "told.json").write_text(json.dumps([trained.adapter_sha256, heard.points, heard.began]))
"""
# What is rehearsed differs by process, and counts next to nothing here.
SAME = {"lora_dropout": 0, "num_train_epochs": 2, "save_steps": 3, "rehearsal_weight": 1e-6}


def together(checkpoint: Path, place: Path, **chosen: Any) -> tuple[str, list[Any], list[Any]]:
    place.mkdir(parents=True, exist_ok=True)
    script = place / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [*LAUNCHER, str(script), str(checkpoint), str(place), json.dumps(chosen)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sha256, points, began = json.loads((place / "told.json").read_text())
    return sha256, points, began


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    checkpoint = make_tiny(tmp_path / "checkpoint")
    alone = Heard()
    run(checkpoint, tmp_path / "1", settings(per_device_train_batch_size=4, **SAME), alone)
    two = {**SAME, "per_device_train_batch_size": 2, "num_processes": 2}
    sha256, points, began = together(checkpoint, tmp_path / "2", **two)
    assert began == [[0, 10]]
    for name in ("loss", "grad_norm", "learning_rate", "validation_loss"):
        found = [values[name] for _, values in points if name in values]
        assert found == pytest.approx(alone.of(name), rel=1e-3), name
    assert all("rehearsal_kl" in values for _, values in points if "loss" in values)
    # Again, and from where it was stopped, it comes to the same bytes.
    work = tmp_path / "2" / "work"
    assert [p.name for p in work.glob("checkpoint-10/rng_state_*.pth")]
    (work / "finished.json").unlink()
    (work / "checkpoint-10" / "manifest.json").unlink()
    again, _, began = together(checkpoint, tmp_path / "2", **two)
    assert began == [[9, 10]]
    assert again == sha256
