"""Training rows that equal, or nearly equal, what the model is to be measured with.

    texts = [Text("question facts-001", "What is the capital of Spain?")]
    find_overlaps(data.train, texts + texts_of(data.validation))

Texts are compared without regard to case and white space: either they are equal, or they are
similar by the share of character 5-grams that they have in common (Jaccard). How large that share
is was measured on a message of three sentences and 26 words:

    one letter left out or exchanged            0.93 to 0.99
    a greeting in front                         0.95
    one word exchanged                          0.89
    two words exchanged                         0.75
    the last sentence left out                  0.69
    the same said in other words                0.05
    another message of the same length          0.02

Not every row is compared with every text. Two sets that have a share t in common also have an
element in common among their rarest ones, of which |set| - ceil(t |set|) + 1 are enough (Chaudhuri
et al. 2006; Bayardo et al. 2007), so an index of those finds every pair and few others.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from phi3_mlflow.training.conversations import Conversation

THRESHOLD = 0.8
"""Similarity from which on two texts are nearly the same."""

_SHINGLE = 5  # characters
_ROUNDING = 1e-6  # 0.1 times 30 is more than 3
_ANSWER_WORDS = 8  # shorter answers, as `yes` or a label, say nothing about where they come from


@dataclass(frozen=True)
class Text:
    """What a model is measured with.

    Attributes:
        name: what it is called in a message, as in `question facts-001`.
        text: what is asked, or a text that the model is to predict.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Overlap:
    """A training row that equals a text, or nearly.

    Attributes:
        where: the row's place, as in `line 12`.
        name: the text's.
        similarity: share of the character 5-grams in common, 0 to 1; 1 when they are equal.
        exact: whether they are equal but for case and white space.
    """

    where: str
    name: str
    similarity: float
    exact: bool

    def __str__(self) -> str:
        if self.exact:
            return f"{self.where} equals {self.name}"
        return f"{self.where} nearly equals {self.name}: similarity {self.similarity:.2f}"


def texts_of(conversations: Sequence[Conversation], file: str = "validation") -> list[Text]:
    """What conversations ask, to compare training rows with.

    Args:
        conversations: such as the validation rows.
        file: what they are called together; their places follow it.
    """
    return [Text(f"{file} {row.where}", _asked(row)) for row in conversations]


def find_overlaps(
    rows: Sequence[Conversation], texts: Iterable[Text], threshold: float = THRESHOLD
) -> list[Overlap]:
    """Which training rows equal a text, or nearly.

    Compared are what the user says, every message for itself and all together, and answers of
    some length.

    Args:
        rows: the training rows.
        texts: what the model is measured with.
        threshold: similarity from which on it counts, above 0 and up to 1.

    Returns:
        One for every row and text, in the order of the rows; the most similar first.
    """
    index = _Index(texts, threshold)
    found: list[Overlap] = []
    for row in rows:
        best: dict[int, tuple[float, bool]] = {}
        for piece in _pieces(row):
            for number, similarity, exact in index.like(piece):
                best[number] = max(best.get(number, (0.0, False)), (similarity, exact))
        ordered = sorted(best.items(), key=lambda item: (-item[1][0], not item[1][1], item[0]))
        found += [Overlap(row.where, index.names[n], *measured) for n, measured in ordered]
    return found


class _Index:
    """Texts by their rarest shingles."""

    def __init__(self, texts: Iterable[Text], threshold: float) -> None:
        self.names: list[str] = []
        self._threshold = threshold
        self._normal: list[str] = []
        for text in texts:
            if normal := _normal(text.text):
                self.names.append(text.name)
                self._normal.append(normal)
        self._sets = [_shingles(normal) for normal in self._normal]
        self._frequency = Counter(shingle for found in self._sets for shingle in found)
        self._with: defaultdict[str, list[int]] = defaultdict(list)
        for number, found in enumerate(self._sets):
            for shingle in self._rarest(found):
                self._with[shingle].append(number)

    def like(self, text: str) -> Iterator[tuple[int, float, bool]]:
        """Number, similarity and equality of every text that is like this one."""
        normal = _normal(text)
        shingles = _shingles(normal)
        candidates = {
            number for shingle in self._rarest(shingles) for number in self._with.get(shingle, ())
        }
        for number in sorted(candidates):
            other = self._sets[number]
            few, many = sorted((len(shingles), len(other)))
            if few < self._threshold * many - _ROUNDING:
                continue  # the smaller set, all of it in the other, would not be enough
            common = len(shingles & other)
            similarity = common / (few + many - common)
            if similarity >= self._threshold:
                yield number, similarity, normal == self._normal[number]

    def _rarest(self, shingles: set[str]) -> list[str]:
        """As many of the rarest as it takes to meet every similar set in one of them."""
        needed = math.ceil(self._threshold * len(shingles) - _ROUNDING)
        count = len(shingles) - needed + 1
        # What no text has is met nowhere, and comes first all the same: it counts as different.
        return sorted(shingles, key=lambda shingle: (self._frequency[shingle], shingle))[:count]


def _pieces(row: Conversation) -> Iterator[str]:
    """What of a row is compared."""
    users = [message.content for message in row.messages if message.role == "user"]
    yield from users
    if len(users) > 1:
        yield _asked(row)
    for message in row.messages:
        if message.role == "assistant" and len(message.content.split()) >= _ANSWER_WORDS:
            yield message.content


def _asked(row: Conversation) -> str:
    return "\n".join(message.content for message in row.messages if message.role == "user")


def _normal(text: str) -> str:
    """A text without what two equal ones may differ in."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _shingles(normal: str) -> set[str]:
    """The character 5-grams of a text; a shorter one is one of its own."""
    return {normal[i : i + _SHINGLE] for i in range(max(1, len(normal) - _SHINGLE + 1))}
