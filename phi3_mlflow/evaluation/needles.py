"""Long prompts with one sentence to find in them, put together from recipes."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.evaluation.datasets import load_calibration, load_heldout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phi3_mlflow.evaluation.items import Needle


@lru_cache(maxsize=1)
def _shipped_haystack() -> tuple[str, ...]:
    plain = [row.text for row in load_calibration() if row.text is not None]
    return (*(row.text for row in load_heldout()), *plain)


def build_needle_prompt(
    row: Needle,
    tokenizer_len_fn: Callable[[str], int],
    haystack: Sequence[str] | None = None,
) -> list[dict[str, str]]:
    """Assemble the long prompt of one recipe; the same inputs always give the same prompt.

    Input: the recipe; a function that counts the tokens of a text; documents to hide the needle
    in (default: the shipped held-out and calibration texts, starting at a place drawn from the
    row's id). Output: one user message whose content measures at most `target_tokens` and hardly
    less, the needle standing as a paragraph of its own nearest to `depth`. The chat template's
    own tokens come on top. Errors: UserError when the haystack is too short for the target, or the
    target for the question.
    """
    documents = list(_shipped_haystack() if haystack is None else haystack)
    start = int(hashlib.sha256(row.id.encode()).hexdigest()[:8], 16) % max(1, len(documents))
    head = "Read the following notes. A question about one of them comes at the end."
    tail = f"Question: {row.question}"
    budget = row.target_tokens - tokenizer_len_fn("\n\n".join([head, row.needle, tail]))
    if budget <= 0:
        raise UserError(f"needle {row.id}: target_tokens {row.target_tokens} leaves no room")
    body: list[str] = []
    sizes: list[int] = []
    for document in documents[start:] + documents[:start]:
        for paragraph in filter(str.strip, document.split("\n\n")):
            if sum(sizes) < budget:
                body.append(paragraph)
                sizes.append(tokenizer_len_fn(paragraph + "\n\n"))
    if sum(sizes) < budget:
        raise UserError(
            f"needle {row.id}: the haystack holds {sum(sizes)} tokens, "
            f"but target_tokens {row.target_tokens} needs {budget}"
        )

    def prompt() -> str:
        depth, place, passed = row.depth * sum(sizes), 0, 0
        while place < len(sizes) and passed + sizes[place] / 2 < depth:
            passed += sizes[place]
            place += 1
        return "\n\n".join([head, *body[:place], row.needle, *body[place:], tail])

    while body and (over := tokenizer_len_fn(prompt()) - row.target_tokens) > 0:
        words = body[-1].split(" ")
        body[-1] = " ".join(words[: -max(1, over // 2)])
        sizes[-1] = tokenizer_len_fn(body[-1])
        if not body[-1].strip():
            del body[-1], sizes[-1]
    return [{"role": "user", "content": prompt()}]
