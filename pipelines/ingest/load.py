"""load: raw text becomes typed events.

in:   data/raw/, the columns and keys of dataset.tables, the dataset's events.sql
out:  data/events/, one Parquet file per month, one typed row per event, in order of dataset.key
run:  dvc repro load

A file that is not what dataset.tables says stops the run with its name, line and column.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from pipelines import stage
from pipelines.errors import UserError, naming
from pipelines.ingest.fetch import RAW
from pipelines.params import Params, Table

EVENTS = Path("data/events")
TYPES = {
    "int": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}


def run(params: Params) -> None:
    from pipelines import engine
    from pipelines.ingest import datasets

    with stage.scratch("load") as scratch, stage.fresh(EVENTS) as out:
        for name, table in params.dataset.tables.items():
            rows = _type(name, table, scratch / name)
            stage.say("load", f"{name}: {rows:,} rows")
        with engine.session(params.engine) as spark:
            for name in params.dataset.tables:
                spark.read.parquet(str((scratch / name).resolve())).createOrReplaceTempView(name)
            frame = spark.sql(
                datasets.sql(params.dataset.name, "events"),
                args={"as_of": params.as_of, "horizon_minutes": params.dataset.horizon_minutes},
            )
            named = [*params.dataset.key, params.dataset.time]
            missing = [name for name in named if name not in frame.columns]
            if missing:
                raise UserError(
                    f"events.sql of {params.dataset.name} gives no column {missing[0]}; "
                    "dataset.key or time names it"
                )
            counts = engine.write_months(
                frame, params.dataset.time, params.dataset.key, out, scratch / "events"
            )
        if not counts:
            raise UserError(f"{RAW}: no event before as_of {params.as_of:%Y-%m-%d}")
    stage.say("load", f"{sum(counts):,} events in {len(counts)} months")


def _type(name: str, table: Table, folder: Path) -> int:
    """Write the typed files of one table into `folder`. Returns the number of rows."""
    folder.mkdir(parents=True)
    rows = 0
    for path in files(name, table):
        typed = read(path, table)
        target = folder / f"{path.stem}.parquet"
        with naming(target):
            pq.write_table(typed, target, compression="none")
        rows += typed.num_rows
    return rows


def files(name: str, table: Table) -> list[Path]:
    """The raw files of a table. Raises UserError where there is none."""
    found = [RAW / f"{name}.csv"] if table.batch is None else sorted((RAW / name).glob("*.csv"))
    if not found or not found[0].is_file():
        raise UserError(f"{RAW / name} is missing; run dvc repro fetch")
    return found


def read(path: Path, table: Table) -> pa.Table:
    """One raw CSV file as a typed table, its key unique.

    Raises UserError with file, line and column.
    """
    columns = _check_text(path, table)
    options = pacsv.ConvertOptions(
        column_types={column: TYPES[kind] for column, kind in table.columns.items()},
        include_columns=list(table.columns),
        null_values=["", "NA"],
        strings_can_be_null=True,
        timestamp_parsers=[pacsv.ISO8601],
    )
    try:
        rows = pacsv.read_csv(
            path,
            # One thread and no skipped line: only then does an error name its line.
            read_options=pacsv.ReadOptions(use_threads=False),
            parse_options=pacsv.ParseOptions(ignore_empty_lines=False),
            convert_options=options,
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: {_explain(str(error), columns)}") from None
    if rows.num_rows == 0:
        raise UserError(f"{path}: no rows; expected at least one below the header")
    lines = path.read_bytes().count(b"\n")
    if lines != rows.num_rows + 1:
        raise UserError(f"{path}: {lines} lines hold {rows.num_rows} rows; a quote is not closed")
    _check_month(path, rows, table.batch)
    _check_key(path, rows, table.key)
    return rows


def _check_text(path: Path, table: Table) -> list[str]:
    """The header's columns, where each expected one stands once and the last line is whole."""
    try:
        with path.open("rb") as file:
            header = file.readline()
            file.seek(-1, 2)
            ends_whole = file.read(1) == b"\n"
    except OSError as error:
        reason = "it is empty" if path.is_file() and path.stat().st_size == 0 else error.strerror
        raise UserError(f"{path} cannot be read: {reason}") from None
    try:
        names = next(csv.reader([header.decode("utf-8-sig")]))
    except (UnicodeDecodeError, StopIteration, csv.Error):
        raise UserError(f"{path}: line 1 is not text in UTF-8; expected the header") from None
    expected = list(table.columns)
    missing = [column for column in expected if column not in names]
    if missing and len(names) == 1:
        raise UserError(
            f"{path}: line 1 has no comma; expected columns separated by commas: "
            f"{','.join(expected)}"
        )
    if missing:
        raise UserError(f"{path}: column {missing[0]} is missing; expected {','.join(expected)}")
    twice = [column for column in expected if names.count(column) > 1]
    if twice:
        raise UserError(f"{path}: column {twice[0]} stands twice in line 1; expected once")
    if not ends_whole:
        raise UserError(f"{path}: the last line does not end; the file was cut short")
    return names


def _explain(error: str, columns: Sequence[str]) -> str:
    """pyarrow's message with the name of the column; its row is the line of the file."""
    if cell := re.match(
        r"In CSV column #(\d+): Row #(\d+): CSV conversion error to (.*)", error, re.S
    ):
        return f"line {cell[2]}, column {columns[int(cell[1])]}: expected {cell[3]}"
    if row := re.match(r"CSV parse error: Row #(\d+): (Expected \d+ columns, got \d+)", error):
        return f"line {row[1]}: {row[2][0].lower()}{row[2][1:]}"
    return error


def _check_month(path: Path, rows: pa.Table, batch: Sequence[str] | None) -> None:
    if batch is None:
        return
    year, month = (int(part) for part in path.stem.split("-"))
    right = pc.and_kleene(pc.equal(rows[batch[0]], year), pc.equal(rows[batch[1]], month))
    wrong = pc.indices_nonzero(pc.invert(pc.fill_null(right, False)))
    if len(wrong):
        at = wrong[0].as_py()
        values = [rows[column][at].as_py() for column in batch]
        if None in values:
            raise UserError(f"{path}: line {at + 2} has no {' and '.join(batch)}; is it empty?")
        found = "-".join(str(value) for value in values)
        raise UserError(f"{path}: line {at + 2} is of month {found}; expected {path.stem}")


def _check_key(path: Path, rows: pa.Table, key: Sequence[str]) -> None:
    keys = rows.select(key)
    for column in key:
        if keys[column].null_count:
            at = pc.indices_nonzero(pc.is_null(keys[column]))[0].as_py()
            raise UserError(f"{path}: line {at + 2}: {column} is missing; it is part of the key")
    numbered = keys.append_column("line", pa.array(range(2, rows.num_rows + 2)))
    groups = numbered.group_by(key, use_threads=False).aggregate([("line", "min"), ("line", "max")])
    twice = groups.filter(pc.not_equal(groups["line_min"], groups["line_max"]))
    if twice.num_rows:
        first = twice.slice(0, 1).to_pylist()[0]
        named = ", ".join(f"{column}={first[column]}" for column in key)
        raise UserError(
            f"{path}: lines {first['line_min']} and {first['line_max']} have the same key "
            f"({named}); expected one"
        )


if __name__ == "__main__":
    stage.main(run)
