"""Signatures on bundles: which bundle is which version, signed with Ed25519.

The private key is the file that HEADRACE_SIGNING_KEY names, `.state/keys/signing.pem` by default,
made on first use; the public key lies beside it and is all that a machine which serves needs.
Where several machines sign and check, all are given one key: the variable may hold the PEM itself,
of the private key or of the public one.

A signature says that a version was once made, not that it is still wanted: an older one stays
valid. Whoever loads a bundle states the smallest version that it accepts.
"""

import base64
import binascii
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.stage import STATE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

VARIABLE = "HEADRACE_SIGNING_KEY"


def sign(statement: Mapping[str, Any]) -> str:
    """The signature on {"model", "version", "bundle"}, as base64."""
    return base64.b64encode(_private().sign(_canonical(statement))).decode()


def check(statement: Mapping[str, Any], signature: str, at_least: int = 0) -> None:
    """Raise UserError unless the statement was signed and is of no version below `at_least`."""
    from cryptography.exceptions import InvalidSignature

    name = f"{statement['model']} version {statement['version']}"
    try:
        _public().verify(base64.b64decode(signature, validate=True), _canonical(statement))
    except (InvalidSignature, binascii.Error, TypeError, ValueError):
        key = VARIABLE if _given() else _file().with_suffix(".pub")
        raise UserError(f"{name}: its signature is not of {key}") from None
    if statement["version"] < at_least:
        raise UserError(f"{name} is older than the smallest accepted, {at_least}")


def _canonical(statement: Mapping[str, Any]) -> bytes:
    text = json.dumps(statement, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def _given() -> bytes | None:
    """The PEM that the environment holds itself."""
    value = os.environ.get(VARIABLE, "")
    return value.encode() if value.startswith("-----BEGIN") else None


def _file() -> Path:
    return Path(os.environ.get(VARIABLE) or STATE / "keys" / "signing.pem")


def _public() -> "Ed25519PublicKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    given = _given()
    if given is not None and b"PRIVATE KEY" in given:
        return _private().public_key()
    file: str | Path = VARIABLE if given else _file().with_suffix(".pub")
    try:
        key = load_pem_public_key(given or Path(file).read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        raise UserError(f"{file}: no public key; expected Ed25519 in PEM") from None
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{file}: another kind of key; expected Ed25519 in PEM")
    return key


def _private() -> "Ed25519PrivateKey":
    """The private key; a file of it is made where there is none, with the public one beside it."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    given, file = _given(), _file()
    if given is None and not file.exists():
        made = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        with suppress(FileExistsError):  # another process was first: its key counts
            _write_new(file, made, 0o600)
    name = VARIABLE if given else file
    try:
        key = serialization.load_pem_private_key(given or file.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"{name}: no private key; expected Ed25519 in PEM, not encrypted") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{name}: another kind of key; expected Ed25519 in PEM")
    beside = file.with_suffix(".pub")
    if given is None and not beside.exists():
        with suppress(FileExistsError):
            _write_new(beside, _pem(key.public_key()), 0o644)
    return key


def _pem(key: "Ed25519PublicKey") -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def public() -> bytes:
    """The public key as PEM, which a machine that serves is given."""
    return _pem(_private().public_key())


def _write_new(file: Path, content: bytes, mode: int) -> None:
    """Whole or not at all, and never over what is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.link(beside, file)
    finally:
        beside.unlink(missing_ok=True)
