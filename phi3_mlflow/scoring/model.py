"""The model that scores: where its files are, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.tracking.stored_files import local_files

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.scoring.requests import RowRequest

SEED = "seed"
"""The parameter of a model that takes a seed, and the key of the seed in a journal."""


@dataclass(frozen=True)
class ScoredModel:
    """What the model's own files say about it.

    Attributes:
        path: the folder with its MLmodel file.
        identity: MLflow's id of it, the same for every copy.
        prompts: it takes a literal prompt instead of messages.
        seeded: it takes a seed.
    """

    path: Path
    identity: str
    prompts: bool
    seeded: bool

    def body(self, request: RowRequest) -> tuple[dict[str, Any], str | None]:
        """A row's request as the model takes it, and why there is none."""
        if request.body is None:
            return {}, request.error
        if self.prompts:
            if "prompt" in request.body:
                return request.body, None
            return {}, "messages: this model takes a prompt (it was logged with contract prompt)"
        if "prompt" in request.body:
            return {"messages": [{"role": "user", "content": request.body["prompt"]}]}, None
        return request.body, None


def inspect_model(model_uri: str) -> ScoredModel:
    """Find a model's files and what it takes.

    Raises:
        UserError: it is not there, or takes neither messages nor a prompt.
        EnvironmentProblem: its files are gone.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        path = local_files(model_uri)
    except UserError as error:
        raise UserError(f"parameter: model_uri = {error}") from error
    try:
        about: Any = mlflow.models.Model.load(str(path))
    except (MlflowException, OSError) as error:
        raise UserError(
            f"parameter: model_uri = {model_uri!r}: no such model: {str(error)[:300]}"
        ) from error
    inputs, parameters = about.get_input_schema(), about.get_params_schema()
    names = inputs.input_names() if inputs is not None and inputs.has_input_names() else []
    if "messages" not in names and names != ["prompt"]:
        raise UserError(
            f"parameter: model_uri = {model_uri!r}: the model takes neither messages nor a prompt, "
            f"but {', '.join(names) or 'what its signature does not say'}"
        )
    seeded = parameters is not None and any(spec.name == SEED for spec in parameters.params)
    return ScoredModel(path, str(about.model_uuid), "messages" not in names, seeded)
