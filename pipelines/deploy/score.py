"""score: what the bundle says of the newest rows, on the engine, where the rows are.

in:   models/bundle/, data/features/, expectations/predictions/<task>.json
out:  data/predictions/<month>.parquet: the rows of the last score.window_days before as_of, as the
      model saw them, in order of dataset.key: key, time, label, every column of the bundle's
      contract, and `prediction` (with classes, that of the last one, and all in `probabilities`)
run:  dvc repro score

The model travels to the engine's workers with the function that asks it; they need this project's
environment, and no disk of ours. Each batch of rows is asked on one thread: the engine has a
worker for every core. An answer does not depend on the batch its row is in, so every engine gives
the same bytes.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines import bundle, stage, tables
from pipelines.deploy import expected
from pipelines.errors import UserError
from pipelines.params import Params

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

FEATURES = Path("data/features")
PREDICTIONS = Path("data/predictions")
Mapper = Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]


def run(params: Params) -> None:
    from pipelines import engine

    contract = bundle.load(bundle.FOLDER).contract
    columns = wanted(params, contract["columns"])
    suite = expected.suite(bundle.task(contract), [*columns, *bundle.answer(contract).names])
    with (
        stage.scratch("score") as scratch,
        stage.fresh(PREDICTIONS) as out,
        engine.session(params.engine) as spark,
    ):
        features = spark.read.parquet(str(FEATURES.resolve()))
        rows = newest(features, columns, params)
        if rows.isEmpty():
            raise UserError(
                f"{FEATURES}: no row in the {params.score.window_days} days before as_of "
                f"{params.as_of:%Y-%m-%d}"
            )
        frame = scored(rows, contract)
        counts = engine.write_months(
            frame, params.dataset.time, params.dataset.key, out, scratch / "predictions"
        )
        for file in tables.months(out):
            expected.check(tables.read_file(file), suite, PREDICTIONS / file.name)
    stage.say("score", f"{sum(counts.values()):,} rows of the last {params.score.window_days} days")


def wanted(params: Params, columns: list[dict[str, str]]) -> list[str]:
    """The names of what is written, each of which every month of features must hold."""
    names = [*params.dataset.key, params.dataset.time, "label", *(one["name"] for one in columns)]
    for file in tables.months(FEATURES):
        tables.check_columns(file, names)
    return list(dict.fromkeys(names))


def newest(features: "DataFrame", columns: list[str], params: Params) -> "DataFrame":
    """The rows of the window."""
    from pyspark.sql import functions as F

    recent = F.col(params.dataset.time) >= F.lit(params.window_from)
    return features.where(recent).select(*columns)


def scored(rows: "DataFrame", contract: dict[str, Any]) -> "DataFrame":
    """The rows with the bundle's answers."""
    from pyspark.sql.pandas.types import from_arrow_schema
    from pyspark.sql.types import StructType

    model = (bundle.FOLDER / bundle.MODEL).read_bytes()
    added = from_arrow_schema(bundle.answer(contract))
    return rows.mapInArrow(asking(model, contract), StructType([*rows.schema, *added]))


def asking(model: bytes, contract: dict[str, Any]) -> Mapper:
    """A function for the engine's workers: batches of rows to batches with answers."""

    def ask(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        scorer = bundle.Scorer(contract, bundle.open_session(model))
        for batch in batches:
            rows = pa.Table.from_batches([batch])
            yield from bundle.answered(rows, scorer.predict(rows)).combine_chunks().to_batches()

    return ask


if __name__ == "__main__":
    stage.main(run)
