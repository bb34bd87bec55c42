"""What orchestration costs: parsing the DAGs, a task's workspace, and Airflow itself.

Each figure stands beside its peer of the same run: the import of Airflow alone, the stage's own
process and a bare `dvc repro --single-item`, a chain of tasks that do nothing. Run: make bench
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import ROOT, clone, run

sys.path.insert(0, str(ROOT / "tests"))
from orchestrate.place import Airflow, running

STAGES = ("fetch", "load", "validate", "featurize")
PARSE = """
import sys, time
begun = time.perf_counter()
import airflow.sdk
from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
imported = time.perf_counter()
sys.path.insert(0, "dags")
import retrain, watch
print(f"RESULT{imported - begun} {time.perf_counter() - imported}")
"""
CHAIN = """
from airflow.sdk import DAG, chain, task
with DAG("chain", is_paused_upon_creation=False):
    chain(*[task(task_id=f"nothing_{number}")(lambda: None)() for number in range(10)])
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = clone(Path(folder) / "home")
        parsing(home)
        workspaces(home)
        airflow(home)


def parsing(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARSE], cwd=home, capture_output=True, text=True, check=True
    )
    imported, parsed = map(float, done.stdout.rpartition("RESULT")[2].split())
    print(f"\nparse both DAGs: {parsed:.2f} s beyond {imported:.2f} s of importing Airflow")


def workspaces(home: Path) -> None:
    """A task's time beyond its stage's own, computed and found; and what bare DVC adds."""
    body = ("-m", "pipelines.orchestrate.task")
    run(home, *body, "begin", "--run", "bench")
    print(
        f"\n  {'stage':<11}{'task':>7}{'stage':>7}{'beyond':>8}{'found again':>13}{'bare dvc':>10}"
    )
    for name in STAGES:
        whole = run(home, *body, "stage", name, "--run", "bench")
        place = home / ".state" / "workspaces" / "bench" / f"{name}-1"
        own = json.loads((place / ".state" / "usage" / f"{name}.json").read_text())["seconds"]
        found = run(home, *body, "stage", name, "--run", "bench")
        bare = run(home, "-m", "dvc", "repro", "--quiet", "--no-run-cache", "--single-item", name)
        bare -= json.loads((home / ".state" / "usage" / f"{name}.json").read_text())["seconds"]
        figures = f"{whole:>6.1f}s{own:>6.1f}s{whole - own:>7.1f}s{found:>12.1f}s{bare:>9.1f}s"
        print(f"  {name:<11}{figures}", flush=True)


def airflow(home: Path) -> None:
    """Seconds per task of a chain that does nothing."""
    (home / "dags" / "chain.py").write_text(CHAIN)
    with running(home, {"training": 1}) as server:
        end = time.monotonic() + 60
        while "chain" not in _dags(server) and time.monotonic() < end:
            time.sleep(0.5)
        for number in range(3):
            server.trigger("chain", f"run-{number}")
            server.wait("chain", f"run-{number}")
            tasks = server.tasks("chain", f"run-{number}").values()
            begun = min(task["start_date"] for task in tasks)
            ended = max(task["end_date"] for task in tasks)
            seconds = (_moment(ended) - _moment(begun)) / len(tasks)
            print(f"Airflow, a chain of ten tasks that do nothing: {seconds:.2f} s a task")


def _dags(server: Airflow) -> set[str]:
    return {dag["dag_id"] for dag in server.api.call("GET", "/dags")["dags"]}


def _moment(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


if __name__ == "__main__":
    main()
