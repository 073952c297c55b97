"""Reading Sigstore bundles: who signed, whether that is so, and what the statement says.

A bundle is whatever somebody has put there: everything in it is believed only after the signature
was found right, with a key that the reader chose.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.trust.keys import Trusted, short

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MODEL = "https://model_signing/signature/v1.0"
"""The predicate type of a signature over files, of OpenSSF Model Signing."""
_IN_TOTO = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_MOST_BYTES = 64 << 20  # a bundle is some hundred bytes per file


class Refused(Exception):
    """A bundle that does not count; the text says why."""


class Foreign(Refused):
    """It is signed, if at all, by somebody whose signatures do not count."""


@dataclass(frozen=True)
class Opened:
    """A bundle whose signature is right.

    Attributes:
        statement: what was signed.
        signer: the key's fingerprint, or the identity.
    """

    statement: Mapping[str, Any]
    signer: str

    @property
    def shown(self) -> str:
        """The signer, for people."""
        return short(self.signer)


def open_bundle(file: Path, trusted: Trusted, predicate_type: str) -> Opened:
    """Check a bundle's signature and read its statement.

    Args:
        file: the bundle.
        trusted: whose signatures count.
        predicate_type: what the statement has to be about; a signature over something else, put
            into this place, is refused.

    Raises:
        Foreign: nobody who counts has signed.
        Refused: the signature is wrong, or the statement is none.
    """
    hint = signer_hint(file)
    if hint is None:
        payload_type, payload, signer = _of_an_identity(file, trusted)
    elif hint in trusted.keys:
        payload_type, payload = _of_a_key(file, trusted.keys[hint])
        signer = hint
    else:
        raise Foreign(
            f"it is signed with the key {short(hint)}, which does not count here ({trusted} does)"
            if trusted
            else f"it is signed with the key {short(hint)}, and no key is given to check it with"
        )
    try:
        statement = json.loads(payload)
        if payload_type != _IN_TOTO or statement["_type"] != _STATEMENT:
            raise Refused("what was signed is no in-toto statement")
        if statement["predicateType"] != predicate_type:
            raise Refused(f"what was signed is another statement: {statement['predicateType']}")
    except (ValueError, KeyError, TypeError) as error:
        raise Refused("what was signed is no in-toto statement") from error
    return Opened(statement, signer)


def signer_hint(file: Path) -> str | None:
    """The fingerprint that a bundle names; None where it has a certificate in its place.

    Raises:
        Refused: it is no bundle.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise Refused(f"it is larger than {_MOST_BYTES >> 20} MB")
        material = json.loads(file.read_text("utf-8"))["verificationMaterial"]
        if "publicKey" not in material:
            return None
        hint = material["publicKey"]["hint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused("it is no Sigstore bundle") from error
    if not isinstance(hint, str):
        raise Refused("it does not name its key")
    return hint


def _of_a_key(file: Path, pem: bytes) -> tuple[str, bytes]:
    from model_signing import verifying
    from model_signing._signing.sign_sigstore_pb import Signature

    with tempfile.TemporaryDirectory(prefix="phi3-mlflow-") as folder:
        public = Path(folder, "key.pub")
        public.write_bytes(pem)
        make: Any = verifying.Config  # untyped there
        verifier = make().use_elliptic_key_verifier(public_key=public)._verifier
    try:
        payload_type, payload = verifier._verify_signed_content(Signature.read(file))
    except Exception as error:  # made by a stranger, it may break in any way
        raise Refused("the signature is not that of its content") from error
    return payload_type, payload


def _of_an_identity(file: Path, trusted: Trusted) -> tuple[str, bytes, str]:
    if not trusted.identities:
        raise Foreign(
            f"it is signed by an identity of Sigstore's, and none counts here ({trusted} does)"
        )
    from model_signing import verifying
    from model_signing._signing.sign_sigstore import Signature

    make: Any = verifying.Config  # untyped there
    for one in trusted.identities:
        try:
            config = make().use_sigstore_verifier(
                identity=one.identity, oidc_issuer=one.issuer, trust_config=one.config
            )
            verifier = config._verifier
            payload_type, payload = verifier._verify_signed_content(Signature.read(file))
        except Exception:  # the next may be it; a network that is away looks the same
            continue
        return payload_type, payload, one.identity
    raise Foreign(f"it is not signed by an identity that counts here ({trusted})")


def signed_hashes(opened: Opened) -> dict[str, str]:
    """The sha256 of each file that was signed, by its path.

    Raises:
        Refused: the statement is not one over files with sha256.
    """
    found: dict[str, str] = {}
    try:
        predicate = opened.statement["predicate"]
        if predicate["serialization"]["method"] != "files":
            raise Refused("it was not signed file by file")
        for path, algorithm, digest in _resources(predicate):
            if algorithm != "sha256" or path in found:
                raise Refused(f"{path} was not signed with sha256, or twice")
            found[path] = digest
    except (KeyError, TypeError) as error:
        raise Refused("the statement over the files cannot be read") from error
    return found


def _resources(predicate: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for one in predicate["resources"]:
        yield str(one["name"]), str(one["algorithm"]), str(one["digest"])
