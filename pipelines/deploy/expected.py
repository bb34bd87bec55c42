"""What must hold of predictions: a suite of Great Expectations for each task.

Importing Great Expectations takes longer than scoring a month. So the few expectations that speak
of predictions are computed here; a test holds each to what Great Expectations itself says.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import params as parameters
from pipelines.errors import UserError
from pipelines.params import Bounded, Bounds, PredictionSuite

SUITES = Path("expectations/predictions")


def suite(task: str, columns: Sequence[str]) -> list[Bounded]:
    """The expectations of a task. Raises UserError where one is not known here, or speaks of none
    of these columns.
    """
    path = SUITES / f"{task}.json"
    found = parameters.checked(path, PredictionSuite).expectations
    for one in found:
        if one.type not in KINDS:
            raise UserError(f"{path}: {one.type} is not known; allowed: {', '.join(KINDS)}")
        if KINDS[one.type] is not _row_count and one.kwargs.column not in columns:
            raise UserError(
                f"{path}: {one.type}: column is {one.kwargs.column}; expected one of "
                f"{', '.join(columns)}"
            )
    return found


def check(month: pa.Table, expectations: list[Bounded], name: Path) -> None:
    """Raise UserError with the first expectation that the table `name` breaks."""
    for one in expectations:
        bounds = one.kwargs
        if broken := KINDS[one.type](month, bounds):
            column = f"{bounds.column}: " if bounds.column else ""
            raise UserError(
                f"{name}: {column}{one.type.removeprefix('expect_')}: {broken}; expected "
                f"{bounds.min_value:g} to {bounds.max_value:g}"
            )


def _row_count(month: pa.Table, bounds: Bounds) -> str:
    return "" if _within(month.num_rows, bounds) else f"{month.num_rows} rows"


def _not_null(month: pa.Table, bounds: Bounds) -> str:
    column = month[bounds.column]
    return _first(column, pc.is_null(column)) if column.null_count else ""


def _between(month: pa.Table, bounds: Bounds) -> str:
    """What is no number lies within no bounds, as on Spark; what is null is not asked."""
    column = month[bounds.column]
    right = pc.and_(
        pc.greater_equal(column, bounds.min_value), pc.less_equal(column, bounds.max_value)
    )
    broken = pc.fill_null(pc.invert(right), False)
    return _first(column, broken) if pc.any(broken).as_py() else ""


def _mean(month: pa.Table, bounds: Bounds) -> str:
    mean = pc.mean(month[bounds.column]).as_py()
    return "" if mean is not None and _within(mean, bounds) else f"mean {mean}"


def _within(value: float, bounds: Bounds) -> bool:
    return bounds.min_value <= value <= bounds.max_value


def _first(column: pa.ChunkedArray, broken: pa.ChunkedArray) -> str:
    rows = pc.indices_nonzero(broken)
    at = rows[0].as_py()
    return f"{len(rows)} of {len(column)} rows, the first is row {at} with {column[at].as_py()}"


KINDS: dict[str, Callable[[pa.Table, Bounds], str]] = {
    "expect_table_row_count_to_be_between": _row_count,
    "expect_column_values_to_not_be_null": _not_null,
    "expect_column_values_to_be_between": _between,
    "expect_column_mean_to_be_between": _mean,
}
