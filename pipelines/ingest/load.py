"""load: raw text becomes typed events.

in:   data/raw/, the columns and keys of dataset.tables, the dataset's events.sql
out:  data/events/, one Parquet file per month, one typed row per event, in order of dataset.key
run:  dvc repro load

A month is made of its raw months, and of those that dataset.lookback_days reach. Where none of them
changed, it is the file that was made before (pipelines/months.py).

A file that is not what dataset.tables says stops the run with its name, line and column.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import months, stage, tables
from pipelines.errors import UserError, naming
from pipelines.ingest import datasets
from pipelines.ingest.fetch import MONTH, RAW
from pipelines.ingest.raw import none, read
from pipelines.months import Kept
from pipelines.params import Params, Table

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

# What is the same for every event; events.sql may name them as parameters.
SETTINGS = ("horizon_minutes", "lookback_days", "settle_days")
EVENTS = Path("data/events")
# In the environment: the secret under which personal columns are hashed.
SECRET = "HEADRACE_PII_KEY"


def run(params: Params) -> None:
    raw = Raw(params)
    keys = {month: raw.key(month) for month in raw.months()}
    with stage.fresh(EVENTS) as out:
        new, made = Kept("load").fill(out, keys, lambda new: _make(raw, new, out))
        total = tables.count(out)
        if not total:
            raise UserError(f"{RAW}: no event before as_of {params.as_of:%Y-%m-%d}")
    stage.say("load", f"{total:,} events, {made:,} of them made: {months.said(new, keys)}")


class Raw:
    """The raw files, and which of them a month of events is made of."""

    def __init__(self, params: Params) -> None:
        self.params, self.dataset = params, params.dataset
        self.files = {name: files(name, table) for name, table in self.dataset.tables.items()}
        self.digests = {path: stage.sha256(path) for held in self.files.values() for path in held}

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
                Path(__file__).with_name("raw.py"),
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

    dataset, kind = raw.dataset, raw.params.engine
    with stage.scratch("load") as scratch, engine.session(kind) as spark:
        frames = _frames(raw, new, _type(raw, new, scratch / "raw"), spark)
        runs = scratch / "runs"
        with datasets.answering(dataset.name, "events"):
            return engine.write_runs(frames, dataset.time, dataset.key, out, runs, kind)


def _frames(
    raw: Raw, new: Sequence[str], typed: Mapping[Path, tuple[Path, int]], spark: "SparkSession"
) -> Iterator["DataFrame"]:
    """The events of the months, some months at a time."""
    from pipelines import engine

    rows: Counter[str] = Counter()
    for path, (_, count) in typed.items():
        rows[path.stem] += count
    for run in months.runs(new, rows, engine.ROWS):
        for name, paths in raw.of(run[0], run[-1]).items():
            held = [str(typed[path][0].resolve()) for path in paths or [RAW / name]]
            spark.read.parquet(*held).createOrReplaceTempView(name)
        frame = impersonal(events(spark, raw.params), raw.params)
        yield months.only(frame, raw.dataset.time, run)


def _type(raw: Raw, new: Sequence[str], folder: Path) -> dict[Path, tuple[Path, int]]:
    """Type every raw file that these months are made of: its Parquet file, and its rows. Under the
    table's own path stands one without rows, for months in which it has no file.
    """
    typed: dict[Path, tuple[Path, int]] = {}
    for name, table in raw.dataset.tables.items():
        (folder / name).mkdir(parents=True)
        typed[RAW / name] = _kept(none(table), folder / f"{name}.parquet")
        for path in dict.fromkeys(path for month in new for path in raw.of(month, month)[name]):
            rows = read(path, table, raw.dataset.timezone)
            typed[path] = _kept(rows, folder / name / f"{path.stem}.parquet")
        count = sum(typed[path][1] for path in raw.files[name] if path in typed)
        stage.say("load", f"{name}: {count:,} rows read")
    return typed


def _kept(rows: pa.Table, target: Path) -> tuple[Path, int]:
    with naming(target):
        pq.write_table(rows, target, compression="none")
    return target, rows.num_rows


def events(spark: "SparkSession", params: Params) -> "DataFrame":
    """What the dataset's events.sql gives of the views of its raw tables."""
    dataset = params.dataset
    settings = {name: getattr(dataset, name) for name in SETTINGS}
    frame = datasets.ask(spark, dataset.name, "events", as_of=params.as_of, **settings)
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
    if table.batch and (odd := [path for path in found if not MONTH.fullmatch(path.name)]):
        raise UserError(f"{odd[0]} is no month; dvc repro -f fetch removes it")
    return found


if __name__ == "__main__":
    stage.main(run)
