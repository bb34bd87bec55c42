"""A supervisor in a process of its own, and callers who count what they get."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from world import ROOT

from pipelines import stage
from pipelines.deploy import serving
from pipelines.deploy.replicas import free_port
from pipelines.deploy.targets import Release
from pipelines.deploy.targets.local import Local
from pipelines.params import Params, Serve, Traffic

STANDIN = (sys.executable, str(ROOT / "tests" / "deploy" / "standin.py"))
FAULTY = (sys.executable, str(ROOT / "tests" / "deploy" / "faulty.py"))
RUN = """
import json, signal, sys
from pathlib import Path
from pipelines.deploy.supervise import Supervisor
from pipelines.params import Serve, Traffic
folder, traffic, serve, program = json.loads(sys.argv[1])
supervisor = Supervisor(Path(folder), Traffic(**traffic), Serve(**serve), program)
signal.signal(signal.SIGTERM, lambda *_: supervisor.over.set())
supervisor.run()
"""


@dataclass
class Served:
    """A folder with a supervisor that can be killed and started again."""

    folder: Path
    traffic: Traffic
    serve: Serve
    program: Sequence[str]
    env: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> Local:
        return Local(self.folder)

    def start(self) -> None:
        blocks = [self.traffic.model_dump(), self.serve.model_dump()]
        given = [str(self.folder), *blocks, list(self.program)]
        command = [sys.executable, "-c", RUN, json.dumps(given)]
        env = os.environ | {"PYTHONPATH": str(ROOT)} | self.env
        self.process = subprocess.Popen(command, env=env)

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(60)

    def status(self) -> serving.Status:
        return serving.status(self.folder)

    def ask(self, times: int) -> Counter[str]:
        """So many requests one after another: the bundle that answered, or what went wrong."""
        return Counter(self.answer({"x": number % 97 / 97}) for number in range(times))

    def answer(self, record: dict[str, Any]) -> str:
        url = f"http://127.0.0.1:{self.traffic.port}/predict"
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(url, data=json.dumps(record).encode(), headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return str(json.load(answer)["bundle"])
        except urllib.error.HTTPError as error:
            return f"{error}: {error.read().decode()}"
        except OSError as error:
            return str(error)


def free(traffic: Traffic, **changes: Any) -> Traffic:
    """The traffic of params.yaml on ports that nobody has."""
    ports = {"port": free_port(), "admin_port": free_port()}
    return traffic.model_copy(update=ports | changes)


@contextmanager
def served(
    folder: Path,
    params: Params,
    program: Sequence[str] = STANDIN,
    faults: Mapping[str, str] | None = None,
    **changes: Any,
) -> Iterator[Served]:
    """Replicas of the current folder behind Envoy until the block ends; `faults` by the digest of a
    bundle.
    """
    env = {"HEADRACE_FAULTS": json.dumps(dict(faults or {}))}
    made = Served(folder, free(params.traffic, **changes), params.serve, program, env)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def release(folder: Path, version: int) -> Release:
    """A version whose bundle is a word: a stand-in opens nothing."""
    place = folder / f"bundle-{version}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "word").write_text(f"version {version}")
    return Release("flights", version, stage.digest(place), place)


def until(condition: Any, seconds: float = 30.0) -> float:
    """Wait for it. Returns how long it took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - begun
