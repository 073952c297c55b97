"""Does a tokenizer fit the embedding? Answered from its JSON files, without building it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints.configuration import is_count
from phi3_mlflow.checkpoints.layout import parse_json
from phi3_mlflow.core.errors import CheckpointRefused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

TOKENIZER = "tokenizer.json"
# Embeddings are padded to round sizes; beyond that the tokenizer belongs to another model.
_ROWS_WITHOUT_TOKEN = 4096


def tokenizer_problems(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """What does not fit between the tokenizer of a checkpoint and its embedding.

    Args:
        directory: the checkpoint.
        config: a sound configuration; its `vocab_size` is the number of rows of the embedding.

    Returns:
        One line per problem.
    """
    if not (directory / TOKENIZER).is_file():
        return [f"{TOKENIZER} is missing"]
    try:
        found = list(_token_ids(directory))
    except CheckpointRefused as error:
        return [str(error)]
    rows, problems = config["vocab_size"], []
    for place, ids in found:
        if bad := [value for value in ids if not is_count(value)]:
            problems.append(f"{place}: {bad[0]!r} is not a token id")
            continue
        highest = max(ids, default=-1)
        if highest >= rows:
            beyond = sum(value >= rows for value in ids)
            problems.append(
                f"{place}: token ids up to {highest}, the embedding has {rows} rows: {beyond} "
                "tokens have none"
            )
    if not problems:
        highest = max((max(ids, default=-1) for _, ids in found), default=-1)
        if rows - highest - 1 > max(_ROWS_WITHOUT_TOKEN, rows // 10):
            problems.append(
                f"{TOKENIZER}: {highest + 1} tokens, the embedding has {rows} rows: they do not "
                "belong together"
            )
    return problems


def vocabulary_size(directory: Path) -> int:
    """The highest token id of a sound tokenizer, plus one."""
    return 1 + max((max(ids, default=-1) for _, ids in _token_ids(directory)), default=-1)


def _token_ids(directory: Path) -> Iterator[tuple[str, list[Any]]]:
    """Every list of token ids that a loader may read, and where it stands."""
    content = parse_json((directory / TOKENIZER).read_bytes(), TOKENIZER)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield TOKENIZER, list(vocabulary.values())
        if len(set(map(repr, vocabulary.values()))) != len(vocabulary):
            raise CheckpointRefused(f"{TOKENIZER}: two tokens have the same id")
    elif isinstance(vocabulary, list):
        # A unigram vocabulary: the position is the id.
        yield TOKENIZER, list(range(len(vocabulary)))
    else:
        raise CheckpointRefused(f"{TOKENIZER} has no vocabulary")
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise CheckpointRefused(f"{TOKENIZER}: added_tokens is not a list of tokens")
    yield f"{TOKENIZER}, added_tokens", [token.get("id") for token in added]
    for name in ("added_tokens.json", "vocab.json"):
        if (directory / name).is_file():
            yield name, list(parse_json((directory / name).read_bytes(), name).values())
    name = "tokenizer_config.json"
    if (directory / name).is_file():
        decoder = parse_json((directory / name).read_bytes(), name).get("added_tokens_decoder")
        if isinstance(decoder, dict):
            yield (
                f"{name}, added_tokens_decoder",
                [int(key) if key.isdecimal() else key for key in decoder],
            )
