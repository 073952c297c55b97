"""How often the gate promotes a fine-tune that has gained nothing, and how large a gain it sees.

    python benchmarks/gate_false_promotions.py [--trials 100] [--rows 100] [--only power]

A tiny model learns which of five words belongs to each of some keys, three fifths of which occur in
what it is trained on. What is measured:

- Null fine-tunes. `labels shuffled`: judged against the base. `the same again`: other rows of the
  same kind, another seed, judged against the fine-tune before it; with few keys, so that rows set
  aside ask the same thing again and again, and with many. Each trial trains a model of its own and
  has rows of its own set aside. Two such models are not equal: each guesses what it was not taught
  in its own way. So every model is also asked every key, and a promotion is wrong when the model is
  not better there. Beside the gate stands the usual rule: promote when the score is higher.
- Power. Challengers that really know more keys than their champion, judged on so many rows drawn
  200 times from a large pool.

Every model is measured in full precision, with the code that measures versions. The general sets
are left out: what they add can only refuse more.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' tiny models

from _result import write_result

from phi3_mlflow.core import console
from phi3_mlflow.evaluation.baseline import measure_checkpoint
from phi3_mlflow.evaluation.gate import check_thresholds, trained_verdict
from phi3_mlflow.evaluation.measurement import Measurement
from phi3_mlflow.evaluation.sets import Sets
from phi3_mlflow.evaluation.settings import Margin, TrainedGateSettings
from phi3_mlflow.evaluation.task import Task, read_task, task_metrics
from phi3_mlflow.training.conversations import Conversation, Message
from phi3_mlflow.training.masking import TokenizedRow, tokenize_rows
from phi3_mlflow.training.task import write_validation
from phi3_mlflow.training.tokens import labels_of
from tests.fixtures.tiny_phi3 import make_tiny

BATCH = 32
FEW, MANY = 60, 300  # keys
WORDS = ("red", "blue", "green", "white", "black")
POOL = 1500  # rows that are drawn from for the power of the test
DRAWS = 200
STEPS_PER_KEY = 8  # of a challenger; more keys take longer to learn
WINDOW = 64
GATE = TrainedGateSettings(better={"task_accuracy": Margin(by=0)}, not_worse={})
"""The side of the gate that chance could pass; the other side can only refuse more."""


def label(key: int) -> str:
    """The word that belongs to a key."""
    return WORDS[(key * 7 + key // 5) % len(WORDS)]


def row(rng: random.Random, key: int, word: str) -> Conversation:
    """Noise around a key, and the word that is to be answered."""
    noise = "".join(rng.choice("abcdefgh") for _ in range(3))
    said = Message("user", f"{noise} k{key:03d}"), Message("assistant", word)
    return Conversation.of(said)


def rows(seed: int, count: int, keys: int, *, shuffled: bool = False) -> list[Conversation]:
    """Rows of the first keys, right or with their words in disorder."""
    rng = random.Random(seed)
    chosen = [rng.randrange(keys) for _ in range(count)]
    words = [label(key) for key in chosen]
    if shuffled:
        rng.shuffle(words)
    return [row(rng, key, word) for key, word in zip(chosen, words, strict=True)]


class Bench:
    """A base that knows what an answer looks like, and fine-tunes of it."""

    def __init__(self, folder: Path, keys: int) -> None:
        folder.mkdir()
        self.folder, self.keys = folder, keys
        self.known = 3 * keys // 5  # that occur in what is trained on
        self.base = folder / "base"
        make_tiny(self.base)
        self._pretrain()
        self._made = 0

    def _pretrain(self) -> None:
        """Teach the base to answer with one of the words, any of them."""
        made = tokenize_rows(
            self.base, rows(1, 1200, self.keys, shuffled=True), max_length=256
        ).rows
        model: Any = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        _fit(model, made, steps=200, learning_rate=3e-3, seed=0)
        model.save_pretrained(self.base)

    def tuned(self, data: Sequence[Conversation], seed: int, steps: int = 0) -> Path:
        """A fine-tune of the base; 0 steps are as many as its keys usually take."""
        self._made += 1
        place = self.folder / f"tuned-{self._made}"
        shutil.copytree(self.base, place)
        made = tokenize_rows(self.base, data, max_length=256).rows
        model: Any = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        steps = steps or (120 if self.keys == FEW else 400)
        _fit(model, made, steps=steps, learning_rate=1e-3, seed=seed)
        model.save_pretrained(place)
        return place

    def measured(self, checkpoint: Path, task: Task) -> Measurement:
        """The task alone."""
        return measure_checkpoint(checkpoint, Sets((), (), task=task), WINDOW)

    def more(self, seed: int, *, shuffled: bool) -> list[Conversation]:
        """Rows to train on."""
        return rows(seed, 8 * self.keys, self.known, shuffled=shuffled)

    def task(self, seed: int, count: int) -> Task:
        """Rows of all keys that are set aside."""
        return self._task(seed, rows(seed, count, self.keys))

    def census(self) -> Task:
        """Every key, once."""
        rng = random.Random(0)
        return self._task(-1, [row(rng, key, label(key)) for key in range(self.keys)])

    def _task(self, seed: int, data: Sequence[Conversation]) -> Task:
        held = self.folder / f"held-{seed}"
        make_tiny(held)
        write_validation(held, data, {one.id for one in data})
        task = read_task(held, "text", len(data))
        assert task is not None
        return task


def _fit(
    model: Any, data: Sequence[TokenizedRow], *, steps: int, learning_rate: float, seed: int
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        chosen = torch.randint(len(data), (BATCH,), generator=drawn).tolist()
        ids, labels = _batch([data[index] for index in chosen])
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _batch(some: Sequence[TokenizedRow]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(one.input_ids) for one in some)
    ids = torch.full((len(some), longest), 2)
    labels = torch.full((len(some), longest), -100)
    for place, one in enumerate(some):
        ids[place, : len(one.input_ids)] = torch.tensor(one.input_ids)
        labels[place, : len(one.input_ids)] = torch.tensor(labels_of(one))
    return ids, labels


def decided(found: Measurement, base: Measurement, champion: Measurement | None) -> str:
    """What the gate decides."""
    verdict = check_thresholds(found.metrics, {})
    uri = "models:/m/1" if champion else None
    return trained_verdict(verdict, found, base, champion, GATE, uri).decision


def null_trials(bench: Bench, name: str, number: int, count: int, *, shuffled: bool) -> list[Any]:
    """Fine-tunes that have gained nothing, through the gate and through a rule of raw scores."""
    gate, wrong, raw = Counter[str](), 0, 0
    before = None if shuffled else bench.tuned(bench.more(10**6, shuffled=False), 10**6)
    scores, census = [], bench.census()
    start = time.monotonic()
    for trial in range(number):
        now = bench.tuned(bench.more(trial, shuffled=shuffled), trial)
        task = bench.task(2 * 10**6 + trial, count)
        found, base = bench.measured(now, task), bench.measured(bench.base, task)
        champion = bench.measured(before, task) if before else None
        decision = decided(found, base, champion)
        gate[decision] += 1
        if decision == "promote":
            mine, theirs = (
                bench.measured(model, census).metrics["task_accuracy"]
                for model in (now, before or bench.base)
            )
            wrong += mine <= theirs
        raw += found.metrics["task_accuracy"] > (champion or base).metrics["task_accuracy"]
        scores.append(found.metrics["task_accuracy"])
        before = before and now
        seconds = (time.monotonic() - start) / (trial + 1)
        print(f"{name}: {trial + 1} of {number}, {seconds:.1f} s each, {dict(gate)}, "
              f"wrong {wrong}, raw {raw}", flush=True)  # fmt: skip
    shares = (sum(scores) / number, gate["promote"] / number, wrong / number, raw / number)
    return [name, number, *(f"{share:.0%}" for share in shares)]


def drawn(measurement: Measurement, chosen: Sequence[int]) -> Measurement:
    """The same model, as it would have been measured on some of the rows."""
    answers = tuple(measurement.task_answers[i] for i in chosen)
    scores = tuple(measurement.task_scores[i] for i in chosen)
    metrics = {**measurement.metrics, **task_metrics([a.correct for a in answers], scores)}
    return replace(measurement, task_answers=answers, task_scores=scores, metrics=metrics)


def power(bench: Bench, counts: Sequence[int]) -> list[list[Any]]:
    """How often a real gain is promoted, by its size and by the rows set aside."""
    task = bench.task(3 * 10**6, POOL)
    base = bench.measured(bench.base, task)
    champion = bench.measured(bench.tuned(rows(7, 480, 24), 7), task)
    rng = random.Random(11)
    table = []
    for keys in (27, 30, 36, 42, 48, 60):
        data = rows(7 + keys, 20 * keys, keys)
        found = bench.measured(bench.tuned(data, 7 + keys, STEPS_PER_KEY * keys), task)
        gain = found.metrics["task_accuracy"] - champion.metrics["task_accuracy"]
        cells: list[Any] = [f"{gain:+.1%}"]
        for count in counts:
            promoted = 0
            for _ in range(DRAWS):
                chosen = rng.sample(range(len(task.questions)), count)
                decision = decided(*(drawn(m, chosen) for m in (found, base, champion)))
                promoted += decision == "promote"
            cells.append(f"{promoted / DRAWS:.0%}")
        table.append(cells)
        print(cells, flush=True)
    return table


def main() -> None:
    """Run both parts and write two results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100, help="fine-tunes of `the same again`")
    parser.add_argument("--rows", type=int, default=100, help="rows set aside")
    parser.add_argument("--only", choices=("null", "power"), help="one part of it")
    chosen = parser.parse_args()
    console.set_quiet(True)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)  # a model so small gains nothing from more
        few = Bench(Path(folder) / "few", FEW)
        if chosen.only != "power":
            measure_null(few, Bench(Path(folder) / "many", MANY), chosen.trials, chosen.rows)
        if chosen.only != "null":
            measure_power(few)


def measure_null(few: Bench, many: Bench, trials: int, count: int) -> None:
    """Null fine-tunes: the first result."""
    again = "the same again, against the champion"
    table = [
        null_trials(few, "labels shuffled, against the base", trials // 2, count, shuffled=True),
        null_trials(few, f"{again}, {FEW} keys", trials, count, shuffled=False),
        null_trials(many, f"{again}, {MANY} keys", trials // 2, count, shuffled=False),
    ]
    write_result(
        "gate_false_promotions",
        f"Fine-tunes that have gained nothing, promoted; {count} rows set aside",
        [
            "null fine-tune",
            "trials",
            "mean accuracy",
            "promoted by the gate",
            "of all trials, promoted and not better on all keys",
            "promoted by raw scores",
        ],
        table,
        notes="A tiny model, all of its weights fine-tuned, measured in full precision. Each "
        "trial has a model and rows of its own. By raw scores: promoted when the share of "
        "right answers is higher than the other's. Rows that ask the same thing again and "
        "again, as with few keys, are less evidence than they are many.",
    )


def measure_power(few: Bench) -> None:
    """Real gains: the second result."""
    counts = (50, 100, 200)
    write_result(
        "gate_power",
        "How often the gate promotes a real gain",
        ["gain in accuracy, on 1,500 rows", *(f"{count} rows set aside" for count in counts)],
        power(few, counts),
        notes=f"{DRAWS} draws of the rows set aside from a pool of {POOL:,}; one champion and "
        "one challenger per line, tiny models that know more or fewer of the keys.",
    )


if __name__ == "__main__":
    main()
