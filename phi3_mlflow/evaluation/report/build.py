"""The report: one HTML file that holds everything it shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.evaluation.answers import NEEDLE, Answer
from phi3_mlflow.evaluation.checks import describe
from phi3_mlflow.evaluation.hardware import hardware
from phi3_mlflow.evaluation.judge import PREFIX as JUDGE
from phi3_mlflow.evaluation.load import measured_while, unsound
from phi3_mlflow.evaluation.metrics import BASE, FULL, METRICS, formatted, label
from phi3_mlflow.evaluation.paired import NAMES
from phi3_mlflow.evaluation.report import plots
from phi3_mlflow.evaluation.report.bought import bought
from phi3_mlflow.evaluation.result import TEXTS_TAG, Evaluation, ModelFacts
from phi3_mlflow.evaluation.statistics import Interval, wilson
from phi3_mlflow.tracking import registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from phi3_mlflow.evaluation.items import Question
    from phi3_mlflow.evaluation.measurement import Measurement
    from phi3_mlflow.evaluation.paired import Comparison
    from phi3_mlflow.evaluation.sets import Sets

WORST = 20
"""The tag of a version that holds the digest of the texts it was measured on last."""
_LONGEST_SHOWN = 1200  # characters of a prompt or an answer
_PLOTTED = ("size_bytes", "tokens_per_second", "kl_mean")
_OF_FULL_PRECISION = {"perplexity_ratio": 1.0, "kl_mean": 0.0, "top1_agreement": 1.0}


@dataclass(frozen=True)
class MetricRow:
    """One metric next to the champion's and full precision's, as text.

    Attributes:
        label: what it is called.
        means: what is measured, in one sentence.
        value: of this version.
        interval: that holds the true value with 95 % confidence, where there is one.
        champion: the champion's value; empty without a champion.
        reference: full precision's value, where it has one.
        base: the value of the base before it was fine-tuned, in full precision.
        change: how it differs from the champion's.
        state: what the gate says to the difference.
    """

    label: str
    means: str
    value: str
    interval: str
    champion: str
    reference: str
    base: str
    change: str
    state: str


@dataclass(frozen=True)
class CategoryRow:
    """How many answers of one category are right, as text.

    Attributes:
        name: of the category.
        asked: how many questions it has.
        share: of right answers.
        interval: that holds the true share with 95 % confidence.
        champion: the champion's share; empty without a champion.
    """

    name: str
    asked: str
    share: str
    interval: str
    champion: str


@dataclass(frozen=True)
class WorstAnswer:
    """A wrong answer, next to what others said to the same question.

    Attributes:
        id: of the question.
        category: of the question, in words.
        level: how hard it is.
        turns: role and text of each message.
        wanted: what a right answer looks like.
        answer: of this version.
        why: that is wrong.
        marks: what else is wrong with it.
        champion: the champion's answer, if there is one.
        champion_right: whether that is right.
        reference: full precision's answer, if there is one.
    """

    id: str
    category: str
    level: str
    turns: tuple[tuple[str, str], ...]
    wanted: str
    answer: str
    why: str
    marks: tuple[str, ...]
    champion: str | None
    champion_right: bool
    reference: str | None


def write_report(
    evaluation: Evaluation,
    facts: ModelFacts,
    sets: Sets,
    out: Path,
    reference_answers: Mapping[str, str] | None = None,
) -> dict[str, Figure]:
    """Write `report.html`.

    Args:
        evaluation: what was found.
        facts: what the model is.
        sets: what it was measured on.
        out: the version's folder.
        reference_answers: question id to the full-precision model's answer, where there are any.

    Returns:
        Its plots by name.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    named = _named(evaluation)
    digests = sets.digests()
    drawn = _plots(evaluation, named, digests["texts_sha256"])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    verdict = evaluation.verdict
    page = environment.get_template("report.html.j2").render(
        facts=facts,
        version=evaluation.version,
        tags=registry.describe(evaluation.version).tags,
        verdict=verdict,
        champion=verdict.against,
        rows=metric_rows(evaluation),
        bought=bought(evaluation.measurement.metrics),
        categories=category_rows(named),
        plots={name: plots.svg(plot, name) for name, plot in drawn.items()},
        worst=worst_answers(evaluation, sets.questions, reference_answers or {}),
        task_worst=wrong_at_the_task(evaluation, sets),
        trained_on=registry.describe(evaluation.version).tags.get("trained_on", ""),
        sample=evaluation.measurement.sample,
        hardware=hardware(),
        measured_while=measured_while(evaluation.measurement.metrics),
        unsound=unsound(evaluation.measurement.metrics),
        counts={
            "questions": len(sets.questions),
            **timed_answers(evaluation.measurement.answers),
            "texts": len(sets.texts),
            "tokens": int(evaluation.measurement.metrics["scored_tokens"]),
            "needles": len(sets.fitting()),
            "task": len(sets.task.questions) if sets.task else 0,
            "task_wrong": sum(not a.correct for a in evaluation.measurement.task_answers),
        },
        digests=digests,
        label=label,
        names=NAMES,
    )
    (out / "report.html").write_text(page, "utf-8")
    return drawn


def timed_answers(answers: Sequence[Answer]) -> dict[str, int]:
    """How many questions were `asked`, and how many of them `timed`: one at a time."""
    asked = [answer for answer in answers if not answer.category.startswith(NEEDLE)]
    return {"asked": len(asked), "timed": sum(answer.alone for answer in asked)}


def _named(evaluation: Evaluation) -> dict[str, Measurement]:
    """The measurements by how the plots call them, the version first."""
    named = {f"version {evaluation.version.version}": evaluation.measurement}
    verdict = evaluation.verdict
    if evaluation.champion and verdict.against and not verdict.note:
        number = registry.number_of(verdict.against)
        named[f"champion, version {number}"] = evaluation.champion
    return named


def _plots(
    evaluation: Evaluation, named: Mapping[str, Measurement], texts_sha256: str
) -> dict[str, Figure]:
    curve = {"training": plots.training(evaluation.curve)} if evaluation.curve else {}
    return curve | {
        "quality": plots.quality(known_versions(evaluation, texts_sha256)),
        "categories": plots.categories({who: m.answers for who, m in named.items()}),
        "latency": plots.latency({who: m.answers for who, m in named.items()}),
        "divergence": plots.divergence({who: m.scores for who, m in named.items()}),
    }


def known_versions(evaluation: Evaluation, texts_sha256: str) -> list[plots.KnownVersion]:
    """The versions of the registered model that were measured on the same texts.

    This one and the champion are shown as they were measured just now, others as their tags say.
    """
    mine, against = evaluation.version, evaluation.verdict.against
    found = []
    for version in registry.client().search_model_versions(f"name='{mine.name}'"):
        number, tags = str(version.version), version.tags
        values: Mapping[str, Any] = tags if tags.get(TEXTS_TAG) == texts_sha256 else {}
        role = "other"
        if number == mine.version:
            values, role = evaluation.measurement.metrics, "version"
        elif against and number == registry.number_of(against):
            values = evaluation.champion.metrics if evaluation.champion else values
            role = "champion"
        try:
            size, speed, kl = (float(values[key]) for key in _PLOTTED)
        except (KeyError, ValueError):  # never measured, or on something else
            continue
        found.append(plots.KnownVersion(number, role, size, speed, kl, tags.get("algorithm", "")))
    return sorted(found, key=lambda known: int(known.number))


def metric_rows(evaluation: Evaluation) -> list[MetricRow]:
    """Every metric that was measured, in the order of `METRICS`, then what a judge says."""
    metrics = evaluation.measurement.metrics
    theirs = evaluation.champion.metrics if evaluation.champion else {}
    judged = {c.metric: c for c in evaluation.verdict.comparisons if c.than == "champion"}
    rows = []
    judges = sorted(metric for metric in metrics if metric.startswith(JUDGE))
    for metric in (*METRICS, *judges):
        if metric not in metrics or metric == "perplexity_reference":
            continue
        before = f"{metric}{BASE}"
        known = "perplexity_reference" if metric == "perplexity" else f"{metric}{FULL}"
        reference = metrics.get(known, _OF_FULL_PRECISION.get(metric))
        change, state = _change(metric, metrics[metric], theirs.get(metric), judged.get(metric))
        rows.append(
            MetricRow(
                label=label(metric),
                means=METRICS[metric].means if metric in METRICS else "Share of the answers.",
                value=formatted(metric, metrics[metric]),
                interval=_interval(metric, evaluation.measurement),
                champion=formatted(metric, theirs[metric]) if metric in theirs else "",
                reference="" if reference is None else formatted(metric, reference),
                base=formatted(metric, metrics[before]) if before in metrics else "",
                change=change,
                state=state,
            )
        )
    return rows


def category_rows(named: Mapping[str, Measurement]) -> list[CategoryRow]:
    """How many of each category are right, with the 95 % interval, compared with the champion's.

    Args:
        named: the version's measurement, then the champion's if there is one.
    """
    mine, *others = [measurement.answers for measurement in named.values()]
    rows = []
    for name in plots.category_names(mine):
        found, asked = _share(mine, name)
        champion = f"{_share(others[0], name)[0].value:.0%}" if others else ""
        rows.append(
            CategoryRow(
                name=name.replace("_", " "),
                asked=str(asked),
                share=f"{found.value:.0%}",
                interval=f"{found.low:.0%} – {found.high:.0%}",
                champion=champion,
            )
        )
    return rows


def _share(answers: Sequence[Answer], category: str) -> tuple[Interval, int]:
    right = [a.correct for a in answers if a.category == category]
    return wilson(sum(right), len(right)), len(right)


def _interval(metric: str, measurement: Measurement) -> str:
    answers = measurement.answers
    flags: dict[str, list[bool]] = {
        "task_accuracy": [a.correct for a in measurement.task_answers],
        "accuracy": [a.correct for a in answers if not a.category.startswith(NEEDLE)],
        "needle_accuracy": [a.correct for a in answers if a.category.startswith(NEEDLE)],
    }
    if metric not in flags:
        return ""
    found: Interval = wilson(sum(flags[metric]), len(flags[metric]))
    return f"{found.low:.0%} – {found.high:.0%}"


def _change(
    metric: str, mine: float, theirs: float | None, judged: Comparison | None
) -> tuple[str, str]:
    """How it differs from the champion, and the state that decides its colour."""
    if theirs is None or METRICS[metric].better == "neither":
        return "", ""
    if mine == theirs:
        return "same", judged.state if judged else ""
    difference = mine - theirs
    sign = "+" if difference > 0 else "−"
    return f"{sign}{formatted(metric, abs(difference))}", judged.state if judged else ""


def worst_answers(
    evaluation: Evaluation, questions: Sequence[Question], reference: Mapping[str, str]
) -> list[WorstAnswer]:
    """The wrong answers that matter most, next to those of others.

    First those that the champion got right, then the easy questions, then those that never end.
    """
    champion = evaluation.champion.answers if evaluation.champion else ()
    return _worst(evaluation, questions, evaluation.measurement.answers, champion, reference)


def wrong_at_the_task(evaluation: Evaluation, sets: Sets) -> list[WorstAnswer]:
    """The wrong answers to rows of the task, in the same order."""
    if sets.task is None:
        return []
    champion = evaluation.champion.task_answers if evaluation.champion else ()
    mine = evaluation.measurement.task_answers
    return _worst(evaluation, sets.task.questions, mine, champion, {})


def _worst(
    evaluation: Evaluation,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    champion: Sequence[Answer],
    reference: Mapping[str, str],
) -> list[WorstAnswer]:
    asked = {question.id: question for question in questions}
    theirs = {answer.question_id: answer for answer in champion}
    if evaluation.verdict.note:  # the champion is the same model, or was not measured
        theirs = {}
    wrong = [answer for answer in answers if not answer.correct and answer.question_id in asked]
    levels = {"easy": 0, "medium": 1, "hard": 2}

    def badness(answer: Answer) -> tuple[bool, int, bool, bool]:
        other = theirs.get(answer.question_id)
        return (
            not (other and other.correct),
            levels[asked[answer.question_id].level],
            not answer.repeats,
            answer.finish_reason != "length",
        )

    shown = []
    for answer in sorted(wrong, key=badness)[:WORST]:
        question = asked[answer.question_id]
        other = theirs.get(answer.question_id)
        shown.append(
            WorstAnswer(
                id=question.id,
                category=question.category.replace("_", " "),
                level=question.level,
                turns=tuple((m.role, _cut(m.content)) for m in question.messages),
                wanted=describe(question.check),
                answer=_cut(answer.text),
                why=answer.why_wrong,
                marks=_marks(answer),
                champion=_cut(other.text) if other else None,
                champion_right=bool(other and other.correct),
                reference=_cut(reference[question.id]) if question.id in reference else None,
            )
        )
    return shown


def _marks(answer: Answer) -> tuple[str, ...]:
    marks = []
    if answer.finish_reason == "length":
        marks.append("cut off")
    if answer.repeats:
        marks.append("repeats itself")
    if not answer.text.strip():
        marks.append("empty")
    return tuple(marks)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} […]"
