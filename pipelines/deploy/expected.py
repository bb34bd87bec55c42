"""What must hold of predictions: a suite of Great Expectations for each task.

Importing Great Expectations takes longer than scoring a month. So the few expectations that speak
of predictions are computed here; a test holds each to what Great Expectations itself says.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import stage
from pipelines.errors import UserError

SUITES = Path("expectations/predictions")
Bounds = dict[str, Any]


def suite(task: str) -> list[dict[str, Any]]:
    """The expectations of a task. Raises UserError where one is not known here."""
    path = SUITES / f"{task}.json"
    found: list[dict[str, Any]] = stage.read_json(path)["expectations"]
    for one in found:
        if one["type"] not in KINDS:
            raise UserError(f"{path}: {one['type']} is not known; allowed: {', '.join(KINDS)}")
    return found


def check(month: pa.Table, expectations: list[dict[str, Any]], name: Path) -> None:
    """Raise UserError with the first expectation that the table `name` breaks."""
    for one in expectations:
        kwargs = one["kwargs"]
        if broken := KINDS[one["type"]](month, kwargs):
            column = f"{kwargs['column']}: " if "column" in kwargs else ""
            raise UserError(
                f"{name}: {column}{one['type'].removeprefix('expect_')}: {broken}; expected "
                f"{kwargs.get('min_value', '-inf')} to {kwargs.get('max_value', 'inf')}"
            )


def _row_count(month: pa.Table, kwargs: Bounds) -> str:
    return "" if _within(month.num_rows, kwargs) else f"{month.num_rows} rows"


def _not_null(month: pa.Table, kwargs: Bounds) -> str:
    column = month[kwargs["column"]]
    return _first(column, pc.is_null(column)) if column.null_count else ""


def _between(month: pa.Table, kwargs: Bounds) -> str:
    """What is no number lies within no bounds, as on Spark; what is null is not asked."""
    column = month[kwargs["column"]]
    right = pc.and_(
        pc.greater_equal(column, kwargs.get("min_value", -math.inf)),
        pc.less_equal(column, kwargs.get("max_value", math.inf)),
    )
    broken = pc.fill_null(pc.invert(right), False)
    return _first(column, broken) if pc.any(broken).as_py() else ""


def _mean(month: pa.Table, kwargs: Bounds) -> str:
    mean = pc.mean(month[kwargs["column"]]).as_py()
    return "" if mean is not None and _within(mean, kwargs) else f"mean {mean}"


def _within(value: float, kwargs: Bounds) -> bool:
    return bool(kwargs.get("min_value", -math.inf) <= value <= kwargs.get("max_value", math.inf))


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
