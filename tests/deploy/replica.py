"""One replica of the real service in a process of its own, and a client that keeps nothing back."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families
from world import ROOT, merged

SERVE = (sys.executable, "-m", "pipelines.deploy.serve")


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Replica:
    """A folder with params.yaml, and the process that was started in it."""

    folder: Path
    port: int = field(default_factory=lambda: _free_port())
    process: subprocess.Popen[bytes] | None = None

    def configure(self, **serve: Any) -> None:
        """Take the repository's params with these changes of `serve`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "params.yaml", self.folder)
        values = yaml.safe_load((ROOT / "params.yaml").read_text())
        changed = merged(values, {"serve": serve})
        (self.folder / "params.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))

    def start(self, *arguments: object, **popen: Any) -> None:
        command = [*SERVE, *map(str, arguments), "--port", str(self.port)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                **popen,
            )

    def wait_ready(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "log").read_text()
            try:
                if self.get("/v2/health/ready").status == 200:
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())

    def ended(self) -> int:
        assert self.process is not None
        return self.process.wait(30)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        """A body that is no bytes goes as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return self.ask("POST", path, content, {"content-type": "application/json"} | named)

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body or None, dict(headers or {}))
            answer = connection.getresponse()
            held = {key.lower(): value for key, value in answer.getheaders()}
            return Reply(answer.status, held, answer.read())
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample; 0 where it is not there."""
        text = self.get("/metrics").body.decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    def logs(self, event: str) -> list[dict[str, Any]]:
        # The last line may not be whole yet.
        lines = (self.folder / "log").read_text().split("\n")[:-1]
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in found if line["event"] == event]


@contextmanager
def serving(folder: Path, *arguments: object, **serve: Any) -> Iterator[Replica]:
    """A replica that is ready; it ends with the block."""
    made = Replica(folder)
    made.configure(**serve)
    made.start(*arguments)
    try:
        made.wait_ready()
        yield made
    finally:
        assert made.process is not None
        if made.process.poll() is None:
            made.process.kill()
            made.process.wait()


def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])
