"""A header is read as the reference implementation reads it, or refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from phi3_mlflow.checkpoints.safetensors_header import TensorEntry, read_header, read_metadata
from phi3_mlflow.core.errors import CheckpointRefused
from tests.sources.raw_checkpoint import safetensors_bytes, with_header

SAME_FILE = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "a": ("F32", (2, 3)),
    "b": ("BF16", (4,)),
    "c": ("I8", ()),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_where_tensors_lie(file: Path) -> None:
    file.write_bytes(safetensors_bytes(TENSORS))
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert read_header(file) == {
        "a": TensorEntry("F32", (2, 3), start, 24),
        "b": TensorEntry("BF16", (4,), start + 24, 8),
        "c": TensorEntry("I8", (), start + 32, 1),
    }
    assert read_metadata(file) == {"format": "pt"}


@SAME_FILE
@given(
    arrays=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        hnp.arrays(
            st.sampled_from(["float32", "float16", "int8", "uint16", "int64", "bool"]),
            hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
        ),
        max_size=5,
    )
)
def test_reads_what_the_library_writes(file: Path, arrays: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file(arrays, str(file))
    found = read_header(file)
    content = file.read_bytes()
    assert set(found) == set(arrays)
    for name, entry in found.items():
        assert entry.shape == arrays[name].shape
        assert content[entry.offset : entry.offset + entry.nbytes] == arrays[name].tobytes()


@SAME_FILE
@given(data=st.data())
def test_a_changed_file_is_refused_or_reads_as_the_library_reads_it(
    file: Path, data: st.DataObject
) -> None:
    """Whatever passes here passes the reference implementation, and means the same there."""
    from safetensors import safe_open

    content = bytearray(safetensors_bytes(TENSORS))
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, header_end - 1))
        content[position] = data.draw(st.sampled_from(b'0123456789{}[]",:aF\\ \x00\xff'))
    del content[data.draw(st.integers(header_end - 10, len(content))) :]
    file.write_bytes(content)
    try:
        found = read_header(file)
    except CheckpointRefused:
        return
    with safe_open(str(file), "numpy") as library:
        assert set(library.keys()) == set(found)
        for name, entry in found.items():
            assert tuple(library.get_slice(name).get_shape()) == entry.shape
            assert library.get_slice(name).get_dtype() == entry.dtype


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_or_read(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        entries = read_header(file)
    except CheckpointRefused as refused:
        assert file.name in str(refused)  # noqa: PT017
        return
    assert sum(entry.nbytes for entry in entries.values()) < len(content)


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Change the entry of tensor `a`."""
    return lambda header: header["a"].update(values)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(shape=[2, 4]), "takes 32 bytes"),
        (change(shape=[2, 3, 0]), "takes 0 bytes"),
        (change(shape=[-2, -3]), "not a list of up to 8 sizes"),
        (change(shape=[2.0, 3]), "not a list of up to 8 sizes"),
        (change(shape=[True, 6]), "not a list of up to 8 sizes"),
        (change(shape=[2**60, 2**60]), "not a list of up to 8 sizes"),
        (change(shape="2,3"), "not a list of up to 8 sizes"),
        (change(shape=[1] * 9), "not a list of up to 8 sizes"),
        (change(dtype="F64"), "takes 48 bytes"),
        (change(dtype="F4"), "dtype 'F4' is not among"),
        (change(dtype=["F32"]), "is not among"),
        (change(data_offsets=[24, 0]), "are not"),
        (change(data_offsets=[-24, 0]), "are not"),
        (change(data_offsets=[0, 24, 48]), "are not"),
        (change(data_offsets=[0, "24"]), "are not"),
        (change(data_offsets=[0, 2**70]), "are not"),
        (change(data_offsets=[4, 28]), "a hole of 4 bytes lies before 'a'"),
        (change(data_offsets=[24, 48]), "a hole of 24 bytes"),
        (change(extra=1), "exactly the keys"),
        (lambda header: header["a"].pop("dtype"), "exactly the keys"),
        (lambda header: header.update(a=[1]), "exactly the keys"),
        (lambda header: header["b"].update(data_offsets=[20, 28]), "overlaps 'a' by 4 bytes"),
        (lambda header: header.pop("c"), "end at byte"),
        (lambda header: header.update(__metadata__={"format": 1}), "must map text to text"),
        (lambda header: header.update(__metadata__="pt"), "must map text to text"),
    ],
)
def test_lies_are_refused(
    file: Path, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    file.write_bytes(safetensors_bytes(TENSORS, change=spoil))
    with pytest.raises(CheckpointRefused, match=r"safetensors header") as refused:
        read_header(file)
    assert message in str(refused.value)
    assert refused.value.exit_code == 2


ONE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"\x00" * 7, "7 bytes"),
        (b"\x00" * 8, "does not start with"),
        (struct.pack("<Q", 2**63) + b"{}", "at most 100000000"),
        (struct.pack("<Q", 100_000_000) + b"{}", "it is cut off"),
        (with_header(b"[]", b""), "does not start with"),
        (with_header(b'{"a": }', b""), "unreadable"),
        (with_header(b'{"a": "\xff"}', b""), "unreadable"),
        (with_header(b'{"a": ' + b"[" * 100_000, b""), "unreadable"),
        (with_header(b'{"a": ' + b"9" * 5000 + b"}", b""), "unreadable"),
        (with_header(b"{" + ONE + b"," + ONE + b"}", bytes(4)), "'a' appears twice"),
        (
            with_header(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1]}}', b""),
            "'dtype' appears twice",
        ),
        (with_header(b"{" + ONE + b"}", bytes(3)), "it is cut off"),
        (with_header(b"{" + ONE + b"}", bytes(5)), "the file has"),
        (with_header(b"{" + ONE + b"}x", bytes(4)), "unreadable"),
    ],
)
def test_broken_files_are_refused(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(CheckpointRefused) as refused:
        read_header(file)
    assert message in str(refused.value)


def test_many_problems_are_counted(file: Path) -> None:
    header = {f"t{i}": {"dtype": "F3"} for i in range(100)}
    file.write_bytes(with_header(json.dumps(header).encode(), b""))
    with pytest.raises(CheckpointRefused, match=r"and 80 more"):
        read_header(file)
