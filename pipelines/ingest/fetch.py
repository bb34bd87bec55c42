"""fetch: the source's CSV files, as they are.

in:   fetch.source: `sample` (CSV files inside the package dataset.package), a folder, or s3://bucket/prefix.
      A table is `<table>.csv`; a batched one is `<table>/<year>-<month>.csv`.
out:  data/raw/, the same layout: every file that begins before as_of
run:  dvc repro fetch

Incremental: a file whose MD5 is already there is not copied again. A file is visible only when it
is whole.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from pipelines import stage
from pipelines.errors import UserError
from pipelines.params import Dataset, Params

RAW = Path("data/raw")
MONTH = re.compile(r"[1-9]\d{3}-(0[1-9]|1[0-2])\.csv")


@dataclass(frozen=True)
class SourceFile:
    """A file of the source: its name below data/raw, its MD5 where known without reading it, its
    bytes.
    """

    name: str
    md5: str | None
    read: Callable[[], bytes]


def run(params: Params) -> None:
    files = wanted(listing(params), params)
    copied = 0
    for file in files:
        if not _present(file):
            copied += 1
            with stage.whole(RAW / file.name) as partial:
                partial.write_bytes(_content(file))
    removed = _prune({file.name for file in files})
    stage.say(
        "fetch",
        f"{len(files)} files, {copied} new or changed, {removed} removed, "
        f"from {params.fetch.source}",
    )


def changed(params: Params) -> bool:
    """Whether the source differs from what was fetched. Reads; writes nothing."""
    files = wanted(listing(params), params)
    here = {path.relative_to(RAW).as_posix() for path in RAW.rglob("*.csv")}
    return here != {file.name for file in files} or not all(_present(file) for file in files)


def listing(params: Params) -> list[SourceFile]:
    """Every file of the source that belongs to a table of the dataset."""
    source = params.fetch.source
    if source == "sample":
        return list(_sample(params.dataset))
    names = _s3(source) if source.startswith("s3://") else _folder(Path(source))
    files = [file for file in names if _belongs(file.name, params)]
    for name, table in params.dataset.tables.items():
        expected = f"{name}.csv" if table.batch is None else f"{name}/<year>-<month>.csv"
        if not any(file.name.partition("/")[0] in (name, f"{name}.csv") for file in files):
            raise UserError(f"{source}: table {name} is missing; expected {expected}")
    return files


def wanted(files: list[SourceFile], params: Params) -> list[SourceFile]:
    """The files whose month begins before as_of.

    Raises UserError where a month between is missing, or the newest that another table has.
    """
    zone = ZoneInfo(params.dataset.timezone)
    kept: list[SourceFile] = []
    by_table: dict[str, list[str]] = {}
    for file in sorted(files, key=lambda file: file.name):
        table, _, month = file.name.removesuffix(".csv").partition("/")
        if month:
            begin = datetime.strptime(month, "%Y-%m").replace(tzinfo=zone)
            if begin >= params.as_of:
                continue
            by_table.setdefault(table, []).append(month)
        kept.append(file)
    for table, batch in ((n, t.batch) for n, t in params.dataset.tables.items()):
        if batch is None:
            continue
        months = by_table.get(table, [])
        if not months:
            raise UserError(
                f"{params.fetch.source}: table {table} has no month before as_of "
                f"{params.as_of:%Y-%m-%d}"
            )
        gap = next((a for a, b in itertools.pairwise(months) if _after(a) != b), None)
        if gap is not None:
            raise UserError(
                f"{params.fetch.source}/{table}/{_after(gap)}.csv is missing; later months exist"
            )
    ends = {months[-1]: table for table, months in by_table.items()}
    newest = max(ends, default="")
    for last, table in ends.items():
        if last != newest:
            raise UserError(
                f"{params.fetch.source}/{table}/{_after(last)}.csv is missing; "
                f"{ends[newest]} has months up to {newest}"
            )
    return kept


def _after(month: str) -> str:
    year, number = int(month[:4]), int(month[5:])
    return f"{year + number // 12:04}-{number % 12 + 1:02}"


def _belongs(name: str, params: Params) -> bool:
    """Whether a file is of a table of the dataset.

    Raises UserError for one in the folder of a batched table that is no month: nobody would miss
    its rows. Names that begin with a dot or an underscore are notes of other tools.
    """
    table, folder, file = name.partition("/")
    spec = params.dataset.tables.get(table if folder else name.removesuffix(".csv"))
    if spec is None or (spec.batch is None) == bool(folder) or file.startswith((".", "_")):
        return False
    if not folder or not file:
        return name.endswith(".csv")
    if not MONTH.fullmatch(file):
        raise UserError(
            f"{params.fetch.source}/{name} is no month of {table}; "
            f"expected {table}/<year>-<month>.csv, such as {table}/2013-05.csv"
        )
    return True


def _folder(folder: Path) -> Iterator[SourceFile]:
    if not folder.is_dir():
        raise UserError(
            f"fetch.source: {folder} is not a folder; expected sample, a folder or s3://bucket/prefix"
        )
    for path in sorted(folder.glob("*.csv")) + sorted(folder.glob("*/*")):
        is_text = path.suffix == ".csv"
        if not is_text and not path.is_file():
            continue

        def read(path: Path = path) -> bytes:
            try:
                return path.read_bytes()
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from None

        md5 = _md5(read()) if is_text else None  # others are only named
        yield SourceFile(path.relative_to(folder).as_posix(), md5, read)


def _s3(url: str) -> Iterator[SourceFile]:
    """The objects below an s3:// prefix. The ETag of an object uploaded in one part is its MD5."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"fetch.source: {url} names no bucket; expected s3://bucket/prefix")
    prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
    client = boto3.client("s3")
    try:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        objects = [item for page in pages for item in page.get("Contents", [])]
    except (BotoCoreError, ClientError) as error:
        raise UserError(f"{url} cannot be listed: {' '.join(str(error).split())}") from None
    for item in objects:
        key, etag = item["Key"], item["ETag"].strip('"')

        def read(key: str = key, etag: str = etag) -> bytes:
            try:
                answer = client.get_object(Bucket=bucket, Key=key, IfMatch=etag)
                return bytes(answer["Body"].read())
            except (BotoCoreError, ClientError) as error:
                raise UserError(f"s3://{bucket}/{key} cannot be read: {error}") from None

        yield SourceFile(key.removeprefix(prefix), None if "-" in etag else etag, read)


def _sample(dataset: Dataset) -> Iterator[SourceFile]:
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
            yield _held(f"{name}.csv", content)
        else:
            for month, content in _by_month(_sample_bytes(folder, name), *table.batch):
                yield _held(f"{name}/{month}.csv", content)


def _held(name: str, content: bytes) -> SourceFile:
    return SourceFile(name, _md5(content), lambda: content)


def _sample_bytes(folder: Path, table: str) -> bytes:
    import zipfile

    plain, packed = folder / f"{table}.csv", folder / f"{table}.csv.zip"
    if plain.is_file():
        return plain.read_bytes()
    if packed.is_file():
        with zipfile.ZipFile(packed) as archive:
            return archive.read(f"{table}.csv")
    raise UserError(f"{plain} is missing; the sample package does not carry table {table}")


def _by_month(content: bytes, year: str, month: str) -> Iterator[tuple[str, bytes]]:
    """Cut CSV lines by two columns that stand before any quoted field; lines stay as they are."""
    header, *lines = content.splitlines(keepends=True)
    columns = header.decode().strip().split(",")
    year_at, month_at = columns.index(year), columns.index(month)
    batches: dict[str, list[bytes]] = {}
    for line in lines:
        fields = line.split(b",", max(year_at, month_at) + 1)
        batches.setdefault(f"{int(fields[year_at]):04}-{int(fields[month_at]):02}", []).append(line)
    for name in sorted(batches):
        yield name, header + b"".join(batches[name])


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _present(file: SourceFile) -> bool:
    target = RAW / file.name
    return file.md5 is not None and target.is_file() and _md5(target.read_bytes()) == file.md5


def _content(file: SourceFile) -> bytes:
    content = file.read()
    if file.md5 is not None and _md5(content) != file.md5:
        raise UserError(f"{file.name} changed in the source while it was read; run again")
    return content


def _prune(names: set[str]) -> int:
    """Remove what the source does not hold before as_of, remains of a killed run included."""
    gone = [p for p in RAW.rglob("*") if p.is_file() and p.relative_to(RAW).as_posix() not in names]
    for path in gone:
        path.unlink()
    return len(gone)


if __name__ == "__main__":
    stage.main(run)
