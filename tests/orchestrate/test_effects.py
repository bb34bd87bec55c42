"""An effect happens exactly once, though its task is killed and told again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from orchestrate.place import environment, python, repository, task

RUN = "effects-1"
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
    for stage in ("fetch", "load", "validate", "featurize", "fit", "evaluate", "package"):
        task(home, "stage", stage, "--run", RUN)
    return home


def _register(home: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.orchestrate.task", "effect", "register", "--run", RUN],
        cwd=home, env=environment(home), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def test_register_killed_at_five_points_and_told_by_two_acts_once(made: Path) -> None:
    begun = time.monotonic()
    _register(made).wait()
    usual = time.monotonic() - begun
    (made / ".state" / "mlflow").rename(made / ".state" / "mlflow-first")
    (made / ".state" / "mlflow").mkdir()
    killed = 0
    for point in (0.3, 0.5, 0.65, 0.8, 0.95):
        process = _register(made)
        time.sleep(usual * point)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 3
    both = [_register(made), _register(made)]
    assert [process.wait() for process in both] == [0, 0]
    said = python(made, "-c", REGISTERED).stdout.rpartition("RESULT")[2]
    versions, aliases = json.loads(said)
    assert len(versions) == 1, "one version"
    assert aliases == {"champion": versions[0]}
    ledger = list((made / ".state" / "ledger").rglob("*.json"))
    assert len(ledger) == 1
    assert (made / ".state/store/orchestrate/runs" / RUN / "register.json").is_file()
