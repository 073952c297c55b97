"""One evaluation: measure a version and its champion, judge, and write everything down.

A folder a version:

    metrics.json answers.jsonl texts.jsonl sample.json      what was measured
    verdict.json verdict.xml                                the gate, for programs and CI systems
    report.html                                             the same for people, self-contained
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.config.profile import Profile
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import ProjectError
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.evaluation.gate import TIMED, Verdict, against_champion, judge
from phi3_mlflow.evaluation.junit import junit_xml
from phi3_mlflow.evaluation.measure import Sets, long_prompts, measured
from phi3_mlflow.evaluation.measurement import Measurement, write_json
from phi3_mlflow.evaluation.rows import HeldoutText, Needle, Question
from phi3_mlflow.tracking import registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Evaluation:
    """What was found of one version."""

    version: registry.VersionName
    measurement: Measurement
    verdict: Verdict
    champion: Measurement | None
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return {
            "metrics": dict(self.measurement.metrics),
            "verdict": self.verdict.to_dict(),
            "sample": dict(self.measurement.sample),
        }


@dataclass(frozen=True)
class Evaluator:
    """What versions are measured against.

    Attributes:
        reference, reference_digest: the full-precision checkpoint.
        context: tokens that fit the model.
        fresh: measure what was measured already, too.
    """

    profile: Profile
    reference: Path
    reference_digest: str
    questions: Sequence[Question]
    texts: Sequence[HeldoutText]
    needles: Sequence[Needle]
    context: int
    store: StepCache
    fresh: bool = False

    @property
    def sets(self) -> Sets:
        return Sets(self.questions, self.texts, self.needles, self.context)

    @property
    def hardware(self) -> str:
        """The machine, in a few words."""
        import os
        import platform

        import psutil

        memory = psutil.virtual_memory().total / 1e9
        return f"{_processor()}, {os.cpu_count()} threads, {memory:.0f} GB, {platform.system()}"

    def evaluate(self, version: registry.VersionName, out: Path) -> Evaluation:
        """Measure and judge a version; everything about it is written to `out`."""
        from phi3_mlflow.evaluation.report.build import write_report

        out.mkdir(parents=True)
        found = self._measure(version, fresh=self.fresh)
        found = self._assess(version, found)
        verdict = judge(found.metrics, self.profile.gate.thresholds)
        champion, verdict = self._compare(version, found, verdict)
        found.write(out)
        write_json(out / "verdict.json", verdict.to_dict())
        (out / "verdict.xml").write_text(junit_xml(version.uri, verdict), "utf-8")
        evaluation = Evaluation(version, found, verdict, champion)
        figures = write_report(evaluation, self, out, self._reference_answers(evaluation))
        return replace(evaluation, figures=figures)

    def _assess(self, version: registry.VersionName, found: Measurement) -> Measurement:
        """Show the answers in MLflow, and add what the judge says of them, if there is one."""
        from mlflow.exceptions import MlflowException

        from phi3_mlflow.evaluation.assessments import log_answers

        asked = [*self.questions, *long_prompts(self.reference, self.sets.fitting())]
        try:
            opinions = log_answers(version, asked, found, self.profile.evaluation.judge)
        except MlflowException as error:
            # A store without traces is no reason to lose what was measured.
            console.say(f"  the answers cannot be shown as an evaluation in MLflow: {error}")
            return found
        return replace(found, metrics={**found.metrics, **opinions})

    def _reference_answers(self, evaluation: Evaluation) -> dict[str, str]:
        """What full precision says to the questions that are shown; in size full only, because
        it says some ten tokens a second."""
        from phi3_mlflow.evaluation.reference import answer_all
        from phi3_mlflow.evaluation.report.build import worst_answers

        if self.profile.evaluation.size != "full":
            return {}
        shown = {item["id"] for item in worst_answers(evaluation, self.questions, {})}
        asked = [question for question in self.questions if question.id in shown]
        with show_progress("full precision", len(asked), "answered") as bar:
            return answer_all(self.reference, asked, bar)

    def _compare(
        self, version: registry.VersionName, found: Measurement, verdict: Verdict
    ) -> tuple[Measurement | None, Verdict]:
        champion = registry.champion_to_beat(version)
        margins = self.profile.gate.champion
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
            window=self.profile.evaluation.window,
            store=self.store,
            fresh=fresh,
        )
        if was_there:
            console.say(f"  {version.uri}: measured before, with the same code on the same sets")
        return found


def _processor() -> str:
    import platform

    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
