"""Bundles in a bucket, each in a folder named by its hash: where clouds and pods take them from.

run:  python -m pipelines.deploy.targets.store s3://BUCKET/PREFIX DIGEST FOLDER
brings one to a folder, checked. Credentials come from the usual AWS chain.
"""

import argparse
import sys
from pathlib import Path

from pipelines import bundle, s3, stage
from pipelines.deploy.targets import Release
from pipelines.errors import TransientError, UserError


def put(url: str, release: Release) -> str:
    """Copy the bundle to the bucket where it is not yet. Returns the URL of its folder."""
    if stage.digest(release.folder) != release.digest:
        raise UserError(f"{release.folder} is not the bundle {release.digest[:12]}")
    client, (bucket, prefix) = s3.client(), s3.parsed(url, "the store")
    folder = f"{prefix}{release.digest}/"
    held = {item["Key"]: item["Size"] for item in s3.listed(client, bucket, folder)}
    for name in bundle.LARGEST:
        content = (release.folder / name).read_bytes()
        if held.get(folder + name) != len(content):
            with s3.saying(f"s3://{bucket}/{folder}{name} cannot be written"):
                client.put_object(Bucket=bucket, Key=folder + name, Body=content)
    return f"s3://{bucket}/{folder}"


def get(url: str, digest: str, folder: Path) -> None:
    """Bring a bundle to `folder`, whole or not at all. Raises UserError where it is another."""
    client, (bucket, prefix) = s3.client(), s3.parsed(url, "the store")
    if folder.exists() and not {one.name for one in folder.iterdir()} <= bundle.LARGEST.keys():
        raise UserError(f"{folder} holds other things than a bundle; expected a new folder")
    with stage.fresh(folder) as made:
        for name in bundle.LARGEST:
            key = f"{prefix}{digest}/{name}"
            with s3.saying(f"s3://{bucket}/{key} cannot be read"):
                client.download_file(bucket, key, str(made / name))
        bundle.verify(made, digest)


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
    except TransientError as error:
        print(f"store: fault: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
