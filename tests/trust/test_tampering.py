"""Whatever is changed of a signed version is refused, or named; nothing of the model runs.

The signature is that of the stock library: what it covers is checked by its own command line, too.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from phi3_mlflow.artifacts.manifests import MANIFEST_NAME, Manifest
from phi3_mlflow.core.errors import VersionRefused
from phi3_mlflow.server.holder import Holder, Target, load
from phi3_mlflow.tracking import promotion, registry
from phi3_mlflow.tracking.registry import CHAMPION, VersionName
from phi3_mlflow.tracking.stored_files import LOGGED, local_files
from phi3_mlflow.trust.attestations import (
    PROVENANCE,
    SIGNATURE,
    VERDICT,
    place_of,
    sign_verdict,
    sign_version,
)
from phi3_mlflow.trust.policy import demands_of, failures, named_subject, refuse_untrusted
from phi3_mlflow.trust.verify import verify
from tests.trust.conftest import Keys, Line

DATA = "artifacts/onnx/model.onnx.data"


def rewrite_manifest(place: Path, version: VersionName) -> None:
    """What somebody does who knows of the project's own manifest: it fits again, the tag too."""
    files = Manifest.of_directory(place).files
    kept = tuple(f for f in files if not f.path.startswith(("attestations/", "registered_model")))
    Manifest(kept).write(place)
    model_id = registry.logged_model_id(version)
    registry.client().set_logged_model_tags(model_id, {"files_sha256": Manifest(kept).digest})


def flip(path: str) -> Callable[[Path], None]:
    """One bit of a file, its size and times as they were."""

    def change(place: Path) -> None:
        file = place / path
        before, content = file.stat(), bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    return change


def add(path: str, content: bytes = b"import os\n") -> Callable[[Path], None]:
    def change(place: Path) -> None:
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(content)

    return change


def remove(place: Path) -> None:
    (place / "artifacts/onnx/chat_template.jinja").unlink()


def rename(place: Path) -> None:
    (place / "chat_model.py").rename(place / "chat_model_.py")


def exchange(place: Path) -> None:
    one, two = place / "artifacts/onnx/tokenizer.json", place / "artifacts/onnx/genai_config.json"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def link_file(place: Path) -> None:
    target = place.parent / f"{place.name}-elsewhere"
    (place / DATA).rename(target)
    (place / DATA).symlink_to(target)


def link_folder(place: Path) -> None:
    target = place.parent / f"{place.name}-runtime"
    shutil.copytree(place / "runtime", target)
    shutil.rmtree(place / "runtime")
    (place / "runtime").symlink_to(target)


CHANGES = {
    "weights": (flip(DATA), f"{DATA} has other bytes"),
    "graph": (flip("artifacts/onnx/model.onnx"), "model.onnx has other bytes"),
    "tokenizer": (flip("artifacts/onnx/tokenizer.json"), "tokenizer.json has other bytes"),
    "template": (flip("artifacts/onnx/chat_template.jinja"), "chat_template.jinja has other"),
    "serving code": (flip("runtime/engine.py"), "runtime/engine.py has other bytes"),
    "model file": (flip("MLmodel"), "MLmodel has other bytes"),
    "requirements": (add("requirements.txt", b"mlflow\nevil\n"), "requirements.txt has other"),
    "added code": (add("runtime/json.py"), "runtime/json.py was added"),
    "added at the top": (add("sitecustomize.py"), "sitecustomize.py was added"),
    "byte code": (add("runtime/__pycache__/engine.cpython-311.pyc"), "byte code that Python"),
    "hidden": (add(".git/config"), ".git/config was added"),
    "removed": (remove, "chat_template.jinja is missing"),
    "renamed": (rename, "chat_model.py is now called chat_model_.py"),
    "exchanged": (exchange, "genai_config.json has other bytes"),
    "link to a file": (link_file, "is a symbolic link"),
    "link to a folder": (link_folder, "is a symbolic link"),
}


@pytest.fixture
def signed(line: Line, keys: Keys, name: str) -> VersionName:
    version = line.version(name)
    assert sign_version(version, keys.signs, "run")
    return version


def why(version: VersionName, keys: Keys, **more: object) -> str:
    """Why a version is refused; empty when it is let through."""
    try:
        refuse_untrusted(version.uri, keys.required(**more))
    except VersionRefused as error:
        return str(error).partition("\n")[0]
    return ""


def test_what_was_signed_is_let_through_wherever_it_is(
    line: Line, signed: VersionName, keys: Keys, tmp_path: Path
) -> None:
    assert why(signed, keys) == ""
    copy = tmp_path / "downloaded" / "under another name"
    copy.mkdir(parents=True)
    mlflow.artifacts.download_artifacts(artifact_uri=signed.uri, dst_path=str(copy))
    assert (copy / "registered_model_meta").is_file()
    refuse_untrusted(str(copy), keys.required())
    assert not sign_version(signed, keys.signs, None), "signed twice"


def test_tags_say_where_and_by_whom_for_people(signed: VersionName) -> None:
    tags = registry.describe(signed).tags
    assert tags["attestations"] == place_of(signed)
    assert len(tags["signed_by"]) == 64


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_the_files_is_refused_and_named(
    what: str, line: Line, signed: VersionName, keys: Keys
) -> None:
    change, told = CHANGES[what]
    change(line.place(signed))
    rewrite_manifest(line.place(signed), signed)
    reason = why(signed, keys)
    assert reason.startswith(f"{signed.uri} is refused: signature: ")
    assert told in reason


@pytest.mark.parametrize("what", ["weights", "added code", "removed", "serving code"])
def test_without_a_signature_verify_still_sees_what_the_manifest_tells(
    what: str, line: Line, keys: Keys, name: str
) -> None:
    version = line.version(name)
    subject = named_subject(version.uri, local_files(version.uri))
    demands = demands_of(keys.required().model_copy(update={"require": "none"}))
    assert not failures(verify(subject, demands))
    change, told = CHANGES[what]
    change(line.place(version))
    (check, *_) = failures(verify(subject, demands))
    assert check.name == "files"
    assert told in check.told


def test_the_stock_command_line_agrees(
    line: Line, signed: VersionName, keys: Keys, store, tmp_path: Path
) -> None:
    copy = tmp_path / "downloaded"
    copy.mkdir()
    mlflow.artifacts.download_artifacts(artifact_uri=signed.uri, dst_path=str(copy))
    command = [
        sys.executable, "-m", "model_signing", "verify", "key", "--public_key", str(keys.public),
        "--signature", str(copy / place_of(signed) / SIGNATURE), str(copy),
    ]  # fmt: skip
    done = store.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    flip(DATA)(copy)
    assert store.run(*command).returncode != 0


def test_one_byte_of_a_signature(line: Line, signed: VersionName, keys: Keys) -> None:
    for name in (SIGNATURE, PROVENANCE):
        file = line.place(signed) / place_of(signed) / name
        whole = json.loads(file.read_text())
        for part in ("payload", "sig"):
            changed = json.loads(json.dumps(whole))
            envelope = changed["dsseEnvelope"]
            holder = envelope if part == "payload" else envelope["signatures"][0]
            raw = bytearray(base64.b64decode(holder[part]))
            raw[len(raw) // 2] ^= 1
            holder[part] = base64.b64encode(bytes(raw)).decode()
            file.write_text(json.dumps(changed))
            assert "the signature is not that of its content" in why(signed, keys)
        file.write_text("{")
        assert "it is no Sigstore bundle" in why(signed, keys)
        file.write_text(json.dumps(whole))
    assert why(signed, keys) == ""


@pytest.mark.parametrize("name_", [SIGNATURE, PROVENANCE])
def test_a_bundle_that_is_gone(name_: str, line: Line, signed: VersionName, keys: Keys) -> None:
    (line.place(signed) / place_of(signed) / name_).unlink()
    assert "is missing" in why(signed, keys)


def test_one_statement_does_not_pass_for_another(
    line: Line, signed: VersionName, keys: Keys
) -> None:
    place = line.place(signed) / place_of(signed)
    shutil.copy(place / PROVENANCE, place / SIGNATURE)
    assert "what was signed is another statement" in why(signed, keys)


def test_unsigned_and_foreign(line: Line, keys: Keys, others: Keys, name: str) -> None:
    version = line.version(name)
    assert "signature: it is not signed" in why(version, keys)
    sign_version(version, others.signs, None)
    assert "it is signed with the key" in why(version, keys)
    assert why(version, others) == ""
    sign_version(version, keys.signs, None)
    assert why(version, keys) == ""


def test_a_signature_of_another_version(line: Line, keys: Keys, name: str) -> None:
    one, two = line.version(name), line.version(name)
    sign_version(one, keys.signs, None)
    shutil.copytree(line.place(one) / place_of(one), line.place(two) / place_of(two))
    assert "the files are not those that were signed" in why(two, keys)


def test_versions_of_the_same_files_that_change_places(line: Line, keys: Keys, name: str) -> None:
    """The files of one version below the number of another, bundles for both beside them."""
    one, two = line.version(name), line.version(name)
    sign_version(one, keys.signs, None)
    sign_version(two, keys.signs, None)
    first, second, aside = line.place(one), line.place(two), line.folder / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    shutil.copytree(first / place_of(two), first / place_of(one))
    shutil.copytree(second / place_of(one), second / place_of(two))
    assert f"it was signed as {two.uri}, and is offered as {one.uri}" in why(one, keys)
    assert f"it was signed as {one.uri}, and is offered as {two.uri}" in why(two, keys)


def test_registered_again_under_another_name(line: Line, signed: VersionName, keys: Keys) -> None:
    model = registry.describe(signed).tags[LOGGED]
    tags = registry.describe(signed).tags
    number = mlflow.register_model(model, f"{signed.name}-other", tags=dict(tags)).version
    other = VersionName(f"{signed.name}-other", str(number))
    assert f"the same files are signed as {signed.name}-1" in why(other, keys)
    shutil.copytree(line.place(signed) / place_of(signed), line.place(signed) / place_of(other))
    assert f"it was signed as {signed.uri}, and is offered as {other.uri}" in why(other, keys)


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("git_commit", "9" * 40),
        ("source", "hf:evil/b@1"),
        ("artifact_sha256", "0" * 64),
        ("precision", "fp32"),
        ("adapter_sha256", "1" * 64),
    ],
)
def test_tags_that_were_changed_in_the_registry(
    tag: str, value: str, signed: VersionName, keys: Keys
) -> None:
    registry.set_tags(signed, {tag: value})
    assert f"registry: tags were changed after it was signed: {tag} is '{value}'" in why(
        signed, keys
    )


def evaluated(version: VersionName, gate: str = "passed", decision: str = "promote") -> None:
    registry.set_tags(
        version,
        {"gate": gate, "gate_decision": decision, "gate_against": "none", "gate_reasons": "so"},
    )


def test_promotion_needs_a_signed_verdict(signed: VersionName, keys: Keys) -> None:
    def promote(**more: object) -> promotion.Promotion:
        def allowed(one: VersionName) -> None:
            refuse_untrusted(one.uri, keys.required(), verdict=True)

        return promotion.promote(signed, overrule=False, allowed=allowed)

    evaluated(signed)
    with pytest.raises(VersionRefused, match="no verdict on it is signed"):
        promote()
    assert registry.alias_of(signed.name, CHAMPION) is None
    evaluated(signed, "failed", "refuse")
    assert sign_verdict(signed, keys.signs)
    assert not sign_verdict(signed, keys.signs), "signed twice"
    evaluated(signed)  # in the registry alone
    with pytest.raises(VersionRefused, match="gate is 'passed', 'failed' was signed"):
        promote()
    assert sign_verdict(signed, keys.signs)
    assert promote().moved


def test_a_verdict_on_other_files_or_another_version(line: Line, keys: Keys, name: str) -> None:
    one, two = line.version(name), line.version(name)
    for version in (one, two):
        sign_version(version, keys.signs, None)
        evaluated(version)
        sign_verdict(version, keys.signs)
    shutil.copy(
        line.place(one) / place_of(one) / VERDICT, line.place(two) / place_of(two) / VERDICT
    )
    assert "verdict: it is about other files" in why(two, keys)


def test_an_old_signed_version_is_let_through_unless_the_profile_has_a_floor(
    line: Line, keys: Keys, name: str
) -> None:
    """A signature says who made a version, not that it is the newest: this is not detected."""
    old, new = line.version(name), line.version(name)
    sign_version(old, keys.signs, None)
    sign_version(new, keys.signs, None)
    assert why(old, keys) == ""
    assert "age: version 1 is older than trust.oldest_version 2" in why(old, keys, oldest_version=2)
    assert why(new, keys, oldest_version=2) == ""


def test_serve_never_loads_what_does_not_verify(
    line: Line, signed: VersionName, keys: Keys
) -> None:
    unsigned = line.version(signed.name)
    trust = keys.required()
    with pytest.raises(VersionRefused, match="it is not signed"):
        load(Target(unsigned.name, unsigned.version, unsigned.uri), trust=trust)

    loaded: list[str] = []

    def pretend(target: Target):
        refuse_untrusted(target.uri, trust)
        loaded.append(target.version)
        return type("Loaded", (), {"target": target, "version": target.version})()

    now = [signed]
    holder = Holder(lambda: Target(now[0].name, now[0].version, now[0].uri), pretend)
    now[0] = unsigned  # the alias moves
    assert not holder.look()
    assert loaded == ["1"]
    assert holder.current.version == "1"


def test_the_manifest_alone_does_not_vouch(line: Line, signed: VersionName, keys: Keys) -> None:
    (line.place(signed) / MANIFEST_NAME).unlink()
    assert f"{MANIFEST_NAME} is missing" in why(signed, keys)


def test_a_trusted_key_among_several(signed: VersionName, keys: Keys, others: Keys) -> None:
    both = replace(keys)
    trust = others.required().model_copy(
        update={"keys": (str(others.public), both.public.read_text())}
    )
    refuse_untrusted(signed.uri, trust)
