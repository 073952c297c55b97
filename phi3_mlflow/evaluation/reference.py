"""What the full-precision checkpoint itself answers, through transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.evaluation.items import Question


def answer_all(checkpoint: Path, questions: Sequence[Question], progress: Meter) -> dict[str, str]:
    """Ask a Hugging Face checkpoint, greedily.

    Args:
        checkpoint: the folder, with its tokenizer and chat template.
        questions: what to ask.
        progress: counts the questions.

    Returns:
        Question id to answer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(checkpoint), trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(checkpoint), dtype="auto", trust_remote_code=False, use_safetensors=True
    )
    model.eval()
    answers: dict[str, str] = {}
    for question in questions:
        ids = tokenizer.apply_chat_template(
            [message.model_dump() for message in question.messages],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            made = model.generate(**ids, max_new_tokens=question.max_tokens, do_sample=False)
        answer = made[0, ids["input_ids"].shape[1] :]
        answers[question.id] = tokenizer.decode(answer, skip_special_tokens=True)
        progress.advance(1)
    return answers
