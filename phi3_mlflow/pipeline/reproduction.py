"""Make a registered version's artifact again from its recipe, in a cache of its own.

The steps run as scripts of the commit that made the version, each a process with an MLflow run of
its own, so that nothing of this process or of the usual cache can slip in.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.artifacts.manifests import Manifest, sha256_of_file
from phi3_mlflow.artifacts.provenance import content_manifest
from phi3_mlflow.core.errors import EnvironmentProblem, StepFailed, UserError, problem_list
from phi3_mlflow.core.git import DIRTY, Origin, git
from phi3_mlflow.core.shipped import PACKAGE, in_project, shipped
from phi3_mlflow.rows.location import is_uri
from phi3_mlflow.tracking.row_sources import local_rows
from phi3_mlflow.training.row_files import row_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from phi3_mlflow.pipeline.recipe import Recipe, Rows

_CALIBRATION = "calibration.jsonl"  # the project's own, in whatever commit


@dataclass(frozen=True)
class Code:
    """The project's code that makes the artifact again.

    Attributes:
        root: the checkout it is in; None for the installed package that runs.
        commit: which commit that is.
        note: why it is not the version's own, or empty.
        present: whether it is the code that runs.
    """

    root: Path | None
    commit: str
    note: str = ""
    present: bool = True

    @property
    def calibration(self) -> Path:
        """The calibration texts that come with it."""
        data = shipped("data") if self.root is None else self.root / "data"
        return data / _CALIBRATION

    def command(self, step: str) -> list[str]:
        """How a step of it is run; options follow."""
        if self.root is None:
            return [sys.executable, "-m", PACKAGE.name, step]
        return [sys.executable, "-m", f"steps.{step}"]

    @property
    def environment(self) -> dict[str, str]:
        """What makes Python take it, and not the present code in the working folder, perhaps."""
        path = {} if self.root is None else {"PYTHONPATH": str(self.root)}
        return {**path, "PYTHONSAFEPATH": "1"}


def code_at(commit: str, root: Path | None, present: Origin, place: Path) -> Code:
    """The code of a commit: the present one when it is that, otherwise checked out elsewhere.

    Args:
        commit: as the version's tag has it, `-dirty` when there were changes that it lacks.
        root: the checkout that the present code is in; None when it is an installed package.
        present: the code that runs.
        place: a folder to check the other one out into; it does not exist yet.
    """
    if commit == present.commit and not commit.endswith(DIRTY):
        return Code(root, commit)
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        why = "had changes that were not committed" if commit.endswith(DIRTY) else "is not known"
        note = f"the version's code ({commit}) {why}: the present code ran"
        return Code(root, present.commit, note)
    # `mlflow run GIT_URL` clones a single commit; where that came from has the others.
    for origin in (str(root) if root else None, present.url):
        if origin and _check_out(origin, commit, place):
            return Code(place, commit, present=False)
    where = root or "the installed package"
    return Code(
        root,
        present.commit,
        f"commit {commit} is neither in {where} nor where that came from: the present code ran",
    )


def _check_out(origin: str, commit: str, place: Path) -> bool:
    place.mkdir(exist_ok=True)
    return all(
        git(place, *command) is not None
        for command in (
            ("init", "--quiet"),
            ("fetch", "--quiet", "--depth", "1", origin, commit),
            ("checkout", "--quiet", "--detach", "FETCH_HEAD"),
        )
    )


def write_profile(recipe: Recipe, code: Code, folder: Path, data: Path | None = None) -> Path:
    """Write the recipe's profile as a file.

    Args:
        recipe: of the version.
        code: which code will run.
        folder: to write into.
        data: where the rows are that it was trained on, if not where they were.

    Raises:
        UserError: the calibration texts, or the rows, are no longer what they were.
    """
    content = dict(recipe.profile)
    if recipe.rows:
        found = find_rows(recipe, code, folder, data)
        content["train"] = {**content["train"], **{k: str(place) for k, place in found.items()}}
        if code.present:
            # A recipe that names no engine is of a time when there was one.
            content["train"].setdefault("engine", "memory")
    elif data is not None:
        raise UserError("parameter: data: the version was not fine-tuned; leave data out")
    if recipe.calibration_sha256 is not None:
        named = content.get("quantization", {}).get("calibration")
        texts = Path(named) if named else code.calibration
        if not texts.is_file() or sha256_of_file(texts) != recipe.calibration_sha256:
            raise UserError(
                f"the calibration texts that the version was made with are not in {texts}: a file "
                f"with sha256 {recipe.calibration_sha256} is needed there"
            )
    file = folder / f"{content['name']}.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), "utf-8")
    return file


def find_rows(recipe: Recipe, code: Code, folder: Path, data: Path | None) -> dict[str, Path]:
    """The rows that a version was trained and validated with, by the key in the section `train`.

    Args:
        recipe: of the version.
        code: which code will run; rows that come with the project are those of its commit.
        folder: where those of several files are put together: the folder that they were in may
            have got more files since.
        data: where the training rows are, if not where they were. Validation rows that are no
            longer where they were are looked for beside them, under their own name.

    Raises:
        UserError: they are not there, or are others; names the hashes that are needed.
    """
    found, problems = {}, []
    for key, rows in recipe.rows.items():
        if data is not None and key == "data":
            places = [data]
        else:
            places = _places(rows.place, code)
            if data is not None and places:
                places.append(data.parent / places[0].name)
        usable = (_with_hashes(place, rows, folder / "rows" / key) for place in places)
        if place := next(filter(None, usable), None):
            found[key] = place
        else:
            problems.append(_missing(key, rows, places))
    if problems:
        raise UserError(
            problem_list(
                "The rows that the version was fine-tuned with are needed",
                problems,
                "They are not kept with the version: say where they are with -P data=PLACE (a "
                "file or folder; validation rows are looked for beside it too).",
            )
        )
    return found


def _places(named: str | None, code: Code) -> list[Path]:
    """Where what a version names for its rows may be had."""
    if named is None:
        return []
    if is_uri(named):
        try:
            return [local_rows(named)]
        except UserError:  # all that is missing is told together
            return []
    # Files that were added to the project's own rows are in the checkout alone.
    return list(dict.fromkeys((in_project(named, code.root), in_project(named, None))))


def _with_hashes(place: Path, rows: Rows, folder: Path) -> Path | None:
    """Where rows with the hashes of the recipe are, given a place to look at."""
    try:
        if not rows.files:
            return place.absolute() if row_files(place).digest == rows.sha256 else None
        there = dict(zip((given := row_files(place)).hashes, given.paths, strict=True))
        if any(given.hashes.get(name) != sha256 for name, sha256 in rows.files.items()):
            return None
    except UserError:
        return None
    for name in rows.files:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(there[name].absolute())
    return folder / "**" / "*" if any("/" in name for name in rows.files) else folder


def _missing(key: str, rows: Rows, places: list[Path]) -> str:
    where = " or ".join(str(place) for place in places) or "no place that the version names"
    if not rows.files:
        return f"train.{key}: sha256 {rows.sha256}; not in {where}"
    files = ", ".join(f"{name} (sha256 {sha256})" for name, sha256 in rows.files.items())
    return f"train.{key}: {files}; not all of it in {where}"


def rebuild(
    flavor: str,
    profile: Path,
    code: Code,
    cache: Path,
    open_run: Callable[[str], str],
    close_run: Callable[[str, str], None],
) -> Manifest:
    """Run the steps that make the artifact, from the source, in a cache with nothing in it.

    Args:
        flavor: of the version, onnx or transformers.
        profile: the recipe's profile.
        code: which code runs.
        cache: an empty folder.
        open_run: makes an MLflow run for a step and gives its id.
        close_run: is told a step's run and FAILED or KILLED, in case it could not say so itself.

    Returns:
        The files of the artifact.

    Raises:
        StepFailed: a step ended badly; it has said why.
    """
    content = yaml.safe_load(profile.read_text("utf-8"))
    steps = ["fetch", "train"] if content.get("train") else ["fetch"]
    if flavor == "onnx":
        steps += ["quantize", "export"] if content["precision"] == "int4" else ["export"]
    for step in steps:
        run_id = open_run(step)
        try:
            returncode = _run_step(step, profile, code, cache, run_id)
        except BaseException:
            close_run(run_id, "KILLED")
            raise
        if returncode != 0:
            close_run(run_id, "FAILED" if returncode > 0 else "KILLED")
            raise StepFailed(step, returncode if returncode > 0 else 1)
    entry = StepCache(cache).latest(content["name"], steps[-1])
    if entry is None:
        raise EnvironmentProblem(f"step {steps[-1]} ended well and left nothing in {cache}")
    return content_manifest(entry.path)


def _run_step(step: str, profile: Path, code: Code, cache: Path, run_id: str) -> int:
    environment = (
        os.environ | {"PHI3_MLFLOW_CACHE": str(cache), "MLFLOW_RUN_ID": run_id} | code.environment
    )
    command = [*code.command(step), "--profile", str(profile)]
    # In this working folder: a tracking store may be named relative to it.
    process = subprocess.Popen(command, env=environment)
    try:
        return process.wait()
    finally:
        if process.poll() is None:  # stopped from outside: the step has to stop first
            process.terminate()
            process.wait()


def changed_libraries(recipe: Recipe, now: Mapping[str, str]) -> list[str]:
    """The libraries whose versions are not those of the recipe."""
    return [
        f"{name} {before} -> {now.get(name, 'not installed')}"
        for name, before in sorted(recipe.libraries.items())
        if now.get(name) != before
    ]
