"""What a full-precision checkpoint itself answers, many questions at once.

Through transformers, with the model as a whole in float32; or, where that does not fit well into
memory, in passes through its layers.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.core import console
from phi3_mlflow.core.endings import ending_of
from phi3_mlflow.core.machine import available_memory
from phi3_mlflow.core.meter import peak_rss_bytes
from phi3_mlflow.core.progress import hide_bars_of_transformers, no_progress
from phi3_mlflow.evaluation.divergence import batches
from phi3_mlflow.evaluation.load import LoadWatch
from phi3_mlflow.evaluation.prompted import Prompter
from phi3_mlflow.evaluation.room import BATCH_TOKENS, fits_well
from phi3_mlflow.evaluation.streamed_answers import answer_streamed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.evaluation.answers import Answer
    from phi3_mlflow.evaluation.items import Question


def whole_bytes(checkpoint: Path) -> int:
    """What a model takes as a whole, in float32."""
    reader = CheckpointReader(checkpoint)
    return 4 * sum(prod(reader.shape(name)) for name in reader)


def answer_all(
    checkpoint: Path,
    questions: Sequence[Question],
    progress: Meter,
    batch_tokens: int = BATCH_TOKENS,
    store: StepCache | None = None,
) -> tuple[Answer, ...]:
    """Ask a Hugging Face checkpoint, greedily, in whichever way fits the memory that is free.

    Args:
        checkpoint: the folder, with its tokenizer and chat template.
        questions: what to ask.
        progress: counts the questions.
        batch_tokens: of prompts and answers computed together, padding included, where the model is
            in memory.
        store: where answers are kept that were given in passes; None keeps nothing.

    Returns:
        One answer per question, in the same order. The times are shares of those of many, and say
        nothing about a single request.
    """
    size, free = whole_bytes(checkpoint), available_memory()
    if fits_well(size, free):
        return _answer_in_memory(checkpoint, questions, progress, batch_tokens)
    console.say(
        f"  full precision answers layer by layer: as a whole it takes {size / 1e9:.1f} GB of "
        f"memory, and {(free or 0) / 1e9:.1f} GB are free"
    )
    return answer_streamed(checkpoint, questions, progress, store)


def _answer_in_memory(
    checkpoint: Path, questions: Sequence[Question], progress: Meter, batch_tokens: int
) -> tuple[Answer, ...]:
    """Ask a checkpoint through transformers.

    Questions of like length are computed together: a step for many costs little more than a step
    for one, because reading the weights is what takes the time.

    Args:
        checkpoint: the folder, with its tokenizer and chat template.
        questions: what to ask.
        progress: counts the questions.
        batch_tokens: of prompts and answers computed together, padding included; 1 asks one
            question after another, and the times are theirs.
    """
    import torch
    from transformers import AutoModelForCausalLM

    hide_bars_of_transformers()
    prompter = Prompter(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(checkpoint), dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    model.eval()
    prompts = [prompter.prompt(question) for question in questions]
    lengths = [
        len(prompter.ids(prompt)) + question.max_tokens
        for prompt, question in zip(prompts, questions, strict=True)
    ]
    answers: dict[int, Answer] = {}
    for group in batches(lengths, batch_tokens):
        some = [(prompts[index], questions[index]) for index in group]
        answers.update(zip(group, _together(model, prompter, some), strict=True))
        share = sum(lengths[index] for index in group) / sum(lengths)
        progress.advance(len(group), share * len(questions))
    return tuple(answers[index] for index in range(len(questions)))


def answer_alone(
    checkpoint: Path, questions: Sequence[Question], progress: Meter
) -> tuple[tuple[Answer, ...], int] | None:
    """Ask a checkpoint one question at a time, in a process that holds nothing else.

    Args:
        checkpoint: the folder, with its tokenizer and chat template.
        questions: what to ask.
        progress: counts the questions.

    Returns:
        The answers with the time that each took, and the peak memory in bytes; None when the
        process died.
    """
    context = multiprocessing.get_context("spawn")
    there = multiprocessing.active_children()
    holding: list[BaseProcess] = []
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            answering = pool.submit(_alone, checkpoint, tuple(questions))
            holding = [one for one in multiprocessing.active_children() if one not in there]
            found = answering.result()
    except BrokenProcessPool:
        console.say(f"  full precision's process {ending_of(holding)}")
        return None
    progress.advance(len(questions))
    return found


def _alone(checkpoint: Path, questions: Sequence[Question]) -> tuple[tuple[Answer, ...], int]:
    with no_progress("full precision", len(questions)) as bar:  # the parent shows how far it is
        answers = _answer_in_memory(checkpoint, questions, bar, batch_tokens=1)
    return answers, peak_rss_bytes()


def _together(
    model: Any, prompter: Prompter, asked: Sequence[tuple[str, Question]]
) -> list[Answer]:
    """The answers to some questions, each with its prompt, computed as one batch."""
    import torch

    start, watch = time.monotonic(), LoadWatch()
    tokenizer = prompter.tokenizer
    inputs = tokenizer(
        [prompt for prompt, _ in asked], add_special_tokens=False, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        made = model.generate(
            **inputs,
            max_new_tokens=max(question.max_tokens for _, question in asked),
            do_sample=False,
            eos_token_id=sorted(prompter.ends) or None,
            pad_token_id=tokenizer.pad_token_id,
        )
    seconds, others = (time.monotonic() - start) / len(asked), watch.others()
    width = inputs["input_ids"].shape[1]
    answers = []
    for row, (_, question) in enumerate(asked):
        said, ended = prompter.said(made[row, width:].tolist(), question.max_tokens)
        answer = prompter.answer(
            question,
            said,
            ended=ended,
            prompt_tokens=int(inputs["attention_mask"][row].sum()),
            seconds=seconds,
            alone=len(asked) == 1,
        )
        answers.append(replace(answer, others=others))
    return answers
