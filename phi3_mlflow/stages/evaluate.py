"""Measure versions against the full-precision checkpoint, and say whether they pass the gate.

    mlflow run . --env-manager local -e evaluate -P profile=smollm2-135m
    python -m steps.evaluate --profile smollm2-135m --version 3 --size full
    python -m steps.evaluate --questions mine.csv

Measured: perplexity, KL divergence and top-1 agreement on held-out text, the share of questions
answered right, speed, memory; of a fine-tuned version also its task, on the rows that training set
aside, next to the base before training. The profile's thresholds and the comparison with the
champion, on the same questions and texts, decide. The version gets the tag `gate` and the reasons;
the run the figures, every answer, the verdict as JSON and JUnit XML, and report.html, which needs
no network.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.inputs import Folder, Input
from phi3_mlflow.artifacts.provenance import content_digest, read_provenance
from phi3_mlflow.config.parameters import AUTO, Request
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.evaluation import datasets
from phi3_mlflow.evaluation.load import measured_while, unsound
from phi3_mlflow.evaluation.metrics import HEADLINE
from phi3_mlflow.evaluation.result import TEXTS_TAG, ModelFacts
from phi3_mlflow.evaluation.sets import Sets, set_name
from phi3_mlflow.pipeline.inputs import (
    CHECKPOINT,
    folder_input,
    full_precision,
    preceding_output,
)
from phi3_mlflow.pipeline.step import Settings, Step, Work, step_parameters
from phi3_mlflow.stages.card import model_card
from phi3_mlflow.stages.records import EvaluatedVersion, EvaluationRecord, RegisteredVersions
from phi3_mlflow.tracking import registry, runs
from phi3_mlflow.tracking.connection import tracking_identity
from phi3_mlflow.tracking.registry import VersionName
from phi3_mlflow.tracking.stored_files import refuse_damaged
from phi3_mlflow.trust.attestations import sign_verdict
from phi3_mlflow.trust.bom import BOM_NAME, with_figures
from phi3_mlflow.trust.policy import refuse_untrusted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from phi3_mlflow.artifacts.cache import Entry, StepCache
    from phi3_mlflow.config.profile import Profile

Versions = tuple[VersionName, ...]

SPEED_TAG = "speed_measured"
"""The tag of a version that says beside what its speeds were measured."""


@dataclass(frozen=True)
class EvaluateInputs:
    """The versions, the champions they are compared with, and what they were made from.

    Attributes:
        version: that are measured.
        champion: that they are compared with.
        checkpoint: the full-precision checkpoint they were made from.
        base: what that was fine-tuned from, if it was.
    """

    version: Input[Versions]
    champion: Input[Versions]
    checkpoint: Folder
    base: Folder | None


class Evaluate(Step[EvaluateInputs, EvaluationRecord]):
    """Version to verdict."""

    name = "evaluate"
    doing = "measuring the version against full precision"
    parameters = step_parameters(
        "version", "checkpoint", "base", "flavor", "registered_model", "size", "questions"
    )
    record_type = EvaluationRecord
    in_mlflow = True

    def inputs(self, request: Request, cache: StepCache) -> EvaluateInputs:
        reference = full_precision(request, cache)
        versions = _versions(request, cache)
        for version in versions:
            refuse_damaged(version.uri)
        champions = [registry.champion_to_beat(version) for version in versions]
        return EvaluateInputs(
            _input(versions),
            _input([champion for champion in champions if champion]),
            reference,
            _base(request, cache, reference),
        )

    def settings(self, request: Request) -> Settings:
        profile = request.profile
        gate = profile.gate.model_dump(mode="json", exclude_none=True)
        judge = profile.evaluation.judge
        return {
            "window": profile.window,
            "judge": judge.model_dump(mode="json") if judge else {},
            **load_sets(profile).digests(),
            "gated": not profile.gate.off,
            "thresholds": gate["thresholds"],
            "champion_margins": gate["champion"],
            "trained_margins": gate["trained"],
            "reference_answers": profile.evaluation.reference_answers,
            "batch": profile.evaluation.batch,
            "task_check": profile.evaluation.task_check,
            "task_rows": profile.evaluation.task_rows,
            "tracking": tracking_identity(),
        }

    def work(self, work: Work[EvaluateInputs]) -> None:
        import mlflow

        from phi3_mlflow.evaluation.evaluate import Checkpoint, Evaluator
        from phi3_mlflow.evaluation.hardware import hardware
        from phi3_mlflow.evaluation.judge import check_judge
        from phi3_mlflow.evaluation.task import read_task

        profile = work.request.profile
        for version in (*work.inputs.version.value, *work.inputs.champion.value):
            refuse_untrusted(version.uri, profile.trust)
        check_judge(profile.evaluation.judge)
        inputs, chosen = work.inputs, profile.evaluation
        sets = load_sets(profile)
        if inputs.base is not None:
            task = read_task(inputs.checkpoint.value, chosen.task_check, chosen.task_rows)
            sets = replace(sets, task=task)
        evaluator = Evaluator(
            facts=model_facts(profile),
            settings=profile.evaluation.model_copy(update={"window": profile.window}),
            gate=profile.gate,
            reference=Checkpoint(inputs.checkpoint.value, inputs.checkpoint.digest),
            base=Checkpoint(inputs.base.value, inputs.base.digest) if inputs.base else None,
            sets=sets,
            store=work.cache,
            fresh=work.request.flag("force"),
        )
        versions = {}
        for version in work.inputs.version.value:
            console.say(f"  {version.uri}")
            result = evaluator.evaluate(version, work.out / version.version)
            evaluated = EvaluatedVersion.model_validate(result.record())
            versions[version.uri] = evaluated
            write_materials(version, headline_metrics(evaluated), work.out / version.version)
            for name, plot in result.plots.items():
                mlflow.log_figure(plot, f"figures/version-{version.version}/{name}.png")
            if not work.metrics:
                work.metrics.update(result.measurement.metrics)
        EvaluationRecord(
            run_id=work.run.run_id,
            versions=versions,
            hardware=hardware(),
            texts_sha256=sets.digests()["texts_sha256"],
        ).write(work.out)
        work.run.log_evaluation(work.out, sets.logged())

    def run_name(self, request: Request, inputs: EvaluateInputs) -> str:
        numbers = " ".join(f"v{version.version}" for version in inputs.version.value)
        return f"{self.name} {numbers}"

    def told(self, entry: Entry) -> Mapping[str, str]:
        versions = self.record_of(entry).versions.items()
        said = {uri: f"{one.verdict.gate}, {one.verdict.decision}" for uri, one in versions}
        return {"version": " ".join(said), "gate": "; ".join(said.values())}

    def after(self, request: Request, entry: Entry) -> None:
        """Say the verdict, mark the versions with it, and sign it where the profile says so."""
        record = self.record_of(entry)
        for uri, result in record.versions.items():
            version = registry.find_version(uri, request.profile.registered_model)
            verdict = result.verdict
            console.say(f"  {uri}: gate: {verdict.told}")
            measured = measured_while(result.metrics)
            told = {SPEED_TAG} & registry.describe(version).tags.keys()
            if disturbed := unsound(result.metrics):
                console.say(f"  its speed was {disturbed}, and is not on its card")
            console.say(f"  report: {report_file(entry, uri)}")
            registry.set_tags(
                version,
                {
                    "gate": verdict.gate,
                    "gate_decision": verdict.decision,
                    "gate_reasons": verdict.explained,
                    registry.GATE_AGAINST: registry.number_of(verdict.against),
                    "evaluation_run": record.run_id,
                    TEXTS_TAG: record.texts_sha256,
                    **({SPEED_TAG: measured} if measured or told else {}),
                    **{key: _plain(value) for key, value in headline_metrics(result).items()},
                },
            )
            tags = registry.describe(version).tags
            figures = headline_metrics(result)
            report = runs.artifact_link(record.run_id, f"evaluation/{version.version}/report.html")
            profile, hardware = request.profile, record.hardware
            card = model_card(profile, tags, figures, hardware, uri, report, disturbed)
            registry.set_description(version, card)
            signs = request.profile.trust.sign_with
            if signs is not None and sign_verdict(version, signs):
                console.say(f"  signed the verdict on {uri}")


def write_materials(version: VersionName, figures: Mapping[str, float], folder: Path) -> None:
    """Put the bill of materials of a version, with its figures, beside its report.

    The one that lies with the model was written before anything was measured. Models that were
    logged before there was one have none here either.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as temporary, suppress(MlflowException, OSError):
        file = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{version.uri}/{BOM_NAME}", dst_path=temporary
        )
        if text := with_figures(Path(file).read_text("utf-8"), figures):
            (folder / BOM_NAME).write_text(text, "utf-8")


def _input(versions: Sequence[VersionName]) -> Input[Versions]:
    digest = " ".join(f"{version.uri}#{registry.content(version)}" for version in versions)
    return Input(tuple(versions), digest, " ".join(version.uri for version in versions))


def _base(request: Request, cache: StepCache, reference: Folder) -> Folder | None:
    """What a fine-tuned checkpoint was made from; None of one that was not fine-tuned.

    Raises:
        UserError: it is another checkpoint than the one that was trained.
    """
    known = read_provenance(reference.value)
    if "adapter_sha256" not in known:
        return None
    base = folder_input(request, cache, "base", "fetch", CHECKPOINT)
    wanted = known.get("base_checkpoint_sha256")
    found = read_provenance(base.value).get("checkpoint_sha256") or content_digest(base.value)
    if wanted != found:
        raise UserError(
            f"parameter: base: {base.shown} is not what the fine-tuned checkpoint was trained "
            f"from: its sha256 is {found}, and training began with {wanted}. Name that checkpoint "
            "with -P base=FOLDER, or train again."
        )
    return base


def _versions(request: Request, cache: StepCache) -> Versions:
    """The named versions; `auto` is the challenger, or all of `register`'s for flavor both."""
    if (registered := request.handed("version", RegisteredVersions)) is not None:
        return registered.challenger_first
    name = request.profile.registered_model
    if not request.is_auto("version"):
        texts = request.value("version").replace(",", " ").split()
        return tuple(registry.find_version(text, name) for text in texts)
    if request.profile.flavor != "both":
        return (registry.find_version(AUTO, name),)
    entry = preceding_output(request, cache, "version", "register", in_mlflow=True)
    return tuple(v.version_name for v in RegisteredVersions.read(entry.path).versions)


def load_sets(profile: Profile) -> Sets:
    """What the profile's model is measured on.

    Long prompts take minutes: they are asked in size full only, and not with a user's own
    questions.
    """
    chosen = profile.evaluation
    quick = chosen.size == "quick"
    own_questions = None if chosen.questions == AUTO else chosen.questions
    own_texts = None if chosen.texts == AUTO else chosen.texts
    return Sets(
        datasets.load_questions(own_questions, quick=quick),
        datasets.load_heldout(own_texts, quick=quick),
        [] if quick or own_questions else datasets.load_needles(),
        profile.runtime.max_context or profile.context_length,
        questions_name="questions" if own_questions is None else set_name(str(own_questions)),
        texts_name="held-out texts" if own_texts is None else set_name(str(own_texts)),
    )


def model_facts(profile: Profile) -> ModelFacts:
    """What the report says of the model."""
    return ModelFacts(
        description=profile.description,
        base_model=profile.base_model,
        source=profile.origin,
        precision=profile.precision,
    )


def report_file(entry: Entry, uri: str) -> Path:
    """Where the report on a version is, in what `evaluate` left in the cache."""
    return entry.path / registry.number_of(uri) / "report.html"


def headline_metrics(result: EvaluatedVersion) -> dict[str, float]:
    """The metrics of a version that are shown first."""
    return {key: result.metrics[key] for key in HEADLINE if key in result.metrics}


def _plain(value: float) -> str:
    """A number that programs can read, too."""
    return str(int(value)) if value.is_integer() else f"{value:.4g}"


STEP = Evaluate()
