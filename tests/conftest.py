"""A small world: a folder of real flights, thinned, and a checkout that points at it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import seaweed
from seaweed import Seaweed
from world import ROOT, Checkout, checked_out, thin
from xdist.scheduler.loadscope import LoadScopeScheduling

from pipelines import params as parameters
from pipelines.params import Params

# What takes minutes to make is made once for the tests that share it, and two Airflows at once are
# as many as a small machine bears.
TOGETHER = (
    ("tests/orchestrate/cluster/",),
    (
        "tests/orchestrate/test_local",
        "tests/orchestrate/test_page",
        "tests/orchestrate/test_retrain",
    ),
    ("tests/lineage/",),
)
SLOW = ("airflow", "pipeline", "jvm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with the slowest first: so no process is left alone with one at the end."""
    places: dict[Path, int] = {}
    for item in items:
        marked = [at for at, mark in enumerate(SLOW) if item.get_closest_marker(mark)]
        places[item.path] = min([places.get(item.path, len(SLOW)), *marked])
    items.sort(key=lambda item: places[item.path])


class _ByFile(LoadScopeScheduling):
    """The tests of a file run in one process, and those of files that belong together."""

    def _split_scope(self, nodeid: str) -> str:
        shared = (starts[0] for starts in TOGETHER if nodeid.startswith(starts))
        return next(shared, nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_offline() -> None:
    """No test may depend on the network or on an account."""
    # What Python leaves beside its sources must change nothing.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ |= {"GX_ANALYTICS_ENABLED": "false", "DVC_NO_ANALYTICS": "1", "RUST_LOG": "error"}
    # A JVM that lives for seconds gains nothing from its second compiler.
    os.environ["JDK_JAVA_OPTIONS"] = "-XX:TieredStopAtLevel=1"


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """An S3 server in this process: its endpoint. Who uses it makes a bucket of its own."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same endpoint, and an environment in which boto3 finds it."""
    account = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in (account | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    return moto


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A real S3 server, with a bucket: `lake`."""
    with seaweed.running(tmp_path_factory.mktemp("weed")) as server:
        server.bucket("lake")
        yield server


@pytest.fixture
def race_url(weed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new place in S3 for writers at once, and an environment in which boto3 finds it. moto looks
    and then writes: there, two can be the first.
    """
    for name, value in weed.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the first keys that it met
    return f"s3://lake/{tmp_path.name}"


@pytest.fixture(scope="session")
def params() -> Params:
    """The repository's own params."""
    return parameters.load(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    """January to May 2013 of the sample as a folder source, a twelfth of the flights."""
    return thin(tmp_path_factory.mktemp("source"), params, until="2013-05")


@pytest.fixture
def checkout(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """The current folder is a copy of what the pipeline reads, on a copy of the small source."""
    made = checked_out(tmp_path, source)
    monkeypatch.chdir(made.folder)
    return made
