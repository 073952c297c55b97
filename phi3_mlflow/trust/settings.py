"""The section `trust` of a profile: who signs versions, whose signatures count, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from phi3_mlflow.core.section import Section

PEM = "-----BEGIN"
_ONE_OF = ("key", "key_env", "pkcs11", "sigstore")


class SignWith(Section):
    """What versions are signed with; the key itself never becomes part of a profile."""

    key: Path | None = Field(
        default=None,
        description="file with an EC private key (P-256, P-384 or P-521) in PEM; relative: to the "
        "profile",
    )
    key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable with that PEM text, or with the path of its file",
    )
    password_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable with the password of an encrypted key",
    )
    pkcs11: str | None = Field(
        default=None,
        pattern=r"^pkcs11:",
        description="URI of an EC key in a hardware token; needs `pip install PyKCS11`",
    )
    pkcs11_modules: tuple[Path, ...] = Field(
        default=(), description="folders or files to look for the token's module in"
    )
    sigstore: Literal["ambient", "browser"] | None = Field(
        default=None,
        description="keyless, needs a network: the identity of the CI job, or of whoever logs in",
    )
    sigstore_config: Path | None = Field(
        default=None, description="trust configuration (JSON) of a Sigstore of your own"
    )

    @model_validator(mode="after")
    def _one(self) -> SignWith:
        named = [name for name in _ONE_OF if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(
                f"exactly one of {', '.join(_ONE_OF)} has to be given; found "
                f"{', '.join(named) or 'none'}"
            )
        return self


class Identity(Section):
    """Whose keyless signatures count."""

    identity: str = Field(min_length=1, description="e-mail address, or URI of the CI workflow")
    issuer: str = Field(min_length=1, description="OpenID Connect issuer that vouches for it")
    config: Path | None = Field(
        default=None, description="trust configuration (JSON) of a Sigstore of your own"
    )


class TrustSettings(Section):
    """Signing, and what unsigned versions may not do."""

    require: Literal["none", "signature"] = Field(
        default="none",
        description="signature: `evaluate`, `promote`, `serve` and `score` refuse versions that "
        "are not signed with one of the keys, or are not what was signed",
    )
    keys: tuple[str, ...] = Field(
        default=(),
        description="public keys that count: files in PEM (relative: to the profile), or the text",
    )
    identities: tuple[Identity, ...] = Field(
        default=(), description="for Sigstore: pairs of `identity` and `issuer` that count"
    )
    sign_with: SignWith | None = Field(
        default=None, description="`register` signs versions, and `evaluate` verdicts, with this"
    )
    oldest_version: int | None = Field(
        default=None,
        ge=1,
        description="versions before this one are refused, however well signed: no way back for "
        "the alias to one that is known to be bad",
    )

    @model_validator(mode="after")
    def _has_keys(self) -> TrustSettings:
        if self.require == "signature" and not (self.keys or self.identities):
            raise ValueError(
                "require: signature needs at least one public key in keys, or one of identities: "
                "without, no signature would count"
            )
        return self

    @property
    def on(self) -> bool:
        """Whether anything but the default was asked for."""
        return self != TrustSettings()
