from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.tiny_phi3 import ARCHITECTURES, make_tiny


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def any_tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of each of the real models' architectures."""
    return make_tiny(tmp_path_factory.mktemp("arch"), request.param)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Phi-3 mini."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Phi-4 mini: tied head."""
    return make_tiny(tmp_path_factory.mktemp("tied"), "phi-4-mini")
