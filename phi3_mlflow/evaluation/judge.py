"""A judge model's opinion of the answers, through MLflow's own judges; off unless a profile asks.

    evaluation:
      judge:
        model: openai:/gpt-4.1-mini
        guidelines: {polite: The answer is polite.}

The key is read by MLflow from the environment (OPENAI_API_KEY; OPENAI_API_BASE for any server that
speaks OpenAI's API, such as one of this project's own models), and never written anywhere. Each
judge gives a metric `judge.NAME`, the share of answers it says yes to; a threshold of the gate may
name it, and otherwise it decides nothing.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core import console
from phi3_mlflow.core.errors import EnvironmentProblem, UserError

if TYPE_CHECKING:
    import pandas
    from mlflow.genai.scorers import Scorer

    from phi3_mlflow.evaluation.settings import JudgeSettings

PREFIX = "judge."
_OPENAI = "https://api.openai.com/v1"
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_SHORTEST_SECRET = 6  # a shorter value would be found in innocent words


def check_judge(judge: JudgeSettings | None) -> None:
    """See whether the judge can be asked, before there is work that would be lost.

    Raises:
        UserError: what it needs is not installed or not in the environment, or its key is refused.
        EnvironmentProblem: its server does not answer.
    """
    if judge is None:
        return
    from mlflow.gateway.provider_registry import is_supported_provider

    provider = judge.model.partition(":")[0]
    known = is_supported_provider(provider) or provider in ("endpoints", "gateway", "databricks")
    if not known and importlib.util.find_spec("litellm") is None:
        raise UserError(
            f"evaluation.judge.model = {judge.model!r}: MLflow asks the provider {provider!r} "
            "through litellm, which is not installed.\nInstall it with  pip install litellm , or "
            "name a provider that needs nothing more, such as openai:/MODEL (with OPENAI_API_BASE "
            "for a server of your own) or anthropic:/MODEL."
        )
    if provider == "openai":
        _check_openai(judge.model)


def _check_openai(model: str) -> None:
    import httpx

    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise UserError(
            f"evaluation.judge.model = {model!r}: the environment holds no OPENAI_API_KEY.\n"
            "Set it; for a server of your own that wants none, set it to any text."
        )
    base = os.environ.get("OPENAI_API_BASE") or os.environ.get("OPENAI_BASE_URL") or _OPENAI
    headers = {"Authorization": f"Bearer {key}"}
    try:
        answer = httpx.get(f"{base.rstrip('/')}/models", headers=headers, timeout=20)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EnvironmentProblem(
            f"evaluation.judge.model = {model!r}: {scrubbed(base)} does not answer "
            f"({type(error).__name__}).\nSee to the network, or to OPENAI_API_BASE; or leave the "
            "judge out."
        ) from None
    if answer.status_code in (401, 403):  # a server need not list its models
        raise UserError(
            f"evaluation.judge.model = {model!r}: {scrubbed(base)} refuses the key in "
            f"OPENAI_API_KEY (HTTP {answer.status_code})."
        )


def judge_scorers(judge: JudgeSettings | None) -> list[Scorer]:
    """MLflow's judges as the profile wants them, each named `judge.NAME`."""
    if judge is None:
        return []
    from mlflow.genai.scorers import Correctness, Guidelines

    made: list[Scorer] = []
    if judge.correctness:
        name = f"{PREFIX}correctness"
        made.append(_guarded(name, Correctness(name=name, model=judge.model), True))
    for short, text in judge.guidelines.items():
        name = f"{PREFIX}{short}"
        made.append(_guarded(name, Guidelines(name=name, guidelines=text, model=judge.model)))
    return made


def _guarded(name: str, judge: Any, expects: bool = False) -> Scorer:
    """A judge whose errors, which MLflow keeps with the trace, hold no secret."""
    from mlflow.genai.scorers import scorer

    @scorer(name=name)
    def ask(inputs: dict[str, Any], outputs: str, expectations: dict[str, Any]) -> Any:
        more = {"expectations": expectations} if expects else {}
        try:
            # An empty answer counts as one not given, which a judge would refuse to look at.
            return judge(inputs=inputs, outputs=outputs or "(nothing)", **more)
        except Exception as error:
            raise EnvironmentProblem(scrubbed(str(error))) from None

    return ask


def judged(judge: JudgeSettings | None, results: pandas.DataFrame) -> dict[str, float]:
    """The share of answers that each judge says yes to.

    A judge that failed on an answer gives no metric: a share of the rest would be of other
    questions each time. A threshold on it is then not met.

    Args:
        judge: as the profile has it.
        results: what `mlflow.genai.evaluate` gives, one row per answer.
    """
    metrics = {}
    for name in judge.metrics if judge else ():
        column = f"{name}/value"
        values = results[column].dropna() if column in results else []
        if len(values) < len(results):
            console.say(
                f"  {name}: the judge failed on {len(results) - len(values)} of {len(results)} "
                "answers, so there is no metric; the traces of the run say why"
            )
            continue
        metrics[name] = sum(_yes(value) for value in values) / len(values)
    return metrics


def _yes(value: Any) -> bool:
    return value is True or str(value).lower() in ("yes", "true")


def scrubbed(text: str) -> str:
    """A text without what the environment keeps under the name of a key, and without passwords."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", text)
