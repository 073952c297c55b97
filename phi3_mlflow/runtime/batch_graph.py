"""The ONNX graph of a decoder, with key-value memory for several sequences side by side.

onnxruntime-genai's own generators take the prompts of a batch all at once at its beginning, so
nobody could join later or keep what was computed. Here onnxruntime runs the same graph on memory
that this module owns: one slot per sequence, each with a length of its own, which is what the
operator GroupQueryAttention takes (`attention_mask` gives the lengths, padded on the right).
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from .genai_config import Decoder

# Memory grows in steps of this many tokens per slot, and at least by half.
_STEP = 256
_PAGE = mmap.PAGESIZE
_KINDS: dict[str, type[np.generic[Any]]] = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
"""What keys and values can be kept as."""


class NotBatchable(ValueError):
    """This model, or this setting, cannot be computed for several sequences at once.

    The message goes on from "the model".
    """


class BatchGraph:
    """A graph in onnxruntime, on the CPU.

    Kernels compute an even number of slots two by two, and a last odd one by itself, which rounds
    differently. Every call therefore has an even number of slots, a spare one among them if need
    be: so what comes out for a sequence is the same to the last bit whatever is computed with it.

    Args:
        folder: holds genai_config.json and the graph it names.
        decoder: what that file says of the graph.
        threads: processor threads.
        slots: sequences that it holds at most.
        context: tokens that one sequence may have.

    Raises:
        NotBatchable: the graph does not take what this module gives.
    """

    def __init__(
        self, folder: Path, decoder: Decoder, threads: int, slots: int, context: int
    ) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(
            str(folder / decoder.filename), options, providers=["CPUExecutionProvider"]
        )
        self.slots = slots + slots % 2
        self._most = context + 2  # a spare token behind the last one, and it rounds to even
        self._heads = decoder.heads
        self._size = decoder.head_size
        self._ids, self._mask = decoder.input_ids, decoder.attention_mask
        self._logits, self._names = decoder.logits, decoder.cache
        self._check()
        self.vocabulary = int(self._session.get_outputs()[0].shape[-1])
        self.capacity = 0
        self._memory: list[_KvMemory] = []

    def _check(self) -> None:
        wanted = {self._ids, self._mask, *(past for past, _ in self._names)}
        inputs = {value.name: value.type for value in self._session.get_inputs()}
        if set(inputs) != wanted:
            names = ", ".join(sorted(set(inputs) ^ wanted)[:3])
            raise NotBatchable(f"has a graph with other inputs than expected: {names}")
        if {inputs[self._ids], inputs[self._mask]} != {"tensor(int64)"}:
            raise NotBatchable("has a graph that does not take tokens as int64")
        outputs = {value.name: value.type for value in self._session.get_outputs()}
        kept = {inputs[past] for past, _ in self._names}
        kept |= {outputs[present] for _, present in self._names}
        if outputs[self._logits] != "tensor(float)" or len(kept) > 1 or not kept <= set(_KINDS):
            kinds = sorted({outputs[self._logits], *kept})
            raise NotBatchable(f"has a cache or logits of {', '.join(kinds)}")
        self._kind = _KINDS[kept.pop()]

    def reserve(self, tokens: int, lengths: dict[int, int]) -> None:
        """Have room for `tokens` in every slot.

        Args:
            tokens: of the longest sequence.
            lengths: slot: tokens in use, of the slots to be kept.
        """
        if tokens <= self.capacity:
            return
        capacity = max(tokens, self.capacity * 3 // 2)
        capacity = min(-(-capacity // _STEP) * _STEP, max(self._most, tokens))
        shape = (self.slots, self._heads, capacity, self._size)
        larger = [_KvMemory(shape, self._kind) for _ in self._names]
        for old, new in zip(self._memory, larger, strict=False):
            for slot, length in lengths.items():
                new.array[slot, :, :length] = old.array[slot, :, :length]
        # Only now: where there was no room for it, the graph must not write beyond what there is.
        self._memory, self.capacity = larger, capacity

    def run(
        self, first: int, tokens: NDArray[np.int64], lengths: Sequence[int]
    ) -> NDArray[np.float32]:
        """Compute tokens of neighbouring slots.

        Args:
            first: the first slot.
            tokens: int64, shape (R, T), R x T even.
            lengths: of each of the R slots, the tokens it has with the new ones.

        Returns:
            Logits, float32, shape (R, T, V).
        """
        slots = len(tokens)
        mask = np.arange(max(lengths))[None] < np.asarray(lengths)[:, None]
        mask = mask.astype(np.int64)
        logits = np.empty((*tokens.shape, self.vocabulary), dtype=np.float32)
        binding = self._session.io_binding()
        for name, given in ((self._ids, tokens), (self._mask, mask)):
            binding.bind_input(name, "cpu", 0, np.int64, given.shape, given.ctypes.data)
        shape = (slots, self._heads, self.capacity, self._size)
        for (past, present), memory in zip(self._names, self._memory, strict=True):
            address = memory.array[first:].ctypes.data
            binding.bind_input(past, "cpu", 0, self._kind, shape, address)
            binding.bind_output(present, "cpu", 0, self._kind, shape, address)
        binding.bind_output(self._logits, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits

    def save(self, slot: int, length: int) -> list[NDArray[Any]]:
        """A copy of the first tokens of a slot."""
        return [memory.array[slot, :, :length].copy() for memory in self._memory]

    def load(self, slot: int, saved: list[NDArray[Any]], length: int) -> None:
        """Put the first tokens of a copy into a slot."""
        for memory, kept in zip(self._memory, saved, strict=True):
            memory.array[slot, :, :length] = kept[:, :length]

    def move(self, slot: int, to: int, length: int) -> None:
        """Copy the first tokens of a slot to another one."""
        for memory in self._memory:
            memory.array[to, :, :length] = memory.array[slot, :, :length]

    def forget(self, slot: int) -> None:
        """Give the memory behind a slot back to the machine."""
        for memory in self._memory:
            memory.forget(slot)


class _KvMemory:
    """Zeros, of which only what is written takes up memory."""

    def __init__(self, shape: tuple[int, int, int, int], kind: type[np.generic]) -> None:
        self._slot_bytes = np.dtype(kind).itemsize * shape[1] * shape[2] * shape[3]
        size = shape[0] * self._slot_bytes
        if hasattr(mmap, "MAP_PRIVATE"):  # pages of a shared one would not be given back
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._map = mmap.mmap(-1, size)
        self.array = np.frombuffer(self._map, dtype=kind).reshape(shape)

    def forget(self, slot: int) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        begin = -(-slot * self._slot_bytes // _PAGE) * _PAGE
        end = (slot + 1) * self._slot_bytes // _PAGE * _PAGE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)
