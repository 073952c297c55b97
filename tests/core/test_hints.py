"""Commands that are named to a person work on the machine that names them."""

from __future__ import annotations

import pytest

from phi3_mlflow.core import hints


@pytest.mark.parametrize(
    ("conda", "ending"), [("/opt/conda/bin/conda", ""), (None, " --env-manager local")]
)
def test_the_environment_manager_fits_the_machine(
    conda: str | None, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: conda)
    assert hints.run_command() == "mlflow run ." + ending
    assert hints.run_command("fetch", profile="a b") == (
        "mlflow run . -e fetch -P 'profile=a b'" + ending
    )
