"""The datasets: a folder each, `events.sql` (raw tables to events), `features.sql` (events to
features) and `contract.yaml` (what the columns mean).
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
    place = path(dataset, f"{query}.sql")
    try:
        return place.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is no text in UTF-8: {error}") from None


def ask(spark: "SparkSession", dataset: str, query: str, **settings: object) -> "DataFrame":
    """What `<dataset>/<query>.sql` gives. Raises UserError where the engine does not take it."""
    with answering(dataset, query):
        frame = spark.sql(sql(dataset, query), args=settings)
        _ = frame.columns  # only then is it looked at
    return frame


@contextmanager
def answering(dataset: str, query: str) -> Iterator[None]:
    """What the engine has against the query, or against a value on its way, becomes a UserError."""
    from pyspark.errors import (
        AnalysisException,
        IllegalArgumentException,
        UnsupportedOperationException,
    )

    try:
        yield
    except (
        AnalysisException,
        IllegalArgumentException,
        UnsupportedOperationException,
    ) as error:
        said = " ".join(str(error).partition("\n\n")[0].split())[:300]
        raise UserError(f"{path(dataset, f'{query}.sql')}: {said}") from None


def contract(dataset: str) -> Contract:
    """What the columns of the dataset's tables mean. Raises UserError with one line."""
    return params.checked(path(dataset, CONTRACT), Contract)
