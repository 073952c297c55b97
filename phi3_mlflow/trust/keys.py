"""Keys in PEM: where they are, and what tells them apart."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.trust.settings import PEM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phi3_mlflow.trust.settings import Identity, SignWith

_CURVES = ("secp256r1", "secp384r1", "secp521r1")


@dataclass(frozen=True)
class Secret:
    """A private key as it was found.

    Attributes:
        pem: its text; never shown.
        password: of an encrypted one.
        place: what to call it.
    """

    pem: bytes = field(repr=False)
    password: bytes | None = field(repr=False)
    place: str


@dataclass(frozen=True)
class Trusted:
    """Whose signatures count.

    Attributes:
        keys: PEM text of public keys by fingerprint.
        identities: for keyless signatures.
    """

    keys: dict[str, bytes] = field(default_factory=dict)
    identities: tuple[Identity, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.keys or self.identities)

    def __str__(self) -> str:
        """Fingerprints and identities, for a message."""
        told = [short(name) for name in self.keys] + [one.identity for one in self.identities]
        return ", ".join(told) or "none"


def secret_from(settings: SignWith) -> Secret:
    """The private key that a profile names.

    Raises:
        UserError: it, or its password, is not there.
    """
    password = None
    if settings.password_env is not None:
        text = os.environ.get(settings.password_env)
        if text is None:
            raise UserError(
                f"trust.sign_with.password_env: the environment has no {settings.password_env}"
            )
        password = text.encode()
    if settings.key_env is None:
        file, place = settings.key, str(settings.key)
    else:
        place = f"the environment variable {settings.key_env}"
        value = os.environ.get(settings.key_env, "").strip()
        if not value:
            raise UserError(f"trust.sign_with.key_env: the environment has no {settings.key_env}")
        if value.startswith(PEM):
            return Secret(value.encode(), password, place)
        # No word of it in a message: it may be a key that was pasted badly.
        file = Path(value).expanduser()
        place = f"the file that {settings.key_env} names"
    try:
        return Secret(Path(file or "").read_bytes(), password, place)
    except (OSError, ValueError) as error:
        told = error.strerror if isinstance(error, OSError) else "no path"
        raise UserError(f"trust.sign_with: {place} cannot be read: {told}") from None


def trusted(keys: Sequence[str], identities: Sequence[Identity] = ()) -> Trusted:
    """Read public keys.

    Args:
        keys: files in PEM, or the text itself.
        identities: that count as well.

    Raises:
        UserError: one of them is no EC public key.
    """
    return Trusted(dict(_public_key(named) for named in keys), tuple(identities))


def _public_key(named: str) -> tuple[str, bytes]:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    inline = named.lstrip().startswith(PEM)
    place = "a key that is written out" if inline else named
    try:
        text = named.strip().encode() + b"\n" if inline else Path(named).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"trust.keys: {place} cannot be read: {error.strerror}") from error
    if b"PRIVATE KEY" in text:
        raise UserError(
            f"trust.keys: {place} is a private key, and whoever checks needs the public one:\n"
            "  openssl pkey -in key.pem -pubout -out key.pub"
        )
    try:
        key: Any = load_pem_public_key(text)
    except ValueError as error:
        raise UserError(f"trust.keys: {place} is no public key in PEM") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise UserError(f"trust.keys: {place} is not an EC key on P-256, P-384 or P-521")
    return fingerprint(key), text


def fingerprint(public_key: Any) -> str:
    """sha256 of a public key's PEM text as hex, which bundles carry as a hint."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    text = public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(text).hexdigest()


def short(name: str) -> str:
    """A fingerprint as it is shown to people."""
    return f"{name[:16]}..." if len(name) > 16 else name
