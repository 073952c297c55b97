"""Keys, and models that are nothing but files: what is signed does not have to run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mlflow.entities import LoggedModelStatus

from phi3_mlflow.artifacts.manifests import FileEntry, Manifest, sha256_of_file
from phi3_mlflow.flavors.bundle import list_files, mark_files
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.registry import VersionName
from phi3_mlflow.tracking.stored_files import LOGGED
from phi3_mlflow.trust.settings import SignWith, TrustSettings
from tests.conftest import Workspace, own_store

FILES = {
    "artifacts/onnx/model.onnx": b"graph" * 50,
    "artifacts/onnx/model.onnx.data": bytes(range(256)) * 40,
    "artifacts/onnx/genai_config.json": b"{}",
    "artifacts/onnx/tokenizer.json": b'{"model": {"type": "BPE"}}',
    "artifacts/onnx/chat_template.jinja": b"{% for message in messages %}{{ message }}{% endfor %}",
    "runtime/engine.py": b"raise SystemExit('nothing of a model may run here')\n",
    "chat_model.py": b"raise SystemExit('nothing of a model may run here')\n",
    "requirements.txt": b"mlflow\n",
    "model_card.md": b"# Fake\n",
}


@dataclass(frozen=True)
class Keys:
    """A pair of files in PEM."""

    private: Path
    public: Path

    @property
    def signs(self) -> SignWith:
        return SignWith(key=self.private)

    def required(self, **more: object) -> TrustSettings:
        return TrustSettings(require="signature", keys=(str(self.public),), **more)


def make_keys(folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> Keys:
    key = ec.generate_private_key(curve or ec.SECP256R1())
    keys = Keys(folder / f"{name}.pem", folder / f"{name}.pub")
    keys.private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    keys.public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return keys


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"), "release")


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Of somebody whose signatures do not count."""
    return make_keys(tmp_path_factory.mktemp("others"), "stranger")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with own_store(tmp_path_factory.mktemp("trust")) as place:
        yield place


@dataclass
class Line:
    """Makes versions of registered models that are files alone, as `log` and `register` would."""

    folder: Path
    made: int = 0
    models: dict[str, str] = field(default_factory=dict)

    def version(self, name: str, **files: bytes) -> VersionName:
        """A new version, its content its own; `files` by path replace those there are."""
        self.made += 1
        place = self.folder / f"model-{self.made}"
        unique = {"artifacts/onnx/model.onnx": f"graph {self.made}".encode() * 9}
        for path, content in {**FILES, **unique, **files}.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(content)
        artifact = place / "artifacts/onnx"
        entries = tuple(
            FileEntry(file.name, file.stat().st_size, sha256_of_file(file))
            for file in sorted(artifact.iterdir())
        )
        recipe = {
            "profile": {"source": f"hf:a/b@{'5' * 40}", "sha256": {"config.json": "6" * 64}},
            "calibration_sha256": "7" * 64,
            "files": [vars(entry) for entry in entries],
            "libraries": {"onnx": "1.23.2"},
        }
        client = registry.client()
        experiment = mlflow.set_experiment("trust").experiment_id
        model = client.create_logged_model(experiment, name="files")
        known = {"model_id": model.model_id, "model_uuid": model.model_id}
        content = {"flavors": {}, "metadata": {"recipe": recipe}, **known}
        (place / "MLmodel").write_text(yaml.safe_dump(content))
        digest = list_files(place)
        client.log_model_artifacts(model.model_id, str(place))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        mark_files(model.model_id, digest)
        uri = f"models:/{model.model_id}"
        tags = {
            "flavor": "onnx",
            "precision": "int4",
            "algorithm": "rtn",
            "source": f"hf:a/b@{'5' * 40}",
            "source_revision": "5" * 40,
            "artifact_sha256": Manifest(entries).digest,
            "git_commit": "8" * 40,
            "profile": "fake",
            LOGGED: uri,
        }
        number = mlflow.register_model(uri, name, tags=tags).version
        self.models[f"{name}/{number}"] = str(model.model_id)
        return VersionName(name, str(number))

    def place(self, version: VersionName) -> Path:
        """Where the store keeps a version's files."""
        found = registry.client().get_logged_model(self.models[f"{version.name}/{version.version}"])
        return Path(found.artifact_location.removeprefix("file://"))


@pytest.fixture
def line(store: Workspace, tmp_path: Path) -> Line:
    return Line(tmp_path)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Of a registered model that no other test has."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name)


@pytest.fixture
def read_json() -> Callable[[Path], dict]:
    return lambda file: json.loads(file.read_text("utf-8"))
