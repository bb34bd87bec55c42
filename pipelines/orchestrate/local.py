"""local: Airflow on this checkout with MLflow beside it, until Ctrl-C.

in:   dags/, infra/airflow/airflow.cfg, params.yaml
out:  .state/airflow/ (SQLite, logs, password), .state/mlflow/
run:  make airflow

AIRFLOW_PORT and MLFLOW_PORT choose other ports than 8080 and 5000. Airflow's own database is SQLite
unless AIRFLOW__DATABASE__SQL_ALCHEMY_CONN names another: a backfill needs PostgreSQL, see
docs/decisions/0014-backfills-on-postgresql.md.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
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
DATABASE = "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def environment(home: Path, port: int) -> dict[str, str]:
    """What an Airflow of this checkout needs beside infra/airflow/airflow.cfg."""
    state = (home / stage.STATE / "airflow").resolve()
    state.mkdir(parents=True, exist_ok=True)
    own = {
        "AIRFLOW_HOME": state,
        "AIRFLOW_CONFIG": home / "infra" / "airflow" / "airflow.cfg",
        "AIRFLOW__CORE__DAGS_FOLDER": home / "dags",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": state / "passwords.json",
        DATABASE: os.environ.get(DATABASE) or f"sqlite:///{state}/airflow.db",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": state / "logs",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": port,
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        # Tokens pass between processes: all of them need the same secret.
        "AIRFLOW__API_AUTH__JWT_SECRET": _secret(state / "jwt_secret"),
        "AIRFLOW__CORE__FERNET_KEY": "",
        "PATH": stage.search_path(),
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
            # Of Airflow's own pool nothing else may be named.
            api.call("PATCH", f"/pools/{name}?update_mask=slots", body)


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


@contextmanager
def airflow(env: dict[str, str], log: Path) -> Iterator[None]:
    """Airflow's servers until the block ends, each started again where it ends by itself.

    `airflow standalone` goes on without a scheduler that died; on SQLite, which locks no rows, one
    does when a backfill is made in the wrong moment (StaleDataError).
    """
    with log.open("ab") as out:
        migrate = ["airflow", "db", "migrate"]
        if subprocess.run(migrate, env=env, stdout=out, stderr=out, check=False).returncode:
            raise UserError(f"{' '.join(migrate)} failed; see {log}")
    over = threading.Event()
    keepers = [
        threading.Thread(target=_keep, args=(["airflow", server], env, log, over))
        for server in ("api-server", "scheduler", "dag-processor", "triggerer")
    ]
    try:
        for keeper in keepers:
            keeper.start()
        yield
    finally:
        over.set()
        for keeper in keepers:
            if keeper.ident is not None:  # it was started
                keeper.join()


def _keep(command: list[str], env: dict[str, str], log: Path, over: threading.Event) -> None:
    while not over.is_set():
        with started(command, env, log) as process:
            while process.poll() is None and not over.wait(0.5):
                pass
        over.wait(1)  # one that cannot start must not spin


def ready(
    url: str,
    log: Path,
    server: subprocess.Popen[bytes] | None = None,
    patience: float = PATIENCE,
) -> None:
    """Wait until `url` answers. Raises UserError with the log's name where it does not, or where
    the server ended.
    """
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if server is not None and server.poll() is not None:
            raise UserError(f"the server of {url} ended by itself; see {log}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise UserError(f"{url} did not answer within {patience:.0f} s; see {log}")


def main() -> int:
    """Start, tell, wait for Ctrl-C, stop. Exit status 0, 2 where the user can mend it, else 1."""
    for stopping in STOPPING:
        signal.signal(stopping, _interrupted)
    home = Path.cwd()
    try:
        params = parameters.load()
        busy = f"another make airflow serves {home}"
        with stage.alone(home / stage.STATE / "airflow" / "lock", busy):
            _serve(home, params)
    except UserError as error:
        print(f"airflow: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("airflow: stopped")
    except Exception as error:
        print(f"airflow: fault: {stage.one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _interrupted(*_: object) -> None:
    """The first signal ends all of it; more of them change nothing."""
    for stopping in STOPPING:
        signal.signal(stopping, lambda *_: None)
    with suppress(OSError):  # a terminal that was closed
        print("\nairflow: stopping; a task at work gets a moment to end", flush=True)
    raise KeyboardInterrupt


def _serve(home: Path, params: parameters.Params) -> None:
    port, mlflow_port = _port("AIRFLOW_PORT", 8080), _port("MLFLOW_PORT", 5000)
    if port == mlflow_port:
        raise UserError(f"AIRFLOW_PORT and MLFLOW_PORT are both {port}; expected two ports")
    for taken in (port, mlflow_port):
        _refuse_taken(taken)
    env = environment(home, port)
    state = Path(env["AIRFLOW_HOME"])
    tracking.client(params)
    pages = f"http://127.0.0.1:{port}"
    stage.say("airflow", "starting, half a minute or so")
    log = state / "airflow.log"
    with airflow(env, log), _mlflow(params.tracking.uri, mlflow_port, env, state) as (runs, mlflow):
        ready(f"{pages}/api/v2/monitor/health", log)
        password = json.loads((state / "passwords.json").read_text())[USER]
        pools(Api(pages, password), params.orchestrate.pools)
        print(
            f"\n  Airflow   {pages}   sign in as {USER}, password {password}\n"
            f"            retrain: {pages}/dags/retrain   watch: {pages}/dags/watch\n"
            f"  MLflow    {runs}\n"
            f"  logs      {state}\n\n  Ctrl-C stops all of it.",
            flush=True,
        )
        # In steps: a signal that comes just before a wait without end would not be heard.
        while mlflow is None or mlflow.poll() is None:
            time.sleep(0.5)
        raise UserError(f"MLflow ended by itself; see {state / 'mlflow.log'}")


@contextmanager
def _mlflow(
    uri: str, port: int, env: dict[str, str], state: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes] | None]]:
    """MLflow's page on the store at `uri` and its server, until the block ends. A server that the
    uri names is there already.
    """
    if uri.startswith(("http://", "https://")):
        yield uri, None
        return
    page, log = f"http://127.0.0.1:{port}", state / "mlflow.log"
    # One worker, and none of the processes that judge language models.
    command = ["mlflow", "server", "--backend-store-uri", uri, "--port", str(port), "--workers=1"]
    with started(command, env | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, log) as server:
        ready(f"{page}/health", log, server)
        yield page, server


def _port(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise UserError(f"{name} is {text}; expected a port, 1 to 65535")
    return int(text)


def _refuse_taken(port: int) -> None:
    with socket.socket() as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(
                f"port {port} is taken; AIRFLOW_PORT and MLFLOW_PORT choose others"
            ) from None


if __name__ == "__main__":
    sys.exit(main())
