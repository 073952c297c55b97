"""Write what is generated in README.md, docs/*.md and examples/, or say what is out of date.

    python tools/readme_tables.py             # rewrite what differs (`make readme`)
    python tools/readme_tables.py --check     # change nothing; exit 1 when something differs

A table stands between two lines of its own ::

    <!-- BEGIN generated: NAME -->
    <!-- END generated: NAME -->

and NAME is one of

- ``entry-points``: the entry points of MLproject, what each does, and its parameters
- ``parameters``: every parameter with its default, its meaning and the entry points that take it
- ``profiles``: the profiles in configs/
- ``benchmark:FILE``: benchmarks/results/FILE.json, as benchmarks/_result.py writes it

examples/kubernetes/MLproject repeats the entry point ``main`` for a docker_env; it is generated
too, from its line ``entry_points:`` on.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _result import format_table  # noqa: E402  (benchmarks/ is no package)

BEGIN = re.compile(r"^<!-- BEGIN generated: (\S+) -->$")
END = "<!-- END generated: {} -->"


class DocumentError(Exception):
    """A marker without its partner, an unknown block, or a source that cannot be read."""


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    if any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        return 0
    if list(arguments) not in ([], ["--check"]):
        print("usage: readme_tables.py [--check]", file=sys.stderr)
        return 2
    check = bool(arguments)
    stale = []
    try:
        for path in generated_files(root):
            text = path.read_text(encoding="utf-8")
            if path.name == "MLproject":
                fresh = with_main_entry_point(text, root)
            else:
                fresh = regenerate(text, root, path.name)
            if fresh == text:
                continue
            stale.append(path.name)
            if check:
                show_difference(path.name, text, fresh)
            else:
                path.write_text(fresh, encoding="utf-8")
                print(f"written: {path.relative_to(root)}")
    except DocumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if check and stale:
        print(f"out of date: {', '.join(stale)}. Write it again with: make readme", file=sys.stderr)
        return 1
    return 0


def generated_files(root: Path) -> list[Path]:
    """The documents that may hold generated tables, and the example that repeats MLproject."""
    documents = (root / "README.md", *sorted((root / "docs").glob("*.md")))
    return [p for p in (*documents, root / "examples" / "kubernetes" / "MLproject") if p.is_file()]


def with_main_entry_point(text: str, root: Path) -> str:
    """A project file whose only entry point is MLproject's ``main``, word for word."""
    project = (root / "MLproject").read_text(encoding="utf-8")
    block = re.search(r"^  main:\n(?:    .*\n|\n)*", project, re.MULTILINE)
    head, separator, _ = text.partition("entry_points:\n")
    if block is None or not separator:
        raise DocumentError("MLproject has no entry point main, or the example no entry_points")
    return head + separator + block.group(0).rstrip() + "\n"


def show_difference(name: str, old: str, new: str) -> None:
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), f"{name} as it is", f"{name} as generated", "", "", 1
    )
    print("\n".join(line.rstrip("\n") for line in lines), file=sys.stderr)


def regenerate(text: str, root: Path, where: str = "document") -> str:
    """``text`` with the content of every generated block replaced.

    Raises DocumentError for a BEGIN without its END and for an unknown block. What looks like a
    marker inside a fenced code block is left alone.
    """
    out: list[str] = []
    lines = iter(enumerate(text.splitlines(), start=1))
    fenced = False
    for number, line in lines:
        out.append(line)
        if line.startswith("```"):
            fenced = not fenced
        match = None if fenced else BEGIN.match(line)
        if match is None:
            continue
        name = match.group(1)
        end = END.format(name)
        for _, inner in lines:
            if inner == end:
                break
            if BEGIN.match(inner):
                raise DocumentError(f"{where}:{number}: block {name} begins and has no line {end}")
        else:
            raise DocumentError(f"{where}:{number}: block {name} begins and has no line {end}")
        out += [block(name, root), end]
    return "\n".join(out) + ("\n" if text.endswith("\n") else "")


def block(name: str, root: Path) -> str:
    """The content of one generated block."""
    kind, _, argument = name.partition(":")
    if name == "entry-points":
        return entry_points_table(root)
    if name == "parameters":
        return parameters_table(root)
    if name == "profiles":
        return profiles_table(root)
    if kind == "benchmark" and argument:
        return benchmark_table(root / "benchmarks" / "results" / f"{argument}.json")
    raise DocumentError(
        f"unknown block {name}; there are entry-points, parameters, profiles and benchmark:FILE"
    )


def read_mlproject(root: Path) -> dict[str, dict[str, str]]:
    """MLproject's entry points: name to its parameters, each with its default as text."""
    import yaml

    content = yaml.safe_load((root / "MLproject").read_text(encoding="utf-8"))
    found: dict[str, dict[str, str]] = {}
    for name, entry in content["entry_points"].items():
        parameters = entry.get("parameters") or {}
        found[name] = {
            key: str(value.get("default", "") if isinstance(value, dict) else "")
            for key, value in parameters.items()
        }
    return found


def summary_of(root: Path, entry_point: str) -> str:
    """The first paragraph of an entry point's script, which is its manual."""
    script = root / "steps" / f"{entry_point}.py"
    if not script.is_file():
        raise DocumentError(f"MLproject has the entry point {entry_point}, and no {script.name}")
    manual = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return " ".join(manual.split("\n\n")[0].split())


def meaning_of(parameter: str) -> str:
    """A parameter's meaning, from the list that `--help` uses too."""
    from phi3_mlflow.config.parameters import PARAMETERS

    known = PARAMETERS.get(parameter)
    if known is None:
        raise DocumentError(f"MLproject has the parameter {parameter}, params.py does not")
    return known.help


def entry_points_table(root: Path) -> str:
    rows = [
        [f"`{name}`", summary_of(root, name), ", ".join(f"`{p}`" for p in parameters)]
        for name, parameters in read_mlproject(root).items()
    ]
    return format_table(["Entry point", "What it does", "Parameters"], rows)


def parameters_table(root: Path) -> str:
    entry_points = read_mlproject(root)
    defaults: dict[str, set[str]] = {}
    takers: dict[str, list[str]] = {}
    for name, parameters in entry_points.items():
        for parameter, default in parameters.items():
            defaults.setdefault(parameter, set()).add(default)
            takers.setdefault(parameter, []).append(name)
    rows = []
    for parameter, values in defaults.items():
        default = " or ".join(f"`{value}`" for value in sorted(values)) if any(values) else "–"
        of = names_of(takers[parameter], list(entry_points))
        rows.append([f"`{parameter}`", default, meaning_of(parameter), of])
    return format_table(["Parameter", "Default", "Meaning", "Entry points"], rows)


def names_of(some: Sequence[str], every: Sequence[str]) -> str:
    """Some of the entry points, the short way round: all, all but one, or their names."""
    missing = [name for name in every if name not in some]
    if len(every) > 1 and not missing:
        return "all"
    if len(missing) == 1 and len(some) > 2:
        return f"all but `{missing[0]}`"
    return ", ".join(f"`{name}`" for name in some)


def profiles_table(root: Path) -> str:
    from phi3_mlflow.config.profile import load_profile
    from phi3_mlflow.core.errors import UserError

    rows = []
    for path in sorted((root / "configs").glob("*.yaml")):
        try:
            profile = load_profile(str(path))
        except UserError as error:
            raise DocumentError(str(error)) from error
        precision = profile.precision
        if profile.quantizes:
            precision = f"{precision}, {profile.quantization.algorithm}"
        rows.append(
            [
                f"`{path.stem}`",
                profile.base_model,
                profile.licence,
                profile.context_length,
                profile.flavor,
                precision,
                f"`{profile.source}`",
            ]
        )
    columns = ["Profile", "Model", "Licence", "Context", "Flavor", "Precision", "Source"]
    return format_table(columns, rows)


def benchmark_table(path: Path) -> str:
    """A benchmark's title, table, notes and the machine it ran on."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        table, machine = result["table"], result["machine"]
        rows = format_table(table["columns"], table["rows"])
        title, notes = result["title"], result.get("notes", "")
    except FileNotFoundError as error:
        raise DocumentError(f"there is no {path}; run the benchmark that writes it") from error
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DocumentError(
            f"{path} is no result of a benchmark as benchmarks/_result.py writes it: {error!r}"
        ) from error
    where = [f"{machine['cpu']}, {machine['cores']} cores"] if "cpu" in machine else []
    if machine.get("gpu"):
        where.insert(0, machine["gpu"])
    if machine.get("memory_gb"):
        where.append(f"{machine['memory_gb']:.0f} GB")
    if machine.get("os"):
        where.append(machine["os"])
    if result.get("date"):
        where.append(result["date"])
    paragraphs = [f"**{title}**", rows]
    if notes:
        paragraphs.append(notes)
    paragraphs.append(f"<sub>Measured on {', '.join(where)}.</sub>")
    return "\n" + "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
