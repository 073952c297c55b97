"""The project's own files under test, and its tools as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tool():
    """Import a script of tools/ by name; tools/ is no package, its scripts import one another."""

    def load(name: str) -> ModuleType:
        folder = str(ROOT / "tools")
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(folder)

    return load
