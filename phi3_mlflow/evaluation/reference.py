"""What a full-precision checkpoint itself answers, through transformers, many questions at once."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core import console
from phi3_mlflow.core.endings import ending_of
from phi3_mlflow.core.meter import peak_rss_bytes
from phi3_mlflow.core.progress import hide_bars_of_transformers, no_progress
from phi3_mlflow.evaluation.answers import Answer, judged, repeats
from phi3_mlflow.evaluation.divergence import batches
from phi3_mlflow.evaluation.load import LoadWatch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.evaluation.items import Question

_BATCH_TOKENS = 4096  # of prompts and answers computed together, padding included


def answer_all(
    checkpoint: Path,
    questions: Sequence[Question],
    progress: Meter,
    batch_tokens: int = _BATCH_TOKENS,
) -> tuple[Answer, ...]:
    """Ask a Hugging Face checkpoint, greedily.

    Questions of like length are computed together: a step for many costs little more than a step
    for one, because reading the weights is what takes the time. The times of the answers are
    therefore shares of their batch's, and say nothing about a single request.

    Args:
        checkpoint: the folder, with its tokenizer and chat template.
        questions: what to ask.
        progress: counts the questions.
        batch_tokens: of prompts and answers computed together, padding included; 1 asks one
            question after another, and the times are theirs.

    Returns:
        One answer per question, in the same order.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hide_bars_of_transformers()
    tokenizer: Any = AutoTokenizer.from_pretrained(
        str(checkpoint), trust_remote_code=False, padding_side="left"
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(checkpoint), dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    model.eval()
    prompts = [
        tokenizer.apply_chat_template(
            [message.model_dump() for message in question.messages],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in questions
    ]
    lengths = [
        len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) + question.max_tokens
        for prompt, question in zip(prompts, questions, strict=True)
    ]
    answers: dict[int, Answer] = {}
    for group in batches(lengths, batch_tokens):
        made = _together(
            model, tokenizer, [prompts[i] for i in group], [questions[i] for i in group]
        )
        answers.update(zip(group, made, strict=True))
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
        answers = answer_all(checkpoint, questions, bar, batch_tokens=1)
    return answers, peak_rss_bytes()


def _together(
    model: Any, tokenizer: Any, prompts: list[str], questions: list[Question]
) -> list[Answer]:
    """The answers to some questions, computed as one batch."""
    import torch

    start, watch = time.monotonic(), LoadWatch()
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(
            **inputs,
            max_new_tokens=max(question.max_tokens for question in questions),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    seconds, others = (time.monotonic() - start) / len(questions), watch.others()
    width = inputs["input_ids"].shape[1]
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = []
    for row, question in enumerate(questions):
        tokens = made[row, width:].tolist()[: question.max_tokens]
        stop = next((at for at, token in enumerate(tokens) if token in ends), None)
        said = tokens if stop is None else tokens[:stop]
        text = tokenizer.decode(said, skip_special_tokens=True)
        answer = Answer(
            question_id=question.id,
            category=question.category,
            text=text,
            correct=False,
            seconds=seconds,
            first_seconds=None,
            prompt_tokens=int(inputs["attention_mask"][row].sum()),
            completion_tokens=len(said),
            finish_reason="length" if stop is None else "stop",
            repeats=repeats(text),
            alone=len(questions) == 1,
            others=others,
        )
        answers.append(judged(answer, question))
    return answers
