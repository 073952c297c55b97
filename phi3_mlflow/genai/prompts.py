"""Do both flavors make the same tokens of a conversation? Asked before what was built is used.

They render and tokenize with the same code; the ONNX flavor from the files that the builder wrote.
What transformers makes of the checkpoint is what the model was trained with. A conversation that
has other tokens is a reason to refuse the model: its answers would be those to another prompt. A
text that has them is worth a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from phi3_mlflow.checkpoints.chat import ONE_TURN, SEVERAL_TURNS, WITH_SYSTEM, Conversation
from phi3_mlflow.core.errors import CheckpointRefused, problem_list
from phi3_mlflow.runtime.request import RequestError
from phi3_mlflow.runtime.tokens import ChatTokenizer

if TYPE_CHECKING:
    from pathlib import Path

_PROBES: dict[str, Conversation] = {
    "one turn": ONE_TURN,
    "several turns": SEVERAL_TURNS,
    "a system message": WITH_SYSTEM,
}
_TEXTS = (
    "Name      Total\nApples       42\n\nTotal:  49",
    "1.  2 eggs\n\t2.  Don'ts",
    "naïve “quotes” 中文 😀 \u200b\r\n",
)


def refuse_other_prompts(checkpoint: Path, onnx_dir: Path) -> list[str]:
    """Refuse a model whose flavors make other tokens of a conversation.

    Args:
        checkpoint: with the model's tokenizer and its chat template.
        onnx_dir: what was built of it.

    Returns:
        One sentence for each of a few texts that differ. Conversations that the template refuses
        are not compared.

    Raises:
        CheckpointRefused: naming each conversation, and what to do.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(str(checkpoint), local_files_only=True)
    built = ChatTokenizer(onnx_dir)
    if problems := _conversations(tokenizer, built):
        raise CheckpointRefused(
            problem_list(
                f"the checkpoint {checkpoint} is refused: a chat would have other tokens in the "
                "ONNX flavor than the model was trained with, so its answers would be others",
                problems,
                "Its tokenizer.json and what transformers reads beside it do not agree. Save the "
                "tokenizer again (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)), "
                "or log it with -P contract=prompt, where the client writes the whole prompt.",
            )
        )
    return _texts(tokenizer, built)


def _conversations(tokenizer: Any, built: ChatTokenizer) -> list[str]:
    found = []
    for what, messages in _PROBES.items():
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template may refuse a role; `fetch` has told so
            continue
        wanted = list(tokenizer(str(text), add_special_tokens=False)["input_ids"])
        try:
            made = built.render(messages)
        except RequestError as error:
            found.append(f"a conversation with {what}: refused by the ONNX flavor: {error}")
            continue
        if made != wanted:
            found.append(
                f"a conversation with {what}: {len(made)} tokens in the ONNX flavor, {len(wanted)} "
                "with the model's own tokenizer"
            )
    return found


def _texts(tokenizer: Any, built: ChatTokenizer) -> list[str]:
    return [
        f"the text {text!r}: other tokens than with the model's own tokenizer"
        for text in _TEXTS
        if built.encode(text) != list(tokenizer(text)["input_ids"])
    ]
