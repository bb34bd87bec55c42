"""featurize: what was known at prediction time, and the label.

in:   data/accepted/, the dataset's features.sql
out:  data/features/, one Parquet file per month: dataset.key, prediction_time, known_at, split,
      label (dataset.target), the slices and every feature of dataset.features (categories are
      strings, numbers 32-bit floats)
run:  dvc repro featurize

A month is made of its events and of those that dataset.lookback_days reach; where none of them
changed, it is the file that was made before (pipelines/months.py).

split is test for the last test_days before as_of, val for the val_days before those, train for the
rest.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import months, stage, tables
from pipelines.errors import UserError
from pipelines.ingest import datasets
from pipelines.ingest.validate import ACCEPTED
from pipelines.months import Kept
from pipelines.params import Params

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

FEATURES = Path("data/features")


def run(params: Params) -> None:
    accepted = Accepted(params)
    keys = {name: accepted.key(name) for name in accepted.files}
    with stage.fresh(FEATURES) as out:
        new, made = Kept("featurize").fill(out, keys, lambda new: _make(accepted, new, out))
        total = tables.count(out)
    names = params.dataset.features.names
    stage.say(
        "featurize",
        f"{total:,} rows of {len(names)} features, {made:,} of them made: {months.said(new, keys)}",
    )


class Accepted:
    """The accepted events, and which of them a month of features is made of."""

    def __init__(self, params: Params) -> None:
        self.params, self.dataset = params, params.dataset
        self.files = {file.stem: file for file in tables.months(ACCEPTED)}
        self.digests = {name: stage.sha256(file) for name, file in self.files.items()}

    def of(self, first: str, last: str) -> list[str]:
        """The months of events that the features of these months and those between are made of."""
        touched = months.between(self.since(first), months.end(last))
        return [name for name in self.files if name in touched]

    def since(self, first: str) -> datetime:
        """The first moment of which the features of this month and later ones see an event."""
        # What is asked for is known before the event, and is of events settled by then.
        days = self.dataset.lookback_days + self.dataset.settle_days
        reach = timedelta(days=days, minutes=self.dataset.horizon_minutes)
        return months.begin(first) - reach

    def key(self, month: str) -> str:
        """The name of all that a month of features is made of."""
        dataset, params = self.dataset, self.params
        begin, end = months.begin(month), months.end(month)
        # A clock that cuts another month changes nothing in this one.
        cuts = [
            min(max(cut, begin), end).isoformat() for cut in (params.val_from, params.test_from)
        ]
        return months.key(
            [Path(__file__), datasets.path(dataset.name, "features.sql")],
            accepted={name: self.digests[name] for name in self.of(month, month)},
            split=cuts,
            dataset=dataset.model_dump(
                include={
                    "features",
                    "key",
                    "lookback_days",
                    "settle_days",
                    "slices",
                    "target",
                    "time",
                }
            ),
        )


def _make(accepted: Accepted, new: Sequence[str], out: Path) -> int:
    """Make the months of features that are new. Returns their rows."""
    from pipelines import engine

    dataset, kind = accepted.dataset, accepted.params.engine
    with stage.scratch("featurize") as scratch, engine.session(kind) as spark:
        frames = _frames(accepted, new, spark)
        with datasets.answering(dataset.name, "features"):
            return engine.write_runs(frames, dataset.time, dataset.key, out, scratch, kind)


def _frames(accepted: Accepted, new: Sequence[str], spark: "SparkSession") -> Iterator["DataFrame"]:
    """The features of the months, some months at a time."""
    from pyspark.sql import functions as F

    from pipelines import engine

    dataset = accepted.dataset
    rows = {name: tables.footer(file).num_rows for name, file in accepted.files.items()}
    for run in months.runs(new, rows, engine.ROWS):
        paths = [str(accepted.files[name].resolve()) for name in accepted.of(run[0], run[-1])]
        seen = F.col(dataset.time) >= F.lit(accepted.since(run[0]))
        spark.read.parquet(*paths).where(seen).createOrReplaceTempView("accepted")
        frame = datasets.ask(
            spark,
            dataset.name,
            "features",
            first=months.begin(run[0]),
            until=months.end(run[-1]),
            lookback_days=dataset.lookback_days,
        )
        # Also where the SQL does not mind what is asked for: other months it has seen in part.
        yield months.only(typed(frame, accepted.params), dataset.time, run)


def typed(frame: "DataFrame", params: Params) -> "DataFrame":
    """The columns of the contract in their order and types, with the split by time."""
    from pyspark.sql import functions as F

    dataset, features = params.dataset, params.dataset.features
    plain = [*dataset.key, "prediction_time", "known_at"]
    slices = [name for name in dataset.slices if name not in features.names]
    target = dataset.target
    asked = [*plain, target.column, *slices, *features.names]
    missing = [name for name in asked if name not in frame.columns]
    if missing:
        raise UserError(
            f"features.sql of {dataset.name} gives no column {missing[0]}; params.yaml names it"
        )
    time = F.col(dataset.time)
    split = (
        F.when(time >= F.lit(params.test_from), "test")
        .when(time >= F.lit(params.val_from), "val")
        .otherwise("train")
    )
    label = F.col(target.column).cast("float" if target.task == "regression" else "int")
    return frame.select(
        *[F.col(name) for name in plain if name not in features.names],
        label.alias("label"),
        *[F.col(name) for name in slices],
        split.alias("split"),
        *[F.col(name).cast("string").alias(name) for name in features.categories],
        *[F.col(name).cast("float").alias(name) for name in features.numbers],
    )


if __name__ == "__main__":
    stage.main(run)
