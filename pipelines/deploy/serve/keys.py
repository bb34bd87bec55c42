"""API keys: who may ask, and how often.

The file has one line for each key: `name sha256 [requests per second]`. The key itself is kept
nowhere; it has 256 random bits, which no table of hashes reaches.

run:  python -m pipelines.deploy.serve.keys NAME
makes a key, adds its line to the file of `serve.keys`, and prints the key, once.
"""

import argparse
import hashlib
import hmac
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipelines import params as parameters
from pipelines.deploy.serve.refusal import Refusal
from pipelines.errors import UserError

_LINE = re.compile(r"(\S+) ([0-9a-f]{64})(?: (\d+(?:\.\d+)?))?")
_ASK = {"www-authenticate": "Bearer"}


@dataclass
class Key:
    """A caller, and the bucket of its requests: `rate` a second flow in, a second's worth fits."""

    name: str
    digest: bytes
    rate: float | None
    left: float = 1.0
    at: float = field(default_factory=time.monotonic)

    def take(self) -> None:
        """One request out of the bucket. Raises Refusal where it is empty."""
        if self.rate is None:
            return
        now = time.monotonic()
        self.left = min(max(self.rate, 1.0), self.left + (now - self.at) * self.rate)
        self.at = now
        if self.left < 1:
            wait = math.ceil((1 - self.left) / self.rate)
            raise Refusal(
                429, f"more than {self.rate:g} requests per second", {"retry-after": str(wait)}
            )
        self.left -= 1


class Keys:
    """The keys of one file. Limits are per replica."""

    def __init__(self, file: Path, rate: float | None) -> None:
        with _usable(file):
            lines = file.read_text(encoding="utf-8").splitlines()
        self.keys = [
            _parsed(file, number, line, rate)
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]

    def admit(self, authorization: str | None) -> None:
        """Raises Refusal: 401 without a known key, 429 where it asked too often."""
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            raise Refusal(401, "no API key; expected the header Authorization: Bearer KEY", _ASK)
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        # All of them, in constant time each: how long it takes tells nothing.
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise Refusal(401, "this API key is not known", _ASK)
        found.take()


@contextmanager
def _usable(file: Path) -> Iterator[None]:
    """Raises UserError where the file can be no file of API keys."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        make = "python -m pipelines.deploy.serve.keys NAME"
        raise UserError(f"{file}: {why}; expected the file of API keys: {make}") from None


def _parsed(file: Path, number: int, line: str, rate: float | None) -> Key:
    parts = _LINE.fullmatch(line.strip())
    if parts is None or (parts[3] is not None and not float(parts[3])):
        raise UserError(
            f"{file}, line {number}: expected: name sha256 [requests per second, more than 0]"
        )
    name, digest, own = parts.groups()
    return Key(name, bytes.fromhex(digest), float(own) if own else rate)


def make(file: Path, name: str) -> str:
    """Add a key of that name to the file and return it."""
    if not re.fullmatch(r"[\w.@-]{1,100}", name):
        raise UserError(f"the name {name!r} has characters beyond letters, digits and .@-_")
    with _usable(file):
        held = file.read_text(encoding="utf-8") if file.exists() else ""
        if name in [line.partition(" ")[0] for line in held.splitlines()]:
            raise UserError(f"{file} has a key of the name {name}; remove its line first")
        key = secrets.token_urlsafe(32)
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as out:
            out.write("\n" if held and not held.endswith("\n") else "")
            out.write(f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n")
    return key


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.deploy.serve.keys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="whose key it is")
    name = parser.parse_args().name
    try:
        file = parameters.load().serve.keys
        if file is None:
            raise UserError("params.yaml: serve.keys is null; expected the file of API keys")
        print(make(Path(file), name))
    except UserError as error:
        print(f"keys: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
