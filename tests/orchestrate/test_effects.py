"""An effect happens exactly once, though its task is killed and told again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from orchestrate.place import environment, python, repository, task

from pipelines import lineage

RUN = "effects-1"
STAGES = ("fetch", "load", "validate", "featurize", "fit", "evaluate", "package")
REGISTERED = """
import json
from pipelines import params, tracking
store, _ = tracking.client(params.load())
versions = [int(one.version) for one in store.search_model_versions("name = 'flights'")]
aliases = {name: int(held) for name, held in store.get_registered_model("flights").aliases.items()}
print("RESULT" + json.dumps([versions, aliases]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, half_year: Path) -> Path:
    """A repository in which a run made every stage."""
    home = repository(tmp_path_factory.mktemp("effects") / "home", half_year)
    task(home, "begin", "--run", RUN, "--spec", '{"overrides": {"as_of": "2013-05-01"}}')
    for stage in STAGES:
        task(home, "stage", stage, "--run", RUN)
    return home


def test_stages_in_workspaces_tell_of_themselves_in_one_journal_as_parts_of_the_run(
    made: Path,
) -> None:
    lines = (made / ".state" / "lineage" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [(event["job"]["name"], event["eventType"]) for event in events] == [
        (stage, said) for stage in STAGES for said in ("START", "COMPLETE")
    ]
    parents = {event["run"]["facets"]["parent"]["run"]["runId"] for event in events}
    assert parents == {lineage.parent(RUN)["OPENLINEAGE_PARENT_ID"].rpartition("/")[2]}


def _register(home: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.orchestrate.task", "effect", "register", "--run", RUN],
        cwd=home, env=environment(home), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _kill_when(process: subprocess.Popen[bytes], seen: Callable[[], bool]) -> None:
    """kill -9 of the task and all it started, at the first moment that `seen` holds."""
    end = time.monotonic() + 120
    while not seen():
        assert process.poll() is None, "it ended before this point"
        assert time.monotonic() < end
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_register_killed_at_five_points_and_told_by_two_acts_once(made: Path) -> None:
    state = made / ".state"
    leases = state / "store" / "orchestrate" / "leases" / "effect-register"
    points = {
        "a workspace": lambda: any((state / "workspaces" / RUN).glob("register-*")),
        "the lease": lambda: any(leases.glob("*.json")),
        "the database": lambda: (state / "mlflow" / "mlflow.db").is_file(),
        "the artifacts": lambda: any((state / "mlflow").rglob("artifacts/**/model.onnx")),
        "the ledger": lambda: any((state / "ledger").rglob("*.json")),
    }
    shutil.rmtree(state / "mlflow")  # what fit left: each point is met for the first time
    (state / "mlflow").mkdir()
    for seen in points.values():
        _kill_when(_register(made), seen)
    both = [_register(made), _register(made)]
    assert [process.wait() for process in both] == [0, 0]
    said = python(made, "-c", REGISTERED).stdout.rpartition("RESULT")[2]
    versions, aliases = json.loads(said)
    assert len(versions) == 1, "one version"
    assert aliases == {"champion": versions[0]}
    ledger = list((made / ".state" / "ledger").rglob("*.json"))
    assert len(ledger) == 1
    assert (made / ".state/store/orchestrate/runs" / RUN / "register.json").is_file()
