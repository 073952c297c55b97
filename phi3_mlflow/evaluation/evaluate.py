"""One evaluation: measure a version and its champion, ask the gate, and write everything down.

A folder per version:

    metrics.json answers.jsonl texts.jsonl sample.json      what was measured
    verdict.json verdict.xml                                the gate, for programs and CI systems
    report.html                                             the same for people, self-contained
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from phi3_mlflow.core import console
from phi3_mlflow.core.errors import ProjectError
from phi3_mlflow.core.machine import available_memory
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.evaluation.answers import Answers
from phi3_mlflow.evaluation.assessments import log_answers
from phi3_mlflow.evaluation.baseline import OF_ANSWERS
from phi3_mlflow.evaluation.batching import TIMED as TIMED_QUESTIONS
from phi3_mlflow.evaluation.batching import Asking, spread
from phi3_mlflow.evaluation.gate import (
    Verdict,
    against_champion,
    check_thresholds,
    trained_verdict,
)
from phi3_mlflow.evaluation.junit import junit_xml
from phi3_mlflow.evaluation.load import OTHER_LOAD
from phi3_mlflow.evaluation.measure import (
    kept,
    long_prompts,
    measured,
    measured_checkpoint,
)
from phi3_mlflow.evaluation.measurement import Measurement, write_json
from phi3_mlflow.evaluation.metrics import BASE, FULL
from phi3_mlflow.evaluation.model_files import find_model, size_of
from phi3_mlflow.evaluation.paired import FEWEST_QUESTIONS, TIMED
from phi3_mlflow.evaluation.reference import answer_all, answer_alone, whole_bytes
from phi3_mlflow.evaluation.report.build import worst_answers, write_report
from phi3_mlflow.evaluation.result import Evaluation, ModelFacts
from phi3_mlflow.evaluation.room import fits_well
from phi3_mlflow.evaluation.task import gain_kept, training_curve
from phi3_mlflow.tracking import registry

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.evaluation.sets import Sets
    from phi3_mlflow.evaluation.settings import EvaluationSettings, GateSettings


@dataclass(frozen=True)
class Checkpoint:
    """A full-precision checkpoint.

    Attributes:
        path: its folder.
        digest: of its files, as hex.
    """

    path: Path
    digest: str


@dataclass(frozen=True)
class Evaluator:
    """What versions are measured against.

    Attributes:
        facts: what the report says of the model.
        settings: how it is measured.
        gate: what it has to meet.
        reference: what the version was made from, in full precision.
        base: the checkpoint before it was fine-tuned, if it was.
        sets: what it is measured on.
        store: where measurements are kept.
        fresh: measure what was measured already, too.
    """

    facts: ModelFacts
    settings: EvaluationSettings
    gate: GateSettings
    reference: Checkpoint
    base: Checkpoint | None
    sets: Sets
    store: StepCache
    fresh: bool = False

    def evaluate(self, version: registry.VersionName, out: Path) -> Evaluation:
        """Measure a version and ask the gate; everything about it is written to `out`."""
        out.mkdir(parents=True)
        found = self._measure(version, fresh=self.fresh)
        found = self._beside_full_precision(self._assess(version, found))
        base = None
        if self.base is not None:
            base = self._measure_checkpoint(self.base, self.sets)
            found = self._with_task(found, base)
        if self.gate.off:
            verdict, champion = Verdict((), trained=base is not None, off=True), None
        else:
            verdict = check_thresholds(found.metrics, self.gate.thresholds)
            champion, verdict = self._compare(version, found, base, verdict)
        found.write(out)
        write_json(out / "verdict.json", verdict.to_dict())
        (out / "verdict.xml").write_text(junit_xml(version.uri, verdict), "utf-8")
        curve = training_curve(self.reference.path) if base else ()
        evaluation = Evaluation(version, found, verdict, champion, curve)
        said = self._reference_answers(evaluation)
        plots = write_report(evaluation, self.facts, self.sets, out, said)
        return replace(evaluation, plots=plots)

    def _assess(self, version: registry.VersionName, found: Measurement) -> Measurement:
        """Show the answers in MLflow, and add what the judge says of them, if there is one."""
        from mlflow.exceptions import MlflowException

        asked = [*self.sets.questions, *long_prompts(self.reference.path, self.sets.fitting())]
        try:
            opinions = log_answers(
                version, asked, found, self.settings.judge, self.sets.logged()[0]
            )
        except MlflowException as error:
            # A store without traces is no reason to lose what was measured.
            console.say(f"  the answers cannot be shown as an evaluation in MLflow: {error}")
            return found
        return replace(found, metrics={**found.metrics, **opinions})

    def _beside_full_precision(self, found: Measurement) -> Measurement:
        """Put next to a version's figures those that were measured of full precision."""
        full = self._asked_full.metrics if self._asked_full else {}
        size = {"size_bytes": size_of(find_model(self.reference.path))}
        named = {f"{name}{FULL}": value for name, value in {**size, **full}.items()}
        return replace(found, metrics={**found.metrics, **named})

    def _reference_answers(self, evaluation: Evaluation) -> dict[str, str]:
        """What full precision says to the questions that are shown, where it was asked."""
        if self._asked_full is None:
            return {}
        shown = {worst.id for worst in worst_answers(evaluation, self.sets.questions, {})}
        answers = self._asked_full.answers
        return {a.question_id: a.text for a in answers if a.question_id in shown}

    @cached_property
    def _asked_full(self) -> Measurement | None:
        """What full precision itself says to the questions, how fast, in how much memory.

        In size full only, because it says some ten tokens per second, and where the model as a
        whole fits well into memory, unless the profile says otherwise. Once per checkpoint. One
        question at a time only where it fits: else its speed would be that of the disk.
        """
        wanted = self.settings.size == "full" and self.settings.reference_answers != "never"
        if not wanted or not self.sets.questions:
            return None
        if self.settings.reference_answers == "auto" and not _worth_asking(self.reference.path):
            return None
        questions = self.sets.digests()["questions_sha256"]
        parts = {"full_precision": self.reference.digest, "questions": questions}
        return kept(parts, self._ask_full, self.store, known=bool(self.reference.digest))[0]

    def _ask_full(self) -> Measurement:
        asked, timed = self.sets.questions, None
        if fits_well(whole_bytes(self.reference.path), available_memory()):
            alone = spread(asked, TIMED_QUESTIONS)
            with show_progress("full precision, one at a time", len(alone), "answered") as bar:
                timed = answer_alone(self.reference.path, alone, bar)
        with show_progress("full precision, many together", len(asked), "answered") as bar:
            answers = answer_all(self.reference.path, asked, bar, store=self.store)
        told = Answers(answers, load_seconds=0.0, peak_memory_bytes=0).metrics()
        metrics = {name: told[name] for name in OF_ANSWERS}
        if timed is not None:
            cost = Answers(timed[0], load_seconds=0.0, peak_memory_bytes=timed[1]).metrics()
            kept_of = ("tokens_per_second", "peak_memory_bytes", OTHER_LOAD)
            metrics |= {name: cost[name] for name in kept_of if name in cost}
        return Measurement(metrics, answers, (), {})

    def _with_task(self, found: Measurement, base: Measurement) -> Measurement:
        """Put next to a fine-tuned version's figures those of its base and of full precision."""
        task_only = replace(self.sets, questions=(), texts=(), needles=())
        full = self._measure_checkpoint(self.reference, task_only)
        metrics = {
            **found.metrics,
            **{f"{name}{BASE}": value for name, value in base.metrics.items()},
            **{f"{name}{FULL}": value for name, value in full.metrics.items()},
        }
        if self.sets.task:
            values = (m.metrics["task_accuracy"] for m in (found, base, full))
            if (kept := gain_kept(*values)) is not None:
                metrics["task_gain_kept"] = kept
        return replace(found, metrics=metrics)

    def _compare(
        self,
        version: registry.VersionName,
        found: Measurement,
        base: Measurement | None,
        verdict: Verdict,
    ) -> tuple[Measurement | None, Verdict]:
        """Compare with the champion and, where it was fine-tuned, with the base."""
        champion = registry.champion_to_beat(version)
        verdict = replace(verdict, trained=base is not None)
        if champion is None:
            if base is not None:
                verdict = trained_verdict(verdict, found, base, None, self.gate.trained, None)
            return None, verdict
        against = replace(verdict, against=champion.uri)
        if registry.same_content(version, champion):
            if found_damaged := registry.damage(champion):
                why = f"it is the same model as the champion, {champion.uri}: {found_damaged}"
                return found, replace(against, replaces=why)
            note = f"it is the same model as the champion, {champion.uri}"
            return found, replace(against, note=note)
        if base is None and registry.was_fine_tuned(champion):
            note = (
                f"the champion {champion.uri} was fine-tuned and this version was not: nothing "
                "here measures the task that the champion was trained for"
            )
            return None, replace(against, note=note)
        margins = self.gate.champion
        try:
            theirs = self._measure(champion, fresh=bool(set(TIMED) & set(margins)))
        except (ProjectError, OSError) as error:
            note = f"the champion {champion.uri} cannot be measured: {error}"
            return None, replace(against, note=note)
        if base is not None:
            wanted = self.gate.trained
            return theirs, trained_verdict(against, found, base, theirs, wanted, champion.uri)
        return theirs, against_champion(against, found, theirs, margins, champion.uri)

    def _measure_checkpoint(self, checkpoint: Checkpoint, sets: Sets) -> Measurement:
        return measured_checkpoint(
            checkpoint.path,
            checkpoint.digest,
            sets=sets,
            window=self.settings.window,
            store=self.store,
        )

    @property
    def _asking(self) -> Asking:
        """How versions are asked: more of them alone where the gate compares their times."""
        compared = not self.gate.off and set(TIMED) & set(self.gate.champion)
        timed = FEWEST_QUESTIONS if compared else TIMED_QUESTIONS
        return Asking(self.settings.batch, timed)

    def _measure(self, version: registry.VersionName, *, fresh: bool) -> Measurement:
        found, was_there = measured(
            version.uri,
            registry.content(version),
            reference=self.reference.path,
            reference_digest=self.reference.digest,
            sets=self.sets,
            window=self.settings.window,
            store=self.store,
            asking=self._asking,
            fresh=fresh,
        )
        if was_there:
            console.say(f"  {version.uri}: measured before, with the same code on the same sets")
        return found


def _worth_asking(checkpoint: Path) -> bool:
    """Whether a model fits well into memory as a whole; says so where it does not."""
    needed, free = whole_bytes(checkpoint), available_memory()
    if fits_well(needed, free):
        return True
    console.say(
        f"  full precision is not asked for answers of its own: as a whole it takes "
        f"{needed / 1e9:.1f} GB of memory, and {(free or 0) / 1e9:.1f} GB are free. With "
        "evaluation.reference_answers: always in the profile it is asked all the same, layer by "
        "layer; a dry run says roughly how long that takes."
    )
    return False
