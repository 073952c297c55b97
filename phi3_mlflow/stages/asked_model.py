"""Which model of the registry a step is asked for."""

from __future__ import annotations

from phi3_mlflow.config.parameters import AUTO, Request
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.hints import run_command
from phi3_mlflow.tracking import registry


def model_uri(request: Request) -> str:
    """The parameter `model_uri`; an alias is replaced by the version that it points to now.

    Left out it is the champion, a number is a version of the profile's model, and what is no
    version stays as it is.

    Raises:
        UserError: there is none.
    """
    name, text = request.profile.registered_model, request.value("model_uri")
    if text == AUTO:
        champion = registry.alias_of(name, registry.CHAMPION)
        if champion is None:
            raise UserError(
                f"parameter: model_uri = 'auto': no version of {name} carries the alias "
                f"{registry.CHAMPION}.\nRun  {run_command(profile=request.profile.name)}  "
                "first, or name a model: -P model_uri=models:/NAME/1"
            )
        return f"models:/{name}/{champion}"
    if text.isdecimal() or (text.startswith("models:/") and not text.startswith("models:/m-")):
        try:
            return registry.find_version(text, name).uri
        except UserError as error:
            told = str(error).replace("parameter: version", "parameter: model_uri")
            raise UserError(told) from error
    return text
