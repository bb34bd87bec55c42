"""Every stage tells of its run in OpenLineage's words, and none is the worse for it."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from dvc.repo import Repo
from lineage.conftest import JOURNAL, Event, told
from openlineage.client import event_v2, facet_v2
from world import ROOT, Checkout

from pipelines.orchestrate import graph

pytestmark = pytest.mark.pipeline
STAGES = list(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])


@pytest.fixture(scope="module")
def stages(made: Checkout) -> dict[str, dict[str, list[str]]]:
    """The graph as DVC resolves it."""
    with Repo(str(made.folder)) as repo:
        return graph.read(repo)


@pytest.fixture(scope="module")
def lock(made: Checkout) -> dict[str, str]:
    """Path → the hash that DVC gave it."""
    entries = yaml.safe_load((made.folder / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for entry in entries.values() for out in entry["outs"]}


def names(datasets: list[Event]) -> list[str]:
    """Their paths; the tables of data/raw are told one by one."""
    return sorted({"/".join(one["name"].split("/")[:2]) if one["name"].startswith("data/")
                   else one["name"] for one in datasets})  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_tells_what_it_read_and_what_it_gave(
    made: Checkout, stages: dict[str, dict[str, list[str]]], stage: str
) -> None:
    start, end = told(made, stage)
    assert (start["eventType"], end["eventType"]) == ("START", "COMPLETE")
    assert start["run"]["runId"] == end["run"]["runId"]
    assert start["eventTime"] < end["eventTime"]
    for event in (start, end):
        assert names(event["inputs"]) == stages[stage]["inputs"]
    assert start["outputs"] == []
    assert names(end["outputs"]) == stages[stage]["outs"]


@pytest.mark.parametrize("stage", STAGES)
def test_rows_columns_files_and_hashes_are_those_of_the_files(
    made: Checkout, lock: dict[str, str], stage: str
) -> None:
    start, end = told(made, stage)
    for one in [*start["inputs"], *end["inputs"], *end["outputs"]]:
        path = made.folder / one["name"]
        facets = one.get("outputFacets") or one["inputFacets"]
        counted = facets.get("outputStatistics") or facets["inputStatistics"]
        schema = one["facets"].get("schema", {"fields": []})["fields"]
        fields = {field["name"]: field.get("type") for field in schema}
        if one["name"] in lock:
            assert one["facets"]["version"]["datasetVersion"] == lock[one["name"]]
        if one["name"].startswith("data/raw/"):
            found = sorted(path.glob("*.csv")) or [path.with_suffix(".csv")]
            rows = [len(file.read_text().splitlines()) - 1 for file in found]
            header = made.params().dataset.tables[path.name].columns
            assert fields == dict.fromkeys(header)
        elif found := sorted(path.glob("*.parquet")) if one["name"].startswith("data/") else []:
            rows = [pq.read_metadata(file).num_rows for file in found]
            assert fields == {field.name: str(field.type) for field in pq.read_schema(found[0])}
        else:
            found = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
            rows = []
            assert "rowCount" not in counted
            assert fields == {}
        assert counted.get("rowCount", 0) == sum(rows)
        assert counted["fileCount"] == len(found)
        assert counted["size"] == sum(file.stat().st_size for file in found)


def test_one_run_is_the_parent_of_all_its_stages(made: Checkout) -> None:
    parents = {
        json.dumps(event["run"]["facets"]["parent"], sort_keys=True)
        for stage in [*STAGES, "register"]
        for event in told(made, stage)
    }
    (parent,) = map(json.loads, parents)
    assert (parent["job"]["namespace"], parent["job"]["name"]) == ("headrace", "run")


def test_an_effect_tells_of_its_run_too(made: Checkout) -> None:
    assert [event["eventType"] for event in told(made, "register")] == ["START", "COMPLETE"]


def test_validate_tells_its_verdict_and_how_many_rows_it_kept_apart(made: Checkout) -> None:
    verdict = json.loads((made.folder / "reports/validate/verdict.json").read_text())
    _, end = told(made, "validate")
    (events,) = end["inputs"]
    assertions = events["inputFacets"]["dataQualityAssertions"]["assertions"]
    assert len(assertions) == len(verdict["expectations"]) > 0
    for assertion, line in zip(assertions, verdict["expectations"], strict=True):
        name = f"{assertion['column']}: " if "column" in assertion else ""
        assert name + assertion["assertion"] == line["name"]
        assert assertion["success"] == line["success"]
        assert assertion["actual"] == f"{line['unexpected']} unexpected"
    rows = {one["name"]: one["outputFacets"]["outputStatistics"].get("rowCount")
            for one in end["outputs"]}  # fmt: skip
    assert rows["data/quarantine"] == verdict["quarantined"]
    assert rows["data/accepted"] == verdict["accepted"]


def columns(event: Event, table: str) -> dict[str, set[str]]:
    """Column → the `table.column` it comes from."""
    (one,) = (one for one in event["outputs"] if one["name"] == table)
    fields = one["facets"]["columnLineage"]["fields"]
    return {name: {f"{source['name']}.{source['field']}" for source in field["inputFields"]}
            for name, field in fields.items()}  # fmt: skip


def test_columns_are_traced_from_features_to_raw_tables(made: Checkout) -> None:
    load, validate, featurize = (told(made, one)[1] for one in ("load", "validate", "featurize"))
    assert columns(featurize, "data/features")["tail_slack"] == {
        "data/accepted.scheduled_at", "data/accepted.departed_at", "data/accepted.block_minutes"
    }  # fmt: skip
    accepted = columns(validate, "data/accepted")
    assert accepted["block_minutes"] == {"data/events.block_minutes"}
    assert columns(load, "data/events")["block_minutes"] == {
        "data/raw/airports.tzone", "data/raw/flights.sched_arr_time",
        "data/raw/flights.sched_dep_time", "data/raw/flights.time_hour",
    }  # fmt: skip
    # Every field is one of the dataset it names.
    for event in (load, validate, featurize):
        held = {f"{one['name']}.{field['name']}" for one in event["inputs"]
                for field in one["facets"]["schema"]["fields"]}  # fmt: skip
        for table in [one for one in event["outputs"] if "columnLineage" in one["facets"]]:
            assert set().union(*columns(event, table["name"]).values()) <= held


def test_every_event_is_one_of_openlineages_classes(made: Checkout) -> None:
    """Each event, and each facet by its schema: no field that those do not have, none missing."""
    modules = [one for one in vars(facet_v2).values() if isinstance(one, ModuleType)]
    kinds = [kind for one in modules for kind in vars(one).values() if hasattr(kind, "_get_schema")]
    facets = {kind._get_schema(): kind for kind in kinds}
    seen = 0
    for line in (made.folder / JOURNAL).read_text().splitlines():
        event = json.loads(line)
        assert event.pop("schemaURL") == event_v2.RunEvent._get_schema()
        event["eventType"] = event_v2.RunState(event["eventType"])
        for part, kind in (("run", event_v2.Run), ("job", event_v2.Job)):
            event[part] = kind(**event[part])
        event["inputs"] = [event_v2.InputDataset(**one) for one in event["inputs"]]
        event["outputs"] = [event_v2.OutputDataset(**one) for one in event["outputs"]]
        event_v2.RunEvent(**event)
        for facet in _facets(json.loads(line)):
            kind = facets[facet.pop("_schemaURL")]
            kind(**{name.removeprefix("_"): value for name, value in facet.items()})
            seen += 1
    assert seen > 100


def _facets(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "_schemaURL" in value:
            yield value
        for one in list(value.values()):
            yield from _facets(one)
    elif isinstance(value, list):
        for one in value:
            yield from _facets(one)


def test_a_failing_stage_tells_the_line_it_says(checkout: Checkout) -> None:
    assert checkout.run("pipelines.ingest.fetch").status == 0
    path = checkout.folder / "data" / "raw" / "flights" / "2013-05.csv"
    path.write_text(path.read_text().replace(",", ";"))
    ended = checkout.run("pipelines.ingest.load")
    assert ended.status == 2
    start, end = told(checkout, "load")
    assert (start["eventType"], end["eventType"]) == ("START", "FAIL")
    message = end["run"]["facets"]["errorMessage"]["message"]
    assert ended.err.splitlines()[-1] == f"load: error: {message}"
    assert end["outputs"] == []
    assert names(end["inputs"]) == ["data/raw"]


@pytest.mark.parametrize(
    ("sent", "said", "why"),
    [(signal.SIGKILL, "FAIL", "killed"), (signal.SIGINT, "ABORT", "interrupted")],
)
def test_a_stage_that_was_stopped_is_told_of(
    checkout: Checkout, sent: signal.Signals, said: str, why: str
) -> None:
    assert checkout.run("pipelines.ingest.fetch").status == 0
    process = checkout.start("pipelines.ingest.load")
    until(lambda: len(told(checkout, "load")) == 1)
    process.send_signal(sent)
    process.communicate(timeout=20)
    until(lambda: len(told(checkout, "load")) == 2)
    end = told(checkout, "load")[1]
    assert (end["eventType"], end["run"]["facets"]["errorMessage"]["message"]) == (said, why)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


class Backend:
    """A server on loopback that answers every event with `status`, or, if that is None, never."""

    def __init__(self, status: int | None) -> None:
        self.received: list[tuple[str, str | None, Event]] = []
        released = threading.Event()
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append((self.path, self.headers["Authorization"], json.loads(body)))
                if status is None:
                    released.wait()
                else:
                    self.send_response(status)
                    self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.released = released
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    started = Backend(request.param)
    yield started
    started.close()


@pytest.mark.parametrize("backend", [201], indirect=True)
def test_a_backend_hears_what_the_journal_holds(
    checkout: Checkout, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "secret")
    checkout.set(lineage={"url": backend.url})
    ended = checkout.run("pipelines.ingest.fetch")
    assert (ended.status, ended.err) == (0, "")
    until(lambda: len(backend.received) == 2)
    assert [event for _, _, event in backend.received] == told(checkout, "fetch")
    assert {path for path, _, _ in backend.received} == {"/api/v1/lineage"}
    assert {key for _, key, _ in backend.received} == {"Bearer secret"}


@pytest.mark.parametrize("backend", [None, 500], indirect=True)
def test_a_backend_that_hangs_or_fails_changes_nothing_of_a_stage(
    checkout: Checkout, backend: Backend
) -> None:
    checkout.set(lineage={"url": backend.url})
    good = checkout.run("pipelines.ingest.fetch")
    assert good.status == 0
    (line,) = good.err.splitlines()
    assert line.startswith(f"fetch: lineage: {backend.url}")
    assert [event["eventType"] for event in told(checkout, "fetch")] == ["START", "COMPLETE"]
    (checkout.folder / "data" / "raw" / "planes.csv").write_text("nothing")
    bad = checkout.run("pipelines.ingest.load")
    assert bad.status == 2
    first, last = bad.err.splitlines()
    assert first.startswith(f"load: lineage: {backend.url}")
    assert last.startswith("load: error: data/raw/planes.csv")


def test_a_journal_that_cannot_be_written_changes_nothing_of_a_stage(checkout: Checkout) -> None:
    journal = checkout.folder / JOURNAL
    journal.parent.mkdir(parents=True)
    journal.symlink_to("/dev/full")
    ended = checkout.run("pipelines.ingest.fetch")
    assert ended.status == 0
    (line,) = ended.err.splitlines()
    assert line.startswith("fetch: lineage: OSError: ")


def test_a_query_that_cannot_be_traced_is_said_and_the_rest_is_told(checkout: Checkout) -> None:
    path = checkout.folder / "dvc.yaml"
    graph = yaml.safe_load(path.read_text())
    graph["stages"]["fetch"]["deps"].append("new.sql")
    path.write_text(yaml.safe_dump(graph))
    (checkout.folder / "new.sql").write_text("select (")
    ended = checkout.run("pipelines.ingest.fetch")
    assert ended.status == 0
    (line,) = ended.err.splitlines()
    assert line.startswith("fetch: lineage: ParseError: ")
    start, end = told(checkout, "fetch")
    assert start["job"]["facets"]["sql"]["query"] == "select ("
    assert names(end["outputs"]) == ["data/raw"]
