"""A lake: a bucket of a real S3 server, behind a proxy that can break."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import proxy
import pytest
from proxy import Proxy, Request
from seaweed import Seaweed
from world import Checkout


@dataclass
class Lake:
    """A prefix of a bucket. The client goes past the proxy; what is tested goes through it."""

    client: Any
    proxy: Proxy
    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def put(self, name: str, body: bytes, **more: Any) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}", Body=body, **more)

    def fill(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*.csv")):
            self.put(path.relative_to(folder).as_posix(), path.read_bytes())

    def files(self) -> dict[str, bytes]:
        """All that is visible below the prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{self.prefix}/"
        )
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {
            key.removeprefix(f"{self.prefix}/"): self.client.get_object(
                Bucket=self.bucket, Key=key
            )["Body"].read()
            for key in keys
        }

    def meeting(self, method: str) -> threading.Barrier:
        """Whoever asks for a file waits for seven others that do, for a while."""
        meeting = threading.Barrier(8, timeout=20)
        waiting = iter(range(8))

        def rule(request: Request) -> None:
            if (
                request.method == method
                and ".csv" in request.path
                and next(waiting, None) is not None
            ):
                meeting.wait()

        self.proxy.rule = rule
        return meeting

    def drop(self) -> None:
        """Delete the bucket with all that is in it."""
        for name in self.files():
            self.client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")
        self.client.delete_bucket(Bucket=self.bucket)


@pytest.fixture
def lake(weed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lake]:
    """An empty one, which is where the environment says."""
    with proxy.before(weed.endpoint) as between:
        for name, value in (weed.env | {"AWS_ENDPOINT_URL": between.endpoint}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the first keys that it met
        yield Lake(weed.client(), between, "lake", tmp_path.name)


@pytest.fixture
def filled(lake: Lake, checkout: Checkout) -> Lake:
    """With the small source in it, which is what fetch is told to fetch."""
    lake.fill(checkout.source)
    checkout.set(fetch={"source": lake.url})
    return lake
