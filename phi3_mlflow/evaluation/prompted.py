"""Questions as a checkpoint is asked them: its own tokenizer, its chat template, its end tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints.chat import stop_tokens
from phi3_mlflow.evaluation.answers import Answer, judged, repeats

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phi3_mlflow.evaluation.items import Question


class Prompter:
    """What makes prompts of questions, and answers of tokens.

    Args:
        checkpoint: a folder in Hugging Face layout.

    Attributes:
        tokenizer: of transformers; it pads on the left.
        ends: tokens that end an answer, the same as of a version that answers requests.
    """

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            str(checkpoint), trust_remote_code=False, padding_side="left"
        )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.ends = frozenset(stop_tokens(checkpoint, self.tokenizer))

    def prompt(self, question: Question) -> str:
        """A conversation up to where the answer begins."""
        text = self.tokenizer.apply_chat_template(
            [message.model_dump() for message in question.messages],
            add_generation_prompt=True,
            tokenize=False,
        )
        return str(text)

    def ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt."""
        return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def said(self, made: Sequence[int], most: int) -> tuple[list[int], bool]:
        """The tokens before the one that ends an answer of `most` at most, and whether one did."""
        tokens = list(made[:most])
        stop = next((at for at, token in enumerate(tokens) if token in self.ends), None)
        return tokens[:stop], stop is not None

    def answer(
        self,
        question: Question,
        said: Sequence[int],
        *,
        ended: bool,
        prompt_tokens: int,
        seconds: float,
        alone: bool = False,
    ) -> Answer:
        """An answer, judged.

        Args:
            question: what was asked.
            said: its tokens, without the one that ended it.
            ended: whether there was one.
            prompt_tokens: how many tokens the prompt has.
            seconds: that it took.
            alone: nothing else was answered meanwhile.
        """
        text = self.tokenizer.decode(said, skip_special_tokens=True)
        answer = Answer(
            question_id=question.id,
            category=question.category,
            text=text,
            correct=False,
            seconds=seconds,
            first_seconds=None,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(said),
            finish_reason="stop" if ended else "length",
            repeats=repeats(text),
            alone=alone,
        )
        return judged(answer, question)
