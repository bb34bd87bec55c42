"""Bundles in a bucket, each in a folder named by its hash: where clouds and pods take them from.

run:  python -m pipelines.deploy.targets.store s3://BUCKET/PREFIX DIGEST FOLDER
brings one to a folder, checked. Credentials come from the usual AWS chain.
"""

import argparse
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pipelines import bundle, stage
from pipelines.deploy.targets import Release
from pipelines.errors import UserError


def put(url: str, release: Release) -> str:
    """Copy the bundle to the bucket where it is not yet. Returns the URL of its folder."""
    if stage.digest(release.folder) != release.digest:
        raise UserError(f"{release.folder} is not the bundle {release.digest[:12]}")
    client, bucket, prefix = _opened(url)
    folder = f"{prefix}{release.digest}/"
    there = client.list_objects_v2(Bucket=bucket, Prefix=folder).get("Contents", [])
    held = {item["Key"]: item["Size"] for item in there}
    for name in bundle.LARGEST:
        content = (release.folder / name).read_bytes()
        if held.get(folder + name) != len(content):
            client.put_object(Bucket=bucket, Key=folder + name, Body=content)
    return f"s3://{bucket}/{folder}"


def get(url: str, digest: str, folder: Path) -> None:
    """Bring a bundle to `folder`, whole or not at all. Raises UserError where it is another."""
    client, bucket, prefix = _opened(url)
    if folder.exists() and not {one.name for one in folder.iterdir()} <= bundle.LARGEST.keys():
        raise UserError(f"{folder} holds other things than a bundle; expected a new folder")
    with stage.fresh(folder) as made:
        for name in bundle.LARGEST:
            try:
                client.download_file(bucket, f"{prefix}{digest}/{name}", str(made / name))
            except client.exceptions.ClientError as error:
                raise UserError(f"{url}/{digest}/{name}: {error}") from None
        bundle.verify(made, digest)


def parted(url: str) -> tuple[str, str]:
    """The bucket, and the prefix with its slash. Raises UserError where it is no bucket."""
    parts = urlparse(url)
    if parts.scheme != "s3" or not parts.netloc:
        raise UserError(f"the store {url} is no bucket; expected s3://bucket/prefix")
    prefix = parts.path.strip("/")
    return parts.netloc, f"{prefix}/" if prefix else ""


def _opened(url: str) -> tuple[Any, str, str]:
    """A client, the bucket and the prefix."""
    import boto3

    return boto3.client("s3"), *parted(url)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.deploy.targets.store", description="Bring a bundle."
    )
    parser.add_argument("store", help="s3://bucket/prefix")
    parser.add_argument("digest", help="the hash of the bundle")
    parser.add_argument("folder", type=Path, help="where it shall lie")
    given = parser.parse_args()
    try:
        get(given.store, given.digest, given.folder.resolve())
    except UserError as error:
        print(f"store: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
