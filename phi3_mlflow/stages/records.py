"""What the steps whose output lives in MLflow leave for the steps after them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from phi3_mlflow.artifacts.records import Record
from phi3_mlflow.tracking.registry import VersionName


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class LoggedModel(_Frozen):
    """A model in MLflow.

    Attributes:
        flavor: onnx or transformers.
        model_id: MLflow's, `m-...`.
        model_uri: how it is loaded.
        tags: that the version will carry.
    """

    flavor: str
    model_id: str
    model_uri: str
    tags: dict[str, str]


class LoggedModels(Record):
    """What `log` left: one model per flavor."""

    models: tuple[LoggedModel, ...]


class RegisteredVersion(_Frozen):
    """A version of a registered model."""

    name: str
    version: str
    flavor: str

    @property
    def version_name(self) -> VersionName:
        """The version as the registry knows it."""
        return VersionName(self.name, self.version)


class RegisteredVersions(Record):
    """What `register` left: one version per flavor."""

    versions: tuple[RegisteredVersion, ...]

    @property
    def challenger(self) -> VersionName:
        """The version that may become champion: the ONNX one where there are two."""
        onnx = (version for version in self.versions if version.flavor == "onnx")
        return next(onnx, self.versions[0]).version_name

    @property
    def challenger_first(self) -> tuple[VersionName, ...]:
        """All versions, the one that may become champion first."""
        names = [version.version_name for version in self.versions]
        return tuple(sorted(names, key=lambda name: name != self.challenger))


class Sample(_Frozen):
    """A question and what the model answered, to be shown."""

    question: str
    answer: str


class CheckRecord(_Frozen):
    """A threshold that was checked, and the sentence about it."""

    passed: bool
    reason: str


class ComparisonRecord(_Frozen):
    """A metric that was compared with the champion's, and the sentence about it."""

    state: str
    reason: str


class VerdictRecord(_Frozen):
    """What the gate decided; see `evaluation.gate.Verdict`.

    Attributes:
        gate: passed, failed, or not gated.
        passed: whether the thresholds are met and nothing is worse than allowed.
        decision: promote, keep or refuse.
        why: the decision in a sentence.
        against: the URI of the champion it was compared with.
        checks: one per threshold.
        comparisons: one per metric compared with another model's.
        reasons: what speaks against the version.
    """

    gate: str
    passed: bool
    decision: str
    why: str
    against: str | None
    checks: tuple[CheckRecord, ...]
    comparisons: tuple[ComparisonRecord, ...]
    reasons: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """The verdict in a line: gate, decision and why."""
        if self.why.startswith(self.gate):
            return self.why
        return f"{self.gate}, {self.decision}: {self.why}"

    @property
    def explained(self) -> str:
        """What speaks against the version, a line per reason; the decision when nothing does."""
        return "\n".join(self.reasons) or self.why


class EvaluatedVersion(_Frozen):
    """What was measured of a version, the verdict, and an answer of it."""

    metrics: dict[str, float]
    verdict: VerdictRecord
    sample: Sample


class EvaluationRecord(Record):
    """What `evaluate` left.

    Attributes:
        run_id: of the MLflow run that holds the figures.
        versions: by URI, the challenger first.
        hardware: what was measured on.
        texts_sha256: of the held-out texts.
    """

    run_id: str
    versions: dict[str, EvaluatedVersion]
    hardware: str
    texts_sha256: str

    @property
    def challenger(self) -> EvaluatedVersion:
        """The version that may become champion."""
        return next(iter(self.versions.values()))


class PromotionRecord(Record):
    """What `promote` left: URIs and version numbers, and why."""

    champion: str
    before: str | None
    moved: bool
    reason: str


class CandidateRecord(Record):
    """What was measured of one quantization that `search` has tried; see `CandidateMetrics`."""

    kl_mean: float
    top1_agreement: float
    perplexity: float
    data_bytes: int
    tokens_per_second: float


class CandidateRow(_Frozen):
    """A candidate in the table of a search; without metrics when it failed."""

    candidate: str
    algorithm: str
    within_budget: bool
    on_front: bool
    reasons: str
    kl_mean: float | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    data_bytes: float | None = None
    tokens_per_second: float | None = None


class SearchRecord(Record):
    """What `search` left: the name of the best candidate, and the table of all."""

    best: str
    candidates: tuple[CandidateRow, ...]


class ReproductionRecord(Record):
    """What `reproduce` found when it made a version again.

    Attributes:
        version: its URI.
        same: whether the bytes are the same.
        artifact_sha256: `registered` and `made_again`.
        differences: one line per file that differs.
        code: `commit` that ran, and a `note` when that is not the version's own.
        libraries_changed: one line per library with another version than then.
        recipe: of the version.
    """

    version: str
    same: bool
    artifact_sha256: dict[str, str]
    differences: tuple[str, ...]
    code: dict[str, str]
    libraries_changed: tuple[str, ...]
    recipe: dict[str, Any]
