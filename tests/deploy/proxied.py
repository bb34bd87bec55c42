"""An Envoy on ports that nobody has, which is told its ways by hand."""

import http.client
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deploy.served import until

from pipelines import stage
from pipelines.deploy import envoy
from pipelines.deploy.envoy import Admin, Way
from pipelines.params import Serve, Traffic


class Ported(Protocol):
    """What answers at a port of this machine."""

    port: int


@dataclass
class Proxy:
    """A running Envoy and its folder."""

    folder: Path
    traffic: Traffic
    process: subprocess.Popen[bytes]

    @property
    def admin(self) -> Admin:
        return Admin(self.traffic)

    def routes(self, clusters: Mapping[str, Iterable[Ported]], ways: list[Way]) -> None:
        """Serve these, once all are healthy."""
        ports = {name: {one.port for one in replicas} for name, replicas in clusters.items()}
        for name, found in ports.items():
            envoy.endpoints(self.folder, name, sorted(found))
        version = envoy.clusters(self.folder, self.traffic, list(clusters))
        until(lambda: self.admin.applied("cds") == version)
        until(lambda: self.admin.healthy() == ports)
        version = envoy.routes(self.folder, self.traffic, ways)
        until(lambda: self.admin.applied("rds") == version)

    def ask(self, path: str = "/predict", **headers: str) -> int:
        return self.answer(path, **headers).status

    def answer(
        self, path: str, body: bytes | Iterable[bytes] = b"{}", **headers: str
    ) -> http.client.HTTPResponse:
        """Of any path, as it is; a body of parts goes in chunks."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.traffic.port, timeout=10)
        connection.request("POST", path, body, named)
        return connection.getresponse()


@contextmanager
def proxied(folder: Path, traffic: Traffic, serve: Serve) -> Iterator[Proxy]:
    """Envoy without a way, until the block ends."""
    command = envoy.command(envoy.prepare(folder, traffic, serve), folder / "envoy.log")
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, env={"PATH": stage.search_path()}, start_new_session=True
    )
    assert process.stdin is not None
    made = Proxy(folder, traffic, process)
    try:
        until(lambda: _up(made.admin))
        yield made
    finally:
        process.stdin.close()
        assert process.wait(10) == 0


def _up(admin: Admin) -> bool:
    try:
        return admin.healthy() == {}
    except OSError:
        return False
