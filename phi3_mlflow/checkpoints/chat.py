"""Does a checkpoint hold conversations, and do its answers end? Tried out before any work is done.

The chat template is rendered on a few conversations, as the logged model will render it, which is
bounded: it may be anybody's. What it writes after an answer is compared with the tokens that end
one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints import layout
from phi3_mlflow.core.errors import CheckpointRefused
from phi3_mlflow.runtime.template import ChatTemplate, TemplateFault

if TYPE_CHECKING:
    from pathlib import Path

Conversation = list[dict[str, str]]

GENERATION = "generation_config.json"
_QUESTION, _ANSWER, _NEXT, _SYSTEM = "Qone", "Aone", "Qtwo", "Sone"


def _turns(*texts: tuple[str, str]) -> Conversation:
    return [{"role": role, "content": text} for role, text in texts]


ONE_TURN = _turns(("user", _QUESTION))
SEVERAL_TURNS = _turns(("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT))
WITH_SYSTEM = _turns(("system", _SYSTEM), ("user", _QUESTION))
_ANSWERED = SEVERAL_TURNS[:2]


@dataclass(frozen=True)
class ChatFindings:
    """What was found out.

    Attributes:
        changes: what was put straight in the files, one sentence each.
        notes: what a user of the model should know, one sentence each.
        problems: why it cannot hold a conversation; empty when it can.
    """

    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def settle_chat(directory: Path) -> ChatFindings:
    """Try the chat template of a checkpoint out, and complete the tokens that end an answer.

    Args:
        directory: a sound checkpoint; `generation_config.json` is written where an end is missing.

    Raises:
        CheckpointRefused: transformers cannot load the configuration or the tokenizer.
    """
    tokenizer = _load(directory)
    problems, notes = _template_problems(tokenizer)
    if problems:
        return ChatFindings(problems=tuple(problems))
    end = _end_of_answer(tokenizer)
    if end is None:
        notes.append(
            "the chat template writes no token that ends an answer: whether answers end is up to "
            "what the model learnt"
        )
        return ChatFindings(notes=tuple(notes))
    ends = stop_tokens(directory, tokenizer)
    if end in ends:
        return ChatFindings(notes=tuple(notes))
    _write_ends(directory, [*ends, end])
    token = tokenizer.convert_ids_to_tokens(end)
    change = (
        f"{GENERATION}: {token} ({end}) is an end now; the chat template writes it after an "
        f"answer, and only {', '.join(map(str, ends)) or 'nothing'} was named"
    )
    return ChatFindings((change,), tuple(notes))


def stop_tokens(directory: Path, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, as those who answer with the checkpoint find them."""
    named: Any = None
    for name in (GENERATION, layout.CONFIG):
        file = directory / name
        if named is None and file.is_file():
            named = layout.parse_json(file.read_bytes(), name).get("eos_token_id")
    listed = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return list(dict.fromkeys(i for i in listed if isinstance(i, int)))


def _load(directory: Path) -> Any:
    """The tokenizer, once the configuration has been loaded as well."""
    from transformers import AutoConfig, AutoTokenizer

    for what, loader in (("config.json", AutoConfig), ("the tokenizer", AutoTokenizer)):
        try:
            loaded = loader.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a file can be wrong with, transformers raises
            first = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointRefused(
                f"the checkpoint {directory} is refused: transformers cannot load {what}: {first}"
            ) from error
    return loaded


def _template_problems(tokenizer: Any) -> tuple[list[str], list[str]]:
    """What makes the template unusable, and what it only cannot do."""
    if not tokenizer.chat_template:
        return [
            "there is no chat template: none in tokenizer_config.json and no chat_template.jinja "
            "(a chat_template.json is read for processors only)"
        ], []
    problems = []
    for what, conversation in (("one turn", ONE_TURN), ("several turns", SEVERAL_TURNS)):
        text, error = _rendered(tokenizer, conversation)
        said = [message["content"] for message in conversation]
        if error:
            problems.append(f"the chat template refuses a conversation of {what}: {error}")
        elif lost := [content for content in said if content not in text]:
            problems.append(
                f"the chat template leaves out {len(lost)} of {len(said)} messages of {what}"
            )
    text, error = _rendered(tokenizer, WITH_SYSTEM)
    notes = []
    if not problems and (error or _SYSTEM not in text):
        notes.append(
            "the chat template "
            + (f"refuses messages of the system: {error}" if error else "ignores system messages")
        )
    return problems, notes


def _rendered(
    tokenizer: Any, conversation: Conversation, *, ask: bool = True
) -> tuple[str, str | None]:
    """The text of a conversation; or the empty one, and why there is none."""
    try:
        template = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
        return template.render(conversation, ask=ask), None
    except (TemplateFault, ValueError) as error:  # or there are several, and none is the default
        return "", " ".join(str(error).split())[:300]


def _end_of_answer(tokenizer: Any) -> int | None:
    """The first special token after an answer, unless it is one that begins a turn."""
    text, error = _rendered(tokenizer, _ANSWERED, ask=False)
    if error or _ANSWER not in text:
        return None
    special = {number for number, added in tokenizer.added_tokens_decoder.items() if added.special}

    def specials(part: str) -> list[int]:
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        return [number for number in ids if number in special]

    after = specials(text.rpartition(_ANSWER)[2])
    if not after:
        return None
    asked, _ = _rendered(tokenizer, ONE_TURN)
    before = specials(asked.partition(_QUESTION)[0])
    opening = specials(asked.rpartition(_QUESTION)[2])
    # What comes last before an answer begins it. What stands before that ends the question's turn,
    # and no turn begins with it, though a system message of the template's own may end with it.
    begins = {*before, *opening[-1:]} - set(opening[:-1][:1])
    return None if after[0] in begins else after[0]


def _write_ends(directory: Path, ends: list[int]) -> None:
    file = directory / GENERATION
    content = layout.parse_json(file.read_bytes(), GENERATION) if file.is_file() else {}
    text = json.dumps({**content, "eos_token_id": ends}, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, "utf-8")
