"""load: raw text becomes typed events.

in:   data/raw/, the columns and keys of dataset.tables, the dataset's events.sql
out:  data/events/, one Parquet file per month, one typed row per event, in order of dataset.key
run:  dvc repro load

A month is made of its raw months, and of those that dataset.lookback_days reach. Where none of them
changed, it is the file that was made before (pipelines/months.py).

A file that is not what dataset.tables says stops the run with its name, line and column.
"""

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from pipelines import months, stage, tables
from pipelines.errors import UserError, naming
from pipelines.ingest import datasets
from pipelines.ingest.fetch import RAW
from pipelines.months import Kept
from pipelines.params import Params, Table

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

# What is the same for every event; events.sql may name them as parameters.
SETTINGS = ("horizon_minutes", "lookback_days", "settle_days")
EVENTS = Path("data/events")
# In the environment: the secret under which personal columns are hashed.
SECRET = "HEADRACE_PII_KEY"
TYPES = {
    "int": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}


def run(params: Params) -> None:
    raw, kept = Raw(params), Kept("load")
    keys = {month: raw.key(month) for month in raw.months()}
    with stage.fresh(EVENTS) as out:
        new = [name for name in keys if not kept.take(keys[name], out / f"{name}.parquet")]
        made = _make(raw, new, out) if new else 0
        for name in new:
            kept.keep(keys[name], out / f"{name}.parquet")
        total = tables.count(out)
        if not total:
            raise UserError(f"{RAW}: no event before as_of {params.as_of:%Y-%m-%d}")
    kept.sweep()
    stage.say("load", f"{total:,} events, {made:,} of them made: {months.said(new, keys)}")


class Raw:
    """The raw files, and which of them a month of events is made of."""

    def __init__(self, params: Params) -> None:
        self.params, self.dataset = params, params.dataset
        self.files = {name: files(name, table) for name, table in self.dataset.tables.items()}
        self.digests = {path: months.sha256(path) for held in self.files.values() for path in held}

    def months(self) -> list[str]:
        """The months, in UTC, that can hold an event of the raw months, before as_of."""
        stems = [
            path.stem
            for name, table in self.dataset.tables.items()
            if table.batch is not None
            for path in self.files[name]
        ]
        zone = self.dataset.timezone
        begin, end = months.begin(min(stems), zone), months.end(max(stems), zone)
        return months.between(begin, min(end, self.params.as_of))

    def of(self, first: str, last: str) -> dict[str, list[Path]]:
        """The files, by table, of which events of these months and those between are made."""
        begin = months.begin(first) - timedelta(days=self.dataset.lookback_days)
        touched = months.between(begin, months.end(last), self.dataset.timezone)
        return {
            name: [path for path in self.files[name] if table.batch is None or path.stem in touched]
            for name, table in self.dataset.tables.items()
        }

    def key(self, month: str) -> str:
        """The name of all that a month of events is made of."""
        dataset, files = self.dataset, self.of(month, month)
        # A later clock changes nothing in a month whose last event is settled.
        settled = months.end(month) + timedelta(days=dataset.settle_days)
        return months.key(
            [
                Path(__file__),
                datasets.path(dataset.name, "events.sql"),
                datasets.path(dataset.name, datasets.CONTRACT),
            ],
            pii=self.params.load_.pii.model_dump(),
            secret=hashlib.sha256(os.environ.get(SECRET, "").encode()).hexdigest()[:8],
            raw={name: [self.digests[path] for path in held] for name, held in files.items()},
            as_of=min(self.params.as_of, settled).isoformat(),
            dataset=dataset.model_dump(include={*SETTINGS, "key", "tables", "time", "timezone"}),
        )


def _make(raw: Raw, new: Sequence[str], out: Path) -> int:
    """Make the months of events that are new. Returns their rows."""
    from pipelines import engine

    dataset, made = raw.dataset, 0
    with stage.scratch("load") as scratch, engine.session(raw.params.engine) as spark:
        typed = _type(raw, new, scratch)
        rows: Counter[str] = Counter()
        for path, (_, count) in typed.items():
            rows[path.stem] += count
        for run in months.runs(new, rows, engine.ROWS):
            for name, paths in raw.of(run[0], run[-1]).items():
                held = [str(typed[path][0].resolve()) for path in paths]
                spark.read.parquet(*held).createOrReplaceTempView(name)
            frame = impersonal(events(spark, raw.params), raw.params)
            frame = months.only(frame, dataset.time, run)
            written = engine.write_months(frame, dataset.time, dataset.key, out, scratch / run[0])
            made += sum(written.values())
    return made


def _type(raw: Raw, new: Sequence[str], folder: Path) -> dict[Path, tuple[Path, int]]:
    """Type every raw file that these months are made of: its Parquet file, and its rows."""
    typed: dict[Path, tuple[Path, int]] = {}
    for name, table in raw.dataset.tables.items():
        (folder / name).mkdir(parents=True)
        for path in dict.fromkeys(path for month in new for path in raw.of(month, month)[name]):
            rows = read(path, table)
            target = folder / name / f"{path.stem}.parquet"
            with naming(target):
                pq.write_table(rows, target, compression="none")
            typed[path] = target, rows.num_rows
        count = sum(typed[path][1] for path in raw.files[name] if path in typed)
        stage.say("load", f"{name}: {count:,} rows read")
    return typed


def events(spark: "SparkSession", params: Params) -> "DataFrame":
    """What the dataset's events.sql gives of the views of its raw tables."""
    dataset = params.dataset
    settings = {name: getattr(dataset, name) for name in SETTINGS}
    text = datasets.sql(dataset.name, "events")
    frame = spark.sql(text, args={"as_of": params.as_of, **settings})
    missing = [name for name in (*dataset.key, dataset.time) if name not in frame.columns]
    if missing:
        raise UserError(
            f"events.sql of {dataset.name} gives no column {missing[0]}; dataset.key or time "
            "names it"
        )
    return frame


def impersonal(frame: "DataFrame", params: Params) -> "DataFrame":
    """The events without what names a person: by the contract's classes and the rule load.pii.

    Raises UserError where the contract does not know a column, or a column cannot be spared.
    """
    from pyspark.sql import functions as F

    dataset, rules = params.dataset, params.load_.pii.model_dump()
    columns = datasets.contract(dataset.name).events
    where = datasets.path(dataset.name, datasets.CONTRACT)
    if unknown := [name for name in frame.columns if name not in columns]:
        raise UserError(f"{where}: events has no {unknown[0]}, which events.sql gives; describe it")
    for name in frame.columns:
        pii = columns[name].pii
        if pii == "none":
            continue
        if name == dataset.time or (name in dataset.key and rules[pii] == "drop"):
            raise UserError(f"{where}: {name} is personal, but dataset.key or time names it")
        if rules[pii] == "drop":
            frame = frame.drop(name)
            continue
        secret = os.environ.get(SECRET, "")
        if len(secret) < 16:
            raise UserError(
                f"{where}: {name} is {pii}ly personal and load.pii says hash; set {SECRET} to a "
                "secret of at least 16 characters"
            )
        text = F.concat(F.lit(secret), F.col(name).cast("string"))
        frame = frame.withColumn(name, F.sha2(text, 256))
    return frame


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
