"""How a Phi-3 model turns its heads by position, whichever way `config.json` spells it.

transformers 4.40 to 5 have written these settings in several ways, and those who read them (the
model's code, the graph builder) do not read all of them alike. Here is the one reading that the
project goes by: what transformers 5 computes. What cannot be read so is refused.

    rope_scaling: null                                  plain
    rope_scaling: {"type": "su", ...}                   LongRoPE, as transformers 4.40 wrote it
    rope_scaling: {"type": "longrope", ...}             transformers 4.43 and later
    rope_parameters: {"rope_type": "longrope", ...}     transformers 5
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Mapping

THETA = 10_000.0
ORIGINAL = 4096
"""Tokens; what transformers takes for `original_max_position_embeddings` where it is not given."""

_ROTATED_BY = 16
_LARGEST_LENGTH = 1 << 24  # tokens
_SECTIONS = ("rope_scaling", "rope_parameters")
_TYPE_KEYS = ("rope_type", "type")
_LONGROPE = {"longrope": "longrope", "su": "longrope"}
_FACTORS = ("short_factor", "long_factor")
_KNOWN = {
    *_TYPE_KEYS,
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "short_factor",
    "long_factor",
    "factor",
    "attention_factor",
    "short_mscale",
    "long_mscale",
}


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings as transformers computes them.

    Attributes:
        long: whether it is LongRoPE, with factors that change beyond `original` tokens.
        theta: the base of the wavelengths.
        rotated: values of a head that are turned.
        original: tokens that the model was trained with before it was made longer.
        short_factor, long_factor: what the wavelengths are multiplied by; empty unless `long`.
        attention_factor: what sine and cosine are multiplied by.
        stated: whether a `factor` or an `attention_factor` of its own leads to that, not the
            lengths alone.
    """

    long: bool
    theta: float
    rotated: int
    original: int
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0
    stated: bool = False


def read_rope(config: Mapping[str, Any]) -> tuple[Rope | None, list[str]]:
    """The rotary embeddings of a configuration.

    Args:
        config: the content of `config.json`, whose sizes are sound.

    Returns:
        The settings, None where they cannot be used, and one line for each reason.
    """
    section, problems = _section(config)
    if problems:
        return None, problems
    kind, problems = _kind(section)
    theta = _either(config, section, "rope_theta", THETA, problems)
    partial = _either(config, section, "partial_rotary_factor", 1.0, problems)
    if not (_is_number(theta) and 0 < theta < math.inf):
        problems.append(f"config.json: rope_theta is {_brief(theta)}, it must be above 0")
    if not (_is_number(partial) and 0 < partial <= 1):
        problems.append(
            f"config.json: partial_rotary_factor is {_brief(partial)}, it must be 0 to 1"
        )
        return None, problems
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or hidden // heads
    rotated = int(head * partial)
    if rotated < 2 or rotated % 2:
        problems.append(
            f"config.json: {rotated} of the {head} values of a head are turned by position "
            f"(partial_rotary_factor {partial}); it must be an even number"
        )
    original = _original(config, section, kind == "longrope", problems)
    # transformers checks the factors against hidden_size, whatever head_dim says.
    pairs = int(hidden // heads * partial) // 2
    factors = {key: _factors(section, key, pairs, problems) for key in _FACTORS}
    if kind == "longrope":
        if head != hidden // heads:
            problems.append(
                f"config.json: head_dim {head} with rope type longrope; transformers takes only "
                f"hidden_size / num_attention_heads, {hidden // heads}"
            )
        problems += [
            f"config.json: {_place(config)}.{key} is missing, longrope needs it"
            for key in _FACTORS
            if section.get(key) is None
        ]
    attention, stated = 1.0, False
    if kind == "longrope" and not problems:
        length = config["max_position_embeddings"]
        attention, stated = _attention_factor(section, length, original, problems)
    if problems:
        return None, problems
    if kind != "longrope":
        return Rope(False, float(theta), rotated, original), []
    short, long = (tuple(factors[key]) for key in _FACTORS)
    return Rope(True, float(theta), rotated, original, short, long, attention, stated), []


def onnx_problems(rope: Rope) -> list[str]:
    """What onnxruntime's attention cannot compute, though transformers can; one line each."""
    if rope.rotated % _ROTATED_BY:
        return [
            f"config.json: {rope.rotated} values of a head are turned by position; onnxruntime's "
            f"attention turns a multiple of {_ROTATED_BY}. flavor: transformers can"
        ]
    return []


def settled_rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration in a spelling that every reader takes, and what was changed.

    Args:
        config: the content of `config.json`, whose rotary embeddings are sound.

    Returns:
        A configuration that means the same; equal to `config` where that is spelled well already.
    """
    settled, changes = dict(config), []
    for key in (
        "rope_theta", "partial_rotary_factor", "head_dim", "original_max_position_embeddings",
    ):  # fmt: skip
        if key in settled and settled[key] is None:
            del settled[key]
            changes.append(f"{key} null left out")
    for name in _SECTIONS:
        section = settled.get(name)
        if not isinstance(section, dict):
            continue
        section = dict(section)
        for key in _TYPE_KEYS:
            if section.get(key) == "su":
                section[key] = "longrope"
                changes.append(f"{name}.{key} su is longrope")
        for key in [key for key, value in section.items() if value is None]:
            del section[key]
            changes.append(f"{name}.{key} null left out")
        settled[name] = section
    return settled, changes


def _section(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The one section that says something, without nulls."""
    found = {}
    for name in _SECTIONS:
        value = config.get(name)
        if value is not None and not isinstance(value, dict):
            return {}, [f"config.json: {name} is {_brief(value)}, it must be an object or null"]
        if value:
            found[name] = {key: item for key, item in value.items() if item is not None}
    if len(found) == 2 and found[_SECTIONS[0]] != found[_SECTIONS[1]]:
        return {}, [
            "config.json: rope_scaling and rope_parameters differ, and only one of them can hold. "
            "Remove the one that does not"
        ]
    section = next(iter(found.values()), {})
    unknown = sorted(set(section) - _KNOWN)
    problems = [
        f"config.json: {_place(config)}.{key}: no setting of Phi-3's rotary embeddings; known are "
        f"{', '.join(sorted(_KNOWN))}"
        for key in unknown
    ]
    return section, problems


def _place(config: Mapping[str, Any]) -> str:
    return next((name for name in _SECTIONS if config.get(name)), _SECTIONS[0])


def _kind(section: Mapping[str, Any]) -> tuple[str, list[str]]:
    """`default` or `longrope`; the problems with what is said instead."""
    said = [section[key] for key in _TYPE_KEYS if key in section]
    kinds = {_LONGROPE.get(str(kind), str(kind)) for kind in said}
    if len(kinds) > 1:
        return "", [f"config.json: rope_type and type differ: {', '.join(map(_brief, said))}"]
    kind = next(iter(kinds), "default")
    if kind == "yarn":
        return "", [
            "config.json: rope type 'yarn' means another arithmetic to transformers 4.40 than to "
            "transformers 5; write 'longrope' if that is what the model was trained with"
        ]
    if kind not in ("default", "longrope"):
        return "", [
            f"config.json: rope type {_brief(kind)}: Phi-3 has only default and longrope (or su, "
            "its name in 2024)"
        ]
    if not said and any(section.get(key) is not None for key in (*_FACTORS, "factor")):
        # Only the lengths of the factors may be wrong besides: both is worth a line.
        return kind, ['config.json: the rotary factors have no type; write "type": "longrope"']
    return kind, []


def _either(
    config: Mapping[str, Any],
    section: Mapping[str, Any],
    key: str,
    default: float,
    problems: list[str],
) -> Any:
    """A setting that may stand in the section or beside it, and must be the same in both."""
    said = [where[key] for where in (section, config) if where.get(key) is not None]
    if len(said) == 2 and said[0] != said[1]:
        problems.append(
            f"config.json: {key} is {_brief(said[1])}, and {_brief(said[0])} among the rotary "
            "settings; only one of them can hold"
        )
    return said[0] if said else default


def _original(
    config: Mapping[str, Any], section: Mapping[str, Any], long: bool, problems: list[str]
) -> int:
    """The length before scaling, tokens; without scaling it means nothing."""
    key = "original_max_position_embeddings"
    if not long:
        return int(config["max_position_embeddings"])
    value = config.get(key)
    value = ORIGINAL if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= _LARGEST_LENGTH:
        problems.append(f"config.json: {key} is {_brief(value)}, it must be 2 to {_LARGEST_LENGTH}")
        return ORIGINAL
    nested = section.get(key)
    if nested is not None and nested != value:
        problems.append(
            f"config.json: {key} is {_brief(nested)} among the rotary settings, and transformers "
            f"takes {value}, from beside them"
            + ("" if config.get(key) is not None else f" (its default): write {key} there")
        )
    return value


def _factors(section: Mapping[str, Any], key: str, pairs: int, problems: list[str]) -> list[float]:
    factors = section.get(key)
    if factors is None:
        return []
    place = f"config.json: rope_scaling.{key}"
    if not isinstance(factors, list) or not all(map(_is_number, factors)):
        problems.append(f"{place} is not a list of numbers")
        return []
    if len(factors) != pairs:
        problems.append(f"{place} has {len(factors)} factors, {pairs} are needed")
    if not all(0 < factor < math.inf for factor in factors):
        problems.append(f"{place} has factors that are not above 0")
    return factors


def _attention_factor(
    section: Mapping[str, Any], length: int, original: int, problems: list[str]
) -> tuple[float, bool]:
    """What sine and cosine are multiplied by, and whether the section states it."""
    factor, attention = section.get("factor"), section.get("attention_factor")
    for key, value in (("factor", factor), ("attention_factor", attention)):
        if value is not None and not (_is_number(value) and 0 < value < math.inf):
            problems.append(f"config.json: rotary {key} is {_brief(value)}, it must be above 0")
            return 1.0, False
    if attention is None:
        ratio = length / original if factor is None else factor
        computed = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
    else:
        computed = float(attention)
    for key in ("short_mscale", "long_mscale"):
        value = section.get(key)
        close = _is_number(value) and math.isclose(value, computed, rel_tol=1e-5)
        if value is not None and not close:
            problems.append(
                f"config.json: rotary {key} is {_brief(value)}; transformers ignores it for Phi-3 "
                f"and multiplies by {computed:.6g}. Remove it, or state attention_factor"
            )
    return computed, not (factor is None and attention is None)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
