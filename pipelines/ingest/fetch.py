"""fetch: the source's CSV files, as they are.

in:   fetch.source: `sample` (CSV files inside the package dataset.package), a folder, or s3://bucket/prefix.
      A table is `<table>.csv`; a batched one is `<table>/<year>-<month>.csv`.
out:  data/raw/, the same layout: every file that begins before as_of
run:  dvc repro fetch

Incremental: a file whose bytes are already there is not brought again. A file is visible only when
it is whole and checked; what a killed run had begun of an object is gone on with.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from pipelines import months, stage
from pipelines.errors import UserError
from pipelines.ingest import sources, transfer
from pipelines.ingest.sources import SourceFile
from pipelines.params import Dataset, Params

RAW = Path("data/raw")
MONTH = re.compile(r"[1-9][0-9]{3}-(0[1-9]|1[0-2])\.csv")
File = TypeVar("File", bound=SourceFile)


def run(params: Params) -> None:
    busy = f"another fetch is at work in {Path.cwd()}; start again when it has ended"
    with stage.alone(stage.STATE / "fetch.lock", busy):
        files = wanted(listing(params), params)
        new = _differing(files)
        transfer.each("fetch", new, lambda file, moved: file.bring(RAW / file.name, moved))
        removed = _prune({file.name for file in files})
    stage.say(
        "fetch",
        f"{len(files)} files, {len(new)} new or changed, {removed} removed, "
        f"from {params.fetch.source}",
    )


def changed(params: Params) -> bool:
    """Whether the source differs from what was fetched. Reads; writes nothing."""
    files = wanted(listing(params), params)
    here = {path.relative_to(RAW).as_posix() for path in RAW.rglob("*.csv")}
    return here != {file.name for file in files} or bool(_differing(files))


def _differing(files: Sequence[SourceFile]) -> list[SourceFile]:
    with ThreadPoolExecutor() as pool:
        same = pool.map(lambda file: file.same(RAW / file.name), files)
    return [file for file, held in zip(files, same, strict=True) if not held]


def listing(params: Params) -> list[SourceFile]:
    """Every file of the source that belongs to a table of the dataset."""
    source, dataset = params.fetch.source, params.dataset
    if source == "sample":
        return list(sources.sample(dataset))
    found: Iterable[SourceFile]
    if source.startswith("s3://"):
        found = sources.bucket(source, "fetch.source")
    elif Path(source).is_dir():
        raw, here = RAW.resolve(), Path(source).resolve()
        if here.is_relative_to(raw) or raw.is_relative_to(here):
            raise UserError(f"fetch.source: {source} overlaps {RAW}, which fetch prunes")
        found = sources.folder(Path(source))
    else:
        raise UserError(
            f"fetch.source: {source} is not a folder; expected sample, a folder or s3://bucket/prefix"
        )
    files = belonging(found, source, dataset)
    complete([file.name for file in files], source, dataset)
    return files


def belonging(files: Iterable[File], source: str, dataset: Dataset) -> list[File]:
    """Those that are of a table of the dataset."""
    return [file for file in files if _belongs(file.name, source, dataset)]


def complete(names: Iterable[str], source: str, dataset: Dataset) -> None:
    """Raises UserError where a table has no file."""
    held = {name.partition("/")[0] for name in names}
    for name, table in dataset.tables.items():
        expected = f"{name}.csv" if table.batch is None else f"{name}/<year>-<month>.csv"
        if not held & {name, f"{name}.csv"}:
            raise UserError(f"{source}: table {name} is missing; expected {expected}")


def wanted(files: list[SourceFile], params: Params) -> list[SourceFile]:
    """The files whose month begins before as_of, and ended within fetch.retention_days before it.

    Raises UserError where a month between is missing, or the newest that another table has.
    """
    kept: list[SourceFile] = []
    by_table: dict[str, list[str]] = {}
    for file in sorted(files, key=lambda file: file.name):
        table, _, month = file.name.removesuffix(".csv").partition("/")
        if month:
            if not _in_time(month, params):
                continue
            by_table.setdefault(table, []).append(month)
        kept.append(file)
    for table, batch in ((n, t.batch) for n, t in params.dataset.tables.items()):
        if batch is None:
            continue
        held = by_table.get(table, [])
        if not held:
            raise UserError(
                f"{params.fetch.source}: table {table} has no month before as_of "
                f"{params.as_of:%Y-%m-%d}"
            )
        gap = next((a for a, b in itertools.pairwise(held) if months.after(a) != b), None)
        if gap is not None:
            raise UserError(
                f"{params.fetch.source}/{table}/{months.after(gap)}.csv is missing; "
                "later months exist"
            )
    ends = {held[-1]: table for table, held in by_table.items()}
    newest = max(ends, default="")
    for last, table in ends.items():
        if last != newest:
            raise UserError(
                f"{params.fetch.source}/{table}/{months.after(last)}.csv is missing; "
                f"{ends[newest]} has months up to {newest}"
            )
    return kept


def _in_time(month: str, params: Params) -> bool:
    """Whether the month begins before as_of, and does not lie past its retention."""
    zone, days = params.dataset.timezone, params.fetch.retention_days
    if months.begin(month, zone) >= params.as_of:
        return False
    return days is None or months.end(month, zone) > params.as_of - timedelta(days=days)


def _belongs(name: str, source: str, dataset: Dataset) -> bool:
    """Whether a file is of a table of the dataset.

    Raises UserError for one in the folder of a batched table that is no month: nobody would miss
    its rows. Names that begin with a dot or an underscore are notes of other tools.
    """
    table, folder, file = name.partition("/")
    spec = dataset.tables.get(table if folder else name.removesuffix(".csv"))
    shown = name if name.isprintable() else ascii(name)
    if spec is None or (spec.batch is None) == bool(folder):
        if not _plain(name):
            stage.say(source, f"{shown} is left out: it may lead elsewhere")
        return False
    if not folder:
        return name.endswith(".csv")
    if file.startswith((".", "_")) and _plain(file):
        return False
    if not MONTH.fullmatch(file):
        raise UserError(
            f"{source}/{shown} is no month of {table}; "
            f"expected {table}/<year>-<month>.csv, such as {table}/2013-05.csv"
        )
    return True


def _plain(name: str) -> bool:
    """Whether no system takes the name for a path that leads elsewhere."""
    odd = {"", ".", ".."} & set(name.split("/"))
    return name.isprintable() and "\\" not in name and not odd


def _prune(names: set[str]) -> int:
    """Remove what the source does not hold before as_of, remains of a killed run included."""
    gone = [p for p in RAW.rglob("*") if p.is_file() and p.relative_to(RAW).as_posix() not in names]
    for path in gone:
        path.unlink()
    return len(gone)


if __name__ == "__main__":
    stage.main(run)
