"""Measuring one model: its answers, its divergence from full precision, what it costs.

What was measured once is found again: by the content of the model, of the reference and of the
sets, and by the code that measures. That is how a champion is measured again exactly when the sets
or the code changed.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import StepCache, key_of
from phi3_mlflow.artifacts.code_keys import closure, library_versions
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.evaluation.answers import NEEDLE
from phi3_mlflow.evaluation.asking import ask
from phi3_mlflow.evaluation.baseline import loss_on_task, measure_checkpoint
from phi3_mlflow.evaluation.batching import Asking
from phi3_mlflow.evaluation.divergence import Divergence, compare, cut, tokenize
from phi3_mlflow.evaluation.items import HeldoutText, Needle, Question
from phi3_mlflow.evaluation.measurement import Measurement
from phi3_mlflow.evaluation.model_files import find_model, size_of
from phi3_mlflow.evaluation.needles import build_needle_prompt
from phi3_mlflow.evaluation.streamed import BATCH_TOKENS, open_logits, streamed, together
from phi3_mlflow.evaluation.task import CATEGORY, task_metrics
from phi3_mlflow.tracking.stored_files import whole_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from phi3_mlflow.evaluation.sets import Sets

SAMPLE = Question.model_validate(
    {
        "id": "sample",
        "category": "sample",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "check": {"kind": "exact", "value": "Paris"},
        "max_tokens": 96,
    }
)
"""Asked of every version and shown to whoever started the run; it does not count."""

_ASKING = Asking()


def measured(
    model_uri: str,
    content: str,
    *,
    reference: Path,
    reference_digest: str,
    sets: Sets,
    window: int,
    store: StepCache,
    asking: Asking = _ASKING,
    fresh: bool = False,
) -> tuple[Measurement, bool]:
    """Measure a model, or find what was measured of it.

    Args:
        model_uri: the version or logged model.
        content: sha256 of its files; empty when that is not known, and then it is measured.
        reference: the full-precision checkpoint.
        reference_digest: of that checkpoint, as hex.
        sets: what it is measured on.
        window: tokens scored in one piece.
        store: where measurements are kept.
        asking: one question at a time, or several together.
        fresh: measure even so, for speeds that are to be compared with others of just now.

    Returns:
        The measurement, and whether it was there already.
    """
    parts = {
        "content": content or model_uri,
        "reference": reference_digest,
        "sets": sets.digests(),
        "window": window,
        "asking": asdict(asking),
    }

    def make() -> Measurement:
        return measure(
            model_uri, reference=reference, sets=sets, window=window, store=store, asking=asking
        )

    return kept(parts, make, store, known=bool(content) and not fresh, model_uri=model_uri)


def measured_checkpoint(
    checkpoint: Path, digest: str, *, sets: Sets, window: int, store: StepCache
) -> Measurement:
    """Measure a full-precision checkpoint, or find what was measured of it.

    Args:
        checkpoint: in Hugging Face layout.
        digest: of its files, as hex.
        sets: what it is measured on; long prompts are not asked.
        window: tokens of a text that are scored in one piece.
        store: where measurements are kept.
    """
    parts = {"checkpoint": digest, "sets": replace(sets, needles=()).digests(), "window": window}

    def make() -> Measurement:
        return measure_checkpoint(checkpoint, sets, window, store)

    return kept(parts, make, store)[0]


def kept(
    parts: Mapping[str, Any],
    make: Callable[[], Measurement],
    store: StepCache,
    *,
    known: bool = True,
    **origin: str,
) -> tuple[Measurement, bool]:
    """What was measured under these parts, with the code and libraries of now, or is measured now.

    Args:
        parts: what decides the measurement.
        make: measures.
        store: where measurements are kept.
        known: False measures in any case.
        origin: for the record.

    Returns:
        The measurement, and whether it was there already.
    """
    measuring = closure((__name__,))
    parts = {
        **parts, "code": measuring.hashes(), "libraries": library_versions([measuring])
    }  # fmt: skip
    key = key_of(parts)
    with store.locked("measure", key):
        entry = store.find("measure", key) if known else None
        if entry:
            return Measurement.read(entry.path), True
        with store.building("measure", key, {"parts": parts, **origin, "time": time.time()}) as out:
            found = make()
            found.write(out)
    return found, False


def measure(
    model_uri: str,
    *,
    reference: Path,
    sets: Sets,
    window: int,
    store: StepCache | None = None,
    asking: Asking = _ASKING,
) -> Measurement:
    """Measure a model.

    Args:
        model_uri: the version or logged model.
        reference: the full-precision checkpoint.
        sets: questions, held-out texts and long prompts.
        window: tokens scored in one piece.
        store: where what the reference makes of the texts is kept.
        asking: one question at a time, or several together.
    """
    model = whole_files(model_uri)
    task = sets.task
    questions = [SAMPLE, *sets.questions, *long_prompts(reference, sets.fitting())]
    questions += task.questions if task else ()
    asked = ask(model_uri, find_model(model), questions, reference, asking, uncounted=1)
    shown, *counted = asked.answers
    answers = replace(asked, answers=tuple(a for a in counted if a.category != CATEGORY))
    task_answers = tuple(answer for answer in counted if answer.category == CATEGORY)
    divergence = diverge(reference, model, sets.texts, window, store=store)
    scores = loss_on_task(find_model(model), task, store) if task else ()
    return Measurement(
        metrics={
            **divergence.metrics(),
            **answers.metrics(),
            **task_metrics([answer.correct for answer in task_answers], scores),
            "size_bytes": size_of(find_model(model)),
        },
        answers=answers.answers,
        scores=divergence.scores,
        sample={"question": SAMPLE.messages[-1].content, "answer": shown.text},
        task_answers=task_answers,
        task_scores=scores,
    )


def long_prompts(reference: Path, needles: Sequence[Needle]) -> list[Question]:
    """The recipes as questions, measured in the model's own tokens."""
    if not needles:
        return []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(reference / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return [
        Question.model_validate(
            {
                "id": row.id,
                "category": f"{NEEDLE}{row.target_tokens}",
                "messages": build_needle_prompt(row, count),
                "check": row.check.model_dump(by_alias=True),
                "max_tokens": row.max_tokens,
            }
        )
        for row in needles
    ]


def diverge(
    reference: Path,
    candidate: Path,
    texts: Sequence[HeldoutText],
    window: int,
    batch_tokens: int = BATCH_TOKENS,
    store: StepCache | None = None,
) -> Divergence:
    """Compare a model's files with the full-precision checkpoint on held-out texts.

    Args:
        reference: the checkpoint.
        candidate: a folder with an ONNX model or a checkpoint somewhere in it.
        texts: what both are asked to continue.
        window: tokens scored in one piece.
        batch_tokens: places scored at once, fewer where the vocabulary is large.
        store: where what the reference makes of the texts is kept; None keeps nothing.

    Raises:
        UserError: no text has two tokens, or the candidate is no model.
    """
    tokens = tokenize(reference, ((text.id, text.text) for text in texts))
    pieces = [ids for _, ids in cut(tokens, window)]
    if not pieces:
        raise UserError("the held-out texts are too short: none of them has two tokens")
    model = find_model(candidate)
    with ExitStack() as held:
        full = held.enter_context(streamed(reference, pieces, store))
        other = held.enter_context(open_logits(model, pieces, store))
        total = sum(len(ids) for _, ids in tokens)
        bar = held.enter_context(show_progress("held-out text", total, "tokens"))
        most = together(full.vocabulary, batch_tokens)
        return compare(full, other, tokens, window, bar.advance, most)
