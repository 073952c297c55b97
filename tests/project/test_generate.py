"""What is generated, MLproject and tables: made from its sources, and up to date in the files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

MLPROJECT = """
name: p
entry_points:
  fetch:
    parameters:
      profile: {type: string, default: smollm2-135m}
      quiet: {type: string, default: "false"}
    command: "python -m steps.fetch --profile {profile} --quiet {quiet}"
  log:
    parameters:
      profile: {type: string, default: smollm2-135m}
      checkpoint: {type: path, default: auto}
    command: "python -m steps.log --profile {profile} --checkpoint {checkpoint}"
"""
DOCUMENT = """# Title

<!-- BEGIN generated: entry-points -->
stale content
<!-- END generated: entry-points -->

between

<!-- BEGIN generated: parameters -->
<!-- END generated: parameters -->
"""


@pytest.fixture(scope="module")
def tables(tool) -> ModuleType:
    return tool("generate")


@pytest.fixture(scope="module")
def results(root) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_result", root / "benchmarks" / "_result.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "steps").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "MLproject").write_text(MLPROJECT)
    (tmp_path / "steps" / "fetch.py").write_text('"""Fetch a\nmodel.\n\nMore.\n"""\n')
    (tmp_path / "steps" / "log.py").write_text('"""Log it."""\n')
    (tmp_path / "README.md").write_text(DOCUMENT)
    return tmp_path


def test_the_documents_are_up_to_date(tables, capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "blocks"),
    [
        ("README.md", ("steps", "headlines")),
        (
            "docs/reference.md",
            ("entry-points", "parameters", "profiles", "manuals"),
        ),
    ],
)
def test_the_documents_show_the_entry_points_and_profiles(root, document, blocks):
    text = (root / document).read_text(encoding="utf-8")
    for block in blocks:
        assert f"<!-- BEGIN generated: {block} -->" in text


def test_every_section_of_a_profile_is_shown(tables, root):
    from phi3_mlflow.config.profile import Profile

    text = (root / "docs" / "profiles.md").read_text(encoding="utf-8")
    schema = Profile.model_json_schema()
    rows = sys.modules["profile_keys"].keys(schema, schema["$defs"])
    keys = {key for key, _, _, _ in rows} - {"name"}
    assert len(keys) > 80
    for key in keys:
        assert f"| `{key}` " in text, key


def test_check_reports_and_changes_nothing_then_writing_mends(tables, project, capsys):
    assert tables.main(["--check"], project) == 1
    assert (project / "README.md").read_text() == DOCUMENT
    assert "out of date: README.md" in capsys.readouterr().err
    assert tables.main([], project) == 0
    assert tables.main(["--check"], project) == 0
    text = (project / "README.md").read_text()
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in text.splitlines()]
    assert ["`fetch`", "Fetch a model.", "`profile`, `quiet`"] in cells
    assert any(row[:2] == ["`checkpoint`", "`auto`"] and row[-1] == "`log`" for row in cells)
    assert any(row[0] == "`profile`" and row[-1] == "all" for row in cells)
    assert "\nbetween\n" in text
    assert "stale content" not in text


def test_entry_points_are_named_the_short_way_round(tables):
    assert tables.names_of(["a", "b"], ["a", "b"]) == "all"
    assert tables.names_of(["a", "b", "c"], ["a", "b", "c", "d"]) == "all but `d`"
    assert tables.names_of(["a", "b"], ["a", "b", "c"]) == "`a`, `b`"
    assert tables.names_of(["a"], ["a"]) == "`a`"


def test_docs_are_looked_at_too(tables, project):
    tables.main([], project)
    (project / "docs" / "a.md").write_text(DOCUMENT)
    assert tables.main(["--check"], project) == 1


def test_the_example_that_repeats_main_is_generated(tables, project, capsys):
    example = project / "examples" / "kubernetes" / "MLproject"
    example.parent.mkdir(parents=True)
    example.write_text("name: p\nentry_points:\n  main: {}\n")
    assert tables.main([], project) == 2
    assert "no entry point main" in capsys.readouterr().err
    (project / "MLproject").write_text(MLPROJECT.replace("  log:", "  main:"))
    (project / "steps" / "main.py").write_text('"""All."""\n')
    assert tables.main([], project) == 0
    assert example.read_text() == "name: p\nentry_points:\n  main:" + MLPROJECT.split("  log:")[1]
    assert tables.main(["--check"], project) == 0


printable = st.text(st.characters(min_codepoint=32, max_codepoint=126))


@given(
    st.dictionaries(st.sampled_from(["profile", "block_size", "port"]), printable, min_size=1),
    printable,
)
def test_a_project_file_says_what_the_commands_are(tool, defaults, default):
    """Whatever a default is: YAML reads it as the same text."""
    defaults["last"] = default
    content = yaml.safe_load(tool("generate").project_text({"fetch": tuple(defaults)}, defaults))
    entry = content["entry_points"]["fetch"]
    assert content["conda_env"] == "conda.yaml"
    assert {n: spec["default"] for n, spec in entry["parameters"].items()} == defaults
    assert {spec["type"] for spec in entry["parameters"].values()} == {"string"}
    options = " ".join(f"--{name.replace('_', '-')} {{{name}}}" for name in defaults)
    assert entry["command"] == f"python -m steps.fetch {options}"


def test_a_headline_without_its_figure_is_an_error(tables, project, capsys):
    (project / "README.md").write_text(
        "<!-- BEGIN generated: headlines -->\n<!-- END generated: headlines -->\n"
    )
    assert tables.main([], project) == 2
    assert "a headline has no figure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- BEGIN generated: entry-points -->\n", "has no line <!-- END"),
        (
            "<!-- BEGIN generated: parameters -->\n<!-- BEGIN generated: profiles -->\n"
            "<!-- END generated: profiles -->\n",
            "block parameters begins",
        ),
        ("<!-- BEGIN generated: x -->\n<!-- END generated: x -->\n", "unknown block x"),
        (
            "<!-- BEGIN generated: benchmark:none -->\n<!-- END generated: benchmark:none -->\n",
            "run the benchmark",
        ),
    ],
)
def test_a_broken_document_is_one_message(tables, project, capsys, text, message):
    (project / "README.md").write_text(text)
    assert tables.main(["--check"], project) == 2
    assert message in capsys.readouterr().err


def test_a_parameter_without_a_meaning_is_an_error(tables, project, capsys):
    (project / "MLproject").write_text(MLPROJECT.replace("checkpoint", "chekpoint"))
    assert tables.main([], project) == 2
    assert "chekpoint" in capsys.readouterr().err


def test_markers_in_a_fence_are_text(tables, project):
    text = "```\n<!-- BEGIN generated: nothing -->\n```\n"
    assert tables.regenerate(text, project) == text


def test_a_benchmark_is_written_and_shown(tables, results, project, capsys):
    folder = project / "benchmarks" / "results"
    path = results.write_result(
        "speed", "Speed", ["what", "tokens/s"], [["a|b", 12.345], ["c", None]], "Note.",
        extra={"runs": [1, 2]}, directory=folder,
    )  # fmt: skip
    assert "12.35" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["table"] == {
        "columns": ["what", "tokens/s"],
        "rows": [["a|b", 12.345], ["c", None]],
    }
    assert content["extra"] == {"runs": [1, 2]}
    assert content["machine"]["cores"] >= 1
    assert "python" in content["versions"]
    assert [p.name for p in folder.iterdir()] == ["speed.json"]
    text = tables.block("benchmark:speed", project)
    assert "**Speed**" in text
    assert "Note." in text
    assert "| a\\|b |" in text
    assert "Measured on" in text


@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [
        ("Bad Name", ["a"], [[1]]),
        ("../x", ["a"], [[1]]),
        ("x", [], []),
        ("x", ["a", "b"], [[1]]),
        ("x", ["a"], [[[1]]]),
        ("x", ["a"], [[float("nan")]]),
    ],
)
def test_a_result_that_cannot_be_shown_is_not_written(results, tmp_path, name, columns, rows):
    with pytest.raises(ValueError):
        results.write_result(name, "T", columns, rows, directory=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"table": 3, "machine": {}, "title": ""}'])
def test_a_broken_result_is_named(tables, project, content):
    (project / "benchmarks" / "results" / "bad.json").write_text(content)
    with pytest.raises(tables.DocumentError, match=r"bad\.json"):
        tables.block("benchmark:bad", project)


cells = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cc", "Cs"])),
)  # fmt: skip


@given(st.lists(st.tuples(cells, cells), max_size=5))
def test_every_row_of_a_table_is_one_line_with_its_cells(results, rows):
    lines = results.format_table(["one", "two"], rows).split("\n")
    assert len(lines) == len(rows) + 2
    for line in lines:
        assert line.replace("\\|", "").count("|") == 3
