"""Sources: where raw files are, which there are, and how each is brought.

A file has a name below data/raw, tells whether a file here has its bytes, and brings itself there,
whole or not at all.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipelines import s3, stage
from pipelines.errors import TransientError, UserError, naming
from pipelines.ingest import transfer
from pipelines.ingest.transfer import Moved, Object
from pipelines.params import Dataset


class SourceFile(Protocol):
    @property
    def name(self) -> str:
        """Its path in the source, with `/`."""

    def same(self, target: Path) -> bool:
        """Whether the file there has its bytes, as far as can be told without bringing it."""

    def bring(self, target: Path, moved: Moved) -> None:
        """Put it there."""


@dataclass(frozen=True)
class Held:
    """A file in memory."""

    name: str
    content: bytes

    def same(self, target: Path) -> bool:
        return target.is_file() and target.read_bytes() == self.content

    def bring(self, target: Path, moved: Moved) -> None:
        with stage.whole(target) as partial:
            partial.write_bytes(self.content)
        moved(len(self.content))


@dataclass(frozen=True)
class Local:
    """A file below a folder."""

    name: str
    folder: Path

    @property
    def path(self) -> Path:
        """Where its bytes are. Raises UserError for what is no file, or leads out of the folder."""
        shown = self.folder / self.name
        try:
            path = shown.resolve(strict=True)
            regular = path.is_file()
        except (OSError, RuntimeError) as error:  # a link to itself is the latter
            why = getattr(error, "strerror", "it is a link to itself")
            raise UserError(f"{shown} cannot be read: {why}") from None
        if not path.is_relative_to(self.folder.resolve()):
            raise UserError(f"{shown} leads to {path}; expected a file inside {self.folder}")
        if not regular:
            why = "Is a directory" if path.is_dir() else "it is no regular file"
            raise UserError(f"{shown} cannot be read: {why}")
        return path

    def pieces(self, size: int = transfer.PIECE) -> Iterator[bytes]:
        """Its bytes. Raises TransientError at the end, where they changed meanwhile."""
        path = self.path
        try:
            before = _version(path)
            yield from transfer.pieces(path, size)
            after = _version(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if before != after:
            raise TransientError(f"{path} changed while it was read; run again")

    def same(self, target: Path) -> bool:
        if not target.is_file() or target.stat().st_size != self.path.stat().st_size:
            return False
        both = zip(self.pieces(), transfer.pieces(target), strict=False)
        return all(ours == theirs for ours, theirs in both)

    def bring(self, target: Path, moved: Moved) -> None:
        with stage.whole(target) as partial, partial.open("wb") as copy:
            for piece in self.pieces():
                copy.write(piece)
                moved(len(piece))


def _version(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Stored:
    """An object below an s3:// prefix.

    Where its ETag says nothing of its bytes, a note tells what they were when they came.
    """

    name: str
    found: Object

    def same(self, target: Path) -> bool:
        if not target.is_file() or target.stat().st_size != self.found.size:
            return False
        content = transfer.etag(target, self.found.etag)
        return content == self.found.etag or (
            self._note.is_file() and self._note.read_text() == self._noted(content)
        )

    def bring(self, target: Path, moved: Moved) -> None:
        # One that a killed run began is gone on with, if the object is the same.
        version = hashlib.sha256(self._noted("").encode()).hexdigest()[:16]
        partial = target.with_name(f".{target.name}.{version}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with naming(target):
            transfer.download(self.found, partial, moved)
        content = transfer.etag(partial, self.found.etag)
        if content != self.found.etag:
            if self.found.vouches(partial) is False:
                partial.unlink()
                raise TransientError(
                    f"{self.found.url} arrived with other bytes than its own; run again"
                )
            with stage.whole(self._note) as note:
                note.write_text(self._noted(content))
        partial.replace(target)

    @property
    def _note(self) -> Path:
        return stage.STATE / "fetch" / f"{self.name}.txt"

    def _noted(self, content: str) -> str:
        return f"{self.found.url}\n{self.found.etag} {self.found.size}\n{content}\n"


def folder(path: Path) -> Iterator[Local]:
    """The files of a folder and of its folders. Raises UserError for one that cannot be read."""
    for one in (path, *path.glob("*/")):
        if not os.access(one, os.R_OK | os.X_OK):
            raise UserError(f"{one} cannot be read: {os.strerror(errno.EACCES)}")
    for one in sorted(path.glob("*.csv")) + sorted(path.glob("*/*")):
        yield Local(one.relative_to(path).as_posix(), path)


def bucket(url: str, what: str) -> Iterator[Stored]:
    """The objects below an s3:// prefix, which `what` names."""
    name, prefix = s3.parsed(url, what)
    client = s3.client()
    for item in s3.listed(client, name, prefix):
        if not item["Key"].endswith("/"):  # those stand for folders
            found = Object(client, name, item["Key"], item["ETag"], item["Size"])
            yield Stored(found.key.removeprefix(prefix), found)


def sample(dataset: Dataset) -> Iterator[Held]:
    """The CSV files of the sample package, batched tables cut by month.

    The package is never imported.
    """
    import importlib.util

    spec = importlib.util.find_spec(dataset.package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"dataset.package: {dataset.package} is not installed; it carries the sample"
        )
    folder = Path(spec.origin).parent / "data"
    for name, table in dataset.tables.items():
        if table.batch is None:
            content = _sample_bytes(folder, name)
            yield Held(f"{name}.csv", content)
        else:
            cut = _by_month(_sample_bytes(folder, name), table.batch, dataset.timezone)
            for month, content in cut:
                yield Held(f"{name}/{month}.csv", content)


def _sample_bytes(folder: Path, table: str) -> bytes:
    import zipfile

    plain, packed = folder / f"{table}.csv", folder / f"{table}.csv.zip"
    if plain.is_file():
        return plain.read_bytes()
    if packed.is_file():
        with zipfile.ZipFile(packed) as archive:
            return archive.read(f"{table}.csv")
    raise UserError(f"{plain} is missing; the sample package does not carry table {table}")


def _by_month(content: bytes, time: str, zone: str) -> Iterator[tuple[str, bytes]]:
    """Cut CSV lines, one a row, by the month of a time on the clock of a zone; they stay as they
    are.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as pacsv

    local = pa.timestamp("s", zone)
    options = pacsv.ConvertOptions(include_columns=[time], column_types={time: local})
    times = pacsv.read_csv(pa.BufferReader(content), convert_options=options)[time]
    header, *lines = content.splitlines(keepends=True)
    batches: dict[str, list[bytes]] = {}
    for month, line in zip(pc.strftime(times, "%Y-%m").to_pylist(), lines, strict=True):
        batches.setdefault(month, []).append(line)
    for name in sorted(batches):
        yield name, header + b"".join(batches[name])
