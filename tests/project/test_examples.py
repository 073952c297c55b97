"""The files of examples/ have the form that their readers want, and name what exists."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from phi3_mlflow.config.loading import load_profile

CRON_RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
QUANTITY = re.compile(r"[1-9][0-9]*(m|Ki|Mi|Gi|Ti)?")


@pytest.fixture(scope="module")
def examples(root) -> Path:
    return root / "examples"


@pytest.fixture(scope="module")
def main_parameters(root) -> set[str]:
    content = yaml.safe_load((root / "MLproject").read_text(encoding="utf-8"))
    return set(content["entry_points"]["main"]["parameters"])


def read_yaml(path: Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def check_cron_field(field: str, low: int, high: int) -> None:
    """One of cron's five fields: ``*``, numbers, ranges, steps and lists of them."""
    for part in field.split(","):
        match = re.fullmatch(r"(\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?", part)
        assert match, f"not a cron field: {field}"
        numbers = [int(n) for n in match.group(2, 3) if n is not None]
        assert all(low <= n <= high for n in numbers), f"{field} is outside {low}-{high}"
        assert numbers == sorted(numbers), f"{field} runs backwards"


def check_cron(expression: str) -> None:
    fields = expression.split()
    assert len(fields) == 5, f"five fields, found {len(fields)}: {expression}"
    for field, (low, high) in zip(fields, CRON_RANGES, strict=True):
        check_cron_field(field, low, high)


def check_mlflow_run(words: list[str], main_parameters: set[str]) -> dict[str, str]:
    """A command line of `mlflow run` from git: MLflow's own options, main's parameters."""
    import click
    from mlflow.cli import cli

    assert words[0].rpartition("/")[2] == "mlflow"
    assert words[1] == "run"
    command = cli.commands["run"]
    context = click.Context(command)
    options, _, _ = command.make_parser(context).parse_args(list(words[2:]))
    given = dict(text.split("=", 1) for text in options["param_list"])
    assert set(given) <= main_parameters
    # One of these names a short hash or a branch otherwise.
    assert re.fullmatch(r"v\d+\.\d+\.\d+|\$VERSION", options["version"])
    assert options["env_manager"] in ("uv", "local", "conda", "virtualenv")
    return given


def check_retrains(given: dict[str, str]) -> None:
    """The parameters name a profile that trains, and a folder that outlives the run."""
    assert load_profile(given["profile"]).train is not None
    assert given["data"].startswith("/")


@pytest.mark.parametrize(
    "wrong", ["60 * * * *", "* 24 * * *", "* * 0 * *", "5-1 * * * *", "* * * *", "*/0 * * * *", "x"]
)
def test_the_cron_check_refuses(wrong):
    with pytest.raises(AssertionError):
        check_cron(wrong if " " in wrong else f"{wrong} * * * *")


def test_crontab(examples, main_parameters):
    text = (examples / "cron" / "phi3-mlflow.crontab").read_text(encoding="utf-8")
    assert text.endswith("\n"), "cron ignores a last line without its end"
    settings, jobs = {}, []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.match(r"([A-Z0-9_]+)=(.*)$", line)
        if match:
            settings[match.group(1)] = match.group(2)
        else:
            jobs.append(line)
    assert {"PATH", "SHELL", "MLFLOW_TRACKING_URI", "PHI3_MLFLOW_CACHE"} <= set(settings)
    assert "$" not in "".join(settings.values()), "cron expands nothing in a setting"
    (job,) = jobs
    *fields, command = job.split(maxsplit=5)
    check_cron(" ".join(fields))
    assert not re.search(r"(?<!\\)%", command), "cron takes a bare % for a line end"
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    words = shlex.split(command)
    assert words[0] == "flock"
    start = words.index("mlflow")
    assert [w for w in words[1:start] if not w.startswith("-")][-1].endswith(".lock")
    given = check_mlflow_run(words[start:], main_parameters)
    assert given["quiet"] == "true"
    check_retrains(given)
    assert {w[1:] for w in words if re.fullmatch(r"\$[A-Z]+", w)} <= set(settings)


def unit(path: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text(encoding="utf-8"))
    return parser


def test_systemd_units(examples, main_parameters):
    folder = examples / "systemd"
    service, timer = unit(folder / "phi3-mlflow.service"), unit(folder / "phi3-mlflow.timer")
    assert set(service.sections()) == {"Unit", "Service"}
    assert service["Service"]["Type"] == "oneshot"
    given = check_mlflow_run(shlex.split(service["Service"]["ExecStart"]), main_parameters)
    assert given["quiet"] == "true"
    check_retrains(given)
    assert service["Service"]["ReadOnlyPaths"] == given["data"]
    assert set(timer.sections()) == {"Unit", "Timer", "Install"}
    assert timer["Timer"]["OnCalendar"]
    assert timer["Install"]["WantedBy"] == "timers.target"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_units(examples, tmp_path):
    for source in (examples / "systemd").iterdir():
        # The program of the example is not installed here; any other that exists will do.
        text = source.read_text(encoding="utf-8")
        text = text.replace("/opt/phi3-mlflow/venv/bin/mlflow", sys.executable)
        (tmp_path / source.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "phi3-mlflow.timer"),
         str(tmp_path / "phi3-mlflow.service")],
        capture_output=True, text=True,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "phi3-mlflow" in line]
    assert not complaints
    assert done.returncode == 0, done.stderr
    calendar = unit(examples / "systemd" / "phi3-mlflow.timer")["Timer"]["OnCalendar"]
    subprocess.run(["systemd-analyze", "calendar", calendar], check=True, capture_output=True)


def test_github_workflow(examples, main_parameters):
    content = read_yaml(examples / "github-actions" / "scheduled.yml")
    # YAML 1.1 reads the key `on` as true.
    triggers = content.pop(True)
    assert set(content) == {"name", "permissions", "concurrency", "jobs"}
    assert content["permissions"] == {"contents": "read"}
    for entry in triggers["schedule"]:
        check_cron(entry["cron"])
    assert set(triggers["workflow_dispatch"]["inputs"]) <= main_parameters
    (job,) = content["jobs"].values()
    assert isinstance(job["timeout-minutes"], int)
    assert job["runs-on"]
    for name, value in job["env"].items():
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*", name)
        assert isinstance(value, str)
        if "PASSWORD" in name:
            assert value.startswith("${{ secrets.")
    commands = []
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|[0-9a-f]{40})", step["uses"])
        else:
            # What an attacker can choose must come in as a variable, never as text of the script.
            assert "${{" not in step["run"]
            assert subprocess.run(["bash", "-n", "-c", step["run"]]).returncode == 0
            commands.append(shlex.split(step["run"]))
    install, run = commands
    given = check_mlflow_run(run, main_parameters)
    assert triggers["push"]["paths"] == ["rows/**"]
    assert given["data"] == "$GITHUB_WORKSPACE/rows"
    check_retrains({"profile": triggers["workflow_dispatch"]["inputs"]["profile"]["default"],
                    "data": "/rows"})  # fmt: skip
    assert install[:4] == ["python", "-m", "pip", "install"]


def test_installed_versions_are_the_locked_ones(examples, root):
    """mlflow and uv as the examples install them are those of the closure."""
    locked = {}
    for name in ("constraints.txt", "constraints-dev.txt"):
        text = (root / "requirements" / name).read_text(encoding="utf-8")
        locked.update(line.split("==") for line in text.splitlines() if "==" in line)
    workflow = (examples / "github-actions" / "scheduled.yml").read_text(encoding="utf-8")
    job = (examples / "databricks" / "job.json").read_text(encoding="utf-8")
    for text in (workflow, job):
        found = dict(re.findall(r"\b(mlflow|uv)==([\d.]+)", text))
        assert found == {"mlflow": locked["mlflow"], "uv": locked["uv"]}


def check_pod(spec: dict) -> dict:
    """A job's pod: restart policy, one container, limits, and volumes that exist. Returns it."""
    assert spec["restartPolicy"] in ("Never", "OnFailure")
    assert spec["securityContext"]["runAsNonRoot"] is True
    (container,) = spec["containers"]
    for variable in container["env"]:
        assert isinstance(variable["value"], str), "numbers and booleans are refused here"
    for kind in ("requests", "limits"):
        for amount in container["resources"][kind].values():
            assert QUANTITY.fullmatch(amount)
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert all(DNS_LABEL.fullmatch(name) for name in volumes)
    return container


def test_kubernetes_cronjob(examples, main_parameters):
    text = (examples / "kubernetes" / "cronjob.yaml").read_text(encoding="utf-8")
    claim, job = yaml.safe_load_all(text)
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert QUANTITY.fullmatch(claim["spec"]["resources"]["requests"]["storage"])
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    for thing in (claim, job):
        assert DNS_LABEL.fullmatch(thing["metadata"]["name"])
        assert thing["metadata"]["namespace"] == job["metadata"]["namespace"]
    # A CronJob's name is the stem of its jobs' names, which end in 11 characters more.
    assert len(job["metadata"]["name"]) <= 52
    spec = job["spec"]
    check_cron(spec["schedule"])
    assert spec["concurrencyPolicy"] in ("Allow", "Forbid", "Replace")
    assert set(spec["jobTemplate"]) == {"spec"}
    assert isinstance(spec["jobTemplate"]["spec"]["backoffLimit"], int)
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    container = check_pod(pod)
    assert container["image"].partition(":")[2] not in ("", "latest")
    words = container["command"] + container["args"]
    assert all(isinstance(word, str) for word in words)
    given = check_mlflow_run(words, main_parameters)
    check_retrains(given)
    cache, rows = pod["volumes"]
    assert cache["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (mount,) = (m for m in container["volumeMounts"] if m["name"] == rows["name"])
    assert (mount["mountPath"], mount["readOnly"]) == (given["data"], True)


def test_kubernetes_project_is_main_in_an_image(examples, root):
    from mlflow.projects._project_spec import load_project
    from mlflow.projects.docker import validate_docker_env

    project = load_project(str(examples / "kubernetes"))
    validate_docker_env(project)
    ours, theirs = load_project(str(root)).get_entry_point("main"), project.get_entry_point("main")
    assert theirs.command.split() == ours.command.split()
    assert {n: p.default for n, p in theirs.parameters.items()} == {
        n: p.default for n, p in ours.parameters.items()
    }
    cronjob = (examples / "kubernetes" / "cronjob.yaml").read_text(encoding="utf-8")
    assert f"image: {project.docker_env['image']}\n" in cronjob


def test_mlflow_makes_a_job_of_the_backend_config(examples, root, monkeypatch):
    """MLflow's own code reads the configuration; only the client for the cluster is not here."""
    client = types.ModuleType("kubernetes")
    config = types.ModuleType("kubernetes.config")
    exceptions = types.ModuleType("kubernetes.config.config_exception")
    exceptions.ConfigException = Exception  # type: ignore[attr-defined]
    for module in (client, config, exceptions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("KUBE_MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(root)
    from mlflow.projects import _parse_kubernetes_config
    from mlflow.projects import kubernetes as backend

    given = json.loads((examples / "kubernetes" / "backend-config.json").read_text())
    parsed = _parse_kubernetes_config(given)
    job = backend._get_kubernetes_job_definition(
        "phi3-mlflow",
        parsed["repository-uri"],
        "sha256:0",
        backend._get_run_command(["python -m steps.main --profile smollm2-135m"]),
        {"MLFLOW_RUN_ID": "r"},
        parsed["kube-job-template"],
    )
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert DNS_LABEL.fullmatch(job["metadata"]["name"])
    container = check_pod(job["spec"]["template"]["spec"])
    assert container["name"] == "phi3-mlflow"
    assert container["image"] == f"{given['repository-uri']}@sha256:0"
    assert container["command"][:3] == ["python", "-m", "steps.main"]
    assert {"name": "MLFLOW_RUN_ID", "value": "r"} in container["env"]
    assert {"name": "PHI3_MLFLOW_CACHE", "value": "/cache"} in container["env"]


def test_dockerfile(examples, root):
    text = (examples / "kubernetes" / "Dockerfile").read_text(encoding="utf-8")
    joined = re.sub(r"(?m)^#.*\n", "", text).replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.strip()]
    words = [line.split()[0] for line in lines]
    assert words[0] == "FROM"
    assert lines[0].split()[1].startswith("python:3.11")
    assert set(words) <= {"FROM", "RUN", "ARG", "WORKDIR", "COPY", "USER", "ENV", "CMD"}
    assert words.count("CMD") == 1
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (root / source).exists(), source
        if line.startswith("RUN"):
            assert subprocess.run(["sh", "-n", "-c", line[4:]]).returncode == 0
    ignored = (root / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".venv", "mlruns", "mlflow.db*"} <= set(ignored)


def test_databricks_reads_the_job(examples, root, main_parameters):
    from databricks.sdk.service.jobs import JobSettings

    content = json.loads((examples / "databricks" / "job.json").read_text(encoding="utf-8"))
    job = JobSettings.from_dict(content)
    assert job.as_dict() == content, "the Jobs API knows no such key, or not with this type"
    assert job.schedule is not None
    seconds, *fields = job.schedule.quartz_cron_expression.split()
    assert re.fullmatch(r"[0-5]?\d", seconds)
    # Quartz marks the unused one of its two day fields with a question mark.
    assert fields.count("?") == 1
    check_cron(" ".join(fields).replace("?", "*"))
    (task,) = job.tasks or []
    (cluster,) = job.job_clusters or []
    assert task.job_cluster_key == cluster.job_cluster_key
    assert task.spark_python_task is not None
    assert (root / task.spark_python_task.python_file).is_file()
    url, version, _, *given = task.spark_python_task.parameters or []
    assert job.git_source is not None
    assert (url, version) == (job.git_source.git_url, job.git_source.git_tag)
    values = dict(text.split("=", 1) for text in given)
    assert set(values) <= main_parameters
    check_retrains(values)


@pytest.mark.parametrize(
    "arguments", [[], ["url", "v1", "/e", "noequals"], ["url", "v1", "/e", "=x"]]
)
def test_databricks_task_says_what_it_wants(examples, arguments):
    script = examples / "databricks" / "run_project.py"
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "NAME=VALUE" in done.stderr


def test_every_example_is_documented(examples, root):
    documents = [root / "docs" / "scheduling.md", root / "docs" / "training.md"]
    text = "\n".join(document.read_text(encoding="utf-8") for document in documents)
    linked = set(re.findall(r"\]\(\.\./examples/([^)]+)\)", text))
    files = {str(p.relative_to(examples)) for p in examples.rglob("*") if p.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {name for name in linked if name not in files} == set()
    assert {name.split("/")[0] for name in files} == {name.split("/")[0] for name in linked}
