"""Tokens per second of `predict` on the logged ONNX model against the bare onnxruntime-genai loop.

    python benchmarks/chat_predict.py --onnx DIR

Both answer the same prompts with the same tokens, one after the other in one process; the logged
model keeps no prefixes, so that it computes as much as the loop does.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from _result import write_result
from chat_common import arguments, ask, store

TOKENS = 96
PROMPTS = 5


def bare(engine: Any, text: str) -> tuple[float, str]:
    """Tokens/s and text of the loop that onnxruntime-genai's own examples show."""
    import onnxruntime_genai as og

    started = time.perf_counter()
    tokens = engine.render([{"role": "user", "content": text}])
    params = og.GeneratorParams(engine._model)
    params.set_search_options(max_length=len(tokens) + TOKENS, do_sample=False)
    generator = og.Generator(engine._model, params)
    generator.append_tokens(tokens)
    stream = engine._tokenizer.create_stream()
    said, count = "", 0
    while not generator.is_done():
        generator.generate_next_token()
        count += 1
        said += stream.decode(int(generator.get_next_tokens()[0]))
    return count / (time.perf_counter() - started), said


def ours(model: Any, text: str) -> tuple[float, str]:
    """Tokens/s and text of the logged model."""
    started = time.perf_counter()
    answer = model.predict(ask(text, TOKENS))
    rate = answer["usage"]["completion_tokens"] / (time.perf_counter() - started)
    return rate, answer["choices"][0]["message"]["content"]


def main() -> None:
    options = arguments(__doc__ or "", "onnx")
    import mlflow

    from phi3_mlflow.flavors.onnx import log_onnx

    with store():
        info = log_onnx(
            options.onnx,
            name="bench",
            model_config={"prefix_cache_mb": 0, "threads": options.threads},
        )
        model = mlflow.pyfunc.load_model(info.model_uri)
        engine = model.unwrap_python_model().answerer.engine
        rates: dict[str, list[float]] = {"bare": [], "predict": []}
        same = True
        for number in range(-1, PROMPTS):
            text = f"Write a long story about fox number {number} and the sea."
            best = {"bare": 0.0, "predict": 0.0}
            for turn in range(options.repeat):
                said = {}
                for kind in ("bare", "predict") if turn % 2 else ("predict", "bare"):
                    rate, said[kind] = bare(engine, text) if kind == "bare" else ours(model, text)
                    best[kind] = max(best[kind], rate)
                same = same and said["bare"] == said["predict"]
                if number < 0:
                    break  # warming up
            else:
                for kind, rate in best.items():
                    rates[kind].append(rate)
    middle = {kind: statistics.median(found) for kind, found in rates.items()}
    ratios = [ours / bare for bare, ours in zip(rates["bare"], rates["predict"], strict=True)]
    write_result(
        "chat_predict",
        "`predict` of the logged ONNX model against the bare onnxruntime-genai loop",
        ["way", "tokens/s", "ratio"],
        [
            ["bare loop", middle["bare"], 1.0],
            ["predict of the logged model", middle["predict"], statistics.median(ratios)],
        ],
        notes=f"{TOKENS} new tokens, prompt and tokenization included. Of each of {PROMPTS} "
        f"prompts the best of {options.repeat} in turns, of these the median. "
        f"Both said the same: {'yes' if same else 'no'}.",
        extra={"rates": rates, "ratios": ratios, "same_text": same},
    )


if __name__ == "__main__":
    main()
