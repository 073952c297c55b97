"""Token ids of conversations, and which of them carry loss: what the assistant says.

A model is trained on what it is to say itself: the assistant's answers, each with the token that
ends its turn, and nothing else. Which tokens those are is found by writing conversations out with
the checkpoint's own chat template: what `add_generation_prompt` ends with is where an answer
begins, and the first token after it that stops generation is where it ends. Where a template does
not allow that, the rows are refused; a mask that is wrong without a word would train a model that
never stops, or one that repeats its questions.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from phi3_mlflow.checkpoints.chat import stop_tokens
from phi3_mlflow.core.errors import UserError, problem_list
from phi3_mlflow.rows.faults import shown
from phi3_mlflow.training.conversations import Message, Role

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phi3_mlflow.training.conversations import Conversation

_LISTED = 20  # rows that are named one by one


@dataclass(frozen=True)
class TokenizedRow:
    """A conversation as the model sees it.

    Attributes:
        input_ids: its tokens, up to the end of its last answer.
        loss_mask: 1 for every token that carries loss, otherwise 0; as long as `input_ids`.
        id: the conversation's.
    """

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    id: str


@dataclass(frozen=True)
class TokenizedRows:
    """The rows that fit, and those that do not.

    Attributes:
        rows: those of at most `max_length` tokens, in order.
        too_long: the others, as in `line 12: 3,120 tokens`.
    """

    rows: tuple[TokenizedRow, ...]
    too_long: tuple[str, ...]
    _tokenizer: Any = field(repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def loss_tokens(self) -> int:
        """Those of them that carry loss."""
        return sum(sum(row.loss_mask) for row in self.rows)

    def shown(self, row: TokenizedRow) -> str:
        """What of a row carries loss, as text: one line for each answer, special tokens written."""
        spans: list[list[int]] = []
        before = 0
        for token, carries in zip(row.input_ids, row.loss_mask, strict=True):
            if carries and not before:
                spans.append([])
            if carries:
                spans[-1].append(token)
            before = carries
        texts = [self._tokenizer.decode(span, skip_special_tokens=False) for span in spans]
        return "\n".join("".join(map(_printable, text)) for text in texts)


def _printable(letter: str) -> str:
    return letter if letter.isprintable() else ascii(letter)[1:-1]


class _RowRefused(Exception):
    """Why a row cannot be masked."""


def tokenize_rows(
    checkpoint: Path, rows: Sequence[Conversation], *, max_length: int
) -> TokenizedRows:
    """Write conversations out with a checkpoint's chat template, and mark what carries loss.

    Args:
        checkpoint: a folder with the tokenizer, its chat template and the configuration.
        rows: the conversations.
        max_length: tokens per row; longer ones are left out, and named.

    Raises:
        UserError: there is no usable tokenizer or template, the mask of some row cannot be told or
            is not as it should be, or no row fits.
    """
    writer = _Writer(checkpoint)
    fitting: list[TokenizedRow] = []
    too_long: list[str] = []
    refused: list[str] = []
    for row in rows:
        try:
            made = writer.tokenized(row)
        except _RowRefused as reason:
            refused.append(f"{row.where}: {reason}")
            continue
        if len(made.input_ids) > max_length:
            too_long.append(f"{row.where}: {len(made.input_ids):,} tokens")
        else:
            fitting.append(made)
    if refused:
        raise UserError(_listed(f"{checkpoint}: rows that cannot be trained on", refused))
    if too_long and not fitting:
        headline = f"no row fits into max_length {max_length:,}"
        raise UserError(_listed(headline, too_long, "Raise max_length or shorten the rows."))
    return TokenizedRows(tuple(fitting), tuple(too_long), writer.tokenizer)


def _listed(headline: str, problems: Sequence[str], way_out: str = "") -> str:
    listed = list(problems[:_LISTED])
    if len(problems) > len(listed):
        listed.append(f"and {len(problems) - len(listed):,} more")
    return problem_list(headline, listed, way_out)


class _Writer:
    """Writes conversations out as one checkpoint reads them."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                str(checkpoint), trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"training needs the tokenizer of {checkpoint}: {error}") from error
        if not self.tokenizer.chat_template:
            raise UserError(f"{checkpoint}: its tokenizer has no chat template to train with")
        self.ends = frozenset(stop_tokens(checkpoint, self.tokenizer))
        if not self.ends:
            raise UserError(f"{checkpoint}: no token is named that ends an answer (eos_token_id)")
        self._ends_shown = " or ".join(map(self._token, sorted(self.ends)))
        self._markers = self._special_tokens_of_turns()

    def tokenized(self, row: Conversation) -> TokenizedRow:
        """A row's tokens and mask.

        Raises:
            _RowRefused: the mask cannot be told, or is not as it should be.
        """
        for number, message in enumerate(row.messages, start=1):
            if found := next((m for m in self._markers if m in message.content), None):
                raise _RowRefused(
                    f"message {number} holds {found}, which the model reads as the beginning or "
                    "the end of a turn"
                )
        text = self._text(row.messages)
        for number, message in enumerate(row.messages, start=1):
            if message.content.strip() not in text:
                raise _RowRefused(
                    f"the chat template leaves out or changes message {number}, of the "
                    f"{message.role}"
                )
        ids = self._ids(text)
        mask = [0] * len(ids)
        end = 0
        for number, message in enumerate(row.messages):
            if message.role == "assistant":
                begin, end = self._answer(text, ids, row.messages, number)
                mask[begin:end] = [1] * (end - begin)
        # What a template writes after the last answer trains nothing.
        made = TokenizedRow(tuple(ids[:end]), tuple(mask[:end]), row.id)
        self._check(made)
        return made

    def _answer(
        self, text: str, ids: list[int], messages: Sequence[Message], number: int
    ) -> tuple[int, int]:
        """Where in the tokens of a conversation an answer begins and ends.

        Args:
            text: the conversation, written out.
            ids: its tokens.
            messages: the conversation.
            number: which of them is the answer, from 0.
        """
        name = f"message {number + 1}, an answer,"
        asked = self._text(messages[:number], prompt=True)
        prompt = self._ids(asked)
        begin = len(prompt)
        if ids[:begin] != prompt or not text.startswith(asked):
            raise _RowRefused(
                f"the tokens before {name} are others when the answer follows than when it is "
                "asked for. Either the chat template writes a conversation differently once it "
                "goes on, or the answer begins with white space that becomes one token with what "
                "stands before it"
            )
        last = number + 1 == len(messages)
        alone = text if last else self._text(messages[: number + 1])
        tokens = ids if last else self._ids(alone)
        end = next((i for i in range(begin, len(tokens)) if tokens[i] in self.ends), -1) + 1
        if not end:
            raise _RowRefused(
                f"the chat template writes no token that stops generation ({self._ends_shown}) "
                f"after {name} so that a model trained on it would never stop"
            )
        if tokens[:end] != ids[:end]:
            raise _RowRefused(
                f"the chat template writes {name} differently once the conversation goes on"
            )
        self._refuse_additions(alone[len(asked) :], messages[number].content.strip(), name)
        return begin, end

    def _refuse_additions(self, written: str, content: str, name: str) -> None:
        """Refuse a template that makes the assistant say more than an answer and its end."""
        before, _, after = written.partition(content)
        if before.strip():
            raise _RowRefused(
                f"the chat template writes {shown(before)} before {name} and does not "
                "with add_generation_prompt: the model would be asked without it"
            )
        if not after.lstrip().startswith(tuple(map(self._token, self.ends))):
            raise _RowRefused(
                f"the chat template writes {shown(after)} after {name} and not at once the token "
                f"that stops generation ({self._ends_shown})"
            )

    def _check(self, row: TokenizedRow) -> None:
        """Refuse a mask that cannot be right, however it came about."""
        if not any(row.loss_mask):
            raise _RowRefused("no token carries loss")
        if all(row.loss_mask):
            raise _RowRefused("every token carries loss, also what the assistant does not say")
        if row.input_ids[-1] not in self.ends or not row.loss_mask[-1]:
            raise _RowRefused(f"the last answer is not ended by {self._ends_shown}")
        begin = self.tokenizer.bos_token_id
        if begin is not None and row.input_ids[:2] == (begin, begin):
            raise _RowRefused(f"begins with {self._token(begin)} twice")

    def _text(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """A conversation, written out by the template."""
        said = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template raises whatever it was written to raise
            raise _RowRefused(f"the chat template refuses it: {error}") from None
        return str(text)

    def _ids(self, text: str) -> list[int]:
        # What the template wrote is complete: adding special tokens would double the first one.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _token(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def _special_tokens_of_turns(self) -> list[str]:
        """The special tokens that the template writes around what is said, and those that stop."""
        special = {
            number: added.content
            for number, added in self.tokenizer.added_tokens_decoder.items()
            if added.special
        }
        written = set(self.ends)
        roles = get_args(Role)
        for turns in (roles, roles[1:]):  # some templates refuse a message of the system
            with suppress(_RowRefused):
                # The first token may begin every text, and then begins no turn.
                written.update(self._ids(self._text([Message(role, "x") for role in turns]))[1:])
        return sorted(special[number] for number in written if number in special)
