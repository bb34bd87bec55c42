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

    second = _refused(home, AIRFLOW_PORT=str(free_port()), MLFLOW_PORT=str(free_port()))
    assert second == f"airflow: error: another make airflow serves {home}\n"

    # A terminal that is closed, and a person who loses patience.
    for sent in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
        started.send_signal(sent)
    rest, _ = started.communicate(timeout=90)
    assert started.returncode == 0
    assert rest.split("\n")[-2] == "airflow: stopped"
    assert "Traceback" not in rest
    assert _processes_of(home) == []


def _refused(home: Path, **ports: str) -> str:
    """What `make airflow` says as a user's mistake."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.orchestrate.local"],
        cwd=home, env=environment(home) | ports, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 2, done
    return done.stderr


@pytest.mark.parametrize(
    ("ports", "said"),
    [
        ({"AIRFLOW_PORT": "abc"}, "AIRFLOW_PORT is abc; expected a port, 1 to 65535"),
        ({"MLFLOW_PORT": "99999"}, "MLFLOW_PORT is 99999; expected a port, 1 to 65535"),
        ({"AIRFLOW_PORT": "7000", "MLFLOW_PORT": "7000"}, "are both 7000; expected two ports"),
    ],
)
def test_a_wrong_port_is_one_line(
    tmp_path: Path, half_year: Path, ports: dict[str, str], said: str
) -> None:
    home = repository(tmp_path / "home", half_year)
    assert _refused(home, **ports).strip().endswith(said)
