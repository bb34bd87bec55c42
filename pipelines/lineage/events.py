"""A stage's run in OpenLineage's words: its facets, from what was read and written."""

import getpass
import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, set_producer
from openlineage.client.facet_v2 import (
    DatasetFacet,
    InputDatasetFacet,
    JobFacet,
    RunFacet,
    column_lineage_dataset,
    data_quality_assertions_dataset,
    dataset_version_dataset,
    error_message_run,
    input_statistics_input_dataset,
    output_statistics_output_dataset,
    parent_run,
    schema_dataset,
    sql_job,
    tags_run,
)
from openlineage.client.uuid import generate_new_uuid

from pipelines import lineage
from pipelines.lineage.columns import Sources
from pipelines.lineage.datasets import Dataset

NAMESPACE = os.environ.get("OPENLINEAGE_NAMESPACE", lineage.NAMESPACE)
set_producer(f"urn:{lineage.NAMESPACE}")


def run() -> Run:
    """A new run: at work where, and a part of which other, if something larger started it."""
    who = socket.gethostname()
    with suppress(KeyError, OSError):  # a user without a name
        who = f"{getpass.getuser()}@{who}"
    tags = tags_run.TagsRunFacet([tags_run.TagsRunFacetFields("who", who)])
    facets: dict[str, RunFacet] = {"tags": tags}
    with suppress(KeyError, ValueError):
        namespace, job, parent = os.environ["OPENLINEAGE_PARENT_ID"].rsplit("/", 2)
        facets["parent"] = parent_run.ParentRunFacet(
            parent_run.Run(parent), parent_run.Job(namespace, job)
        )
    return Run(str(generate_new_uuid()), facets)


def failed(run: Run, error: str) -> Run:
    """The same run with the line that says why it ended."""
    message = error_message_run.ErrorMessageRunFacet(error, "PYTHON")
    return Run(run.runId, {**(run.facets or {}), "errorMessage": message})


def job(stage: str, sql: str | None = None) -> Job:
    """A stage, and its query, which is told once: a backend adds up what it hears of a run."""
    facets: dict[str, JobFacet] = {} if sql is None else {"sql": sql_job.SQLJobFacet(sql, "spark")}
    return Job(NAMESPACE, stage, facets)


def read(one: Dataset, expectations: Iterable[Mapping[str, Any]] = ()) -> InputDataset:
    """A dataset that went in, and what a verdict says of the expectations on it."""
    facets: dict[str, InputDatasetFacet] = {
        "inputStatistics": input_statistics_input_dataset.InputStatisticsInputDatasetFacet(
            one.rows, one.size, len(one.files)
        )
    }
    if assertions := [_assertion(line) for line in expectations]:
        facets["dataQualityAssertions"] = (
            data_quality_assertions_dataset.DataQualityAssertionsDatasetFacet(assertions)
        )
    return InputDataset(NAMESPACE, one.name, facets, facets=_facets(one))


def written(one: Dataset, sources: Sources) -> OutputDataset:
    """A dataset that came out, and of those of its columns that are known from which they come."""
    facets = _facets(one)
    fields = {
        column: column_lineage_dataset.Fields(
            [column_lineage_dataset.InputField(NAMESPACE, *source) for source in found]
        )
        for column, found in sources.items()
        if column in one.columns
    }
    if fields:
        facets["columnLineage"] = column_lineage_dataset.ColumnLineageDatasetFacet(fields)
    statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
        one.rows, one.size, len(one.files)
    )
    return OutputDataset(NAMESPACE, one.name, {"outputStatistics": statistics}, facets=facets)


def _facets(one: Dataset) -> dict[str, DatasetFacet]:
    facets: dict[str, DatasetFacet] = {
        "version": dataset_version_dataset.DatasetVersionDatasetFacet(one.md5)
    }
    fields = [
        schema_dataset.SchemaDatasetFacetFields(name, kind or None)
        for name, kind in one.columns.items()
    ]
    if fields:
        facets["schema"] = schema_dataset.SchemaDatasetFacet(fields)
    return facets


def _assertion(line: Mapping[str, Any]) -> data_quality_assertions_dataset.Assertion:
    column, _, kind = line["name"].rpartition(": ")
    return data_quality_assertions_dataset.Assertion(
        kind, line["success"], column or None, actual=f"{line['unexpected']} unexpected"
    )
