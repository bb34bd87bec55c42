"""local: Airflow on this checkout with MLflow beside it, until Ctrl-C.

in:   dags/, infra/airflow/airflow.cfg, params.yaml
out:  .state/airflow/ (SQLite, logs, password), .state/mlflow/
run:  make airflow

AIRFLOW_PORT and MLFLOW_PORT choose other ports than 8080 and 5000.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines import params as parameters
from pipelines import stage, tracking
from pipelines.errors import UserError

USER = "admin"
PATIENCE = 180  # seconds until Airflow has to answer


def environment(home: Path, port: int) -> dict[str, str]:
    """What an Airflow of this checkout needs beside infra/airflow/airflow.cfg."""
    state = (home / stage.STATE / "airflow").resolve()
    state.mkdir(parents=True, exist_ok=True)
    here = Path(sys.executable).parent
    own = {
        "AIRFLOW_HOME": state,
        "AIRFLOW_CONFIG": home / "infra" / "airflow" / "airflow.cfg",
        "AIRFLOW__CORE__DAGS_FOLDER": home / "dags",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": state / "passwords.json",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{state}/airflow.db",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": state / "logs",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": port,
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        # Tokens pass between processes: all of them need the same secret.
        "AIRFLOW__API_AUTH__JWT_SECRET": _secret(state / "jwt_secret"),
        "AIRFLOW__CORE__FERNET_KEY": "",
        "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": home,
    }
    return os.environ | {key: str(value) for key, value in own.items()}


def _secret(path: Path) -> str:
    if not path.is_file():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    return path.read_text()


class Api:
    """Airflow's public API, as its first user."""

    def __init__(self, url: str, password: str) -> None:
        self.url = url
        answer = self._send("POST", "/auth/token", {"username": USER, "password": password})
        self.token = str(answer["access_token"])

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """`path` below /api/v2. Raises urllib.error.HTTPError."""
        return self._send(method, f"/api/v2{path}", body, {"Authorization": f"Bearer {self.token}"})

    def _send(
        self, method: str, path: str, body: Any, headers: dict[str, str] | None = None
    ) -> Any:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"} | (headers or {}),
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            content = answer.read()
        return json.loads(content) if content else None


def pools(api: Api, wanted: dict[str, int]) -> None:
    """Make the pools of params.yaml, or set their slots."""
    held = {pool["name"]: pool["slots"] for pool in api.call("GET", "/pools")["pools"]}
    for name, slots in wanted.items():
        body = {"name": name, "slots": slots, "include_deferred": False}
        if name not in held:
            api.call("POST", "/pools", body)
        elif held[name] != slots:
            api.call("PATCH", f"/pools/{name}", body)


@contextmanager
def started(
    command: list[str], env: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A server and all that it starts, which end with the block."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], patience: float = 20) -> None:
    """End a server and its whole group, the kind way first."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        os.killpg(process.pid, signal.SIGKILL)  # what is left of the group
    process.wait()


def ready(
    process: subprocess.Popen[bytes], url: str, log: Path, patience: float = PATIENCE
) -> None:
    """Wait until `url` answers. Raises UserError with the log's name where it does not."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise UserError(f"{url} did not start, status {process.returncode}; see {log}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise UserError(f"{url} did not answer within {patience:.0f} s; see {log}")


def main() -> int:
    """Start, tell, wait for Ctrl-C, stop. Exit status 0, or 2 where something does not start."""
    for stopping in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stopping, signal.default_int_handler)
    home = Path.cwd()
    port = int(os.environ.get("AIRFLOW_PORT", "8080"))
    mlflow_port = int(os.environ.get("MLFLOW_PORT", "5000"))
    try:
        params = parameters.load()
        _serve(home, params, port, mlflow_port)
    except UserError as error:
        print(f"airflow: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nairflow: stopped")
    return 0


def _serve(home: Path, params: parameters.Params, port: int, mlflow_port: int) -> None:
    env = environment(home, port)
    state = Path(env["AIRFLOW_HOME"])
    tracking.client(params)
    airflow, mlflow = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{mlflow_port}"
    store = ["--backend-store-uri", params.tracking.uri, "--port", str(mlflow_port)]
    print("airflow: starting, half a minute or so", flush=True)
    with (
        started(["mlflow", "server", *store], env, state / "mlflow.log") as second,
        started(["airflow", "standalone"], env, state / "airflow.log") as first,
    ):
        ready(first, f"{airflow}/api/v2/monitor/health", state / "airflow.log")
        ready(second, f"{mlflow}/health", state / "mlflow.log")
        password = json.loads((state / "passwords.json").read_text())[USER]
        pools(Api(airflow, password), params.orchestrate.pools)
        print(
            f"\n  Airflow   {airflow}   sign in as {USER}, password {password}\n"
            f"            retrain: {airflow}/dags/retrain   watch: {airflow}/dags/watch\n"
            f"  MLflow    {mlflow}\n"
            f"  logs      {state}\n\n  Ctrl-C stops all of it.",
            flush=True,
        )
        while first.poll() is None and second.poll() is None:
            time.sleep(1)
        raise UserError(f"a server ended by itself; see {state}")


if __name__ == "__main__":
    sys.exit(main())
