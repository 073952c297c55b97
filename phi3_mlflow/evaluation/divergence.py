"""How far a quantized model's next-token distribution is from the reference's, on held-out text.

For every place of a text: the reference's distribution p, the candidate's q, and the token t that
follows. Reported over all places: perplexity of each, exp(mean -log q(t)); the mean of the
divergence KL(p || q) = sum p log(p / q), in nats; and how often the same token is likeliest to
both.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from phi3_mlflow.evaluation.logits import LogitSource

    Array = NDArray[Any]


MOST_ROWS = 32  # onnxruntime-genai takes no larger batch
_PLACES = 32  # whose distributions are compared at once: what that takes stays in the cache


@dataclass(frozen=True)
class TextScore:
    """Sums over the places of one text."""

    text_id: str
    places: int
    candidate_nll: float
    reference_nll: float
    kl: float
    agreements: int


def read_scores(file: Path) -> list[TextScore]:
    """What an evaluation wrote, one JSON object a line."""
    return [TextScore(**json.loads(line)) for line in file.read_text("utf-8").splitlines()]


@dataclass(frozen=True)
class Divergence:
    """What was found on all texts."""

    scores: tuple[TextScore, ...]

    def metrics(self) -> dict[str, float]:
        """Metric to value.

        Returns:
            `perplexity`, `perplexity_reference`, `perplexity_ratio`, `kl_mean` (nats),
            `top1_agreement` (share) and `scored_tokens`.
        """
        places = sum(score.places for score in self.scores)
        candidate = math.exp(sum(score.candidate_nll for score in self.scores) / places)
        reference = math.exp(sum(score.reference_nll for score in self.scores) / places)
        return {
            "perplexity": candidate,
            "perplexity_reference": reference,
            "perplexity_ratio": candidate / reference,
            "kl_mean": sum(score.kl for score in self.scores) / places,
            "top1_agreement": sum(score.agreements for score in self.scores) / places,
            "scored_tokens": float(places),
        }


def compare(
    reference: LogitSource,
    candidate: LogitSource,
    texts: Sequence[tuple[str, Sequence[int]]],
    window: int,
    advance: Callable[[int], None] = lambda amount: None,
    batch_tokens: int = 0,
) -> Divergence:
    """Compare two models on texts.

    Args:
        reference: the full-precision model.
        candidate: the model that is compared with it.
        texts: name and token ids of each text.
        window: a longer text is scored in pieces of this many tokens, each on its own.
        advance: is told how many tokens have been scored.
        batch_tokens: so many places, padding included, are scored at once; 0 for one piece at a
            time. The logits of both models are held for as many: 8 bytes per place and token of
            the vocabulary.
    """
    import numpy as np

    totals = {text_id: np.zeros(5) for text_id, _ in texts}
    pieces = cut(texts, window)
    for group in batches([len(ids) for _, ids in pieces], batch_tokens):
        together = [pieces[index][1] for index in group]
        p, q = reference.logits(together), candidate.logits(together)
        for place, index in enumerate(group):
            text_id, ids = pieces[index]
            totals[text_id] += _piece(p[place], q[place], ids)
            advance(len(ids))
        del p, q  # before the next are made: they are the largest things there are
    scores = []
    for text_id, total in totals.items():
        places, candidate_nll, reference_nll, kl, agreements = (float(value) for value in total)
        scores.append(
            TextScore(text_id, int(places), candidate_nll, reference_nll, kl, int(agreements))
        )
    return Divergence(tuple(score for score in scores if score.places))


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group pieces of like length, so that there is little padding.

    Args:
        lengths: of the pieces.
        batch_tokens: places at most in a group, padding included; a longer piece is a group.

    Returns:
        Every index once; groups one after another.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        full = (len(group) + 1) * lengths[index] > batch_tokens or len(group) == MOST_ROWS
        if group and full:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def windows(tokens: Sequence[int], window: int) -> Iterator[Sequence[int]]:
    """Cut a text into pieces; a last piece of one token has nothing to predict and is left out."""
    for start in range(0, len(tokens), window):
        piece = tokens[start : start + window]
        if len(piece) > 1:
            yield piece


def cut(texts: Iterable[tuple[str, Sequence[int]]], window: int) -> list[tuple[str, Array]]:
    """The pieces of all texts: the text's name, and int32 token ids."""
    import numpy as np

    return [
        (text_id, np.asarray(piece, dtype=np.int32))
        for text_id, tokens in texts
        for piece in windows(tokens, window)
    ]


def _piece(p_logits: Array, q_logits: Array, tokens: Array) -> Array:
    """Sums over the places of a piece: places, candidate NLL, reference NLL, KL, agreements."""
    import numpy as np

    following = tokens[1:].astype(np.int64)
    total = np.zeros(5)
    for start in range(0, len(following), _PLACES):
        places = slice(start, min(start + _PLACES, len(following)))
        total += _places(p_logits[places], q_logits[places], following[places])
    return total


def _places(p_logits: Array, q_logits: Array, following: Array) -> Array:
    import numpy as np
    import torch

    p = torch.log_softmax(torch.from_numpy(np.ascontiguousarray(p_logits)), -1)
    q = torch.log_softmax(torch.from_numpy(np.ascontiguousarray(q_logits)), -1)
    # A padded vocabulary may give one model more columns than the other; they mean nothing.
    columns = min(p.shape[1], q.shape[1])
    p, q = p[:, :columns], q[:, :columns]
    ids = torch.from_numpy(following)[:, None]
    kl = (p.exp() * (p - q)).sum(-1)
    return np.array(
        [
            len(following),
            -q.gather(1, ids).double().sum().item(),
            -p.gather(1, ids).double().sum().item(),
            kl.double().clamp_min(0).sum().item(),
            (p.argmax(-1) == q.argmax(-1)).sum().item(),
        ]
    )


def tokenize(
    model_directory: Path, texts: Iterable[tuple[str, str]]
) -> list[tuple[str, list[int]]]:
    """Turn texts into token ids with the tokenizer in a model's folder."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_directory / "tokenizer.json"))
    return [(name, tokenizer.encode(text).ids) for name, text in texts]
