"""Tables on disk: Parquet whose bytes depend on the rows alone, one file per month."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import UserError, intact, naming

# What is read, and how its reader tells of damage.
PARQUET = ("Parquet file", pa.ArrowInvalid, OSError)


def write(table: pa.Table, path: Path) -> None:
    """Write one Parquet file, whose rows the caller gives in full order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        encode(table, path)


def encode(table: pa.Table, where: Path | BinaryIO) -> None:
    """As Parquet without metadata of its maker."""
    # Engines differ in what they call nullable and in the size of their batches; the rows do not.
    fields = [field.with_nullable(True).remove_metadata() for field in table.schema]
    plain = pa.Table.from_arrays(table.combine_chunks().columns, schema=pa.schema(fields))
    pq.write_table(plain, where, compression="zstd")


def spaced(rows: int, most: int) -> npt.NDArray[np.int64]:
    """The places of up to `most` of so many rows, evenly spaced from the first to the last."""
    return np.linspace(0, rows - 1, min(most, rows)).astype(np.int64)


def write_month(rows: pa.Table, key: Sequence[str], path: Path) -> None:
    """Write the rows of one month, which are in order of `key`.

    Raises UserError where a key stands twice: whoever names a row by it would mean two.
    """
    if rows.num_rows > 1:
        columns = [rows[name].combine_chunks() for name in key]
        same = [pc.equal(column[1:], column[:-1]) for column in columns]
        twice = pc.indices_nonzero(functools.reduce(pc.and_, same))
        if len(twice):
            at = twice[0].as_py()
            named = ", ".join(f"{name}={rows[name][at]}" for name in key)
            raise UserError(f"{path.stem}: two rows have {named}; expected one of each dataset.key")
    write(rows, path)


def write_months(table: pa.Table, time: str, key: Sequence[str], folder: Path) -> int:
    """Write rows in any order as one file per month of `time`, in UTC, rows in order of `key`.
    Returns the rows. Raises UserError where a time is missing, or a key stands twice.
    """
    if table[time].null_count:
        raise UserError(f"a row has no {time}; expected the time of each")
    month = pc.strftime(pc.floor_temporal(table[time], unit="month"), "%Y-%m")
    for name in pc.unique(month).to_pylist():
        rows = table.filter(pc.equal(month, name))
        # As the engines do: what is missing comes first.
        order = [(column, "ascending", "at_start") for column in key]
        write_month(rows.take(pc.sort_indices(rows, order)), key, folder / f"{name}.parquet")
    return int(table.num_rows)


def months(folder: Path) -> list[Path]:
    """The month files of a table in order of time. Raises UserError where there is none."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(f"{folder} holds no Parquet file; run the stage that writes it: dvc repro")
    return files


def read(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All months of a table, in order of time."""
    return pa.concat_tables(read_months(folder, columns))


def read_months(folder: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The months of a table one at a time, so that memory holds one."""
    for file in months(folder):
        yield read_file(file, columns)


def read_file(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """One Parquet file. Raises UserError where it is missing, damaged or lacks a column."""
    check_columns(file, columns or ())  # read_table takes a folder for an empty table
    with intact(file, *PARQUET):
        return pq.read_table(file, columns=None if columns is None else list(columns))


def check_columns(file: Path, wanted: Sequence[str]) -> None:
    """Raise UserError where a Parquet file is missing, damaged or lacks a column."""
    held = footer(file).schema.to_arrow_schema().names
    if lacking := [name for name in wanted if name not in held]:
        raise UserError(f"{file}: column {lacking[0]} is missing; it is asked for")


def footer(file: Path) -> pq.FileMetaData:
    """What a Parquet file says of itself. Raises UserError where it is missing or damaged."""
    with intact(file, *PARQUET):
        return pq.read_metadata(file)


def count(folder: Path) -> int:
    """The number of rows, from the footers alone."""
    return sum(footer(file).num_rows for file in folder.glob("*.parquet"))
