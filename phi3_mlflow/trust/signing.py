"""Signing with OpenSSF Model Signing: a model's files, and statements about them.

The library is imported in here and in `bundles`, and only when somebody signs or checks. Its public
interface signs folders; the same signers take any in-toto statement, which is what it makes of a
folder, too. They are an inner part of the library, whose version is pinned for that reason.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import EnvironmentProblem, UserError
from phi3_mlflow.trust.files import IGNORED
from phi3_mlflow.trust.keys import fingerprint, secret_from

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from phi3_mlflow.trust.settings import SignWith

KEYLESS = "sigstore"
"""What stands for a fingerprint where the identity is in a certificate of the moment."""


@dataclass(frozen=True)
class _Payload:
    """What a signer of the library takes: something with an in-toto statement."""

    statement: Any


class SigningKey:
    """What signs, for as long as it is needed.

    Attributes:
        fingerprint: sha256 of the public key's PEM text as hex, as bundles carry it as a hint;
            `KEYLESS` where there is no lasting key.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        signer = config._signer
        public: Any = getattr(signer, "_public_key", None)
        private: Any = getattr(signer, "_private_key", None)
        if public is None and hasattr(private, "public_key"):
            public = private.public_key()
        self.fingerprint = KEYLESS if public is None else fingerprint(public)

    def sign_folder(self, folder: Path, bundle: Path) -> None:
        """Sign a model's files, all but `IGNORED`, and write the bundle.

        Raises:
            EnvironmentProblem: it could not be done: a token, a network that gives out.
        """
        from model_signing import hashing

        make: Any = hashing.Config  # untyped there
        rules = make().set_ignored_paths(
            paths=[Path(name) for name in IGNORED], ignore_git_paths=False
        )
        with _told("the files"):
            self._config.set_hashing_config(rules).sign(folder, bundle)

    def sign_statement(self, statement: Mapping[str, Any], bundle: Path) -> None:
        """Sign an in-toto statement, and write the bundle.

        Args:
            statement: `subject`, `predicateType` and `predicate`.
            bundle: the file to write.

        Raises:
            EnvironmentProblem: it could not be done: a token, a network that gives out.
        """
        from google.protobuf import json_format
        from in_toto_attestation.v1 import statement as in_toto
        from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor

        subjects = [
            ResourceDescriptor(name=one["name"], digest=dict(one["digest"])).pb
            for one in statement["subject"]
        ]
        # Structs take plain values only.
        predicate = json.loads(json.dumps(statement["predicate"]))
        made = in_toto.Statement(subjects, statement["predicateType"], predicate)
        with _told("the statement"):
            json_format.MessageToJson(made.pb)
            self._config._signer.sign(_Payload(made)).write(bundle)


@contextmanager
def signing_key(settings: SignWith) -> Iterator[SigningKey]:
    """What the profile signs with.

    Raises:
        UserError: the key is not there, or is none; never with what is in it.
        EnvironmentProblem: the token or the identity cannot be had.
    """
    from model_signing import signing

    make: Any = signing.Config  # untyped there
    config = make()
    if settings.pkcs11 is not None:
        modules = [str(path) for path in settings.pkcs11_modules]
        with _told("with a PKCS#11 key"):
            config.use_pkcs11_signer(pkcs11_uri=settings.pkcs11, module_paths=modules)
    elif settings.sigstore is not None:
        with _told("with Sigstore"):
            if settings.sigstore == "ambient":
                _require_identity()
            config.use_sigstore_signer(
                use_ambient_credentials=settings.sigstore == "ambient",
                trust_config=settings.sigstore_config,
            )
    else:
        _use_key(config, settings)
    yield SigningKey(config)


def _require_identity() -> None:
    """See that this job has an identity: the library would open a browser, and wait for it."""
    from sigstore.oidc import detect_credential

    if detect_credential("sigstore") is None:
        raise LookupError("this job has no identity token (GitHub Actions: permissions: id-token)")


def _use_key(config: Any, settings: SignWith) -> None:
    """Take a key in PEM; one in the environment is a file for a moment, of this user's alone."""
    secret = secret_from(settings)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="phi3-mlflow-", dir=memory) as private:
        file = Path(private, "key.pem")
        file.touch(mode=0o600)
        file.write_bytes(secret.pem)
        try:
            config.use_elliptic_key_signer(private_key=file, password=secret.password)
        except Exception as error:  # whatever it says, it may quote the key
            why = _why(error, secret.password)
            raise UserError(
                f"trust.sign_with: {secret.place} has no key to sign with: {why}"
                "\nNeeded is an EC private key on P-256, P-384 or P-521 in PEM, as made by\n"
                "  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem"
            ) from None


def _why(error: Exception, password: bytes | None) -> str:
    if isinstance(error, AttributeError):
        return "it is of another kind than EC"
    if "Unsupported key for curve" in str(error):
        return "it is on another curve"
    if isinstance(error, TypeError) and password is None:
        return "it is encrypted; name the variable with its password in password_env"
    if isinstance(error, TypeError):
        return "it is not encrypted, and password_env is set"
    if password is not None:
        return "it cannot be read with the password in password_env"
    return "it is not a private key in PEM"


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What goes wrong outside, in a sentence."""
    try:
        yield
    except Exception as error:
        told = str(error).partition("\n")[0][:300]
        raise EnvironmentProblem(
            f"signing {what} did not work: {type(error).__name__}: {told}"
        ) from error


def statement(
    subject: Sequence[Mapping[str, Any]], predicate_type: str, predicate: Mapping[str, Any]
) -> dict[str, Any]:
    """An in-toto statement, version 1."""
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": list(subject),
        "predicateType": predicate_type,
        "predicate": dict(predicate),
    }
