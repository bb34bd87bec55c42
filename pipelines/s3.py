"""S3 and what speaks its language: where a URL leads, a client of bounded patience, and each error
of botocore as one line.

Credentials, region and endpoint come from the usual AWS chain.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.errors import TransientError, UserError

# Of one request. The pauses between double, by chance shortened, from 1 to at most 20 seconds.
ATTEMPTS = 8
# Statuses below 500 that another attempt may not meet; the last two say that others write.
BUSY, CHANGED = {408, 429}, {409, 412}


def parsed(url: str, what: str) -> tuple[str, str]:
    """The bucket, and the prefix: empty, or with a slash at its end.

    Raises UserError, of `what`, where the URL names no bucket.
    """
    scheme, _, place = url.partition("://")
    bucket, _, prefix = place.partition("/")
    if scheme != "s3" or not bucket:
        raise UserError(f"{what}: {url} names no bucket; expected s3://bucket/prefix")
    prefix = prefix.strip("/")
    return bucket, f"{prefix}/" if prefix else ""


def client(
    endpoint: str | None = None, *, attempts: int = ATTEMPTS, connect: float = 10, read: float = 30
) -> Any:
    """A client, which threads may share. `connect` and `read` are the seconds that one attempt
    waits for a connection and for the next bytes.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    patience = Config(
        connect_timeout=connect,
        read_timeout=read,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )
    try:
        return boto3.client("s3", endpoint_url=endpoint, config=patience)
    except (BotoCoreError, ValueError) as error:  # of a profile, a region or an endpoint
        raise UserError(f"no client for S3: {_flat(error)}") from None


def listed(client: Any, bucket: str, prefix: str, **more: str) -> Iterator[dict[str, Any]]:
    """What S3 tells of every object below the prefix, page after page."""
    with saying(f"s3://{bucket}/{prefix}".rstrip("/") + " cannot be listed"):
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix=prefix, **more
        )
        for page in pages:
            yield from page.get("Contents", [])


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Every error of botocore becomes one line that begins with `what`: a TransientError where
    another attempt may get through, else a UserError.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _answered(what, error.response) from None
    except (Boto3Error, BotoCoreError) as error:
        kind = TransientError if isinstance(error, broken()) else UserError
        raise kind(f"{what}: {_flat(error)}") from None


def broken() -> tuple[type[Exception], ...]:
    """What botocore raises where the way to S3 broke, also in the middle of a body."""
    from boto3.exceptions import RetriesExceededError
    from botocore import exceptions as raised

    cut = raised.FlexibleChecksumError, raised.IncompleteReadError, RetriesExceededError
    return raised.ConnectionError, raised.HTTPClientError, *cut


def _answered(what: str, response: dict[str, Any]) -> Exception:
    error, status = response["Error"], response["ResponseMetadata"].get("HTTPStatusCode", 500)
    said = f"{error.get('Code', status)}: {_flat(error.get('Message', ''))}"
    if status in CHANGED:
        return TransientError(f"{what}: it changed meanwhile; run again ({said})")
    kind = TransientError if status >= 500 or status in BUSY else UserError
    return kind(f"{what}: {said}")


def _flat(said: object) -> str:
    return " ".join(str(said).split())
