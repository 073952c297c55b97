"""The logits of a checkpoint on texts that are known beforehand, without loading it as a whole.

A checkpoint is run layer by layer over all texts at once. What is kept for each place of a text is
the state that the head sees, in float32: its product with the head is the place's logits, all of
them, so that nothing is lost and little is stored (Phi-3-mini: 12 kB a place instead of 128 kB).
The states lie in the step cache by the content of the checkpoint, the texts' token ids and the
code, so that of a reference they are computed once, whatever is compared with it. A run that is
killed goes on after the last layer whose states were kept.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from phi3_mlflow.artifacts.cache import StepCache, key_of
from phi3_mlflow.artifacts.code_keys import closure, library_versions
from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.artifacts.unfinished import drop_kept_folder, kept_folder
from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.core import console
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.evaluation.logits import OnnxLogits
from phi3_mlflow.evaluation.model_files import ONNX_CONFIG
from phi3_mlflow.layers import head
from phi3_mlflow.layers.decoder import Decoder, arithmetic
from phi3_mlflow.layers.forward import final_states, work
from phi3_mlflow.layers.kept import KeptStates
from phi3_mlflow.layers.states import States

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from phi3_mlflow.evaluation.logits import LogitSource

    Array = NDArray[Any]

STEP = "states"
"""Under which name the states lie in the step cache."""

BATCH_TOKENS = 1024
"""Places whose logits are worked on at once."""

_FILE = "states.f32"
_MOST_LOGITS = 1 << 26  # of one model, held at once: 256 MiB


class StreamedLogits:
    """Logits of a checkpoint on texts that it was run over.

    Args:
        decoder: the checkpoint.
        pieces: token ids of the texts, int32 (S,) each.
        states: what `final_states` made of them.
        dtype: what matrices are multiplied in.
    """

    def __init__(
        self, decoder: Decoder, pieces: Sequence[Array], states: States, dtype: torch.dtype
    ) -> None:
        self._decoder, self._states, self._dtype = decoder, states, dtype
        self._starts: dict[bytes, int] = {}
        start = 0
        for piece in pieces:
            self._starts[piece.tobytes()] = start
            start += len(piece)

    @property
    def vocabulary(self) -> int:
        """Tokens that a logit is given for."""
        return self._decoder.vocabulary

    def logits(self, pieces: Sequence[Array]) -> list[Array]:
        """Token ids (S,) of some of the texts to logits (S, vocabulary)."""
        starts = [self._starts[piece.tobytes()] for piece in pieces]
        lengths = [len(piece) for piece in pieces]
        rows = [
            self._states.read(start, start + length)
            for start, length in zip(starts, lengths, strict=True)
        ]
        found = head.logits(self._decoder, torch.cat(rows), self._dtype)
        return [part.numpy() for part in torch.split(found, lengths)]


def together(vocabulary: int, batch_tokens: int = BATCH_TOKENS) -> int:
    """Places whose logits are held at once: fewer than so many where the vocabulary is large."""
    return min(batch_tokens, _MOST_LOGITS // vocabulary)


@contextmanager
def open_logits(
    model: Path, pieces: Sequence[Array], store: StepCache | None = None
) -> Iterator[LogitSource]:
    """The logits of a model on texts, whichever runtime its files are for.

    Args:
        model: a folder with an ONNX model or a checkpoint.
        pieces: token ids of the texts, int32 (S,) each; no others can be asked about.
        store: where the states of a checkpoint are kept.
    """
    if (model / ONNX_CONFIG).is_file():
        yield OnnxLogits(model)
    else:
        with streamed(model, pieces, store) as source:
            yield source


@contextmanager
def streamed(
    checkpoint: Path, pieces: Sequence[Array], store: StepCache | None = None
) -> Iterator[StreamedLogits]:
    """Run a checkpoint over texts, or find what it made of them.

    Args:
        checkpoint: its folder.
        pieces: token ids of the texts, int32 (S,) each; every piece stands for itself.
        store: where the states are kept; None keeps them until the block ends only.
    """
    reader = CheckpointReader(checkpoint)
    decoder, dtype = Decoder(checkpoint, reader), arithmetic(reader)
    if store is None:
        yield StreamedLogits(decoder, pieces, _run(decoder, pieces, dtype, None), dtype)
        return
    parts = _parts(checkpoint, pieces, dtype, store)
    key = key_of(parts)
    with store.locked(STEP, key):
        entry = store.find(STEP, key)
        if entry is None:
            origin = {"parts": parts, "time": time.time()}
            with (
                kept_folder(store, STEP, key) as unfinished,
                store.building(STEP, key, origin) as out,
            ):
                states = _run(decoder, pieces, dtype, out, unfinished)
                with (out / _FILE).open("wb") as stream:
                    states.save(stream)
                del states
            drop_kept_folder(store, STEP, key)
            entry = store.find(STEP, key)
        else:
            console.say("  full precision: computed before on the same texts")
    if entry is None:
        raise RuntimeError("the hidden states that were just written are not whole")
    with store.using([entry]):
        kept = States.stored(entry.path / _FILE, decoder.hidden)
        yield StreamedLogits(decoder, pieces, kept, dtype)


def _run(
    decoder: Decoder,
    pieces: Sequence[Array],
    dtype: torch.dtype,
    folder: Path | None,
    unfinished: Path | None = None,
) -> States:
    """Compute the states.

    Args:
        decoder: the checkpoint.
        pieces: token ids of the texts, int32 (S,) each.
        dtype: what matrices are multiplied in.
        folder: for states that are too many for memory.
        unfinished: where they are kept on the way; a run that was killed goes on from there.
    """
    ids = [torch.from_numpy(piece).to(torch.int64) for piece in pieces]
    places = sum(map(len, ids))
    console.say(
        f"  full precision: {decoder.layers} layers over {places:,} tokens, computed in "
        f"{str(dtype).removeprefix('torch.')}"
    )
    kept = KeptStates(unfinished, decoder.hidden, places) if unfinished else None
    begun = kept.find() if kept else None
    done = begun[0] if begun else 0
    name = f"full precision, from layer {done} on" if done else "full precision"
    with show_progress(name, work(decoder, places, done), "share") as meter:
        return final_states(
            decoder,
            ids,
            meter,
            dtype=dtype,
            folder=folder,
            border=kept.save if kept else None,
            begun=begun,
        )


def _parts(
    checkpoint: Path, pieces: Sequence[Array], dtype: torch.dtype, store: StepCache
) -> dict[str, Any]:
    """Everything that decides the states."""
    texts = hashlib.sha256()
    for piece in pieces:
        texts.update(f"{len(piece)} ".encode() + piece.astype("<i4").tobytes())
    computing = closure((final_states.__module__, Decoder.__module__))
    return {
        "checkpoint": weights_of(checkpoint, store),
        "texts": texts.hexdigest(),
        "arithmetic": str(dtype),
        "code": computing.hashes(),
        "libraries": library_versions([computing]),
    }


def weights_of(checkpoint: Path, store: StepCache) -> dict[str, str]:
    """The hash of each file that decides what a checkpoint computes, as hex."""
    entry = store.holding(checkpoint)
    return {
        file.name: (entry and entry.manifest.sha256_of(file.name)) or sha256_of_file(file)
        for file in [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]
    }
