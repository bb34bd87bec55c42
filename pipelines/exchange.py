"""The exchange: where processes meet. Small JSON objects beside the data, in a folder or a bucket.

Every write is whole or absent, and `put_new` has one winner: on these two everything else rests.

    runs/<run>/run.json            what the run is: commit, overrides, reason
    runs/<run>/<task>.json         what a task made: the stage's entry in dvc.lock
    runs/<run>/lock.json           all of them in one, once the run is whole
    made/<stage>/<key>.json        who computed these inputs before, whatever the run
    leases/<name>/<generation>.json  who computes now
    champions/<model>-<created>/<number>.json  who was champion, one after another
    releases/<model>-<created>/<release>/<line>.json  what a release did
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from pipelines import s3
from pipelines.errors import UserError

Record = dict[str, Any]
ATTEMPTS = 10


class Exchange(Protocol):
    """Names are relative paths with `/`."""

    def get(self, name: str) -> Record | None:
        """The object, or None where there is none."""

    def put(self, name: str, value: Record) -> None:
        """Write, over what was there."""

    def put_new(self, name: str, value: Record) -> bool:
        """Write where nothing was; False, and nothing changed, where something was."""

    def names(self, prefix: str) -> list[str]:
        """The sorted names below the folder `prefix`."""


def _bytes(value: Record) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _record(name: str, content: bytes) -> Record:
    """Raises UserError where it is no record: every write is whole, so something else was here."""
    try:
        return dict(json.loads(content))
    except ValueError:
        raise UserError(f"the record {name} in the exchange is damaged; remove it") from None


class Folder:
    """An exchange in a folder: one machine, or a file system that workers share."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, name: str) -> Record | None:
        try:
            return _record(name, (self.path / name).read_bytes())
        except FileNotFoundError:
            return None

    def put(self, name: str, value: Record) -> None:
        self._beside(name, value).replace(self.path / name)

    def put_new(self, name: str, value: Record) -> bool:
        beside = self._beside(name, value)
        try:
            # A link to a name that is taken fails; a rename would win over it.
            os.link(beside, self.path / name)
        except FileExistsError:
            return False
        finally:
            beside.unlink()
        return True

    def names(self, prefix: str) -> list[str]:
        found = (self.path / prefix).rglob("*.json")
        return sorted(
            file.relative_to(self.path).as_posix()
            for file in found
            if not file.name.startswith(".")
        )

    def _beside(self, name: str, value: Record) -> Path:
        """The object on the disk, under a name of its own in the same folder."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        with beside.open("wb") as file:
            file.write(_bytes(value))
            file.flush()
            os.fsync(file.fileno())
        return beside


class Bucket:
    """An exchange in S3 or what speaks its language. Credentials come from the usual AWS chain.

    `put_new` is S3's conditional write (If-None-Match).
    """

    def __init__(self, bucket: str, prefix: str, endpoint: str | None) -> None:
        self.client = s3.client(endpoint)
        self.bucket, self.prefix = bucket, prefix

    def get(self, name: str) -> Record | None:
        with s3.saying(f"{self._url(name)} cannot be read"):
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)
            except self.client.exceptions.NoSuchKey:
                return None
            return _record(name, answer["Body"].read())

    def put(self, name: str, value: Record) -> None:
        with s3.saying(f"{self._url(name)} cannot be written"):
            self._put(name, value)

    def put_new(self, name: str, value: Record) -> bool:
        from botocore.exceptions import ClientError

        with s3.saying(f"{self._url(name)} cannot be written"):
            for _ in range(ATTEMPTS):
                try:
                    self._put(name, value, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    code = error.response["Error"]["Code"]
                    if code == "PreconditionFailed":
                        # A retry after a lost answer meets its own object.
                        return bool(self.get(name) == json.loads(_bytes(value)))
                    if code != "ConditionalRequestConflict":  # another write is under way
                        raise
        raise RuntimeError(f"{self._url(name)}: others write without an end")

    def names(self, prefix: str) -> list[str]:
        below = self.prefix + prefix.rstrip("/") + "/"
        keys = [item["Key"] for item in s3.listed(self.client, self.bucket, below)]
        return sorted(key.removeprefix(self.prefix) for key in keys if key.endswith(".json"))

    def _put(self, name: str, value: Record, **condition: str) -> None:
        key = self.prefix + name
        self.client.put_object(Bucket=self.bucket, Key=key, Body=_bytes(value), **condition)

    def _url(self, name: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{name}"


def at(url: str, endpoint: str | None = None) -> Exchange:
    """The exchange beside the DVC remote at `url`: a folder, or s3://bucket/prefix."""
    parts = urlparse(url)
    if parts.scheme == "s3":
        bucket, prefix = s3.parsed(url, "the DVC remote")
        return Bucket(bucket, f"{prefix}orchestrate/", endpoint)
    if parts.scheme not in ("", "file"):
        raise UserError(f"the DVC remote {url} is neither a folder nor s3://")
    return Folder(Path(parts.path) / "orchestrate")


def of(checkout: Path) -> Exchange:
    """The exchange beside the default DVC remote of a checkout."""
    from dvc.config import Config

    return beside(Config(str(checkout / ".dvc")))


def beside(config: Mapping[str, Any]) -> Exchange:
    """The exchange beside the default remote of DVC's configuration."""
    name = config["core"].get("remote")
    if name is None:
        raise UserError(".dvc/config names no remote; set one: dvc remote add --default NAME URL")
    remote = config["remote"][name]
    return at(remote["url"], remote.get("endpointurl"))


def plain(kind: str, name: str) -> str:
    """Both as one name that a folder, a branch and a key can bear, never the same for two pairs."""
    text = f"{kind}-{name}"
    kept = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")
    if kept == text and "-" not in kind:
        return kept
    pair = json.dumps([kind, name]).encode()
    return f"{kept}-{hashlib.sha256(pair).hexdigest()[:8]}"
