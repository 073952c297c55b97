"""Decoding, prefill and quality compared with llama.cpp: the same weights, the same threads.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python==0.3.36
    python benchmarks/llama_cpp.py CHECKPOINT ONNX --llama-python /tmp/llama/bin/python --work W

CHECKPOINT is in full precision, ONNX what `quantize` and `export` made of it. The checkpoint is
written as a GGUF file of llama.cpp's architecture `phi3`, every matrix in Q4_0 (blocks of 32 with
a float16 scale: 4.5 bits a weight). Each engine runs in a process of its own, the runs take turns,
the median counts. With `--texts` both are also compared with full precision on held-out text.

The share of the bandwidth is what decoding has to read of the weights each second, over what this
machine reads from memory with as many threads (the best of several sums over 2 GB).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_LLAMA = """
import json, sys, time
import numpy as np
from llama_cpp import Llama
job = json.loads(sys.argv[1])
llama = Llama(job["gguf"], n_ctx=job["context"], n_batch=512, n_threads=job["threads"],
              n_threads_batch=job["threads"], logits_all=bool(job["pieces"]), verbose=False)
prompt = job["prompt"]
llama.eval(prompt[:8]); llama.reset()
started = time.perf_counter()
llama.eval(prompt)
first = time.perf_counter() - started
started = time.perf_counter()
for token in job["answer"]:
    llama.eval([token])
print(json.dumps([len(prompt) / first, len(job["answer"]) / (time.perf_counter() - started)]))
for number, piece in enumerate(job["pieces"]):
    llama.reset()
    llama.eval(piece)
    np.save(f"{job['out']}/{number}.npy", np.array(llama.scores[:len(piece)], dtype=np.float32))
"""
_ONNX = """
import json, sys, time
import numpy as np
import onnxruntime_genai as og
job = json.loads(sys.argv[1])
config = og.Config(job["onnx"])
options = {"intra_op_num_threads": job["threads"]}
config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
model = og.Model(config)
def generator():
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=job["context"], do_sample=False)
    return og.Generator(model, params)
warm = generator(); warm.append_tokens(np.array([job["prompt"][:8]], dtype=np.int32)); del warm
made = generator()
started = time.perf_counter()
made.append_tokens(np.array([job["prompt"]], dtype=np.int32))
first = time.perf_counter() - started
started = time.perf_counter()
for token in job["answer"]:
    made.append_tokens(np.array([[token]], dtype=np.int32))
rest = time.perf_counter() - started
print(json.dumps([len(job["prompt"]) / first, len(job["answer"]) / rest]))
"""


def names(layers: int) -> Iterator[tuple[str, str]]:
    """Names of the tensors in a GGUF file of architecture phi3 and in the checkpoint."""
    yield "token_embd.weight", "model.embed_tokens.weight"
    for i in range(layers):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        yield f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight"
        yield f"{block}.attn_qkv.weight", f"{layer}.self_attn.qkv_proj.weight"
        yield f"{block}.attn_output.weight", f"{layer}.self_attn.o_proj.weight"
        yield f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight"
        yield f"{block}.ffn_up.weight", f"{layer}.mlp.gate_up_proj.weight"
        yield f"{block}.ffn_down.weight", f"{layer}.mlp.down_proj.weight"
    yield "output_norm.weight", "model.norm.weight"
    yield "output.weight", "lm_head.weight"


def write_gguf(checkpoint: Path, file: Path) -> int:
    """Write the checkpoint as GGUF in Q4_0, tensor by tensor; returns the bytes of the matrices
    that decoding reads (all but the embedding)."""
    import gguf
    from gguf.quants import quantize

    from phi3_mlflow.checkpoints.reader import CheckpointReader, read_config

    config, reader = read_config(checkpoint), CheckpointReader(checkpoint)
    head = config["hidden_size"] // config["num_attention_heads"]
    writer = gguf.GGUFWriter(file, "phi3", use_temp_file=True)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_scaling_orig_ctx_len(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head)
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    writer.add_rope_freq_base(theta)
    writer.add_sliding_window(config.get("sliding_window") or 0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    read = 0
    for theirs, ours in names(config["num_hidden_layers"]):
        tensor = reader.read(ours if ours in reader else "model.embed_tokens.weight")
        values = tensor.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(theirs, values)
            continue
        packed = quantize(values, gguf.GGMLQuantizationType.Q4_0)
        writer.add_tensor(theirs, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        read += 0 if theirs == "token_embd.weight" else packed.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def bandwidth(threads: int) -> float:
    """Bytes per second that so many threads read from memory: the best of several sums."""
    blocks = [np.ones(2**28 // threads, dtype=np.float64) for _ in range(threads)]
    size = sum(block.nbytes for block in blocks)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(7):
            started = time.perf_counter()
            list(pool.map(np.sum, blocks))
            best = max(best, size / (time.perf_counter() - started))
    return best


def measured(python: str, code: str, job: dict[str, Any]) -> tuple[float, float]:
    """Prefill and decode tokens/s of one engine, in a process of its own."""
    done = subprocess.run([python, "-c", code, json.dumps(job)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    prefill, decode = json.loads(done.stdout.splitlines()[-1])
    return prefill, decode


def quality(checkpoint: Path, onnx: Path, pieces: list[list[int]], out: Path) -> list[list[float]]:
    """KL and top-1 agreement with full precision, of the ONNX model and of llama.cpp's logits."""
    import torch

    from phi3_mlflow.evaluation.divergence import compare, cut
    from phi3_mlflow.evaluation.logits import OnnxLogits
    from phi3_mlflow.evaluation.streamed import streamed

    number_of = {tuple(piece): number for number, piece in enumerate(pieces)}

    class Saved:
        def logits(self, some: Any) -> Any:
            return [np.load(out / f"{number_of[tuple(ids.tolist())]}.npy") for ids in some]

    texts = [(str(i), piece) for i, piece in enumerate(pieces)]
    torch.set_num_threads(2)
    found = []
    with streamed(checkpoint, [ids for _, ids in cut(texts, 512)]) as reference:
        for candidate in (OnnxLogits(onnx), Saved()):
            metrics = compare(reference, candidate, texts, 512).metrics()
            found.append([metrics["kl_mean"], metrics["top1_agreement"]])
    return found


def main() -> None:
    """The command line."""
    from _result import write_result

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--llama-python", required=True, help="with llama-cpp-python installed")
    parser.add_argument("--work", type=Path, required=True, help="a directory for the GGUF file")
    parser.add_argument("--texts", action="store_true", help="compare on the quick held-out texts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--answer", type=int, default=48, help="tokens")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--name", default="llama_cpp", help="of the result file")
    parser.add_argument("--title", default="the embedded default")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    gguf = args.work / "model.gguf"
    read = {"llama.cpp Q4_0": write_gguf(args.checkpoint, gguf)}
    read["ours"] = decoded_bytes(args.onnx)
    pieces: list[list[int]] = []
    if args.texts:
        from phi3_mlflow.evaluation.datasets import load_heldout
        from phi3_mlflow.evaluation.divergence import tokenize, windows

        rows = [(row.id, row.text) for row in load_heldout(quick=True)]
        pieces = [list(p) for _, ids in tokenize(args.checkpoint, rows) for p in windows(ids, 512)]
    tokens = np.random.default_rng(0).integers(3, 20000, args.prompt + args.answer).tolist()
    job = {
        "gguf": str(gguf), "onnx": str(args.onnx), "threads": args.threads, "out": str(args.work),
        "prompt": tokens[: args.prompt], "answer": tokens[args.prompt :], "pieces": [],
        "context": max(args.prompt + args.answer + 1, 520),
    }  # fmt: skip
    speeds: dict[str, list[tuple[float, float]]] = {"ours": [], "llama.cpp Q4_0": []}
    for _ in range(args.repeat):
        speeds["llama.cpp Q4_0"].append(measured(args.llama_python, _LLAMA, job))
        speeds["ours"].append(measured(sys.executable, _ONNX, job))
    per_second = bandwidth(args.threads)
    qualities: list[list[float]] | None = None
    if pieces:
        measured(args.llama_python, _LLAMA, {**job, "pieces": pieces})
        qualities = quality(args.checkpoint, args.onnx, pieces, args.work)
    table: list[list[str | int | float | bool | None]] = []
    base = statistics.median(d for _, d in speeds["llama.cpp Q4_0"])
    for row, name in enumerate(("ours", "llama.cpp Q4_0")):
        prefill = statistics.median(p for p, _ in speeds[name])
        decode = statistics.median(d for _, d in speeds[name])
        label = "onnxruntime-genai int4" if name == "ours" else name
        table.append(
            [label, read[name] / 1e6, decode, decode / base, decode * read[name] / per_second,
             prefill, *(qualities[row] if qualities else ())]
        )  # fmt: skip
    write_result(
        args.name,
        f"Compared with llama.cpp: {args.title}, {args.threads} threads",
        ["engine", "weights read per token (MB)", "decode, tokens/s", "times llama.cpp",
         "share of the bandwidth", "prefill, tokens/s", *(("KL", "top-1") if qualities else ())],
        table,
        notes=f"The same weights in both. Prompt of {args.prompt} tokens, then {args.answer} more "
        f"one at a time; median of {args.repeat}, taking turns. This machine reads "
        f"{per_second / 1e9:.1f} GB/s with {args.threads} threads."
        + (f" Quality on {len(pieces)} pieces of held-out text." if qualities else ""),
        extra={"speeds": speeds, "bandwidth": per_second},
    )  # fmt: skip


def decoded_bytes(onnx: Path) -> int:
    """Bytes of the weights that decoding reads: all initializers but an embedding of its own."""
    import onnx as onnx_library
    from onnx.external_data_helper import ExternalDataInfo

    graph = onnx_library.load(onnx / "model.onnx", load_external_data=False).graph
    multiplied = {
        name
        for node in graph.node
        if node.op_type in ("MatMulNBits", "MatMul")
        for name in node.input
    }
    total = 0
    for tensor in graph.initializer:
        if tensor.name in multiplied and tensor.external_data:
            total += int(ExternalDataInfo(tensor).length or 0)
    return total


if __name__ == "__main__":
    main()
