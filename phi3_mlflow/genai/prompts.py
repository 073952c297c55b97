"""Do both flavors make the same tokens of a conversation? Asked before what was built is used.

The ONNX flavor renders and tokenizes with onnxruntime-genai, the transformers flavor with the
model's own tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from phi3_mlflow.checkpoints.chat import ONE_TURN, SEVERAL_TURNS, WITH_SYSTEM, Conversation
from phi3_mlflow.runtime.engine import EngineSettings
from phi3_mlflow.runtime.genai_folder import GenaiFolder
from phi3_mlflow.runtime.request import RequestError

if TYPE_CHECKING:
    from pathlib import Path

_PROBES: dict[str, Conversation] = {
    "one turn": ONE_TURN,
    "several turns": SEVERAL_TURNS,
    "a system message": WITH_SYSTEM,
}


def differing_prompts(checkpoint: Path, onnx_dir: Path) -> list[str]:
    """What the two make of a few conversations, where it differs.

    Args:
        checkpoint: with the model's tokenizer and its chat template.
        onnx_dir: what was built of it.

    Returns:
        One sentence for each conversation; none for those that the template refuses.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), local_files_only=True)
    folder = GenaiFolder(onnx_dir, EngineSettings())
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
            made = folder.render(messages)
        except RequestError as error:
            found.append(f"a conversation with {what}: refused by onnxruntime-genai: {error}")
            continue
        if made != wanted:
            found.append(
                f"a conversation with {what}: {len(made)} tokens in the ONNX flavor, {len(wanted)} "
                "with the model's own tokenizer"
            )
    return found
