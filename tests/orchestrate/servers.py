"""PostgreSQL and Redis from Debian, on free ports, gone when their block ends."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from orchestrate.place import free_port

from pipelines.orchestrate import local


def missing() -> list[str]:
    """The programs that these servers need and this machine lacks."""
    needed = {"redis-server": shutil.which("redis-server"), "initdb": _postgres()}
    return [name for name, found in needed.items() if not found]


def _postgres() -> Path | None:
    """Debian keeps the server's programs off the path, a folder for each release."""
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


needed = pytest.mark.skipif(
    bool(missing()) and not os.environ.get("CI"),
    reason=f"needs {', '.join(missing())} (Debian: redis-server, postgresql)",
)


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """Redis that keeps nothing; its URL."""
    port = free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir"]
    with local.started([*command, str(folder)], dict(os.environ), folder / "redis.log") as server:
        _wait(["redis-cli", "-p", str(port), "ping"], server)
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def postgres(names: list[str]) -> Iterator[dict[str, str]]:
    """PostgreSQL with these databases; their URLs by name."""
    programs = _postgres()
    assert programs is not None
    port = free_port()
    # It refuses to run as root, and its folder must be reached by whom it runs as.
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="headrace-postgres-"))
    try:
        if user:
            shutil.chown(folder, "postgres")
        data = ["-D", str(folder / "data")]
        trust = ["--auth=trust", "--username=airflow", "--no-sync", "--encoding=UTF8"]
        subprocess.run(
            [*user, str(programs / "initdb"), *data, *trust],
            check=True, stdout=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        options = ["-p", str(port), "-h", "127.0.0.1", "-k", str(folder), "-c", "fsync=off"]
        command = [*user, str(programs / "postgres"), *data, *options]
        at = ["-h", "127.0.0.1", "-p", str(port), "-U", "airflow"]
        log = Path(tempfile.gettempdir()) / f"{folder.name}.log"
        with local.started(command, dict(os.environ), log) as server:
            _wait([str(programs / "pg_isready"), *at], server)
            for name in names:
                subprocess.run([str(programs / "createdb"), *at, name], check=True)
            yield {name: f"postgresql+psycopg2://airflow@127.0.0.1:{port}/{name}" for name in names}
        log.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(asked: list[str], server: subprocess.Popen[bytes], patience: float = 60) -> None:
    """Until the server answers its own client."""
    end = time.monotonic() + patience
    while subprocess.run(asked, capture_output=True, check=False).returncode:
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{asked[0]}: the server did not start")
        time.sleep(0.2)
