"""A repository of its own with thin real data, and a real Airflow on it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from world import ROOT, merged, narrowed

from pipelines.exchange import plain
from pipelines.orchestrate import local

RED, GREEN = "failed", "success"
# Training is short, the baseline weak and the verdict lenient: these tests are about the way there.
QUICK: dict[str, Any] = {
    "as_of": "2013-06-01",
    "fit": {
        "max_epochs": 1, "batch_size": 128, "hidden": [16], "members": 1, "learning_rate": 0.03,
    },
    "evaluate": {
        "resamples": 5, "baseline_iterations": 1, "min_auc": 0.0, "max_calibration_error": 1.0,
        "max_missing_shift": 1.0, "leak_auc": 1.0,
    },
    "gate": {"max_log_loss_rise": 9.0, "max_ap_fall": 1.0, "max_slice_log_loss_rise": 9.0,
             "max_row_ms": 1e4, "max_thousand_rows_ms": 1e4},
    "drift": {"max_auc_fall": 1.0, "max_loss_rise": 9.0, "max_label_shift": 1.0,
              "max_prediction_drift": 99.0},
    "orchestrate": {"default": {"retry_delay_seconds": 1}},
}  # fmt: skip


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def repository(folder: Path, source: Path, **changes: Any) -> Path:
    """A git repository in `folder` with the files of this one and its own params, committed."""
    listed = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in listed:
        if not name.startswith("tests/") and (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    values = yaml.safe_load((folder / "params.yaml").read_text())
    for change in (QUICK, {"fetch": {"source": str(source)}}, changes):
        values = merged(values, change)
    (folder / "params.yaml").write_text(yaml.safe_dump(narrowed(values), sort_keys=False))
    git(folder, "init", "-q")
    python(folder, "-m", "pipelines.orchestrate.graph")
    commit(folder, "first")
    return folder


def commit(folder: Path, message: str) -> str:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)
    return git(folder, "rev-parse", "HEAD")


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
    }


def python(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python …` in `folder`, with the code of that folder."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def task(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The body of one Airflow task, without Airflow."""
    return python(folder, "-m", "pipelines.orchestrate.task", *arguments, check=check)


def at_work(stage: str, *under: Path, patience: float = 300) -> psutil.Process:
    """The process of a training stage in a workspace below one of the folders, once it writes."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        for process in psutil.process_iter(["cmdline", "cwd"]):
            command, cwd = process.info["cmdline"] or [], process.info["cwd"] or ""
            here = any(cwd.startswith(f"{folder}/") for folder in under)
            named = here and command[-1:] == [f"pipelines.train.{stage}"]
            if named and any((Path(cwd) / ".state" / "scratch").glob("*/*")):
                return process
        time.sleep(0.2)
    raise TimeoutError(f"{stage} was not seen at work")


def kill_group(process: psutil.Process) -> None:
    """kill -9 of a stage, the task around it and all they started."""
    os.killpg(os.getpgid(process.pid), signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


class Airflow:
    """A running Airflow on a repository."""

    def __init__(self, home: Path, url: str, api: local.Api, env: dict[str, str]) -> None:
        self.home, self.url, self.api, self.env = home, url, api, env
        self.runs = home / ".state" / "store" / "orchestrate" / "runs"
        self.workspaces = home / ".state" / "workspaces"

    @property
    def password(self) -> str:
        state = Path(self.env["AIRFLOW_HOME"])
        return str(json.loads((state / "passwords.json").read_text())[local.USER])

    def trigger(self, dag: str, run: str, **conf: Any) -> None:
        body = {"dag_run_id": run, "logical_date": None, "conf": conf}
        self.api.call("POST", f"/dags/{dag}/dagRuns", body)

    def state(self, dag: str, run: str) -> str:
        return str(self.api.call("GET", f"/dags/{dag}/dagRuns/{run}")["state"])

    def wait(self, dag: str, run: str, patience: float = 600) -> str:
        """The state in which the run ended."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if (state := self.state(dag, run)) in (RED, GREEN):
                return state
            time.sleep(1)
        raise TimeoutError(f"{dag} {run}: {self.tasks(dag, run)}")

    def tasks(self, dag: str, run: str) -> dict[str, dict[str, Any]]:
        """The task instances by id."""
        path = f"/dags/{dag}/dagRuns/{run}/taskInstances?limit=100"
        return {one["task_id"]: one for one in self.api.call("GET", path)["task_instances"]}

    def log(self, dag: str, run: str, task: str, attempt: int = 1) -> list[str]:
        """The lines of one attempt's log, its exceptions too."""
        path = f"/dags/{dag}/dagRuns/{run}/taskInstances/{task}/logs/{attempt}"
        content = self.api.call("GET", path)["content"]
        return [
            said
            for line in content
            for said in (
                line["event"],
                *(error["exc_value"] for error in line.get("error_detail") or []),
            )
        ]

    def fragment(self, dag: str, run: str, name: str) -> dict[str, Any]:
        """What a task published."""
        return dict(json.loads((self.runs / plain(dag, run) / f"{name}.json").read_text()))

    def lock(self, dag: str, run: str) -> str:
        """The run's united dvc.lock."""
        return str(self.fragment(dag, run, "lock")["dvc.lock"])


@contextmanager
def running(home: Path, wanted_pools: dict[str, int], **settings: str) -> Iterator[Airflow]:
    """Airflow on `home`, on a free port, until the block ends; `settings` go before its own."""
    port = free_port()
    env = local.environment(home, port) | {"PYTHONPATH": str(home)} | settings
    # A scheduler that looks ten times a second takes a fifth of a core from the other tests.
    env["AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME"] = "0.5"
    # Ports of the servers that log to workers' pages must not meet those of another Airflow.
    env |= {
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
    }
    state = Path(env["AIRFLOW_HOME"])
    url = f"http://127.0.0.1:{port}"
    log = state / "airflow.log"
    with local.airflow(env, log):
        local.ready(f"{url}/api/v2/monitor/health", log)
        password = json.loads((state / "passwords.json").read_text())[local.USER]
        api = local.Api(url, password)
        local.pools(api, wanted_pools)
        parsed(api)
        yield Airflow(home, url, api, env)


def parsed(api: local.Api, patience: float = 60) -> None:
    """Until both DAGs are there."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        found = {dag["dag_id"] for dag in api.call("GET", "/dags")["dags"]}
        if {"retrain", "watch"} <= found:
            return
        time.sleep(0.5)
    raise TimeoutError(f"the DAGs were not parsed: {api.call('GET', '/importErrors')}")
