from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.tiny_phi3 import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Phi-3 mini: untied head, float32, one file."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Phi-4 mini: tied head, grouped queries."""
    return make_tiny(tmp_path_factory.mktemp("tied"), "phi-4-mini")


@pytest.fixture(scope="session")
def tiny_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Phi-3.5 mini: bfloat16, several files."""
    return make_tiny(tmp_path_factory.mktemp("sharded"), "phi-3.5-mini")
