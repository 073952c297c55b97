"""First token of the second turn after 1,000 tokens of history: reusing the prefix against cold.

    python benchmarks/chat_second_turn.py --onnx DIR

Both answers are compared: reuse must not change a token.
"""

from __future__ import annotations

import statistics
from typing import Any

from _result import write_result
from chat_common import arguments, store, timed_stream

HISTORY = "The harbour of the town lies behind a long wall of stone. "


def main() -> None:
    options = arguments(__doc__ or "", "onnx")
    import mlflow

    from phi3_mlflow.flavors.onnx import log_onnx

    def answer(model: Any, messages: list[dict[str, str]], tokens: int) -> str:
        wanted = {"messages": messages, "max_tokens": tokens}
        return str(model.predict(wanted)["choices"][0]["message"]["content"])

    with store():
        info = log_onnx(options.onnx, name="bench", model_config={"threads": options.threads})
        warm = mlflow.pyfunc.load_model(info.model_uri)
        cold = mlflow.pyfunc.load_model(info.model_uri, model_config={"prefix_cache_mb": 0})
        times: dict[str, list[float]] = {"cold": [], "reuse": []}
        same, history = True, 0
        for number in range(options.repeat):
            said = [{"role": "user", "content": f"Summary {number}: {HISTORY * 74}"}]
            said.append({"role": "assistant", "content": answer(warm, said, 24)})
            said.append({"role": "user", "content": "And in one word?"})
            wanted = {"messages": said, "max_tokens": 8}
            times["reuse"].append(timed_stream(warm, wanted)[0])
            first, _, usage = timed_stream(cold, wanted)
            times["cold"].append(first)
            history = usage["prompt_tokens"]
            same = same and answer(warm, said, 24) == answer(cold, said, 24)
    middle = {kind: statistics.median(found) for kind, found in times.items()}
    ratio = statistics.median(
        cold / reuse for cold, reuse in zip(times["cold"], times["reuse"], strict=True)
    )
    write_result(
        "chat_second_turn",
        "First token of the second turn, with the prefix kept and without",
        ["way", "first token, ms", "times sooner"],
        [["cold", middle["cold"] * 1000, 1.0], ["prefix reused", middle["reuse"] * 1000, ratio]],
        notes=f"{history} tokens of prompt, of which some 1,000 are history; an answer of at most "
        f"24 tokens in between; median of {options.repeat} conversations. "
        f"Both said the same: {'yes' if same else 'no'}.",
        extra={"seconds": times, "same_text": same},
    )


if __name__ == "__main__":
    main()
