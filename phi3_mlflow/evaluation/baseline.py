"""A checkpoint in full precision, measured on what versions are measured on.

Two of them stand beside a fine-tuned version: the base before it was trained, which the version has
to be better than at the task and not worse than at everything else, and the fine-tuned checkpoint
before it was quantized, whose gain the version is to keep.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.evaluation.answers import Answers
from phi3_mlflow.evaluation.divergence import Divergence, TextScore, cut, tokenize
from phi3_mlflow.evaluation.measurement import Measurement
from phi3_mlflow.evaluation.reference import answer_all
from phi3_mlflow.evaluation.streamed import BATCH_TOKENS, open_logits, streamed
from phi3_mlflow.evaluation.task import CATEGORY, pieces_of, task_metrics, task_scores

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.evaluation.items import HeldoutText
    from phi3_mlflow.evaluation.sets import Sets
    from phi3_mlflow.evaluation.task import Task, TaskScore

OF_ANSWERS = ("accuracy", "endless_rate", "repetition_rate")
"""What answers tell that were given many at a time: nothing about speed."""


def measure_checkpoint(
    checkpoint: Path, sets: Sets, window: int, store: StepCache | None = None
) -> Measurement:
    """Measure a full-precision checkpoint.

    Args:
        checkpoint: in Hugging Face layout.
        sets: questions, texts and the task; what is empty is not measured. Long prompts are not
            asked.
        window: tokens of a text that are scored in one piece.
        store: where what the checkpoint makes of texts and rows is kept, and its answers where it
            is not loaded as a whole; None keeps nothing.

    Returns:
        Answers and scores as of a version, without speeds and memory: answers come in batches.
    """
    asked = [*sets.questions, *(sets.task.questions if sets.task else ())]
    with show_progress("full precision", len(asked), "answered") as bar:
        everything = answer_all(checkpoint, asked, bar, store=store)
    scores = text_scores(checkpoint, sets.texts, window, store) if sets.texts else ()
    task = loss_on_task(checkpoint, sets.task, store) if sets.task else ()
    answers = tuple(answer for answer in everything if answer.category != CATEGORY)
    task_answers = tuple(answer for answer in everything if answer.category == CATEGORY)
    metrics = task_metrics([answer.correct for answer in task_answers], task)
    if answers:
        general = Answers(answers, load_seconds=0.0, peak_memory_bytes=0).metrics()
        metrics |= {name: general[name] for name in OF_ANSWERS}
    if scores:
        metrics["perplexity"] = Divergence(scores).metrics()["perplexity"]
    return Measurement(metrics, answers, scores, {}, task_answers, task)


def loss_on_task(model: Path, task: Task, store: StepCache | None = None) -> tuple[TaskScore, ...]:
    """The loss of a model on the rows of a task.

    Args:
        model: a folder with an ONNX model or a checkpoint.
        task: the rows.
        store: where what a checkpoint makes of them is kept.
    """
    with ExitStack() as held:
        source = held.enter_context(open_logits(model, pieces_of(task.rows), store))
        bar = held.enter_context(show_progress("loss on the task", len(task.rows), "rows"))
        return task_scores(source, task.rows, BATCH_TOKENS, bar.advance)


def text_scores(
    checkpoint: Path, texts: Sequence[HeldoutText], window: int, store: StepCache | None = None
) -> tuple[TextScore, ...]:
    """How surprised a checkpoint is by texts, as scores of a model that is its own reference.

    Args:
        checkpoint: its folder.
        texts: held-out texts.
        window: a longer text is scored in pieces of this many tokens, each on its own.
        store: where what the checkpoint makes of them is kept.
    """
    import torch

    tokens = tokenize(checkpoint, ((text.id, text.text) for text in texts))
    pieces = cut(tokens, window)
    found = {name: TextScore(name, 0, 0.0, 0.0, 0.0, 0) for name, _ in tokens}
    with streamed(checkpoint, [ids for _, ids in pieces], store) as source:
        for name, ids in pieces:
            said = torch.from_numpy(source.logits([ids])[0][:-1])
            following = torch.from_numpy(ids[1:]).to(torch.int64)[:, None]
            nll = -torch.log_softmax(said, -1).gather(1, following).double().sum().item()
            before, places = found[name], len(ids) - 1
            found[name] = replace(
                before,
                places=before.places + places,
                candidate_nll=before.candidate_nll + nll,
                reference_nll=before.reference_nll + nll,
                agreements=before.agreements + places,
            )
    return tuple(score for score in found.values() if score.places)
