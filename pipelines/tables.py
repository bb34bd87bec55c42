"""Tables on disk: Parquet whose bytes depend on the rows alone, one file per month."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import UserError, naming


def write(table: pa.Table, path: Path) -> None:
    """Write one Parquet file without metadata of its maker.

    The caller gives the rows in full order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Engines differ in what they call nullable and in the size of their batches; the rows do not.
    fields = [field.with_nullable(True).remove_metadata() for field in table.schema]
    plain = pa.Table.from_arrays(table.combine_chunks().columns, schema=pa.schema(fields))
    with naming(path):
        pq.write_table(plain, path, compression="zstd")


def write_months(table: pa.Table, time: str, key: Sequence[str], folder: Path) -> int:
    """Write rows in any order as one file per month of `time`, in UTC, rows in order of `key`.
    Returns the rows.
    """
    month = pc.strftime(pc.floor_temporal(table[time], unit="month"), "%Y-%m")
    for name in pc.unique(month).to_pylist():
        rows = table.filter(pc.equal(month, name))
        # As the engines do: what is missing comes first.
        order = [(column, "ascending", "at_start") for column in key]
        write(rows.take(pc.sort_indices(rows, order)), folder / f"{name}.parquet")
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
        yield pq.read_table(file, columns=None if columns is None else list(columns))


def count(folder: Path) -> int:
    """The number of rows, from the footers alone."""
    return sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))
