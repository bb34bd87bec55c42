"""watch under a real Airflow on PostgreSQL: backfills, and the retraining it asks for."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import yaml
from orchestrate import servers
from orchestrate.place import GREEN, RED, Airflow, commit, repository, running

from pipelines.orchestrate import local
from pipelines.params import Params

pytestmark = [pytest.mark.airflow, servers.needed]
MONTHS = [f"2013-{month:02}-01" for month in range(1, 7)]
STAGES = ("fetch", "load", "validate", "featurize", "score", "drift")


@pytest.fixture(scope="module")
def champion(
    tmp_path_factory: pytest.TempPathFactory,
    half_year: Path,
    params: Params,
    databases: dict[str, str],
) -> Iterator[Airflow]:
    """Airflow with a champion in the registry and watch switched on."""
    home = repository(tmp_path_factory.mktemp("watch") / "home", half_year)
    database = {local.DATABASE: databases["watch"]}
    with running(home, params.orchestrate.pools, **database) as airflow:
        airflow.trigger("retrain", "champion", as_of="2013-06-01")
        assert airflow.wait("retrain", "champion") == GREEN, airflow.tasks("retrain", "champion")
        airflow.api.call("PATCH", "/dags/watch?update_mask=is_paused", {"is_paused": False})
        yield airflow


def _backfill(airflow: Airflow, months: list[str], **options: Any) -> int:
    """Ask for a backfill of the months; its id."""
    body = {
        "dag_id": "watch", "from_date": f"{months[0]}T00:00:00Z",
        "to_date": f"{months[-1]}T00:00:00Z", "max_active_runs": 3, **options,
    }  # fmt: skip
    return int(airflow.api.call("POST", "/backfills", body)["id"])


def _runs(airflow: Airflow) -> dict[str, dict[str, Any]]:
    """The backfilled runs by month."""
    found = airflow.api.call("GET", "/dags/watch/dagRuns?limit=100")["dag_runs"]
    return {run["logical_date"][:10]: run for run in found if run["logical_date"][:10] in MONTHS}


def _close(airflow: Airflow, backfill: int) -> None:
    """End it now: Airflow itself notices after a while, and allows one backfill of a DAG."""
    with suppress(HTTPError):
        airflow.api.call("PUT", f"/backfills/{backfill}/cancel")


def _wait(airflow: Airflow, months: list[str], patience: float = 600) -> None:
    """Until the run of each month has ended."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        runs = _runs(airflow)
        if all(month in runs and runs[month]["state"] in (GREEN, RED) for month in months):
            return
        time.sleep(1)
    raise TimeoutError(str({month: run["state"] for month, run in _runs(airflow).items()}))


def _records(airflow: Airflow, name: str) -> dict[str, dict[str, Any]]:
    """What the task of this name published in the run of each month, by its clock."""
    found = {}
    for folder in airflow.runs.glob("watch-backfill*"):
        if (folder / f"{name}.json").is_file():
            run = json.loads((folder / "run.json").read_text())
            found[run["overrides"]["as_of"]] = json.loads((folder / f"{name}.json").read_text())
    return found


def test_backfills_side_by_side_interrupted_and_in_reverse_give_equal_hashes(
    champion: Airflow,
) -> None:
    airflow = champion
    backfill = _backfill(airflow, MONTHS)
    while len(_records(airflow, "featurize")) < 3:
        time.sleep(0.5)
    _close(airflow, backfill)
    _wait(airflow, MONTHS)
    made = {name: _records(airflow, name) for name in STAGES}
    done = {month for month, run in _runs(airflow).items() if run["state"] == GREEN}
    assert len(done) < len(MONTHS), "it was interrupted"

    # Again: only what is missing is computed.
    backfill = _backfill(airflow, MONTHS, reprocess_behavior="failed")
    time.sleep(2)
    _wait(airflow, MONTHS)
    _close(airflow, backfill)
    unfinished = {
        month: airflow.tasks("watch", run["dag_run_id"])
        for month, run in _runs(airflow).items() if run["state"] != GREEN
    }  # fmt: skip
    assert not unfinished
    for name, before in made.items():
        now = _records(airflow, name)
        assert len(now) == len(MONTHS)
        assert all(now[clock] == fragment for clock, fragment in before.items()), name

    # In reverse, and nothing remembered: every byte is computed again.
    first = {clock: record["outs"] for clock, record in _records(airflow, "lock").items()}
    assert sorted(first) == [*(f"2013-{month:02}-01" for month in range(2, 8))]
    assert len({record["data/features"] for record in first.values()}) == len(MONTHS)
    for memory in ("runs", "made"):
        for folder in (airflow.runs.parent / memory).glob("*"):
            if memory == "made" or folder.name.startswith("watch-backfill"):
                shutil.rmtree(folder)
    shutil.rmtree(airflow.home / ".dvc" / "cache" / "runs", ignore_errors=True)
    backfill = _backfill(airflow, MONTHS, reprocess_behavior="completed", run_backwards=True)
    time.sleep(2)
    _wait(airflow, MONTHS)
    _close(airflow, backfill)
    again = {clock: record["outs"] for clock, record in _records(airflow, "lock").items()}
    assert again == first
    assert all(record["ran"] for record in _records(airflow, "featurize").values())


def test_a_window_without_data_is_red_with_its_reason(champion: Airflow) -> None:
    """The newest interval of the real clock: the sample ended long before."""
    runs = champion.api.call("GET", "/dags/watch/dagRuns?limit=100")["dag_runs"]
    newest = next(run["dag_run_id"] for run in runs if run["run_type"] == "scheduled")
    assert champion.wait("watch", newest) == RED
    log = "\n".join(champion.log("watch", newest, "score"))
    assert "score: error: data/features: no row in the 30 days before as_of" in log


def test_drift_triggers_retrain_with_the_reason(champion: Airflow) -> None:
    path = champion.home / "params.yaml"
    values = yaml.safe_load(path.read_text())
    values["drift"]["max_label_shift"] = 0.0
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    commit(champion.home, "watch closely")
    _backfill(champion, ["2013-04-01"], reprocess_behavior="completed")
    time.sleep(2)
    _wait(champion, ["2013-04-01"])
    run = _runs(champion)["2013-04-01"]
    assert run["state"] == GREEN
    asked = champion.api.call("GET", f"/dags/retrain/dagRuns/watch__{run['dag_run_id']}")
    assert asked["conf"]["as_of"] == "2013-05-01"
    assert asked["conf"]["reason"].startswith("watch: label rate moved from ")
    champion.api.call("PATCH", f"/dags/retrain/dagRuns/{asked['dag_run_id']}", {"state": "failed"})
