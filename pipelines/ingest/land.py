"""land: raw files of a folder into a bucket, where fetch finds them.

in:   a folder laid out as fetch wants it, or with some of the files only
out:  the same files below s3://bucket/prefix; nothing that is there is deleted
run:  make land SOURCE=folder TO=s3://bucket/prefix

An effect: told twice, it acts once. What is there with the same bytes is left, with others it is
replaced, and said. An object is visible only when S3 has all of it and agrees on its checksum; an
upload in parts that was cut goes on behind the parts that are there.
"""

import argparse
import base64
import hashlib
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines import s3, stage
from pipelines.errors import TransientError, UserError
from pipelines.ingest import fetch, sources, transfer
from pipelines.ingest.sources import Local, Stored
from pipelines.ingest.transfer import Moved, Object
from pipelines.params import Params

EXPECTED = "expected make land SOURCE=folder TO=s3://bucket/prefix"
NEW, REPLACED, SAME = "new", "replaced", "already there"


def run(params: Params, source: str, to: str) -> None:
    if not source or not Path(source).is_dir():
        raise UserError(f"SOURCE: {source or 'nothing'} is not a folder; {EXPECTED}")
    bucket, prefix = s3.parsed(to or "nothing", "TO")
    files = fetch.belonging(sources.folder(Path(source)), source, params.dataset)
    if not files:
        tables = ", ".join(params.dataset.tables)
        raise UserError(f"SOURCE: {source} holds no file of {params.dataset.name}: {tables}")
    there = {one.name: one for one in fetch.belonging(sources.bucket(to, "TO"), to, params.dataset)}
    fetch.complete(
        there.keys() | {file.name for file in files}, f"{source} and {to}", params.dataset
    )
    for file in files:
        _ = file.path  # before the first is sent: what is no file would leave the others there
    client = s3.client()

    def move(file: Local, moved: Moved) -> str:
        return _land(client, bucket, prefix + file.name, file, there.get(file.name), moved)

    ends = transfer.each("land", files, move)
    for file, end in zip(files, ends, strict=True):
        if end == REPLACED:
            stage.say("land", f"{file.name} was there with other bytes and is replaced")
    counts = ", ".join(f"{ends.count(end)} {end}" for end in (NEW, REPLACED, SAME))
    stage.say("land", f"{len(files)} files, {counts}, at {to}")


def _land(
    client: Any, bucket: str, key: str, file: Local, there: Stored | None, moved: Moved
) -> str:
    if there and there.found.holds(file.path):
        return SAME
    # Of what was listed only: what another process landed meanwhile is not overwritten.
    condition = {"IfMatch": there.found.etag} if there else {"IfNoneMatch": "*"}
    place = {"Bucket": bucket, "Key": key}
    size = file.path.stat().st_size
    upload = _in_parts if size >= transfer.PART else _at_once
    url = f"s3://{bucket}/{key}"
    with s3.saying(f"{url} cannot be written"), _lost():
        upload(client, place, file, transfer.part_of(size), moved, condition)
    with s3.saying(f"{url} cannot be read"):
        head = client.head_object(**place)
    if not Object(client, bucket, key, head["ETag"], head["ContentLength"]).holds(file.path):
        raise TransientError(f"{url} does not hold the bytes of {file.path}; run again")
    return REPLACED if there else NEW


@contextmanager
def _lost() -> Iterator[None]:
    """A request whose answer was lost is sent again, and meets what it did. Look what is there."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("NoSuchUpload", "PreconditionFailed"):
            raise


def _at_once(
    client: Any, place: dict[str, str], file: Local, part: int, moved: Moved, condition: Any
) -> None:
    body = b"".join(file.pieces(part))
    client.put_object(**place, Body=body, ChecksumAlgorithm="CRC32", **condition)
    moved(len(body))


def _in_parts(
    client: Any, place: dict[str, str], file: Local, part: int, moved: Moved, condition: Any
) -> None:
    upload, held = _begun(client, place)
    parts, crc = [], 0
    for number, body in enumerate(file.pieces(part), start=1):
        crc = zlib.crc32(body, crc)
        etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
        given = {"ChecksumCRC32": _base64(zlib.crc32(body))}
        ours = held.get(number, {})
        if ours.get("ETag") != etag and ours.get("ChecksumCRC32") != given["ChecksumCRC32"]:
            ours = client.upload_part(
                **place, UploadId=upload, PartNumber=number, Body=body, **given
            )
        parts.append({"PartNumber": number, "ETag": ours["ETag"], **given})
        moved(len(body))
    # S3 joins the parts only if they make up the bytes with this checksum.
    client.complete_multipart_upload(
        **place,
        UploadId=upload,
        MultipartUpload={"Parts": parts},
        ChecksumType="FULL_OBJECT",
        ChecksumCRC32=_base64(crc),
        **condition,
    )


def _begun(client: Any, place: dict[str, str]) -> tuple[str, dict[int, dict[str, Any]]]:
    """The upload of this object that was begun and not ended, with its parts; else a new one."""
    pages = client.get_paginator("list_multipart_uploads").paginate(
        Bucket=place["Bucket"], Prefix=place["Key"]
    )
    for page in pages:
        for one in page.get("Uploads", []):
            kind = one.get("ChecksumType", "FULL_OBJECT")  # SeaweedFS does not tell
            if one["Key"] == place["Key"] and kind == "FULL_OBJECT":
                found = client.get_paginator("list_parts").paginate(
                    **place, UploadId=one["UploadId"]
                )
                parts = [part for page in found for part in page.get("Parts", [])]
                return one["UploadId"], {part["PartNumber"]: part for part in parts}
    made = client.create_multipart_upload(
        **place, ChecksumAlgorithm="CRC32", ChecksumType="FULL_OBJECT"
    )
    return made["UploadId"], {}


def _base64(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4)).decode()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.ingest.land",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="FOLDER")
    parser.add_argument("to", metavar="s3://BUCKET/PREFIX")
    given = parser.parse_args()
    return stage.guarded("land", lambda params: run(params, given.source, given.to))


if __name__ == "__main__":
    sys.exit(main())
