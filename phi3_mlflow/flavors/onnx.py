"""Logging the ONNX flavor: a pyfunc over onnxruntime-genai.

`mlflow.pyfunc.log_model(artifacts=...)` copies the model into a temporary folder and from there
into the artifact store, so twice its size is written. Here the temporary folder holds links to the
files instead, and the store is written to once, whether it is a folder or a server. What comes out
is an ordinary MLflow model: an `MLmodel` file with the `python_function` flavor.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.flavors import bundle
from phi3_mlflow.genai.kept import kv_cache

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow.models import Model
    from mlflow.models.model import ModelInfo

    from phi3_mlflow.flavors.bundle import Contract
    from phi3_mlflow.runtime.model_config import ModelConfig

ARTIFACT = "artifacts/onnx"


def log_onnx(
    onnx_dir: Path,
    *,
    name: str,
    contract: Contract = "chat",
    model_config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    tags: dict[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    input_example: Mapping[str, Any] | None = None,
    pip_requirements: list[str] | None = None,
    model_card: str | None = None,
    license_text: str | None = None,
    bom: str | None = None,
) -> ModelInfo:
    """Log a directory made by onnxruntime-genai's model builder as an MLflow LoggedModel.

    The active run becomes the source run of the model; without one the model has none.

    Args:
        onnx_dir: holds genai_config.json; every file in it becomes part of the model.
        name: of the logged model, and of the `model` in its answers unless `model_config` says
            otherwise.
        contract: `chat` answers MLflow's chat schema, `prompt` answers a text with a text.
        model_config: values of `runtime.model_config.ModelConfig`; all can be
            overridden when loading.
        metadata: goes into the MLmodel file.
        tags: of the LoggedModel.
        params: of the LoggedModel.
        input_example: a request; default: one of the contract's own.
        pip_requirements: default: `bundle.requirements("onnx")`.
        model_card: a text, kept as model_card.md with the model.
        license_text: a text, kept as LICENSE.txt with the model.
        bom: the bill of materials, kept as bom.cdx.json with the model.

    Returns:
        MLflow's ModelInfo: `model_uri`, `model_id`, `signature` and more.

    Raises:
        UserError: the directory is not a model, or a value of `model_config` is not known.
    """
    from mlflow.models import Model

    if not (onnx_dir / "genai_config.json").is_file():
        raise UserError(
            f"{onnx_dir} is not a model for onnxruntime-genai: it has no genai_config.json. "
            "The export step makes such a directory"
        )
    facts = {"rope_switch": rope_switch(onnx_dir), "kv_cache": kv_cache(onnx_dir)}
    config = {"model_name": name, **facts, **(model_config or {})}
    example = bundle.CHAT_EXAMPLE if contract == "chat" else bundle.PROMPT_EXAMPLE
    layout = _OnnxFlavor()
    logged: ModelInfo = Model.log(
        artifact_path=None,
        name=bundle.logged_name(name),
        flavor=layout,
        flavor_name="mlflow.pyfunc",
        metadata={**({"task": "llm/v1/chat"} if contract == "chat" else {}), **(metadata or {})},
        tags=tags,
        params=params,
        # Trying the example out would load the whole model; checking what was built is the export
        # step's work, and checking what was logged the evaluation's.
        validate_serving_input=False,
        onnx_dir=onnx_dir.resolve(),
        contract=contract,
        # Under another name than `model_config`: MLflow would write that into the run's parameters,
        # where two models logged by one run contradict each other.
        config=bundle.checked_config(config),
        input_example=input_example or example,
        pip_requirements=pip_requirements or bundle.requirements("onnx"),
        model_card=model_card,
        license_text=license_text,
        bom=bom,
    )
    bundle.mark_files(logged.model_id, layout.digest)
    return logged


class _OnnxFlavor:
    """What `Model.log` needs of a flavor: a way to lay the model out in a local folder.

    Attributes:
        digest: of the manifest of what was laid out.
    """

    digest = ""

    def save_model(
        self,
        path: str,
        mlflow_model: Model,
        onnx_dir: Path,
        contract: Contract,
        config: ModelConfig,
        model_card: str | None,
        license_text: str | None,
        bom: str | None,
        validate_serving_input: bool,
        **arguments: Any,
    ) -> None:
        import mlflow
        from mlflow.models.model import MLMODEL_FILE_NAME
        from mlflow.utils.file_utils import get_total_file_size

        folder = Path(path)
        mlflow.pyfunc.save_model(
            path=path,
            mlflow_model=mlflow_model,
            python_model=bundle.code_file(contract),
            model_config=asdict(config),
            signature=bundle.signature(contract),
            **arguments,
        )
        bundle.copy_code(contract, folder)
        bundle.write_documents(folder, model_card, license_text, bom)
        bundle.link_files(onnx_dir, folder / ARTIFACT)
        flavor = mlflow_model.flavors[mlflow.pyfunc.FLAVOR_NAME]
        flavor["artifacts"] = {"onnx": {"path": ARTIFACT, "uri": ARTIFACT}}
        flavor["model_code_path"] = bundle.code_file(contract).name  # not where it lies here
        mlflow_model.model_size_bytes = get_total_file_size(folder)
        mlflow_model.save(str(folder / MLMODEL_FILE_NAME))
        self.digest = bundle.list_files(folder)


def rope_switch(onnx_dir: Path) -> int:
    """The length at which a LongRoPE model changes to its long factors, or 0 for other models.

    The builder puts the choice into the graph as an `If` on the length of the sequence, and leaves
    no trace of it in genai_config.json.
    """
    import onnx

    graph = onnx.load(onnx_dir / "model.onnx", load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "If" or not any("cos_cache" in name for name in node.output):
            continue
        compare = makers.get(node.input[0])
        for name in compare.input if compare is not None else ():
            value = _scalar(name, constants, makers)
            if value is not None:
                return value
    return 0


def _scalar(name: str, constants: dict[str, Any], makers: dict[str, Any]) -> int | None:
    """The value of a whole number in a graph that is an initializer or a Constant node."""
    from onnx import numpy_helper

    tensor = constants.get(name)
    if tensor is None and name in makers and makers[name].op_type == "Constant":
        tensor = next((item.t for item in makers[name].attribute if item.name == "value"), None)
    return None if tensor is None else int(numpy_helper.to_array(tensor).reshape(-1)[0])
