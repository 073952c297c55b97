"""The answers as a GenAI evaluation in MLflow: a trace per answer, an assessment per scorer.

Every version gets a run of its own below the step's, of the type that MLflow's page "Evaluation
runs" lists, so that two versions can be laid side by side there, question by question. The checks
are code scorers of `mlflow.genai.evaluate`; what needs logits is measured elsewhere. A judge model
is asked here too, where the profile names one.

The answers were given, and timed, before: MLflow's own way of calling a model would have it answer
the first question twice and ten at a time.
"""

from __future__ import annotations

import io
import os
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core import console
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.evaluation.answers import Answer, repeats
from phi3_mlflow.evaluation.checks import describe
from phi3_mlflow.evaluation.judge import judge_scorers, judged
from phi3_mlflow.evaluation.wrong import why_wrong
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.logged_sets import name_rows
from phi3_mlflow.tracking.runs import child_run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pandas
    from mlflow.genai.scorers import Scorer

    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.evaluation.items import Question
    from phi3_mlflow.evaluation.measurement import Measurement
    from phi3_mlflow.evaluation.settings import JudgeSettings
    from phi3_mlflow.tracking.logged_sets import LoggedSet

QUESTION, CATEGORY, LEVEL = "question", "category", "level"
"""Tags of a trace: `tag.category = 'json'` finds the answers of a category."""

_QUICK_WRITES = {
    # One writer: SQLite takes turns anyway, and more threads are slower there.
    "MLFLOW_GENAI_EVAL_MAX_WORKERS": "1",
    # The limit of some ten calls a second is meant for models behind a network.
    "MLFLOW_GENAI_EVAL_SCORER_RATE_LIMIT": "0",
    "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false",
}
_JUDGING = {"MLFLOW_GENAI_EVAL_MAX_WORKERS": "4", "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false"}


def log_answers(
    version: registry.VersionName,
    questions: Sequence[Question],
    found: Measurement,
    judge: JudgeSettings | None = None,
    asked_set: LoggedSet | None = None,
) -> dict[str, float]:
    """Log what a version answered as a GenAI evaluation, in a run below the active one.

    Args:
        version: whose answers they are.
        questions: all that were asked, long prompts included.
        found: its answers and metrics.
        judge: the judge model to ask about every answer, if any.
        asked_set: the set that the questions come from, for MLflow to name.

    Returns:
        What the judge found: metric to value; empty without a judge.

    Raises:
        EnvironmentProblem: the judge does not answer.
    """
    import mlflow

    model_id = registry.logged_model_id(version)
    asked = {question.id: question for question in questions}
    answers = [answer for answer in found.answers if answer.question_id in asked]
    scorers = [*_code_scorers(asked), *judge_scorers(judge)]
    if judge:
        console.say(f"  {judge.model} judges {len(answers)} answers")
    with child_run(f"answers of version {version.version}", {"version": version.uri}):
        with _environment(_JUDGING if judge else _QUICK_WRITES):
            with show_progress("answers", len(answers), "shown in MLflow") as bar:
                rows = _traced(answers, asked, model_id, bar)
            if asked_set is not None:
                name_rows(rows, asked_set)
            # It writes a bar and an advertisement for its page, neither of which belongs in a log.
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                result = mlflow.genai.evaluate(data=rows, scorers=scorers, model_id=model_id)
        metrics = judged(judge, result.result_df)
        mlflow.log_metrics({**found.metrics, **metrics}, model_id=model_id)
    return metrics


def _code_scorers(asked: Mapping[str, Question]) -> list[Scorer]:
    from mlflow.entities import Feedback
    from mlflow.genai.scorers import scorer

    @scorer
    def correct(outputs: str, trace: Any) -> Feedback:
        check = asked[trace.info.tags[QUESTION]].check
        why = why_wrong(check, outputs)
        told = f"wanted: {describe(check)}" + (f"; {why}" if why else "")
        return Feedback(value=not why, rationale=told)

    @scorer
    def category(trace: Any) -> str:
        return str(trace.info.tags[CATEGORY])

    # Named for the good case, because MLflow shows False in red.
    @scorer
    def no_loop(outputs: str) -> bool:
        return not repeats(outputs)

    @scorer
    def ended(trace: Any) -> bool:
        """By itself, before the question's limit of tokens."""
        return bool(trace.data.spans[0].outputs["choices"][0]["finish_reason"] != "length")

    return [correct, category, ended, no_loop]


def _traced(
    answers: Sequence[Answer],
    asked: Mapping[str, Question],
    model_id: str | None,
    progress: Meter,
) -> pandas.DataFrame:
    """Log a trace for each answer, and lay them out as `mlflow.genai.evaluate` takes them.

    The traces lie one after another and end now, each as long as its answer took. Where questions
    were answered together (attribute `alone`: false), that is longer than it would have been alone.
    """
    import mlflow
    import pandas

    start = time.time_ns() - int(sum(answer.seconds for answer in answers) * 1e9)
    rows = []
    for answer in answers:
        question = asked[answer.question_id]
        end = start + int(answer.seconds * 1e9)
        inputs = {"messages": [message.model_dump() for message in question.messages]}
        trace_id = _trace(answer, question, inputs, (start, end), model_id)
        rows.append(
            {
                "trace": mlflow.get_trace(trace_id, flush=True),
                "inputs": inputs,
                "outputs": answer.text,
                "expectations": {"expected_response": describe(question.check)},
            }
        )
        start = end
        progress.advance(1)
    return pandas.DataFrame(rows)


def _trace(
    answer: Answer,
    question: Question,
    inputs: Mapping[str, Any],
    times: tuple[int, int],
    model_id: str | None,
) -> str:
    import mlflow
    from mlflow.entities import SpanType
    from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey

    span = mlflow.start_span_no_context(
        "chat",
        span_type=SpanType.CHAT_MODEL,
        inputs={**inputs, "max_tokens": question.max_tokens, "temperature": 0},
        tags={QUESTION: question.id, CATEGORY: question.category, LEVEL: question.level},
        metadata={TraceMetadataKey.MODEL_ID: model_id} if model_id else None,
        start_time_ns=times[0],
    )
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
    span.set_outputs({"choices": [choice]})
    if answer.first_seconds is not None:
        span.set_attribute("time_to_first_token_s", answer.first_seconds)
    if not answer.alone:
        span.set_attribute("alone", False)
    span.set_attribute(
        SpanAttributeKey.CHAT_USAGE,
        {
            "input_tokens": answer.prompt_tokens,
            "output_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
    )
    span.end(end_time_ns=times[1])
    return str(span.trace_id)


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while, where they are not set by somebody else."""
    mine = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
