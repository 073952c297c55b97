"""Find a profile, read it and lay the entry-point parameters over it.

Profile file < entry-point parameters. All that is wrong with either is reported in one message,
before any work.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from phi3_mlflow.config.problems import SEARCH, described
from phi3_mlflow.config.profile import Profile
from phi3_mlflow.core.errors import UserError, problem_list
from phi3_mlflow.core.shipped import shipped
from phi3_mlflow.rows.location import is_uri
from phi3_mlflow.training.settings import ROWS
from phi3_mlflow.trust.settings import PEM

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROFILE_DIRECTORY = shipped("configs")
CALIBRATION = shipped("data") / "calibration.jsonl"
_FOR_EVERY_ALGORITHM = ("algorithm", "block_size", "head", "embedding", "accuracy_level")


def profile_names() -> list[str]:
    """The profiles that come with the project."""
    return sorted(file.stem for file in PROFILE_DIRECTORY.glob("*.yaml"))


def find_profile(name_or_path: str) -> Path:
    """The file of a profile, given its name in `configs/` or its path.

    Raises:
        UserError: there is no such profile; the message names those there are.
    """
    looks_like_path = name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path
    file = (
        Path(name_or_path).expanduser()
        if looks_like_path
        else PROFILE_DIRECTORY / f"{name_or_path}.yaml"
    )
    if file.is_file():
        return file
    if looks_like_path:
        raise UserError(
            f"profile: there is no file {file.absolute()}\n"
            "Give an absolute path (a relative one counts from the project's folder), or one of "
            f"the names {', '.join(profile_names())}."
        )
    close = difflib.get_close_matches(name_or_path, profile_names(), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UserError(
        f"profile: there is no profile {name_or_path!r}.{hint}\n"
        f"Allowed: {', '.join(profile_names())}, or the path of a YAML file of your own."
    )


def load_profile(
    name_or_path: str,
    overrides: Mapping[str, str | int] | None = None,
    problems: Sequence[str] = (),
) -> Profile:
    """Read a profile and lay the entry-point parameters over it.

    Args:
        name_or_path: a name in `configs/`, or the path of a YAML file.
        overrides: dotted profile key to value.
        problems: what is already known to be wrong elsewhere, to be reported in the same message.

    Raises:
        UserError: everything that is wrong with the file and the overrides, and what is allowed.
    """
    overrides = overrides or {}
    try:
        file = find_profile(name_or_path)
    except UserError as error:
        if problems:
            raise UserError(
                problem_list("These parameters are wrong", [*problems, str(error)])
            ) from error
        raise
    content = _read_yaml(file)
    content.setdefault("name", file.stem)
    content.setdefault("registered_model", content["name"])
    _another_algorithm(content, overrides.get("quantization.algorithm"))
    if "@" in str(overrides.get("source", "")):  # a pin given for this run
        content.pop("track", None)
    _find_rows(content, file)
    _find_keys(content, file)
    for key, value in overrides.items():
        _lay_over(content, key, value)
    _search_instead(content, overrides.get("quantization.algorithm"))
    for chosen in _quantizations(content):
        _find_calibration(chosen, file)
    trains = _given_rows(content)
    found: list[str] = list(problems)
    try:
        profile = Profile.model_validate(content)
    except ValidationError as error:
        found += [described(problem, file.name, overrides) for problem in error.errors()]
    if found:
        given = all(line.startswith("parameter:") for line in found)
        heading = (
            "These parameters are wrong" if given else f"Profile {name_or_path} cannot be used"
        )
        raise UserError(problem_list(heading, found))
    return profile if trains else profile.model_copy(update={"train": None})


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file.name} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file.name}: expected a mapping of keys, found {type(content).__name__}")
    return content


def _another_algorithm(content: dict[str, Any], algorithm: str | int | None) -> None:
    """Where a parameter chooses another algorithm, leave out what the file says for its own."""
    chosen = content.get("quantization")
    if algorithm is None or not isinstance(chosen, dict) or chosen.get("algorithm") == algorithm:
        return
    content["quantization"] = {k: v for k, v in chosen.items() if k in _FOR_EVERY_ALGORITHM}


def _search_instead(content: dict[str, Any], algorithm: str | int | None) -> None:
    """Turn the search on for the algorithm `search`, and off where a parameter names another."""
    chosen, search = content.get("quantization"), content.setdefault("search", {})
    if not isinstance(search, dict):
        return
    if isinstance(chosen, dict) and chosen.get("algorithm") == SEARCH:
        content["quantization"], search["on"] = {}, True
    elif algorithm is not None:
        search["on"] = False


def _quantizations(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Every set of quantization settings in a profile file."""
    search = content.get("search")
    candidates = search.get("candidates") if isinstance(search, dict) else None
    found = [content.get("quantization")]
    found += list(candidates.values()) if isinstance(candidates, dict) else []
    return [chosen for chosen in found if isinstance(chosen, dict)]


def _find_calibration(chosen: dict[str, Any], file: Path) -> None:
    """GPTQ without texts takes the project's; a relative file counts from the profile's folder."""
    named = chosen.get("calibration")
    if isinstance(named, str):
        chosen["calibration"] = _beside(file, named)
    elif named is None and chosen.get("algorithm") == "gptq":
        chosen["calibration"] = str(CALIBRATION)


def _beside(file: Path, named: str) -> str:
    """A path that a profile names: a relative one counts from the profile's folder."""
    return str(file.absolute().parent / Path(named).expanduser())


def _find_rows(content: dict[str, Any], file: Path) -> None:
    """Relative files of training rows in a profile count from its folder."""
    train = content.get("train")
    for key in ROWS:
        if isinstance(train, dict) and isinstance(train.get(key), str) and not is_uri(train[key]):
            train[key] = _beside(file, train[key])


def _find_keys(content: dict[str, Any], file: Path) -> None:
    """Relative files of keys in a profile count from its folder."""

    def found(named: Any) -> Any:
        if not isinstance(named, str) or named.lstrip().startswith(PEM):
            return named
        return _beside(file, named)

    trust = content.get("trust")
    if not isinstance(trust, dict):
        return
    if isinstance(keys := trust.get("keys"), str):  # one key needs no list
        trust["keys"] = [found(keys)]
    elif isinstance(keys, list):
        trust["keys"] = [found(named) for named in keys]
    signs = trust.get("sign_with")
    if isinstance(signs, dict):
        _refuse_secrets(signs)
        for key in ("key", "sigstore_config"):
            if key in signs:
                signs[key] = found(signs[key])


def _refuse_secrets(signs: dict[str, Any]) -> None:
    """Refuse a key or a PIN in a profile before a message about the section could show it.

    Raises:
        UserError: without a word of it.
    """
    if any(PEM in str(value) for value in signs.values()):
        raise UserError(
            "trust.sign_with holds a key itself, which does not belong into a profile: put it into "
            "a file (key) or an environment variable (key_env)"
        )
    if "pin-value" in str(signs.get("pkcs11")):
        raise UserError(
            "trust.sign_with.pkcs11 holds a PIN, which does not belong into a profile: name a file "
            "with pin-source= in its place"
        )


def _given_rows(content: dict[str, Any]) -> bool:
    """Whether there are rows to train on. A section without is for those that a parameter gives.

    Its other keys are checked all the same.
    """
    train = content.get("train")
    if isinstance(train, dict) and train and train.get("data") is None:
        train["data"] = "none"
        return False
    return True


def _lay_over(content: dict[str, Any], dotted: str, value: str | int) -> None:
    *path, last = dotted.split(".")
    for part in path:
        section = content.setdefault(part, {})
        if not isinstance(section, dict):  # reported by validation as a wrong type
            return
        content = section
    content[last] = value
