"""What the steps of a run will need on this machine: said, or refused, before the download.

Known is what follows from the model's sizes; times come from what the machine does in a second,
measured now, and are rough: twice as long or half is no surprise. What an earlier run of the same
profile took is more to be trusted, and a dry run shows it as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints.reader import CheckpointReader, read_config
from phi3_mlflow.core.errors import CheckpointRefused, EnvironmentProblem, UserError, problem_list
from phi3_mlflow.core.machine import available_memory, free_disk
from phi3_mlflow.core.rates import Rates, measure_rates
from phi3_mlflow.evaluation.batching import Asking, Expected, is_large, most_together
from phi3_mlflow.layers.room import IN_MEMORY
from phi3_mlflow.quantization.effort import NEAREST, SEARCHED, head_effort, layer_effort
from phi3_mlflow.quantization.plan import LinearPlan, make_plan
from phi3_mlflow.quantization.preflight import LIBRARIES, Needs, needs_of
from phi3_mlflow.quantization.settings import GptqSettings, QuantizationSettings, RtnSettings
from phi3_mlflow.stages.evaluate import load_sets
from phi3_mlflow.stages.foreseen import Foreseen, Model
from phi3_mlflow.stages.foreseen_answers import full_precision
from phi3_mlflow.stages.foreseen_training import task_here, training

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.config.parameters import Request
    from phi3_mlflow.config.profile import Profile
    from phi3_mlflow.evaluation.items import Question
    from phi3_mlflow.quantization.plan import QuantizationPlan

_LETTERS_PER_TOKEN = 4
_LOGITS = 2 << 28  # bytes of both models' logits that are compared at once
_ANSWERED = 0.5  # share of the tokens that an answer may have, on the average
_MILLION = 1e6


def known_model(request: Request, cache: StepCache) -> Model | None:
    """The sizes of the model that a run is about, where they are known before it is fetched."""
    profile = request.profile
    if (fetched := cache.latest(profile.name, "fetch")) and _same_source(fetched.origin, profile):
        try:
            reader = CheckpointReader(fetched.path)
            dtype = reader.entry("model.embed_tokens.weight").dtype
            return Model(read_config(fetched.path), dtype)
        except CheckpointRefused:
            return None
    # The sizes in the profile are those of its own source.
    if profile.architecture is None or not request.is_auto("source"):
        return None
    sizes = profile.architecture.model_dump()
    return Model(sizes, sizes.pop("dtype"))


def foresee(profile: Profile, model: Model, rates: Rates) -> dict[str, Foreseen]:
    """What each step needs, by its name; steps that need next to nothing are left out.

    Raises:
        UserError: the profile's quantization does not fit the model.
    """
    found = {"fetch": Foreseen(disk=model.nbytes, download=_download(profile, model))}
    if profile.train is not None:
        found["train"] = training(profile.train, model, rates)
    onnx = model.nbytes if profile.makes_onnx else 0
    if profile.quantizes:
        tried = profile.search.candidates.values() if profile.search.on else [profile.quantization]
        each = [_quantization(model, chosen, rates) for chosen in tried]
        onnx = max(needs.onnx for needs, _, _ in each)
        memory = max(needs.memory for needs, _, _ in each)
        int4 = max(needs.disk - needs.onnx for needs, _, _ in each)
        quantizing = sum(seconds for _, seconds, _ in each)
        exporting = sum(seconds for _, _, seconds in each)
        if profile.search.on:
            compared = _compared(profile, model, onnx, rates)
            found["search"] = Foreseen(
                memory=max(memory, compared.memory),
                disk=sum(needs.disk for needs, _, _ in each) + compared.disk,
                seconds=quantizing + exporting + len(each) * (compared.seconds or 0),
            )
        else:
            found["quantize"] = Foreseen(memory=memory, disk=int4, seconds=quantizing)
            found["export"] = Foreseen(memory=memory, disk=onnx, seconds=exporting)
    elif profile.makes_onnx:
        onnx = 2 * model.nbytes if model.reader.entry("model.norm.weight").dtype != "F32" else onnx
        found["export"] = Foreseen(LIBRARIES, onnx, seconds=2 * onnx / rates.disk)
    logged = onnx + (model.nbytes if profile.flavor != "onnx" else 0)
    found["log"] = Foreseen(LIBRARIES, logged, seconds=2 * logged / rates.disk)
    found["evaluate"] = _evaluated(profile, model, onnx or 2 * model.nbytes, rates)
    return found


def refuse_what_does_not_fit(
    profile: Profile, foreseen: Mapping[str, Foreseen], place: Path
) -> None:
    """Stop a run that would end for want of memory or disk.

    Args:
        profile: what is run.
        foreseen: of the steps that are still to be done.
        place: where the step cache is.

    Raises:
        EnvironmentProblem: the machine is too small; says what is needed and what helps.
    """
    memory, disk = available_memory(), free_disk(place)
    problems, ways = [], []
    for step, needed in foreseen.items():
        if memory is not None and needed.memory > memory:
            problems.append(
                f"{step} needs {needed.memory / 1e9:.1f} GB of memory, "
                f"{memory / 1e9:.1f} GB are available"
            )
    if problems:
        ways.append("close other programs, take a machine with more memory, or a smaller profile")
    taken = sum(needed.disk for needed in foreseen.values())
    if taken > disk:
        problems.append(
            f"all steps together need {taken / 1e9:.1f} GB of disk, {disk / 1e9:.1f} GB are free "
            f"at {place}"
        )
        ways.append("free some space, or put PHI3_MLFLOW_CACHE on a larger disk")
    if problems:
        raise EnvironmentProblem(
            problem_list(
                f"profile {profile.name} is too large for this machine as it is; nothing was done",
                problems,
                "What helps: " + "; ".join(ways) + ".",
            )
        )


def foreseen_for(request: Request, cache: StepCache, steps: Iterable[str]) -> dict[str, Foreseen]:
    """What some steps need, in their order; empty where the model's sizes are not known."""
    model = known_model(request, cache)
    if model is None:
        return {}
    try:
        found = foresee(request.profile, model, measure_rates(cache.root))
    except (UserError, CheckpointRefused):  # the step itself says it, with the checkpoint's name
        return {}
    return {step: found[step] for step in steps if step in found}


def _same_source(origin: Mapping[str, Any], profile: Profile) -> bool:
    source = origin.get("parts", {}).get("settings", {}).get("source")
    return bool(source == profile.origin)


def _download(profile: Profile, model: Model) -> int:
    return model.nbytes if profile.origin.startswith("hf:") else 0


def _quantization(
    model: Model, chosen: QuantizationSettings, rates: Rates
) -> tuple[Needs, float, float]:
    """What a quantization needs, and the seconds of quantize and of export."""
    plan = make_plan(model.config, model.reader, chosen)
    needs = needs_of(plan, chosen)
    int4 = needs.disk - needs.onnx
    efforts = _MILLION * _effort(plan, chosen) / rates.products
    moved = (int4 + needs.onnx) / rates.disk
    return needs, efforts + int4 / rates.disk, moved


def _effort(plan: QuantizationPlan, chosen: QuantizationSettings) -> float:
    """Millions of multiplications that rounding is worth."""
    linears = plan.linears()
    if isinstance(chosen, GptqSettings):
        inside = [step for step in linears if step.layer is not None]
        head = sum(head_effort(step) for step in linears if step.layer is None)
        return layer_effort(inside, chosen.calibration_tokens) + head
    plain = isinstance(chosen, RtnSettings)
    return sum(_rounding(step, nearest=plain or step.bits == 8) for step in linears)


def _rounding(step: LinearPlan, *, nearest: bool) -> float:
    return step.rows * step.columns * (NEAREST if nearest else SEARCHED / 2) / _MILLION


def _compared(profile: Profile, model: Model, candidate: int, rates: Rates) -> Foreseen:
    """Comparing a candidate with full precision on the held-out texts."""
    texts = load_sets(profile).texts
    tokens = sum(len(text.text) for text in texts) // _LETTERS_PER_TOKEN
    states = 4 * tokens * model.hidden
    largest = 4 * max(model.attention, model.mlp)
    full = min(states, IN_MEMORY) + largest + largest // 4 + (1 << 28)
    return Foreseen(
        memory=LIBRARIES + max(full, candidate + _LOGITS),
        disk=2 * states,
        seconds=2 * tokens * model.products / rates.products + model.nbytes / rates.disk,
    )


def _evaluated(profile: Profile, model: Model, candidate: int, rates: Rates) -> Foreseen:
    sets = load_sets(profile)
    compared = _compared(profile, model, candidate, rates)
    general = [_expected(question) for question in sets.questions]
    task = task_here(profile.train, profile.evaluation.task_rows) if profile.train else []
    both = [*general, *task]
    answers = sum(takes.answer for takes in both) * _ANSWERED
    asked = sum(takes.prompt for takes in both)
    asked += sum(needle.target_tokens for needle in sets.fitting())
    longest = max([512, *(needle.target_tokens for needle in sets.fitting())])
    kept = longest * model.cached // (4 if profile.runtime.kv_cache == "int8" else 1)
    token = candidate / rates.memory
    asking = Asking(profile.evaluation.batch)
    if profile.makes_onnx and is_large(asking, candidate):
        # The weights are read once for several answers, and computed for each.
        token = max(token / most_together(asking), model.products / rates.products)
    asked += sum(takes.tokens for takes in task)  # the loss on the same rows
    speaking = answers * token + asked * model.products / rates.products
    texts = sum(len(text.text) for text in sets.texts) // _LETTERS_PER_TOKEN
    full = full_precision(profile, model, general, task, texts, rates, available_memory())
    return replace(
        compared,
        memory=max(compared.memory, LIBRARIES + candidate + kept, full.memory),
        seconds=(compared.seconds or 0) + speaking + (full.seconds or 0),
    )


def _expected(question: Question) -> Expected:
    letters = sum(len(message.content) for message in question.messages)
    return Expected(letters // _LETTERS_PER_TOKEN, question.max_tokens)
