"""featurize: what was known at prediction time, and the label.

in:   data/accepted/, the dataset's features.sql
out:  data/features/, one Parquet file per month: dataset.key, prediction_time, known_at, split,
      label, the slices and every feature of dataset.features (categories are strings, numbers
      32-bit floats)
run:  dvc repro featurize

split is test for the last test_days before as_of, val for the val_days before those, train for the
rest.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import stage
from pipelines.errors import UserError
from pipelines.ingest.validate import ACCEPTED
from pipelines.params import Params

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

FEATURES = Path("data/features")


def run(params: Params) -> None:
    from pipelines import engine
    from pipelines.ingest import datasets

    with (
        stage.scratch("featurize") as scratch,
        stage.fresh(FEATURES) as out,
        engine.session(params.engine) as spark,
    ):
        spark.read.parquet(str(ACCEPTED.resolve())).createOrReplaceTempView("accepted")
        frame = typed(spark.sql(datasets.sql(params.dataset.name, "features")), params)
        counts = engine.write_months(
            frame, params.dataset.time, params.dataset.key, out, scratch / "features"
        )
    names = params.dataset.features.names
    stage.say("featurize", f"{sum(counts):,} rows in {len(counts)} months, {len(names)} features")


def typed(frame: "DataFrame", params: Params) -> "DataFrame":
    """The columns of the contract in their order and types, with the split by time."""
    from pyspark.sql import functions as F

    dataset, features = params.dataset, params.dataset.features
    plain = [*dataset.key, "prediction_time", "known_at", "label"]
    plain += [name for name in dataset.slices if name not in features.names]
    missing = [name for name in [*plain, *features.names] if name not in frame.columns]
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
    return frame.select(
        *[F.col(name) for name in plain if name not in features.names],
        split.alias("split"),
        *[F.col(name).cast("string").alias(name) for name in features.categories],
        *[F.col(name).cast("float").alias(name) for name in features.numbers],
    )


if __name__ == "__main__":
    stage.main(run)
