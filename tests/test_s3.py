"""A place of S3 is read in one way, and whatever goes wrong on the way there is one line."""

import socketserver
import threading
from collections.abc import Iterator

import boto3
import pytest

from pipelines import s3 as store
from pipelines.errors import TransientError, UserError


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("s3://lake", ("lake", "")),
        ("s3://lake/", ("lake", "")),
        ("s3://lake/raw", ("lake", "raw/")),
        ("s3://lake//raw/2013/", ("lake", "raw/2013/")),
        ("s3://lake/what?#is", ("lake", "what?#is/")),
    ],
)
def test_a_url_is_a_bucket_and_a_prefix(url: str, place: tuple[str, str]) -> None:
    assert store.parsed(url, "fetch.source") == place


@pytest.mark.parametrize("url", ["", "s3:", "s3://", "s3:///raw", "gs://lake/raw", "lake/raw"])
def test_a_url_without_a_bucket_is_one_line(url: str) -> None:
    with pytest.raises(UserError) as raised:
        store.parsed(url, "TO")
    assert str(raised.value) == f"TO: {url} names no bucket; expected s3://bucket/prefix"


def test_a_listing_is_of_the_prefix_as_a_folder(s3: str) -> None:
    client = boto3.client("s3")
    client.create_bucket(Bucket="some")
    for key in ("raw/a", "raw/b/c", "raw-2/d", "e"):
        client.put_object(Bucket="some", Key=key, Body=b"")
    held = [
        item["Key"] for item in store.listed(store.client(), *store.parsed("s3://some/raw", ""))
    ]
    assert held == ["raw/a", "raw/b/c"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_ENDPOINT_URL", "nowhere", "no client for S3: Invalid endpoint: nowhere"),
        (
            "AWS_PROFILE",
            "nobody",
            r"no client for S3: The config profile \(nobody\) could not be f",
        ),
    ],
)
def test_settings_of_aws_that_are_wrong_are_one_line(
    s3: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        store.client()


def test_a_name_that_no_bucket_can_have_is_one_line(s3: str) -> None:
    with pytest.raises(UserError, match=r"s3://A b cannot be listed: .*Invalid bucket name"):
        list(store.listed(store.client(), "A b", ""))


class _Page(socketserver.BaseRequestHandler):
    """Who answers everything with a page."""

    def handle(self) -> None:
        self.request.recv(1 << 16)
        self.request.sendall(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n<html><p>Welcome!</html>"
        )


@pytest.fixture
def page() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_endpoint_that_is_not_of_s3_is_one_line(s3: str, page: str) -> None:
    with pytest.raises(TransientError, match="s3://lake cannot be listed: 500: Internal Server"):
        list(store.listed(store.client(page, attempts=1), "lake", ""))


def test_what_a_user_can_mend_is_told_from_what_may_pass(s3: str) -> None:
    with pytest.raises(UserError, match="s3://none cannot be listed: NoSuchBucket: The specified"):
        list(store.listed(store.client(), "none", ""))
    with pytest.raises(TransientError, match="s3://lake cannot be listed: Could not connect to"):
        list(store.listed(store.client("http://127.0.0.1:9", attempts=1), "lake", ""))
