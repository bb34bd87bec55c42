"""A real S3 server: SeaweedFS on free ports of this machine, gone when its block ends."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

KEY, SECRET = "headrace-tests", "not-a-secret"
GRPC = 10_000  # each server speaks gRPC on its port plus this
# Below the ports that Linux gives to clients, so that no connection of a neighbour takes one.
PORTS = range(12_000, 22_000)
PATIENCE = 90  # seconds until the first object has to be written


@dataclass(frozen=True)
class Seaweed:
    """A running server: where it answers, and what a process needs in its environment to use it."""

    endpoint: str

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def client(self) -> Any:
        """A client that gives up soon: the server is on this machine."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )

    def bucket(self, name: str) -> Any:
        """A new, empty bucket, at least three letters long; its boto3 client."""
        client = self.client()
        client.create_bucket(Bucket=name)
        return client

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """The names of the objects below a prefix."""
        pages = (
            self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        )
        return [item["Key"] for page in pages for item in page.get("Contents", [])]


@contextmanager
def running(folder: Path) -> Iterator[Seaweed]:
    """A server with its data in `folder`, as soon as it takes an object, until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "s3.json"
    config.write_text(json.dumps(_identities()))
    s3, *others = _ports(4)
    # Its notes go with its data; its sockets are always in /tmp.
    env = os.environ | {"TMPDIR": str(folder)}
    command = _command(folder, config, s3, others)
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    server = Seaweed(f"http://127.0.0.1:{s3}")
    try:
        _wait(process, server, folder / "weed.log")
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its data is of no use to anyone
        process.wait()
        for port in (s3, *others):
            for name in (f"*-{port}.sock", f"*-grpc-{port + GRPC}.sock"):
                for left in Path("/tmp").glob(f"seaweedfs-{name}"):
                    left.unlink()


def _command(folder: Path, config: Path, s3: int, others: list[int]) -> list[str]:
    master, volume, filer = others
    return [
        str(Path(sys.executable).with_name("weed")),
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.port={s3}",
        f"-s3.config={config}",
        f"-master.port={master}",
        "-master.telemetry=false",  # it calls its makers by default
        # Small volumes, and enough of them: each bucket takes seven for itself.
        "-master.volumeSizeLimitMB=64",
        f"-volume.port={volume}",
        "-volume.max=70",
        f"-filer.port={filer}",
        # Two more servers, on ports that only one can have.
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]


def _identities() -> dict[str, Any]:
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    actions = ["Admin", "Read", "Write", "List"]
    return {"identities": [{"name": "tests", "credentials": credentials, "actions": actions}]}


def _ports(count: int) -> list[int]:
    """Ports that are free here and now, with their gRPC twins."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if all(_free(one) for one in (port, port + GRPC)):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def _free(port: int) -> bool:
    with socket.socket() as held:
        try:
            held.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait(process: subprocess.Popen[bytes], server: Seaweed, log: Path) -> None:
    """Until an object was written: before, the server answers but has no volume to put it on."""
    end = time.monotonic() + PATIENCE
    client = server.client()
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with suppress(BotoCoreError, ClientError):
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")  # makes the bucket too
            return
        time.sleep(0.2)
    raise RuntimeError("SeaweedFS did not start:\n" + log.read_text(errors="replace")[-2000:])
