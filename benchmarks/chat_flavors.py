"""The ONNX flavor against the transformers flavor: time to the first token, and decoding.

python benchmarks/chat_flavors.py --onnx DIR --checkpoint DIR
"""

from __future__ import annotations

import statistics
from typing import Any

from _result import write_result
from chat_common import arguments, ask, store, timed_stream

TOKENS = 24
PROMPT = (
    "The harbour of the town lies behind a long wall of stone, and the boats come in late. " * 5
)


def main() -> None:
    options = arguments(__doc__ or "", "onnx", "checkpoint")
    import mlflow

    from phi3_mlflow.flavors.onnx import log_onnx
    from phi3_mlflow.flavors.transformers import log_transformers

    config = {"prefix_cache_mb": 0, "threads": options.threads}
    with store():
        checkpoint = options.checkpoint
        uris = {
            "onnx int4": log_onnx(options.onnx, name="onnx", model_config=config).model_uri,
            "transformers bf16": log_transformers(
                checkpoint, name="bf16", dtype="bfloat16", model_config=config
            ).model_uri,
            "transformers fp32": log_transformers(
                checkpoint, name="fp32", dtype="float32", model_config=config
            ).model_uri,
        }
        found: dict[str, dict[str, Any]] = {}
        for kind, uri in uris.items():
            model = mlflow.pyfunc.load_model(uri)
            timed_stream(model, ask("Hello", 4))
            runs = [
                timed_stream(model, ask(f"{number}: {PROMPT}Tell it on.", TOKENS))
                for number in range(options.repeat)
            ]
            found[kind] = {
                "first": [run[0] for run in runs],
                "rate": [run[1] for run in runs],
                "prompt_tokens": runs[0][2]["prompt_tokens"],
            }
            del model
    base = found["transformers fp32"]
    rows = []
    for kind, measured in found.items():
        first, rate = (statistics.median(measured[name]) for name in ("first", "rate"))
        rows.append(
            [
                kind,
                rate,
                rate / statistics.median(base["rate"]),
                first * 1000,
                statistics.median(base["first"]) / first,
            ]
        )
    write_result(
        "chat_flavors",
        "The two flavors behind the same request",
        ["flavor", "decode, tokens/s", "times fp32", "first token, ms", "times sooner than fp32"],
        rows,
        notes=f"Prompt of {base['prompt_tokens']} tokens, {TOKENS} new ones, median of "
        f"{options.repeat}; streamed through predict_stream.",
        extra=found,
    )


if __name__ == "__main__":
    main()
