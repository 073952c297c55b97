"""How the package is put together, beyond what import-linter's contracts in pyproject.toml say."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

LONGEST = 400
# A step imports its work when it does it, so that `--help` answers at once.
IMPORTS_LATE = "stages"


def modules(root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def late_imports(source: str) -> Iterator[tuple[int, str]]:
    """First-party imports inside functions: the line, and what is imported."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for node in ast.walk(function):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = ["phi3_mlflow" if node.level else node.module or ""]
            for name in names:
                if name.partition(".")[0] in ("phi3_mlflow", "steps"):
                    yield node.lineno, name


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from phi3_mlflow.core import git", []),
        ("import torch\nif True:\n    import phi3_mlflow.core", []),
        ("def f():\n    import torch", []),
        ("def f():\n    from phi3_mlflow.core import git", [(2, "phi3_mlflow.core")]),
        ("class A:\n    async def f(self):\n        from . import x", [(3, "phi3_mlflow")]),
        ("def f():\n    if True:\n        import steps.fetch", [(3, "steps.fetch")]),
    ],
)
def test_the_check_finds_imports_inside_functions(source, found):
    assert list(late_imports(source)) == found


def test_no_first_party_import_hides_in_a_function(root):
    hidden = [
        f"{path.relative_to(root)}:{line}: {name}"
        for path in modules(root, "phi3_mlflow", "steps")
        if path.parent.name != IMPORTS_LATE
        for line, name in late_imports(path.read_text(encoding="utf-8"))
    ]
    assert not hidden


def test_no_module_is_too_long_to_read(root):
    lengths = {
        str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines())
        for path in modules(root, "phi3_mlflow", "steps", "tools", "benchmarks")
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}
