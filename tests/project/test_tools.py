"""The scripts of tools/ that stand between a bare machine and the project."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet


@pytest.fixture
def pip_env(tool):
    return tool("pip_env")


@pytest.fixture
def setup_venv(tool, tmp_path, monkeypatch):
    module = tool("setup_venv")
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "LOCK", tmp_path / ".venv.lock")
    monkeypatch.setattr(module, "BROKEN_OFF", tmp_path / ".venv" / ".installing")
    monkeypatch.setattr(module, "LOG", tmp_path / ".venv" / "install.log")
    monkeypatch.setattr(module, "COMPILED", tmp_path / ".venv" / ".compiled")
    monkeypatch.setattr(module, "OWN", ())  # the checkout's own byte code stays as it is
    return module


def fake_venv(module) -> None:
    """What a finished installation leaves, without the packages."""
    (module.VENV / "bin").mkdir(parents=True)
    (module.VENV / "bin" / "python").touch()
    module.BROKEN_OFF.touch()
    module.mark_ready("runtime")
    module.COMPILED.touch()


# --- pip_env ------------------------------------------------------------------------------------


def test_later_sections_of_pips_configuration_win(pip_env):
    text = (
        "global.find-links='/global'\n:env:.find-links='/a /b'\ninstall.find-links='/install'\n"
        "global.index-url='https://user:secret@mirror.example/simple'\n"
        "freeze.timeout='10'\nnonsense\n"
    )
    assert pip_env.parse_pip_config(text) == {
        "find-links": "/a /b",
        "index-url": "https://user:secret@mirror.example/simple",
    }


def test_uv_gets_what_pip_has_and_the_caller_did_not_set(pip_env):
    configuration = {
        "find-links": "/a\n/b",
        "index-url": "https://one.example/simple",
        "extra-index-url": "https://two.example/simple https://three.example/simple",
        "cert": "/ca.pem",
        "timeout": "10",
    }
    assert pip_env.uv_variables(configuration, {"SSL_CERT_FILE": "/mine"}) == {
        "UV_FIND_LINKS": "/a,/b",
        "UV_DEFAULT_INDEX": "https://one.example/simple",
        "UV_INDEX": "https://two.example/simple https://three.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert pip_env.uv_variables({}, {}) == {}
    assert pip_env.uv_variables({"no-index": "true"}, {}) == {"UV_NO_INDEX": "1"}


@given(st.dictionaries(st.sampled_from(["find-links", "cert", "index-url"]), st.text()))
def test_what_pip_prints_is_read_back(tool, options):
    pip_env = tool("pip_env")
    text = "".join(f"global.{name}={value!r}\n" for name, value in options.items())
    assert pip_env.parse_pip_config(text) == options


def test_a_command_runs_with_pips_find_links(root, tmp_path):
    environment = {**os.environ, "PIP_FIND_LINKS": str(tmp_path)}
    environment.pop("UV_FIND_LINKS", None)
    show = [sys.executable, "-c", "import os; print(os.environ['UV_FIND_LINKS'])"]
    script = [sys.executable, str(root / "tools" / "pip_env.py")]
    done = subprocess.run([*script, *show], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path)
    named = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    assert "UV_FIND_LINKS" in named.stdout
    assert str(tmp_path) not in named.stdout
    missing = subprocess.run([*script, "/no/such"], env=environment, capture_output=True, text=True)
    assert missing.returncode == 127
    assert "cannot run /no/such" in missing.stderr


# --- find_python.sh -----------------------------------------------------------------------------


def find_python(root, path, **variables):
    script = str(root / "tools" / "find_python.sh")
    return subprocess.run(
        ["/bin/sh", script], env={"PATH": str(path), **variables}, capture_output=True, text=True
    )


def pretend_python(folder, name, version):
    """A `python` that answers as the given version would."""
    script = folder / name
    answer = str(script) if version == "3.11" else ""
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "Python {version}.0"; '
        f'else printf "%s" "{answer}"; fi\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_python_3_11_is_found_under_each_of_its_names(root, tmp_path):
    pretend_python(tmp_path, "python3", "3.12")
    only = pretend_python(tmp_path, "python", "3.11")
    assert find_python(root, tmp_path).stdout.strip() == str(only)
    better = pretend_python(tmp_path, "python3", "3.11")
    assert find_python(root, tmp_path).stdout.strip() == str(better)
    best = pretend_python(tmp_path, "python3.11", "3.11")
    assert find_python(root, tmp_path).stdout.strip() == str(best)


def test_without_python_3_11_the_message_says_what_to_do(root, tmp_path):
    head = shutil.which("head")
    assert head is not None
    (tmp_path / "head").symlink_to(head)
    nothing = find_python(root, tmp_path)
    assert nothing.returncode == 1
    assert nothing.stdout == ""
    assert "No Python 3.11 found" in nothing.stderr
    wrong = find_python(root, tmp_path, PYTHON=str(pretend_python(tmp_path, "mine", "3.12")))
    assert wrong.returncode == 1
    assert "Python 3.12.0" in wrong.stderr
    assert "make run PYTHON=" in wrong.stderr


def test_the_named_python_is_the_only_candidate(root, tmp_path):
    pretend_python(tmp_path, "python3.11", "3.11")
    mine = pretend_python(tmp_path, "mine", "3.11")
    assert find_python(root, tmp_path, PYTHON=str(mine)).stdout.strip() == str(mine)


def test_the_python_that_made_a_virtual_environment_is_found_not_the_environments(root, tmp_path):
    """.venv is first on the PATH while it is made again; what is left of it cannot make it."""
    made = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    path = f"{made / 'bin'}:/usr/bin:/bin"
    assert not Path(find_python(root, path).stdout.strip()).is_relative_to(made)
    (made / "pyvenv.cfg").unlink()
    assert not Path(find_python(root, path).stdout.strip()).is_relative_to(made)


# --- setup_venv ---------------------------------------------------------------------------------


def test_a_finished_environment_is_ready_until_a_requirement_changes(
    setup_venv, tmp_path, monkeypatch
):
    fake_venv(setup_venv)
    assert setup_venv.is_ready("runtime")
    assert not setup_venv.is_ready("dev")
    changed = tmp_path / "conda.yaml"
    changed.write_text("other")
    monkeypatch.setattr(setup_venv, "CONDA_YAML", changed)
    assert not setup_venv.is_ready("runtime")


def test_what_development_needs_is_enough_for_running(setup_venv):
    fake_venv(setup_venv)
    setup_venv.stamp("runtime").unlink()
    setup_venv.BROKEN_OFF.touch()
    setup_venv.mark_ready("dev")
    assert setup_venv.is_ready("runtime")


def test_an_installation_that_was_broken_off_is_not_ready(setup_venv):
    fake_venv(setup_venv)
    setup_venv.BROKEN_OFF.touch()
    assert not setup_venv.is_ready("runtime")


def test_a_ready_environment_costs_no_process(setup_venv, monkeypatch):
    fake_venv(setup_venv)
    monkeypatch.setattr(setup_venv.subprocess, "run", lambda *a, **k: pytest.fail("ran something"))
    assert setup_venv.main(["runtime"]) == 0


def test_a_moved_environment_is_made_again(setup_venv, tmp_path):
    """Its scripts name the interpreter by its old path."""
    made = tmp_path / "elsewhere"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    assert setup_venv._home_of(made) is not None
    made.rename(setup_venv.VENV)
    assert setup_venv._home_of(setup_venv.VENV) is None


def test_pips_failure_shows_its_last_lines_and_leaves_the_state_unready(setup_venv, capfd):
    fake_venv(setup_venv)
    setup_venv.BROKEN_OFF.touch()
    failing = "import sys; print('Collecting torch'); print('ERROR: no such thing'); sys.exit(3)"
    with pytest.raises(SystemExit) as stopped, setup_venv.one_at_a_time() as lock:
        setup_venv.run_pip([sys.executable, "-c", failing], "two packages", lock)
    assert "pip ended with 3" in str(stopped.value)
    assert "ERROR: no such thing" in capfd.readouterr().err
    assert not setup_venv.is_ready("runtime")


def test_a_pip_that_outlives_its_killed_parent_keeps_the_lock(root, tmp_path):
    """The next setup must not remove .venv from under it."""
    parent = (
        "import os, setup_venv as s; from pathlib import Path\n"
        f"s.LOCK = Path({str(tmp_path / 'lock')!r}); s.LOG = Path({str(tmp_path / 'log')!r})\n"
        "with s.one_at_a_time() as lock:\n"
        "    s.run_pip(['sh', '-c', 'kill -9 $PPID; sleep 30'], 'x', lock)\n"
    )
    folder = str(root / "tools")
    started = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=folder, stdout=subprocess.DEVNULL, process_group=0
    )
    try:
        assert started.wait() == -signal.SIGKILL
        with (tmp_path / "lock").open("w") as handle, pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.killpg(started.pid, signal.SIGKILL)
    with (tmp_path / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)


def packages_of(setup_venv) -> Path:
    """A virtual environment with one package of three modules; returns the package's folder."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(setup_venv.VENV)], check=True
    )
    (packages,) = (setup_venv.VENV / "lib").glob("python3*/site-packages")
    for name in ("one.py", "tests/two.py", "template.py"):
        (packages / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / "p" / name).write_text(
            "{% no Python %}" if name == "template.py" else "x = 1\n"
        )
    return packages / "p"


def test_packages_are_compiled_where_no_import_may_keep_its_byte_code(
    setup_venv, monkeypatch, capsys, tmp_path
):
    package = packages_of(setup_venv)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(setup_venv, "ROOT", tmp_path)
    monkeypatch.setattr(setup_venv, "OWN", ("steps",))
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "main.py").write_text("x = 1\n")
    monkeypatch.setattr(setup_venv.sys, "flags", SimpleNamespace(dont_write_bytecode=1, optimize=0))
    with setup_venv.one_at_a_time() as lock:
        setup_venv.compile_packages(lock)
    assert [p.name.partition(".")[0] for p in package.rglob("*.pyc")] == ["one"]
    assert list((tmp_path / "steps").rglob("main*.pyc")), "the project is no package of .venv"
    assert capsys.readouterr().out.count("\n") == 1
    (tmp_path / "steps" / "new.py").write_text("x = 1\n")
    with setup_venv.one_at_a_time() as lock:
        setup_venv.compile_packages(lock)
    assert list((tmp_path / "steps").rglob("new*.pyc")), "what changed of the project since"
    assert capsys.readouterr().out == "", "the packages are compiled once"


@pytest.mark.parametrize(("off", "compiled"), [(1, True), (0, False)])
def test_a_ready_environment_is_compiled_when_byte_code_is_not_kept_any_more(
    setup_venv, monkeypatch, off, compiled
):
    package = packages_of(setup_venv)
    monkeypatch.setattr(setup_venv, "is_ready", lambda kind: True)
    monkeypatch.setattr(
        setup_venv.sys, "flags", SimpleNamespace(dont_write_bytecode=off, optimize=0)
    )
    assert setup_venv.main(["runtime"]) == 0
    assert bool(list(package.rglob("*.pyc"))) == compiled
    for file in package.rglob("*.pyc"):
        file.unlink()
    assert setup_venv.main(["runtime"]) == 0
    assert not list(package.rglob("*.pyc")), "once"


def test_packages_are_left_to_be_compiled_by_their_first_import(setup_venv, monkeypatch, capsys):
    package = packages_of(setup_venv)
    monkeypatch.setattr(setup_venv.sys, "flags", SimpleNamespace(dont_write_bytecode=0))
    with setup_venv.one_at_a_time() as lock:
        setup_venv.compile_packages(lock)
    assert not list(package.rglob("*.pyc"))
    assert capsys.readouterr().out == ""


def test_progress_says_what_pip_is_at(setup_venv):
    progress = setup_venv.Progress("30 packages")
    seen = []
    for line in (
        "Collecting torch==2.13.0 (from -r x)",
        "  Downloading torch-2.13.0-cp311.whl (190.1 MB)",
        "Installing collected packages: a, b, c",
        "Successfully installed a-1 b-2 c-3",
    ):
        progress.note(line)
        seen.append(progress.text().rpartition(" (")[0])
    assert seen == [
        "1 found, collecting torch",
        "1 found, downloading torch (190.1 MB)",
        "installing 3 packages",
        "installed 3 packages",
    ]


def test_usage(setup_venv, capsys):
    assert setup_venv.main(["everything"]) == 2
    assert "runtime|dev" in capsys.readouterr().err


# --- make ---------------------------------------------------------------------------------------


def test_make_run_starts_main_through_mlflow(root):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    shown = subprocess.run(
        ["make", "--dry-run", "run", "PROFILE=p", "ARGS=-P force=all"],
        cwd=root, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    command = " ".join(shown.replace("\\\n", " ").split())
    assert "mlflow run . -e main --env-manager local" in command
    assert '-P profile="p" -P force=all' in command


def test_ci_runs_what_the_readme_says(root):
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")
    assert "make test" in (root / "README.md").read_text(encoding="utf-8")


def test_github_runs_the_same_with_the_same_python(root):
    content = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    assert content["permissions"] == {"contents": "read"}
    steps = content["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    (python,) = (s["with"] for s in steps if s.get("uses", "").startswith("actions/setup-python"))
    assert python["python-version"] == "3.11"
    for job in content["jobs"].values():
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "actions/x@v1"))


def test_every_python_that_the_package_claims_is_tested(root):
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    claimed = SpecifierSet(project["requires-python"])
    jobs = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]
    tested = {"3.11", *jobs["installed"]["strategy"]["matrix"]["python"]}
    assert {f"3.{n}" for n in range(8, 20) if claimed.contains(f"3.{n}")} == tested


def test_hooks_before_a_commit_are_what_make_lint_runs(root):
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0][
        "hooks"
    ]
    shown = subprocess.run(
        ["make", "--dry-run", "check"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    for hook in hooks:
        command = hook["entry"].replace(" --force-exclude", "")
        assert command in shown, hook["id"]
