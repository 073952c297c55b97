"""The process in which grammars are tried: what one takes or breaks, it takes or breaks here.

`grammar_trial` starts it as a script, with nothing of the package around it. The library makes a
grammar when a generator begins, so there is a model: the real one's tokenizer and settings over a
graph that computes nothing. A schema is read per line, what it cost is written per line.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IDLE_S = 120
"""Without a schema for so long the process ends."""
STEPS = 16
_LIMITS = sys.platform != "win32"
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges")

_GRAPH = bytes.fromhex(
    "08083a85040a210a09696e7075745f69647312036964732204436173742a090a02746f1801a001020a1b0a0369"
    "64730a046c61737412036f6e652209556e73717565657a650a1c0a036f6e650a05736861706512066c6f676974"
    "732206457870616e640a300a15706173745f6b65795f76616c7565732e302e6b6579120d70726573656e742e30"
    "2e6b657922084964656e746974790a340a17706173745f6b65795f76616c7565732e302e76616c7565120f7072"
    "6573656e742e302e76616c756522084964656e7469747912076e6f7468696e672a0d080110073a010242046c61"
    "73742a2508031007420573686170654a1801000000000000000100000000000000ed5e0000000000005a1d0a09"
    "696e7075745f69647312100a0e0807120a0a031201620a031201735a310a15706173745f6b65795f76616c7565"
    "732e302e6b657912180a16080112120a031201620a0208010a031201700a0208015a330a17706173745f6b6579"
    "5f76616c7565732e302e76616c756512180a16080112120a031201620a0208010a031201700a020801621f0a06"
    "6c6f6769747312150a130801120f0a031201620a031201730a0312017662290a0d70726573656e742e302e6b65"
    "7912180a16080112120a031201620a0208010a031201700a020801622b0a0f70726573656e742e302e76616c75"
    "6512180a16080112120a031201620a0208010a031201700a02080142040a001011"
)
"""An ONNX model: token ids become logits, keys and values stay as they are. `_VOCABULARY` marks
where it says how many logits there are."""
_VOCABULARY = struct.pack("<3q", 1, 1, 0x5EED)


def lay_out(model: Path, out: Path) -> int:
    """Write a folder that onnxruntime-genai opens.

    Args:
        model: the folder of the real model.
        out: an empty folder.

    Returns:
        The size of the vocabulary.
    """
    about = json.loads((model / "genai_config.json").read_text(encoding="utf-8"))
    of_model = about["model"]
    size = int(of_model["vocab_size"])
    (out / "model.onnx").write_bytes(_GRAPH.replace(_VOCABULARY, struct.pack("<3q", 1, 1, size)))
    of_model["type"] = "llama"
    of_model["decoder"] = {
        "session_options": {"intra_op_num_threads": 1, "provider_options": []},
        "filename": "model.onnx",
        "head_size": 1,
        "hidden_size": 1,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
    }
    (out / "genai_config.json").write_text(json.dumps(about), encoding="utf-8")
    for file in model.iterdir():
        if file.name.startswith(_TOKENIZER) and file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    return size


class Trial:
    """Tries schemas with the library that follows them.

    Args:
        model: the folder of the real model.
    """

    def __init__(self, model: Path) -> None:
        import numpy as np
        import onnxruntime_genai as og

        self._og, self._np = og, np
        # It is read once: nothing of it is left when this process is killed.
        with tempfile.TemporaryDirectory(prefix="grammar-") as folder:
            self._size = lay_out(model, Path(folder))
            self._model = og.Model(og.Config(folder))
            self.guides = hasattr(og.GeneratorParams(self._model), "set_guidance")
            if self.guides:
                self.costs('{"type": "object"}')

    def costs(self, schema: str) -> dict[str, Any]:
        """Seconds of computing for the grammar and for the slowest token, or why there is none."""
        og, np, began = self._og, self._np, time.process_time()
        try:
            params = og.GeneratorParams(self._model)
            params.set_search_options(max_length=STEPS + 2, do_sample=False)
            params.set_guidance("json_schema", schema)
            generator = og.Generator(self._model, params)
        except RuntimeError as error:
            return {"error": " ".join(str(error).split())[:300]}
        made, slowest = time.process_time() - began, 0.0
        logits = np.random.default_rng(0)
        generator.append_tokens(np.zeros(1, dtype=np.int32))
        for _ in range(STEPS):
            began = time.process_time()
            generator.get_logits()  # it computes them when they are asked for
            generator.set_logits(logits.random((1, 1, self._size), dtype=np.float32))
            generator.generate_next_token()
            slowest = max(slowest, time.process_time() - began)
            if generator.is_done():
                break
        return {"grammar_s": made, "token_s": slowest}


def _bound_memory(room: int) -> None:
    """From now on so many bytes more may be taken."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    taken = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:")]
    if taken:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (taken[0] + room, hard))


def _bound_time(seconds: float) -> None:
    """So many seconds of computing from now on the system ends this process."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, hard))


def main(model: str, room: str, seconds: str) -> None:
    """Answer until nobody asks.

    Args:
        model: the folder of the real model.
        room: bytes that grammars may take.
        seconds: of computing for each, counted in whole ones.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    if _LIMITS:
        os.nice(5)
    trial = Trial(Path(model))
    if _LIMITS:
        _bound_memory(int(room))
    out.write(json.dumps({"guides": trial.guides}) + "\n")
    out.flush()
    while True:
        if _LIMITS:
            signal.alarm(IDLE_S)
        line = sys.stdin.readline()
        if not line:
            return
        if _LIMITS:
            signal.alarm(0)
            _bound_time(float(seconds))
        out.write(json.dumps(trial.costs(json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
