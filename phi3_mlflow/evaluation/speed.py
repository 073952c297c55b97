"""How fast an exported model decodes."""

from __future__ import annotations

import json
import os
import statistics
import time
from typing import TYPE_CHECKING

from phi3_mlflow.core import console
from phi3_mlflow.core.machine import usable_cores
from phi3_mlflow.evaluation.load import LIMIT, LoadWatch
from phi3_mlflow.runtime.genai_folder import provider_here, session_config

if TYPE_CHECKING:
    from pathlib import Path

PROMPT_TOKENS = 16


def decode_speed(onnx: Path, *, threads: int = 0, tokens: int = 64, runs: int = 5) -> float:
    """Greedy decoding after a short prompt, by onnxruntime-genai's own loop.

    Args:
        onnx: the folder with genai_config.json.
        threads: 0 takes every core.
        tokens: how many are generated per run; the first is not timed, because it is the prompt's.
        runs: how many; the median counts. Those that other programs disturbed are done again, as
            often at most.

    Returns:
        Tokens per second.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import numpy as np
    import onnxruntime_genai as og

    provider = provider_here(og, onnx)
    model = og.Model(session_config(og, onnx, provider, threads or usable_cores()))
    about = json.loads((onnx / "genai_config.json").read_text(encoding="utf-8"))["model"]
    prompt = np.arange(PROMPT_TOKENS, dtype=np.int32) % int(about["vocab_size"])
    speeds: list[float] = []
    disturbed: list[float] = []
    while len(speeds) < runs and len(speeds) + len(disturbed) < 2 * runs:
        params = og.GeneratorParams(model)
        length = PROMPT_TOKENS + tokens
        params.set_search_options(max_length=length + 1, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt[None, :])
        generator.generate_next_token()
        watch, started = LoadWatch(), time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
        speed = (tokens - 1) / (time.perf_counter() - started)
        (disturbed if (watch.others() or 0.0) > LIMIT else speeds).append(speed)
    if not speeds:
        console.say("  other programs used the processor during every run: the model may be faster")
    return statistics.median(speeds or disturbed)
