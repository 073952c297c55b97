"""Keys: where they come from, what is refused, and that no word of one is ever shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from phi3_mlflow.config.loading import load_profile
from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.tracking import registry
from phi3_mlflow.trust.attestations import sign_version
from phi3_mlflow.trust.keys import trusted
from phi3_mlflow.trust.policy import refuse_untrusted
from phi3_mlflow.trust.settings import SignWith, TrustSettings
from phi3_mlflow.trust.signing import signing_key
from tests.conftest import ROOT
from tests.fixtures.tiny_line import write_profile
from tests.trust.conftest import Keys, Line, make_keys


def fingerprint(settings: SignWith) -> str:
    with signing_key(settings) as key:
        return key.fingerprint


def encrypted(keys: Keys) -> bytes:
    key = serialization.load_pem_private_key(keys.private.read_bytes(), None)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret word"),
    )


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_every_curve_of_the_library(
    curve: ec.EllipticCurve, line: Line, name: str, tmp_path: Path
) -> None:
    keys = make_keys(tmp_path, "key", curve)
    version = line.version("curves")
    assert sign_version(version, keys.signs, None)
    refuse_untrusted(version.uri, keys.required())


def test_a_key_in_the_environment(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (known,) = trusted((str(keys.public),)).keys
    monkeypatch.setenv("SIGNING_KEY", keys.private.read_text())
    assert fingerprint(SignWith(key_env="SIGNING_KEY")) == known
    monkeypatch.setenv("SIGNING_KEY", str(keys.private))
    assert fingerprint(SignWith(key_env="SIGNING_KEY")) == known
    monkeypatch.setenv("SIGNING_KEY", encrypted(keys).decode())
    monkeypatch.setenv("PASSWORD", "secret word")
    assert fingerprint(SignWith(key_env="SIGNING_KEY", password_env="PASSWORD")) == known


def test_what_is_no_key_is_refused_without_a_word_of_it(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = "c2VjcmV0IHdvcmQ"
    other = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    monkeypatch.setenv("RSA", other.decode())
    monkeypatch.setenv("BROKEN", f"-----BEGIN PRIVATE KEY-----\n{word}\n-----END PRIVATE KEY-----")
    monkeypatch.setenv("PASTED", word)
    monkeypatch.setenv("LOCKED", encrypted(keys).decode())
    monkeypatch.setenv("PASSWORD", word)
    monkeypatch.delenv("ABSENT", raising=False)
    cases = {
        SignWith(key_env="RSA"): "of another kind than EC",
        SignWith(key_env="BROKEN"): "not a private key in PEM",
        SignWith(key_env="PASTED"): "the file that PASTED names cannot be read",
        SignWith(key_env="ABSENT"): "the environment has no ABSENT",
        SignWith(key_env="LOCKED"): "it is encrypted; name the variable",
        SignWith(key_env="LOCKED", password_env="PASSWORD"): "with the password in password_env",
        SignWith(key_env="LOCKED", password_env="ABSENT"): "the environment has no ABSENT",
        SignWith(key=keys.public): "not a private key in PEM",
        SignWith(key=tmp_path / "gone.pem"): "gone.pem cannot be read",
    }
    for settings, told in cases.items():
        with pytest.raises(UserError) as caught:
            fingerprint(settings)
        assert told in str(caught.value)
        assert word not in str(caught.value)
        assert caught.value.__cause__ is None or word not in str(caught.value.__cause__)


def test_no_private_key_is_taken_for_a_public_one(keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a private key"):
        trusted((str(keys.private),))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="is no public key in PEM"):
        trusted((str(tmp_path / "text"),))
    with pytest.raises(UserError, match="cannot be read"):
        trusted((str(tmp_path / "gone"),))


def test_the_key_is_nowhere_in_what_a_version_carries(
    line: Line, name: str, keys: Keys, store
) -> None:
    version = line.version("secrets")
    sign_version(version, keys.signs, "run")
    secret = "".join(keys.private.read_text().splitlines()[1:-1])[20:60]
    raw = serialization.load_pem_private_key(keys.private.read_bytes(), None)
    number = raw.private_numbers().private_value.to_bytes(32)
    for file in line.place(version).rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes()
            assert number not in file.read_bytes()
            assert str(keys.private).encode() not in file.read_bytes()
    assert secret not in str(registry.describe(version).tags)
    assert str(keys.private) not in str(registry.describe(version).tags)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"require": "signature"}, "needs at least one public key"),
        ({"sign_with": {}}, "exactly one of key, key_env, pkcs11, sigstore"),
        ({"sign_with": {"key": "a", "key_env": "B"}}, "found key, key_env"),
        ({"sign_with": {"pkcs11": "pkcs11:token=t?pin-value=1234"}}, "holds a PIN"),
        ({"sign_with": {"key": "-----BEGIN PRIVATE KEY-----1234"}}, "holds a key itself"),
        ({"require": "sometimes"}, "'none' or 'signature'"),
        ({"key": "x"}, "key"),
    ],
)
def test_a_section_that_cannot_be_meant(section: dict, told: str, tmp_path: Path) -> None:
    file = write_profile(tmp_path, trust=section)
    with pytest.raises(UserError, match=told) as caught:
        load_profile(str(file))
    assert "1234" not in str(caught.value)


def test_files_of_keys_count_from_the_profile(tmp_path: Path, keys: Keys) -> None:
    text = keys.public.read_text()
    section = {
        "require": "signature",
        "keys": ["a.pub", text],
        "sign_with": {"key": "sub/a.pem"},
    }
    trust = load_profile(str(write_profile(tmp_path, trust=section))).trust
    assert trust.keys == (str(tmp_path / "a.pub"), text)
    assert trust.sign_with == SignWith(key=tmp_path / "sub/a.pem")
    one = load_profile(str(write_profile(tmp_path, trust={"keys": "a.pub"}))).trust
    assert one.keys == (str(tmp_path / "a.pub"),)


def test_it_is_off_and_costs_nothing_by_default(tmp_path: Path) -> None:
    for file in (ROOT / "configs").glob("*.yaml"):
        assert "trust" not in yaml.safe_load(file.read_text())
    assert not TrustSettings().on
    code = (
        "import sys\n"
        "from phi3_mlflow.trust.policy import OPEN, refuse_untrusted\n"
        "import phi3_mlflow.stages.catalog\n"
        "refuse_untrusted('models:/none/1', OPEN)\n"
        "assert not {'model_signing', 'sigstore', 'cryptography', 'mlflow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_section_is_no_part_of_what_a_run_shows_or_a_model_is_made_of(tmp_path: Path) -> None:
    from phi3_mlflow.pipeline.recipe import _DECIDES_NOTHING

    assert "trust" in _DECIDES_NOTHING
    section = {"sign_with": {"key": "a.pem"}}
    file = write_profile(tmp_path, trust=section)
    request = read_request(("profile",), {"profile": str(file)})
    assert request.profile.trust.on
