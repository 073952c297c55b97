"""One evaluation: measure a version and its champion, ask the gate, and write everything down.

A folder per version:

    metrics.json answers.jsonl texts.jsonl sample.json      what was measured
    verdict.json verdict.xml                                the gate, for programs and CI systems
    report.html                                             the same for people, self-contained
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phi3_mlflow.core import console
from phi3_mlflow.core.errors import ProjectError
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.evaluation.assessments import log_answers
from phi3_mlflow.evaluation.gate import TIMED, Verdict, against_champion, check_thresholds
from phi3_mlflow.evaluation.junit import junit_xml
from phi3_mlflow.evaluation.measure import long_prompts, measured
from phi3_mlflow.evaluation.measurement import Measurement, write_json
from phi3_mlflow.evaluation.reference import answer_all
from phi3_mlflow.evaluation.report.build import worst_answers, write_report
from phi3_mlflow.evaluation.result import Evaluation, ModelFacts
from phi3_mlflow.tracking import registry

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.evaluation.sets import Sets
    from phi3_mlflow.evaluation.settings import EvaluationSettings, GateSettings


@dataclass(frozen=True)
class Evaluator:
    """What versions are measured against.

    Attributes:
        facts: what the report says of the model.
        settings: how it is measured.
        gate: what it has to meet.
        reference: the full-precision checkpoint.
        reference_digest: of that checkpoint, as hex.
        sets: what it is measured on.
        store: where measurements are kept.
        fresh: measure what was measured already, too.
    """

    facts: ModelFacts
    settings: EvaluationSettings
    gate: GateSettings
    reference: Path
    reference_digest: str
    sets: Sets
    store: StepCache
    fresh: bool = False

    def evaluate(self, version: registry.VersionName, out: Path) -> Evaluation:
        """Measure a version and ask the gate; everything about it is written to `out`."""
        out.mkdir(parents=True)
        found = self._measure(version, fresh=self.fresh)
        found = self._assess(version, found)
        verdict = check_thresholds(found.metrics, self.gate.thresholds)
        champion, verdict = self._compare(version, found, verdict)
        found.write(out)
        write_json(out / "verdict.json", verdict.to_dict())
        (out / "verdict.xml").write_text(junit_xml(version.uri, verdict), "utf-8")
        evaluation = Evaluation(version, found, verdict, champion)
        said = self._reference_answers(evaluation)
        plots = write_report(evaluation, self.facts, self.sets, out, said)
        return replace(evaluation, plots=plots)

    def _assess(self, version: registry.VersionName, found: Measurement) -> Measurement:
        """Show the answers in MLflow, and add what the judge says of them, if there is one."""
        from mlflow.exceptions import MlflowException

        asked = [*self.sets.questions, *long_prompts(self.reference, self.sets.fitting())]
        try:
            opinions = log_answers(version, asked, found, self.settings.judge)
        except MlflowException as error:
            # A store without traces is no reason to lose what was measured.
            console.say(f"  the answers cannot be shown as an evaluation in MLflow: {error}")
            return found
        return replace(found, metrics={**found.metrics, **opinions})

    def _reference_answers(self, evaluation: Evaluation) -> dict[str, str]:
        """What full precision says to the questions that are shown.

        In size full only, because it says some ten tokens per second.
        """
        if self.settings.size != "full":
            return {}
        shown = {worst.id for worst in worst_answers(evaluation, self.sets.questions, {})}
        asked = [question for question in self.sets.questions if question.id in shown]
        with show_progress("full precision", len(asked), "answered") as bar:
            return answer_all(self.reference, asked, bar)

    def _compare(
        self, version: registry.VersionName, found: Measurement, verdict: Verdict
    ) -> tuple[Measurement | None, Verdict]:
        champion = registry.champion_to_beat(version)
        margins = self.gate.champion
        if champion is None:
            return None, verdict
        against = Verdict(verdict.checks, against=champion.uri)
        if registry.same_content(version, champion):
            note = f"it is the same model as the champion, {champion.uri}"
            return found, Verdict(verdict.checks, against=champion.uri, note=note)
        try:
            theirs = self._measure(champion, fresh=bool(set(TIMED) & set(margins)))
        except (ProjectError, OSError) as error:
            note = f"the champion {champion.uri} cannot be measured: {error}"
            return None, Verdict(verdict.checks, against=champion.uri, note=note)
        return theirs, against_champion(against, found, theirs, margins, champion.uri)

    def _measure(self, version: registry.VersionName, *, fresh: bool) -> Measurement:
        found, was_there = measured(
            version.uri,
            registry.content(version),
            reference=self.reference,
            reference_digest=self.reference_digest,
            sets=self.sets,
            window=self.settings.window,
            store=self.store,
            fresh=fresh,
        )
        if was_there:
            console.say(f"  {version.uri}: measured before, with the same code on the same sets")
        return found
