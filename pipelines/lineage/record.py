"""record: tell of one run of a stage, from a process beside it.

in:   on standard input, a line of JSON when it begins and one when it ends: event, at, error;
      dvc.yaml, params.yaml, and the files they name
out:  an OpenLineage event for each in the journal, and at the URL, where one is given
run:  python -m pipelines.lineage.record STAGE [URL] (a stage starts it)

Beside it, for the client takes as long to import as a small stage to run, and a backend may hang.
Once both events are in the journal, what went wrong is said in one line, and the stage waits no
longer; what the backend has not taken by then is still sent. An input without an end is of a stage
that was killed.
"""

import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from openlineage.client import OpenLineageClient
from openlineage.client.event_v2 import OutputDataset, RunEvent, RunState
from openlineage.client.serde import Serde

from pipelines.lineage import columns, datasets, events, journal, steps
from pipelines.lineage.datasets import Dataset
from pipelines.lineage.steps import Step

# A backend that is well has answered after so many seconds.
PATIENCE = 0.2
Told = dict[str, str]


def main() -> None:
    """Both events, then one line that says what could not be told, empty where all was."""
    stage, *urls = sys.argv[1:]
    faults: list[str] = []
    with ThreadPoolExecutor(1) as sender:
        sent: dict[Future[None], str] = {}
        for event in _events(stage, map(json.loads, sys.stdin), faults):
            with _noting(faults):
                journal.append(Serde.to_json(event))
            sent |= {sender.submit(_send, url, event): url for url in urls}
        late = wait(sent, PATIENCE).not_done
        for answer, url in sent.items():
            why = "has not answered yet" if answer in late else answer.exception()
            faults += [f"{url}: {why}"] if why else []
        print(" ".join(faults[0].split())[:300] if faults else "", flush=True)


def _events(stage: str, told: Iterator[Told], faults: list[str]) -> Iterator[RunEvent]:
    """START, and what became of it."""
    begun = next(told)
    step, inputs, sql = Step(stage, {}, {}, {}), [], None
    # Input that a stage refuses may be no table to trace either: the stage says it.
    untraced: list[str] = []
    with _noting(untraced):
        step = steps.planned(stage)
        inputs = _tables(step.inputs)
        sql = Path(step.sql).read_text(encoding="utf-8") if step.sql else None
    run, read = events.run(), list(map(events.read, inputs))
    yield _event(begun, run=run, job=events.job(stage, sql), inputs=read)

    # While the stage is at work: what it gives may be Parquet, whose reader is slow to import, but
    # not what the first stage gives.
    if inputs:
        importlib.import_module("pyarrow.parquet")
    queried: columns.Sources = {}
    with _noting(untraced):
        queried = steps.labelled(columns.of_query(sql, inputs)) if sql else {}
    ended = next(told, None) or {"event": "FAIL", "at": _now(), "error": "killed"}
    outs: list[OutputDataset] = []
    if ended["event"] == "COMPLETE":
        faults += untraced
        with _noting(faults):
            expected = _expectations(step)
            read = [events.read(one, expected) for one in inputs]
            for one in _tables(step.outs):
                sources = queried if sql else columns.of_chosen(one, inputs)
                outs.append(events.written(one, sources))
    else:
        run = events.failed(run, ended["error"])
    yield _event(ended, run=run, job=events.job(stage), inputs=read, outputs=outs)


def _event(told: Told, **said: Any) -> RunEvent:
    return RunEvent(eventType=RunState(told["event"]), eventTime=told["at"], **said)


def _tables(paths: Iterable[str]) -> list[Dataset]:
    return [table for path in paths for table in datasets.tables(datasets.read(path))]


def _expectations(step: Step) -> list[dict[str, Any]]:
    """What the stage's verdict says was expected of its input, if it says so."""
    verdicts = [Path(path) for path in step.outs if path.endswith(".json")]
    read = [json.loads(verdict.read_text(encoding="utf-8")) for verdict in verdicts]
    return [line for verdict in read for line in verdict.get("expectations", ())]


def _send(url: str, event: RunEvent) -> None:
    """Keys and the like come from the client's own environment variables."""
    transport: dict[str, Any] = {"type": "http", "url": url, "retry": {"total": 1}}
    if key := os.environ.get("OPENLINEAGE_API_KEY"):
        transport["auth"] = {"type": "api_key", "apiKey": key}
    OpenLineageClient(config={"transport": transport}).transport.emit(event)


@contextmanager
def _noting(faults: list[str]) -> Iterator[None]:
    """What keeps one thing from being told keeps nothing else, least of all the stage."""
    try:
        yield
    except Exception as error:
        faults.append(f"{type(error).__name__}: {error}")


def _now() -> str:
    return datetime.now(UTC).isoformat()


if __name__ == "__main__":
    main()
