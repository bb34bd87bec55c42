"""validate: what must hold, row by row and for the table.

in:   data/events/, expectations/<dataset>.json
out:  data/accepted/, data/quarantine/ (rows with the expectations they broke),
      reports/validate/verdict.json
page: reports/validate/data_docs/ (Great Expectations; for eyes, not tracked)
run:  dvc repro validate

A column expectation without `mostly` is about rows: rows that break it go to quarantine. Any other
is about the table: a breach stops the run. An expectation that raised is a fault, never a pass.
"""

import functools
import io
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import params as parameters
from pipelines import stage, tables
from pipelines.errors import UserError
from pipelines.ingest.load import EVENTS
from pipelines.params import Params, Suite

if TYPE_CHECKING:
    from great_expectations.core import (
        ExpectationSuiteValidationResult,
        ExpectationValidationResult,
    )
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
    from pyspark.sql import DataFrame

ACCEPTED = Path("data/accepted")
QUARANTINE = Path("data/quarantine")
DOCS = Path("reports/validate/data_docs")
VERDICT = Path("reports/validate/verdict.json")
SUITES = Path("expectations")
MONTHS = 2  # are divided at once, so that memory holds two
ASKED_OF = ("column", "row_condition", "condition_parser")  # not what is expected of it
REASONS = pa.field("reasons", pa.list_(pa.string()))


def run(params: Params) -> None:
    with stage.page(DOCS, VERDICT):
        total, apart = divide(params)
    stage.say("validate", f"{total - apart:,} accepted, {apart:,} in quarantine")


def divide(params: Params) -> tuple[int, int]:
    """Write the page, the two tables and the verdict. Returns the rows, and those in quarantine."""
    from pipelines import engine

    total = sum(tables.footer(file).num_rows for file in tables.months(EVENTS))
    suite = parameters.checked(SUITES / f"{params.dataset.name}.json", Suite)
    # A row is named by its key, and found by its month.
    names = list(dict.fromkeys([params.dataset.time, *params.dataset.key]))
    with (
        stage.fresh(ACCEPTED) as accepted,
        stage.fresh(QUARANTINE) as quarantine,
        ThreadPoolExecutor(1) as beside,
    ):
        # While they are judged: few months hold a row that is not accepted.
        all_accepted = beside.submit(_accept, accepted, quarantine)
        with engine.session(params.engine) as spark:
            events = spark.read.parquet(str(EVENTS.resolve()))
            _check_columns(suite, events.columns)
            stage.say("validate", f"{len(suite.expectations)} expectations on {total:,} events")
            with stage.fresh(DOCS) as docs:
                result = check(events, suite, docs)
            stop_on_table_breach(result)
            reasons = broken_rows(rows_of(result, events, names), names)
        if len(reasons) > params.validate_.max_quarantine * total:
            first = min(row[0] for row in reasons).astimezone(UTC)
            raise UserError(
                f"{EVENTS}: {len(reasons):,} of {total:,} rows break {', '.join(_failed(result))}, "
                f"the first in {first:%Y-%m}.parquet, of {first:%Y-%m-%d %H:%M} UTC; expected at "
                f"most the share validate.max_quarantine = {params.validate_.max_quarantine}"
            )
        all_accepted.result()
        _set_apart(reasons, names, accepted, quarantine)
    stage.write_json(VERDICT, verdict(result, total, len(reasons)))
    return total, len(reasons)


def _check_columns(suite: Suite, columns: list[str]) -> None:
    for one in suite.expectations:
        if missing := [name for name in _columns(one.arguments) if name not in columns]:
            raise UserError(
                f"{SUITES / suite.name}.json: {EVENTS} has no column {missing[0]}; mend the suite"
            )


def _columns(kwargs: Mapping[str, Any]) -> list[str]:
    """Those of which an expectation speaks."""
    named = [kwargs[kind] for kind in ("column", "column_A", "column_B") if kind in kwargs]
    return [str(name) for name in (*named, *kwargs.get("column_list", ()))]


def check(frame: "DataFrame", suite: Suite, docs: Path) -> "ExpectationSuiteValidationResult":
    """Run the suite on the engine's frame and build the Data Docs.

    The result counts what is broken and lists nothing: a tolerated share would be a list that grows
    with the table.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    from great_expectations.exceptions.exceptions import GreatExpectationsError
    from great_expectations.expectations.registry import get_expectation_impl

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
    asset = context.data_sources.add_spark(name="engine").add_dataframe_asset(suite.name)
    try:
        for one in suite.expectations:
            get_expectation_impl(one.type)  # the suite would leave out what it does not know
        expectations = context.suites.add(gx.ExpectationSuite(**suite.model_dump(by_alias=True)))
    except (GreatExpectationsError, TypeError, ValueError) as error:
        raise UserError(
            f"{SUITES / suite.name}.json: {' '.join(str(error).split())[:300]}"
        ) from None
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(
            name=suite.name,
            data=asset.add_batch_definition_whole_dataframe("all"),
            suite=expectations,
        )
    )
    site = {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {
            "class_name": "TupleFilesystemStoreBackend",
            "base_directory": str(docs.resolve()),
        },
    }
    context.update_data_docs_site("local_site", site)  # type: ignore[arg-type]
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name=suite.name,
            validation_definitions=[definition],
            # Each value that it shows is another query of the whole table.
            result_format={"result_format": "BASIC", "partial_unexpected_count": 0},
        )
    )
    outcome = checkpoint.run(batch_parameters={"dataframe": frame})
    with pages_or_error():
        context.build_data_docs()
    (result,) = outcome.run_results.values()
    raise_on_exception(result)
    return result


def rows_of(
    result: "ExpectationSuiteValidationResult", frame: "DataFrame", key: list[str]
) -> "list[ExpectationValidationResult]":
    """The broken expectations that are about rows, asked again for the keys of those rows."""
    broken: list[Any] = [
        {"type": _config(item).type, "kwargs": _bounds(item)}
        for item in result.results
        if not item.success and is_about_rows(item)
    ]
    if not broken:
        return []
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
    source = context.data_sources.add_spark(name="engine").add_dataframe_asset("broken")
    batch = source.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
    form = {"result_format": "COMPLETE", "unexpected_index_column_names": key}
    suite = gx.ExpectationSuite(name="broken", expectations=broken)
    again = batch.validate(suite, result_format=form)
    raise_on_exception(again)
    return list(again.results)


@contextmanager
def pages_or_error() -> Iterator[None]:
    """Great Expectations logs what keeps it from writing a page, traceback and all, and goes on."""

    class Raised(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError(f"Data Docs: {record.getMessage().partition('follows:')[2]}")

    log, handler = logging.getLogger("great_expectations.render"), Raised(logging.ERROR)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def raise_on_exception(result: "ExpectationSuiteValidationResult") -> None:
    """Raise where an expectation could not be computed: its verdict would mean nothing."""
    for item in result.results:
        info = item.exception_info or {}
        for entry in [info] if "raised_exception" in info else info.values():
            if entry["raised_exception"]:
                text = " ".join(str(entry["exception_message"]).split())
                raise RuntimeError(
                    f"{_name(item)}, of a suite in {SUITES}, could not be computed: {text[:300]}"
                )


def is_about_rows(item: "ExpectationValidationResult") -> bool:
    """Whether the expectation speaks of each row: a map over columns, with no tolerated share."""
    kwargs = _config(item).kwargs
    return "unexpected_count" in item.result and kwargs.get("mostly", 1.0) == 1.0


def stop_on_table_breach(result: "ExpectationSuiteValidationResult") -> None:
    """Raise UserError with the first breach that is not about rows."""
    for item in result.results:
        if not item.success and not is_about_rows(item):
            seen = item.result.get("observed_value", item.result.get("unexpected_percent"))
            bounds = {k: v for k, v in _bounds(item).items() if k not in ASKED_OF}
            raise UserError(f"{EVENTS}: {_name(item)}: observed {seen}; expected {bounds}")


def broken_rows(
    results: "list[ExpectationValidationResult]", key: list[str]
) -> dict[tuple[Any, ...], list[str]]:
    """Key of a row → the names of the expectations it broke, sorted."""
    broken: dict[tuple[Any, ...], list[str]] = {}
    for item in results:
        for row in item.result["unexpected_index_list"]:
            broken.setdefault(tuple(_aware(row[column]) for column in key), []).append(_name(item))
    return {row: sorted(names) for row, names in broken.items()}


def _aware(value: Any) -> Any:
    """The engine's collected times are naive in local time; the tables hold UTC."""
    return value.astimezone() if isinstance(value, datetime) and value.tzinfo is None else value


def _config(item: "ExpectationValidationResult") -> "ExpectationConfiguration":
    assert item.expectation_config is not None, "a result names its expectation"
    return item.expectation_config


def _bounds(item: "ExpectationValidationResult") -> dict[str, Any]:
    """What was expected, as the suite says it."""
    return {k: v for k, v in _config(item).kwargs.items() if k != "batch_id"}


def _name(item: "ExpectationValidationResult") -> str:
    """`column: type`, the name of an expectation for people."""
    columns = _columns(_config(item).kwargs)
    kind = _config(item).type.removeprefix("expect_")
    return f"{', '.join(columns)}: {kind}" if columns else kind


def _failed(result: "ExpectationSuiteValidationResult") -> list[str]:
    return [_name(item) for item in result.results if not item.success]


def _accept(accepted: Path, quarantine: Path) -> None:
    """Write every month as if all of its events were accepted: the very file."""
    for file in tables.months(EVENTS):
        stage.link(accepted / file.name, file)
        (quarantine / file.name).write_bytes(_none(tables.footer(file).schema.to_arrow_schema()))


def _set_apart(
    reasons: dict[tuple[Any, ...], list[str]], names: list[str], accepted: Path, quarantine: Path
) -> None:
    """Write the months with broken rows anew, so that every event is in exactly one of both, order
    kept. `names` are the columns that name a row, its time first.
    """
    by_month: defaultdict[str, dict[tuple[Any, ...], list[str]]] = defaultdict(dict)
    for row, why in reasons.items():
        by_month[f"{row[0].astimezone(UTC):%Y-%m}"][row] = why

    def divide_month(name: str) -> int:
        file = f"{name}.parquet"
        month = tables.read_file(EVENTS / file)
        column = pa.array(_reasons(month, by_month[name], names), REASONS.type)
        good = pc.is_null(column)
        (accepted / file).unlink()  # it is the month of the events
        tables.write(month.filter(good), accepted / file)
        broken = month.append_column(REASONS, column).filter(pc.invert(good))
        tables.write(broken, quarantine / file)
        return int(broken.num_rows)

    with ThreadPoolExecutor(MONTHS) as pool:
        apart = sum(pool.map(divide_month, sorted(by_month)))
    if apart != len(reasons):
        raise RuntimeError(f"{len(reasons)} rows are broken, but {apart} were found by key")


@functools.cache
def _none(schema: pa.Schema) -> bytes:
    """The file of a month of whose events none is in quarantine: most are, and it is the same."""
    file = io.BytesIO()
    tables.encode(schema.append(REASONS).empty_table(), file)
    return file.getvalue()


def _reasons(
    month: pa.Table, reasons: dict[tuple[Any, ...], list[str]], key: list[str]
) -> list[list[str] | None]:
    """The reasons of every row, which few have: only those of a broken row's time are looked at."""
    found: list[list[str] | None] = [None] * month.num_rows
    times = pa.array([row[0] for row in reasons], month.schema.field(key[0]).type)
    for at in pc.indices_nonzero(pc.is_in(month[key[0]], times)).to_pylist():
        found[at] = reasons.get(tuple(month[column][at].as_py() for column in key))
    return found


def verdict(
    result: "ExpectationSuiteValidationResult", rows: int, quarantined: int
) -> dict[str, Any]:
    """The stable part of the result: what was expected, and how many rows broke it."""
    return {
        "rows": rows,
        "accepted": rows - quarantined,
        "quarantined": quarantined,
        "expectations": sorted(
            (
                {
                    "name": _name(item),
                    "about": "rows" if is_about_rows(item) else "table",
                    "success": bool(item.success),
                    "unexpected": item.result.get("unexpected_count", 0),
                }
                for item in result.results
            ),
            key=lambda line: (line["name"], line["about"]),
        ),
    }


if __name__ == "__main__":
    stage.main(run)
