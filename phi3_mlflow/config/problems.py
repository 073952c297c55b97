"""Say what is wrong with a profile in the words of its file: key, value and what is allowed.

pydantic names places in the model; what a person has written are keys in YAML.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from phi3_mlflow.config.profile import Profile
from phi3_mlflow.quantization.settings import ALGORITHMS

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SEARCH = "search"
"""What `quantization.algorithm` may say besides the algorithms."""


@dataclass(frozen=True)
class _Place:
    """Where in a profile a problem is.

    Attributes:
        keys: the keys that lead there.
        section: the settings that the last key is looked for in; None where it is no such place.
    """

    keys: tuple[str, ...]
    section: type[BaseModel] | None

    @property
    def key(self) -> str:
        """The dotted key."""
        return ".".join(self.keys)


def described(problem: ErrorDetails, file: str, overridden: Container[str]) -> str:
    """One problem as `where: key = value: what is wrong; what is allowed`.

    Args:
        problem: as pydantic tells it.
        file: the profile's name, for keys that the file gives.
        overridden: the dotted keys that a parameter gives.
    """
    place = _place(problem["loc"])
    if problem["type"] == "union_tag_invalid":
        return _unknown_algorithm(place, problem["input"], file, overridden)
    key = place.key
    where = "parameter" if key in overridden else file
    if problem["type"] == "extra_forbidden":
        allowed = sorted(place.section.model_fields) if place.section else []
        close = difflib.get_close_matches(place.keys[-1], allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{where}: unknown key {key}; {hint}Allowed here: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{where}: {key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return f"{where}: {message}"
    value = problem["input"]
    shown = "" if isinstance(value, dict | list) else f" = {value!r}"
    return f"{where}: {key}{shown}: {message}"


def _unknown_algorithm(place: _Place, values: Any, file: str, overridden: Container[str]) -> str:
    key = f"{place.key}.algorithm"
    where = "parameter" if key in overridden else file
    value = values.get("algorithm") if isinstance(values, Mapping) else values
    *others, last = [*ALGORITHMS, SEARCH] if place.keys == ("quantization",) else [*ALGORITHMS]
    allowed = f"{', '.join(map(repr, others))} or {last!r}"
    return f"{where}: {key} = {value!r}: Input should be {allowed}"


def _place(location: Sequence[int | str]) -> _Place:
    """The place in the file of a place in the model, which counts the chosen algorithm as one."""
    keys: list[str] = []
    here: Any = Profile
    section: type[BaseModel] | None = None
    for part in location:
        here = _bare(here)
        if _is_choice(here):
            here = ALGORITHMS.get(str(part))
            continue
        keys.append(str(part))
        section = here if isinstance(here, type) and issubclass(here, BaseModel) else None
        if section is not None:
            field = section.model_fields.get(str(part))
            here = field.annotation if field else None
        else:
            here = get_args(here)[-1] if get_origin(here) in (dict, list) else None
    return _Place(tuple(keys), section)


def _bare(annotation: Any) -> Any:
    """`X` for an annotation such as `X | None` or `Annotated[X, ...]`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        others = [part for part in get_args(annotation) if part is not type(None)]
        if len(others) == 1:
            return _bare(others[0])
    return annotation


def _is_choice(annotation: Any) -> bool:
    """Whether an annotation is the union of the settings of all algorithms."""
    return set(get_args(annotation)) == set(ALGORITHMS.values())
