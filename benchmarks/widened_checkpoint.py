"""Put a small Phi-3 model into the shapes of a large one, so that it still says the same.

    python benchmarks/widened_checkpoint.py SMALL phi-3-mini-4k /tmp/widened

SMALL is a checkpoint in Phi-3's architecture, as `fetch` leaves the embedded default. Every matrix
becomes as large as the large model's, with zeros where the small one has nothing; what one layer
hands to the next is the small model's state, followed by zeros; layers that the small model has
not add nothing. So the logits are the small model's up to the rounding of the weights to
bfloat16, and a line that quantizes, exports, logs and evaluates gigabytes can be checked for the
right answers, which random weights cannot show.

What it takes to be exact:

- RMSNorm divides by the root of the mean of all squares, and the zeros count: its weights are
  multiplied by sqrt(small / large), and its epsilon by small / large.
- Rotation pairs dimension i of a head with i + half: `partial_rotary_factor` rotates as many
  dimensions as the small model's heads have, and leaves the rest, which are zero.
- Attention divides by the root of the head's size: queries are multiplied by sqrt(large / small).
- The vocabulary and the base of the rotation are the small model's; an embedding that is the head
  too is written twice where the large model has a head of its own.

What it does not show: how real weights of that size fare in int4 (zeros are no loss to anybody),
and how far apart the values of wide layers lie.

Memory: one layer of the large model in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from random_checkpoint import COMMON, MODELS, tensor_shapes

if TYPE_CHECKING:
    import torch

    from phi3_mlflow.checkpoints.reader import CheckpointReader

TAKEN = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "rope_theta")


class Widened:
    """The tensors of the wide model, one at a time.

    Args:
        small: the checkpoint that is put in.
        config: of it.
        wide: the config of the model that it is put into.

    Raises:
        SystemExit: the small model does not fit into the large one.
    """

    def __init__(
        self, small: CheckpointReader, config: dict[str, Any], wide: dict[str, Any]
    ) -> None:
        self.small, self.config, self.wide = small, config, wide
        self.head, self.wide_head = _head(config), _head(wide)
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if config[key] > wide[key]:
                sys.exit(f"{key} is {config[key]}, and {wide[key]} in the large model")
        if self.head > self.wide_head:
            sys.exit(f"heads are {self.head} wide, and {self.wide_head} in the large model")
        self.queries = self._places()

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of the wide model, bfloat16, with what the small one has of it."""
        import torch

        out = torch.zeros(shape, dtype=torch.bfloat16)
        source = name
        if name == "lm_head.weight" and name not in self.small:
            source = "model.embed_tokens.weight"
        if source not in self.small:
            return out
        values = self.small.read_float(source)
        if "norm" in name:
            share = self.config["hidden_size"] / self.wide["hidden_size"]
            out[: len(values)] = math.sqrt(share) * values
        elif "qkv_proj" in name:
            self._attention(out, values)
        elif "o_proj" in name:
            for place, query in self.queries:
                columns = values[:, query * self.head : (query + 1) * self.head]
                start = place * self.wide_head
                out[: len(values), start : start + self.head] = columns
        elif "gate_up_proj" in name:
            inner, width = self.config["intermediate_size"], values.shape[1]
            out[:inner, :width] = values[:inner]
            start = self.wide["intermediate_size"]
            out[start : start + inner, :width] = values[inner:]
        else:
            out[: values.shape[0], : values.shape[1]] = values
        return out

    def _places(self) -> list[tuple[int, int]]:
        """At which of the wide model's query heads each of the small one's is."""
        per_group = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        wide_per_group = self.wide["num_attention_heads"] // self.wide["num_key_value_heads"]
        if wide_per_group == 1:  # each query has keys of its own: those of its group
            return [(query, query) for query in range(self.config["num_attention_heads"])]
        if (
            per_group > wide_per_group
            or self.config["num_key_value_heads"] > self.wide["num_key_value_heads"]
        ):
            sys.exit(f"{per_group} queries share a key, and {wide_per_group} in the large model")
        return [
            (group * wide_per_group + one, group * per_group + one)
            for group in range(self.config["num_key_value_heads"])
            for one in range(per_group)
        ]

    def _attention(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """Queries, keys and values of a layer, head by head."""
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        wide_heads, wide_groups = self.wide["num_attention_heads"], self.wide["num_key_value_heads"]
        width, head, wide = values.shape[1], self.head, self.wide_head

        def put(place: int, row: int, factor: float = 1.0) -> None:
            part = factor * values[row * head : (row + 1) * head]
            out[place * wide : place * wide + head, :width] = part

        for place, query in self.queries:
            put(place, query, math.sqrt(wide / head))
            group = query * groups // heads
            wide_group = place * wide_groups // wide_heads
            put(wide_heads + wide_group, heads + group)
            put(wide_heads + wide_groups + wide_group, heads + groups + group)


def _head(config: dict[str, Any]) -> int:
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def write_widened_checkpoint(small: Path, model: str, out: Path, layers: int | None = None) -> int:
    """Write the checkpoint, in bfloat16.

    Args:
        small: the checkpoint that is put in.
        model: a key of `MODELS`, without scaled positions.
        out: the directory; made if it is not there.
        layers: number of decoder layers, None for as many as the large model has.

    Returns:
        The bytes of the weights.
    """
    from phi3_mlflow.checkpoints.reader import CheckpointReader, read_config
    from phi3_mlflow.checkpoints.writer import Announced, CheckpointWriter
    from phi3_mlflow.quantization.description import COMPANIONS

    config = read_config(small)
    wide = {**COMMON, **MODELS[model], **{key: config[key] for key in TAKEN}}
    wide["num_hidden_layers"] = layers or wide["num_hidden_layers"]
    share = config["hidden_size"] / wide["hidden_size"]
    wide["rms_norm_eps"] = config["rms_norm_eps"] * share
    # Libraries cut head size times factor to a whole number; half a dimension keeps it from below.
    wide["partial_rotary_factor"] = (_head(config) + 0.5) / _head(wide)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(wide, indent=2) + "\n", encoding="utf-8")
    shapes = tensor_shapes(wide)
    announced = {name: Announced("BF16", shape) for name, shape in shapes.items()}
    widened = Widened(CheckpointReader(small), config, wide)
    with CheckpointWriter(out, announced) as writer:
        for name, shape in shapes.items():
            writer.write(name, widened.tensor(name, shape))
    for pattern in COMPANIONS:
        for file in small.glob(pattern):
            shutil.copyfile(file, out / file.name)
    return sum(tensor.nbytes for tensor in announced.values())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("small", type=Path)
    known = sorted(name for name, config in MODELS.items() if not config.get("rope_scaling"))
    parser.add_argument("model", choices=known)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    args = parser.parse_args()
    size = write_widened_checkpoint(args.small, args.model, args.out, args.layers)
    print(f"{args.out}: {size / 1e9:.2f} GB, {args.small} in the shapes of {args.model}")


if __name__ == "__main__":
    main()
