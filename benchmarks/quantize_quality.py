"""Quality against size on the embedded default: algorithm by algorithm, on held-out text.

    python benchmarks/quantize_quality.py CHECKPOINT --work /tmp/quality
    python benchmarks/quantize_quality.py CHECKPOINT --work /tmp/quality --only "rtn;k_quant"

CHECKPOINT is the full-precision checkpoint (`mlflow run . -e fetch` leaves one). Divergence,
perplexity and top-1 agreement are over `data/heldout.jsonl`, which no calibration text shares;
decode speed is the median of five runs of 64 tokens. Every candidate is built, checked and deleted.

The embedded default's weights come from a 4-bit file and lie on a grid of blocks of 32 with a float
minimum. No candidate here can state such a block exactly (its zero points are whole numbers), so
the figures do not profit from that grid; a scheme with float zero points would, on this model only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from phi3_mlflow.quantization.settings import QuantizationSettings

# What the profile's own candidates leave out.
_DRIFT = "gptq mixed, drift corrected"


def candidates() -> dict[str, QuantizationSettings]:
    """Those of the embedded default's profile, and its best with drift correction."""
    from phi3_mlflow.config.loading import load_profile

    found = load_profile("smollm2-135m").search.candidates
    return {**found, _DRIFT: found["gptq mixed"].model_copy(update={"drift_correction": 1.0})}


def main() -> None:
    """The command line."""
    from _result import write_result

    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.evaluation.divergence import compare, cut, tokenize
    from phi3_mlflow.evaluation.logits import OnnxLogits
    from phi3_mlflow.evaluation.speed import decode_speed
    from phi3_mlflow.evaluation.streamed import streamed
    from phi3_mlflow.genai.check import check_export
    from phi3_mlflow.genai.export import export_onnx
    from phi3_mlflow.quantization.quantize import quantize_checkpoint

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", help="names of candidates, separated by semicolons")
    parser.add_argument("--quick", action="store_true", help="the quick texts only")
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()
    chosen = candidates()
    if args.only:
        chosen = {name: chosen[name] for name in args.only.split(";")}
    lines = (ROOT / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row.get("quick") or not args.quick]
    texts = tokenize(args.checkpoint, [(row["id"], row["text"]) for row in rows])
    pieces = [ids for _, ids in cut(texts, args.window)]
    store = StepCache(args.work / "reference")
    table: list[list[str | int | float | bool | None]] = []
    for name, settings in chosen.items():
        int4, onnx = args.work / "int4", args.work / "onnx"
        started = time.monotonic()
        quantize_checkpoint(args.checkpoint, int4, settings)
        export_onnx(int4, onnx, precision="int4", accuracy_level=settings.accuracy_level)
        seconds = time.monotonic() - started
        report = check_export(onnx, settings)
        with streamed(args.checkpoint, pieces, store) as reference:
            found = compare(reference, OnnxLogits(onnx), texts, args.window).metrics()
        table.append(
            [
                name,
                round(report.data_bytes / 1e6, 1),
                round(found["kl_mean"], 4),
                round(found["top1_agreement"], 4),
                round(found["perplexity"], 2),
                round(decode_speed(onnx), 1),
                round(seconds),
            ]
        )
        print(table[-1], flush=True)
        shutil.rmtree(int4)
        shutil.rmtree(onnx)
    write_result(
        "quantize_quality",
        "Quality against size, SmolLM2-135M-Instruct in Phi-3's architecture",
        ["algorithm", "data (MB)", "KL", "top-1", "perplexity", "tokens/s", "seconds to build"],
        table,
        notes=(
            f"{len(texts)} held-out texts, {int(found['scored_tokens']):,} tokens; full precision "
            f"has perplexity {found['perplexity_reference']:.2f}. MB is 10^6 bytes of "
            "model.onnx.data. 'k_quant_mixed all layers' and 'gptq mixed': head, qkv_proj and "
            "down_proj in int8 (blocks of 64 and 128), gate_up_proj in int4 with blocks of 64, "
            "o_proj with 32."
        ),
        extra={
            "settings": {
                name: settings.model_dump(mode="json", exclude={"calibration"})
                for name, settings in chosen.items()
            }
        },
    )


if __name__ == "__main__":
    main()
