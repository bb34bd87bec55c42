"""The datasets: a folder each, `events.sql` (raw tables to events), `features.sql` (events to
features) and `contract.yaml` (what the columns mean).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import params
from pipelines.errors import UserError
from pipelines.params import Contract

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

CONTRACT = "contract.yaml"


def path(dataset: str, name: str) -> Path:
    """Where a file of the dataset is. Raises UserError where it is missing."""
    found = Path(__file__).parent / dataset / name
    if not found.is_file():
        raise UserError(f"dataset.name: {found} is missing")
    return found


def sql(dataset: str, query: str) -> str:
    """The text of `<dataset>/<query>.sql`. Raises UserError where it is missing."""
    return path(dataset, f"{query}.sql").read_text(encoding="utf-8")


def ask(spark: "SparkSession", dataset: str, query: str, **settings: object) -> "DataFrame":
    """What `<dataset>/<query>.sql` gives. Raises UserError where the engine does not take it."""
    from pyspark.errors import (
        AnalysisException,
        IllegalArgumentException,
        UnsupportedOperationException,
    )

    try:
        frame = spark.sql(sql(dataset, query), args=settings)
        _ = frame.columns  # only then is it looked at
    except (
        AnalysisException,
        IllegalArgumentException,
        UnsupportedOperationException,
    ) as error:
        said = " ".join(str(error).partition("\n\n")[0].split())[:300]
        raise UserError(f"{path(dataset, f'{query}.sql')}: {said}") from None
    return frame


def contract(dataset: str) -> Contract:
    """What the columns of the dataset's tables mean. Raises UserError with one line."""
    return params.checked(path(dataset, CONTRACT), Contract)
