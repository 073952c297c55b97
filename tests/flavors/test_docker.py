"""What `mlflow models generate-dockerfile` (and `build-docker`, which builds it) would install."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from phi3_mlflow.flavors.bundle import requirements

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["onnx", "prompt", "transformers"])
def image(
    request: pytest.FixtureRequest, store: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The flavor, and the folder that an image would be built from."""
    from mlflow.models.cli import commands

    info = request.getfixturevalue(f"{request.param}_info")
    folder = tmp_path_factory.mktemp("docker")
    options = ["generate-dockerfile", "-m", info.model_uri, "-d", str(folder)]
    environment = {"MLFLOW_TRACKING_URI": store}
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    try:
        done = CliRunner().invoke(commands, options, env=environment, catch_exceptions=False)
    finally:
        mlflow.set_tracking_uri(before)
    assert done.exit_code == 0, done.output
    return ("transformers" if request.param == "transformers" else "onnx"), folder


def _copied(folder: Path) -> Path:
    """The model's folder, as the Dockerfile copies it."""
    source = re.search(r"^COPY (\S+) /opt/ml/model$", (folder / "Dockerfile").read_text(), re.M)
    assert source
    return folder / source[1]


def test_the_image_installs_the_models_own_pins_and_nothing_else(image: tuple[str, Path]) -> None:
    flavor, folder = image
    model = _copied(folder)
    pins = requirements(flavor)
    assert (model / "requirements.txt").read_text().splitlines() == pins
    assert yaml.safe_load((model / "python_env.yaml").read_text())["dependencies"] == [
        "-r requirements.txt"
    ]
    names = {pin.partition("==")[0] for pin in pins}
    assert {"mlflow", "numpy"} < names
    assert not names & {"torchvision", "torchaudio", "phi3-mlflow"}
    assert ("torch" in names) == (flavor == "transformers")
    text = (folder / "Dockerfile").read_text()
    installed = re.findall(r"pip install (.*)", text)
    assert installed == [pin for pin in pins if pin.startswith("mlflow==")]
    assert "_install_pyfunc_deps('/opt/ml/model'" in text


def test_the_image_is_a_slim_python_that_needs_no_repository(image: tuple[str, Path]) -> None:
    text = (image[1] / "Dockerfile").read_text()
    python = ".".join(map(str, sys.version_info[:3]))
    assert f"FROM python:{python}-slim\n" in text
    assert not re.search(r"git (clone|\+)|https?://(?!docs\.)|conda|openjdk", text)
    assert str(ROOT) not in text
    assert "_serve('local')" in text


def test_what_is_copied_is_whole_and_stands_alone(image: tuple[str, Path]) -> None:
    flavor, folder = image
    model = _copied(folder)
    assert (model / "runtime" / "python_model.py").is_file()
    assert list(model.rglob("*.onnx" if flavor == "onnx" else "*.safetensors"))
    code = [*model.glob("*.py"), *(model / "runtime").glob("*.py")]
    assert not any("import phi3_mlflow" in f.read_text() for f in code)
    assert not any("from phi3_mlflow" in f.read_text() for f in code)
    assert not [file for file in model.rglob("*") if file.is_symlink() or file.suffix == ".pkl"]
