"""`make airflow` says where its pages are, and Ctrl-C stops all of it."""

import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from orchestrate.place import environment, free_port, repository

pytestmark = pytest.mark.airflow


def _processes_of(home: Path) -> list[psutil.Process]:
    """Whatever runs with its Airflow or MLflow in `home`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("AIRFLOW_HOME", "").startswith(str(home)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_it_starts_tells_and_stops(tmp_path: Path, half_year: Path) -> None:
    home = repository(tmp_path / "home", half_year)
    ports = {"AIRFLOW_PORT": str(free_port()), "MLFLOW_PORT": str(free_port())}
    started = subprocess.Popen(
        [sys.executable, "-m", "pipelines.orchestrate.local"],
        cwd=home, env=environment(home) | ports, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert started.stdout is not None
    said = ""
    while "Ctrl-C stops all of it" not in said:
        line = started.stdout.readline()
        assert line, said
        said += line
    assert re.search(r"sign in as admin, password \w{8,}", said)
    for name, path in (("AIRFLOW_PORT", "/api/v2/monitor/health"), ("MLFLOW_PORT", "/health")):
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[name]}{path}", timeout=10) as answer:
            assert answer.status == 200
    assert len(_processes_of(home)) > 4

    started.send_signal(signal.SIGINT)  # as the terminal does
    rest, _ = started.communicate(timeout=90)
    assert started.returncode == 0
    assert rest.strip() == "airflow: stopped"
    assert _processes_of(home) == []
