"""Which code and which libraries decide what a step makes, read from the source itself.

A list kept by hand goes stale without a word: a module that is changed and not on it leaves an old
output in the cache as if it were good. So the list is derived: the modules that a step's own module
imports, and what these import, and so on, imports inside functions included. Nothing is imported
to find this out; the files are parsed.
"""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.core.shipped import PACKAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

SOURCE = PACKAGE.parent
"""The folder that holds the package."""

NEUTRAL_MODULES = {
    "phi3_mlflow": "the version number, and a switch of MLflow's",
    "phi3_mlflow.artifacts.cache": "keeps outputs, compared with their hashes",
    "phi3_mlflow.artifacts.code_keys": "makes the key",
    "phi3_mlflow.artifacts.inputs": "holds inputs; their digests are in the key",
    "phi3_mlflow.config.loading": "reads profiles; their values are in the key as settings",
    "phi3_mlflow.config.parameters": "reads parameters; their values are in the key as settings",
    "phi3_mlflow.config.profile": "holds settings; their values are in the key",
    "phi3_mlflow.core.console": "shows remarks",
    "phi3_mlflow.core.errors": "words and exit codes of failures, which leave no output",
    "phi3_mlflow.core.machine": "measures the machine; what is chosen by it is in the key",
    "phi3_mlflow.core.meter": "measures time and memory",
    "phi3_mlflow.core.metrics": "makes metrics of reports, which are logged beside the output",
    "phi3_mlflow.core.progress": "shows progress",
    "phi3_mlflow.pipeline.command": "what an entry point is; says nothing of outputs",
    "phi3_mlflow.pipeline.inputs": "finds inputs; their digests are in the key",
    "phi3_mlflow.pipeline.runner": "calls steps; what it hands over is in the key as inputs",
    "phi3_mlflow.pipeline.step": "carries a step out; what it hands over is in the key",
    "phi3_mlflow.stages.overlap": "refuses rows to train on, or lets them pass as they are",
    "phi3_mlflow.tracking.connection": "finds the tracking store, whose identity is in the key",
    "phi3_mlflow.tracking.runs": "records the run of a step beside its output",
}
"""Modules that cannot change what a step makes, with the reason. Neither they nor what they import
count, unless something else imports it, too."""

NEUTRAL_LIBRARIES = {
    "click": "reads the command line",
    "filelock": "makes processes wait for each other",
    "huggingface_hub": "carries bytes that are compared with their hashes",
    "httpx": "carries bytes that are compared with their hashes",
    "pip": "carries bytes that are compared with their hashes",
    "psutil": "measures processes",
    "pydantic": "checks values, which are in the key as settings",
    "pydantic_core": "checks values, which are in the key as settings",
    "rich": "shows progress",
    "yaml": "reads profiles; their values are in the key as settings",
}
"""Libraries, by the name they are imported under, that cannot change what a step makes."""

COMPUTES_BEHIND = {"onnxruntime_genai": ("onnxruntime",), "trl": ("accelerate",)}
"""Libraries that an imported one computes with, so that they decide an output, too."""

DISTRIBUTIONS = {"google": "protobuf", "yaml": "PyYAML", "jinja2": "Jinja2"}
"""Distributions whose name is not that of their module (`_` and `-` are the same to pip)."""


def modules_in(package: str, source: Path = SOURCE) -> tuple[str, ...]:
    """The modules in a package's own folder, by dotted name."""
    folder = source.joinpath(*package.split("."))
    names = sorted(file.stem for file in folder.glob("*.py"))
    return tuple(package if name == "__init__" else f"{package}.{name}" for name in names)


@dataclass(frozen=True)
class _Module:
    """What one source file imports: names of this project's modules, and of libraries."""

    file: Path
    own: tuple[str, ...]
    libraries: tuple[str, ...]


@dataclass(frozen=True)
class Closure:
    """What decides the output of a step.

    Attributes:
        modules: this project's modules, by dotted name.
        files: their files, and the files that are no source beside them, relative to the packages'
            folder, with `/`.
        libraries: the distributions they import.
    """

    modules: tuple[str, ...]
    files: tuple[str, ...]
    libraries: tuple[str, ...]

    def hashes(self, source: Path = SOURCE) -> dict[str, str]:
        """The sha256 of every file, as hex."""
        return {file: _sha256(source / file) for file in self.files}


@lru_cache
def closure(roots: tuple[str, ...], source: Path = SOURCE) -> Closure:
    """What some modules run, as far as it can change what comes out.

    Args:
        roots: dotted names of modules.
        source: the folder that holds the packages.

    Raises:
        ValueError: one of the roots does not exist.
    """
    if unknown := [name for name in roots if _file_of(name, source) is None]:
        raise ValueError(f"there is no module {', '.join(unknown)} in {source}")
    found: dict[str, _Module] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        # Importing a.b.c runs a/__init__.py and a/b/__init__.py first.
        parts = name.split(".")
        waiting += [p for n in range(1, len(parts)) if (p := ".".join(parts[:n])) not in found]
        if name in found or name in NEUTRAL_MODULES:
            continue
        module = _read(name, source)
        if module is not None:
            found[name] = module
            waiting += module.own
    libraries = {library for module in found.values() for library in module.libraries}
    libraries |= {behind for library in libraries for behind in COMPUTES_BEHIND.get(library, ())}
    files = {module.file for module in found.values()}
    files |= {beside for file in files for beside in _data_beside(file)}
    return Closure(
        tuple(sorted(found)),
        tuple(sorted(file.relative_to(source).as_posix() for file in files)),
        tuple(sorted(map(distribution, libraries - NEUTRAL_LIBRARIES.keys()))),
    )


def library_versions(closures: Iterable[Closure]) -> dict[str, str]:
    """The libraries that decide some outputs, with the versions installed here."""
    names = {name for each in closures for name in each.libraries}
    return {name: version_of(name) for name in sorted(names)}


def distribution(library: str) -> str:
    """The distribution that brings a module, by pip's name for it."""
    return DISTRIBUTIONS.get(library, library.replace("_", "-"))


def _data_beside(file: Path) -> Iterator[Path]:
    """Templates and the like: files in a module's folder that are no source."""
    for path in file.parent.iterdir():
        if path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith("."):
            yield path


@cache
def _read(name: str, source: Path) -> _Module | None:
    file = _file_of(name, source)
    if file is None:
        return None
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    own, libraries = set(), set()
    for imported in _imports(ast.parse(file.read_text("utf-8")), package):
        top = imported.partition(".")[0]
        if top == PACKAGE.name:
            own.add(imported)
        elif top not in sys.stdlib_module_names:
            libraries.add(top)
    modules = {module for name in own if (module := _module_of(name, source))}
    return _Module(file, tuple(sorted(modules)), tuple(sorted(libraries)))


def _module_of(name: str, source: Path) -> str | None:
    """The module that `from a.b import c` means: a.b.c where that is one, else a.b."""
    if _file_of(name, source):
        return name
    parent = name.rpartition(".")[0]
    return parent if parent and _file_of(parent, source) else None


@cache
def _file_of(name: str, source: Path) -> Path | None:
    path = source.joinpath(*name.split("."))
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """The dotted names that a source imports; what only a type checker reads is left out."""
    for node in _run(ast.iter_child_nodes(tree)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def _run(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Every node below that may run."""
    for node in nodes:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _run(node.orelse)
        else:
            yield from _run(ast.iter_child_nodes(node))


@cache
def _sha256(file: Path) -> str:
    return sha256_of_file(file)


def version_of(name: str) -> str:
    """The version of a distribution that is installed here."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
