"""Transfers: many files at a time, each in pieces, each checked; a cut one goes on where it stood.

What S3 tells of an object's bytes is its ETag and, where it was uploaded so, a checksum. The ETag
of an object that came in one part is its MD5, of one in several the MD5 of its parts' MD5s; under a
key of KMS it is neither. So where it says what the bytes say they are the same; else, ask further.
"""

import base64
import hashlib
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipelines import s3, stage
from pipelines.errors import TransientError

File = TypeVar("File")
Result = TypeVar("Result")

THREADS = 8
PIECE = 1 << 20  # bytes that a thread holds of a file
# Bytes of a part, and how many parts S3 takes. boto3 and the aws command choose the same, so that
# the ETags of what they uploaded can be compared.
PART, PARTS = 8 << 20, 10_000
EVERY = 5.0  # seconds between two lines of progress


def pieces(path: Path, size: int = PIECE) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(size):
            yield piece


# What the bytes are, as S3 says it.


def part_of(size: int) -> int:
    """The bytes of each part of a file of `size` bytes, but of the last."""
    part = PART
    while size > part * PARTS:
        part *= 2
    return part


def etag(path: Path, like: str) -> str:
    """The file's ETag, in one part or in several as the ETag `like` is."""
    if "-" not in like:
        return f'"{_digest("md5", pieces(path)).hex()}"'
    parts = [_digest("md5", [body]) for body in pieces(path, part_of(path.stat().st_size))]
    return f'"{_digest("md5", parts).hex()}-{len(parts)}"'


def crc32(bodies: Iterable[bytes]) -> bytes:
    value = 0
    for body in bodies:
        value = zlib.crc32(body, value)
    return value.to_bytes(4)


def _digest(name: str, bodies: Iterable[bytes]) -> bytes:
    made = hashlib.new(name, usedforsecurity=False)
    for body in bodies:
        made.update(body)
    return made.digest()


@dataclass(frozen=True)
class Object:
    """An object of a bucket as it was when it was listed."""

    client: Any
    bucket: str
    key: str
    etag: str
    size: int

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def holds(self, path: Path) -> bool | None:
        """Whether it has the file's bytes; None where S3 tells nothing that could be compared."""
        if path.stat().st_size != self.size:
            return False
        return etag(path, self.etag) == self.etag or self.vouches(path)

    def vouches(self, path: Path) -> bool | None:
        """The same where the ETags differ, by what S3 tells beside the ETag.

        Raises TransientError where it is another object by now.
        """
        if path.stat().st_size != self.size:
            return False
        with s3.saying(f"{self.url} cannot be read"):
            head = self.client.head_object(
                Bucket=self.bucket, Key=self.key, IfMatch=self.etag, ChecksumMode="ENABLED"
            )
        # A checksum of checksums would want the sizes of the parts.
        if "-" not in self.etag or head.get("ChecksumType") == "FULL_OBJECT":
            if given := head.get("ChecksumSHA256"):
                return base64.b64decode(given) == _digest("sha256", pieces(path))
            if given := head.get("ChecksumCRC32"):
                return base64.b64decode(given) == crc32(pieces(path))
        is_hash = "-" not in self.etag and "kms" not in head.get("ServerSideEncryption", "")
        return False if is_hash else None


# The way.


class Progress:
    """What many threads have moved, told now and then; and their end, once one of them failed."""

    def __init__(self, name: str, files: int) -> None:
        self.name, self.files, self.done, self.bytes = name, files, 0, 0
        self.over = False
        self.lock, self.said = threading.Lock(), time.monotonic()

    def moved(self, count: int) -> None:
        if self.over:
            raise TransientError("another transfer failed")
        with self.lock:
            self.bytes += count
            if time.monotonic() - self.said > EVERY:
                self.said = time.monotonic()
                moved = f"{self.bytes / 1e6:,.0f} MB"
                stage.say(self.name, f"{self.done} of {self.files} files, {moved} so far")


Moved = Callable[[int], None]


def each(name: str, files: Sequence[File], move: Callable[[File, Moved], Result]) -> list[Result]:
    """`move` every file, `THREADS` at a time; the results in the order of the files.

    Raises what the first that failed raised, when all others have stopped.
    """
    progress = Progress(name, len(files))
    with ThreadPoolExecutor(THREADS) as pool:
        tasks = [pool.submit(move, file, progress.moved) for file in files]
        try:
            for task in as_completed(tasks):
                task.result()
                progress.done += 1
        except BaseException:
            progress.over = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [task.result() for task in tasks]


def download(found: Object, partial: Path, moved: Moved) -> None:
    """Bring an object's bytes to `partial`, going on behind those that are there.

    Raises TransientError where it has changed, or where nothing comes any more.
    """
    said, failures = f"{found.url} cannot be read", 0
    with partial.open("ab") as file:
        while (start := file.tell()) < found.size:
            moved(0)  # another transfer may have failed meanwhile
            with s3.saying(said):
                answer = found.client.get_object(
                    Bucket=found.bucket, Key=found.key, IfMatch=found.etag, Range=f"bytes={start}-"
                )
            try:
                for piece in answer["Body"].iter_chunks(PIECE):
                    file.write(piece)
                    moved(len(piece))
            except s3.broken() as error:
                answer["Body"].close()
                failures = 1 if file.tell() > start else failures + 1
                if failures == s3.ATTEMPTS:
                    raise TransientError(f"{said}: {stage.one_line(error)}") from None
                time.sleep(random.random() * min(2 ** (failures - 1), 20))
