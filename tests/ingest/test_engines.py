"""One SQL, the same bytes: embedded, in a JVM, by a Spark Connect server, on a cluster."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyspark
import pytest
from world import ROOT, Checkout

from pipelines import stage
from pipelines.errors import UserError
from pipelines.ingest import featurize, fetch, load, validate

JAVA = shutil.which("java") is not None
BIN = Path(pyspark.__file__).parent / "bin"
CONNECT = "org.apache.spark.sql.connect.service.SparkConnectServer"
HOST = "127.0.0.1"
PATIENCE = 120.0  # seconds until a JVM has to be up


def _port() -> int:
    with socket.socket() as asked:
        asked.bind((HOST, 0))
        return int(asked.getsockname()[1])


@contextmanager
def _jvm(folder: Path, name: str, ready: str, *command: str) -> Iterator[None]:
    """A process of Spark's that is up once its log says so, until the block ends."""
    log = folder / f"{name}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command], stdout=out, stderr=out, cwd=folder, env=_environment(folder)
        )
    try:
        end = time.monotonic() + PATIENCE
        while ready not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


def _environment(folder: Path) -> dict[str, str]:
    own = {"SPARK_LOCAL_IP": HOST, "SPARK_LOCAL_DIRS": str(folder), "SPARK_WORKER_DIR": str(folder)}
    return dict(os.environ) | own


@contextmanager
def _jvm_here(folder: Path) -> Iterator[str]:
    yield "local[2]"


@contextmanager
def _connect_server(folder: Path) -> Iterator[str]:
    port = _port()
    settings = {
        "spark.connect.grpc.binding.port": port,
        "spark.connect.grpc.binding.address": HOST,
        "spark.master": "local[2]",
        "spark.ui.enabled": "false",
    }
    conf = [part for key, value in settings.items() for part in ("--conf", f"{key}={value}")]
    submit = str(BIN / "spark-submit")
    with _jvm(folder, "connect", "Spark Connect server started", submit, *conf, "--class", CONNECT):
        yield f"sc://{HOST}:{port}"


@contextmanager
def _standalone(folder: Path) -> Iterator[str]:
    """A master and two workers."""
    port, spark = _port(), str(BIN / "spark-class")
    place = ["--host", HOST, "--webui-port", "0"]
    url = f"spark://{HOST}:{port}"
    master = [spark, "org.apache.spark.deploy.master.Master", *place, "--port", str(port)]
    worker = [spark, "org.apache.spark.deploy.worker.Worker", *place, "--cores", "1"]
    with ExitStack() as stack:
        stack.enter_context(_jvm(folder, "master", "I have been elected leader", *master))
        for number in range(2):
            registered = "Successfully registered with master"
            command = [*worker, "--memory", "1g", url]
            stack.enter_context(_jvm(folder, f"worker-{number}", registered, *command))
        yield url


def _made(checkout: Checkout) -> dict[str, bytes]:
    """Events and features from a start without anything kept; stages as processes, since a process
    holds one engine.
    """
    shutil.rmtree(stage.STATE / "months", ignore_errors=True)
    for module in ("load", "featurize"):
        done = checkout.run(f"pipelines.ingest.{module}")
        assert done.status == 0, done
        if module == "load":
            shutil.rmtree(validate.ACCEPTED, ignore_errors=True)
            shutil.copytree(load.EVENTS, validate.ACCEPTED)
    folders = (load.EVENTS, featurize.FEATURES)
    return {str(p): p.read_bytes() for folder in folders for p in sorted(folder.iterdir())}


@pytest.mark.jvm
@pytest.mark.skipif(not JAVA, reason="Spark on the JVM needs Java")
def test_every_engine_gives_the_same_bytes(checkout: Checkout, tmp_path: Path) -> None:
    checkout.set(as_of="2013-03-01", featurize={"test_days": 5, "val_days": 5})
    fetch.run(checkout.params())
    embedded = _made(checkout)
    for engine in (_jvm_here, _connect_server, _standalone):
        (place := tmp_path / engine.__name__).mkdir()
        with engine(place) as url:
            checkout.set(engine=url)
            assert _made(checkout) == embedded, engine.__name__


@pytest.mark.parametrize("engine", ["sc://127.0.0.1:1", "spark://127.0.0.1:1,127.0.0.1:2"])
def test_a_cluster_of_nobody_is_a_fault_at_once(checkout: Checkout, engine: str) -> None:
    checkout.set(engine=engine)
    fetch.run(checkout.params())
    done = checkout.run("pipelines.ingest.load")
    assert done.status == 1
    said = f"load: fault: engine: {engine} cannot be reached: Connection refused"
    assert done.err.splitlines() == [said]


def test_who_speaks_no_spark_is_not_waited_for(checkout: Checkout) -> None:
    fetch.run(checkout.params())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = f"sc://127.0.0.1:{silent.getsockname()[1]}"
        checkout.set(engine=engine)
        done = checkout.run("pipelines.ingest.load")
    assert done.status == 1
    why = "no Spark Connect server listens there"
    assert done.err.splitlines() == [f"load: fault: engine: {engine} cannot be reached: {why}"]


def test_a_port_that_is_none_is_one_line(checkout: Checkout) -> None:
    checkout.set(engine="spark://x:y")
    fetch.run(checkout.params())
    with pytest.raises(UserError, match=r"engine: spark://x:y: the port is 'y'; expected a number"):
        load.run(checkout.params())


def test_without_java_is_one_line(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout.set(engine="local[2]")
    fetch.run(checkout.params())
    monkeypatch.setenv("JAVA_HOME", str(checkout.folder))
    done = checkout.run("pipelines.ingest.load")
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert line.startswith("load: error: engine: local[2] needs Java, and ")


HELD = """
from pipelines import engine
with engine.session("local[1]") as spark:
    print(spark.range(3).count(), flush=True)
    input()
"""


@pytest.mark.jvm
@pytest.mark.skipif(not JAVA, reason="Spark on the JVM needs Java")
def test_two_stages_of_one_machine_start_a_jvm_each() -> None:
    command = [sys.executable, "-c", HELD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # As a process with a session of its own hands it down.
    env = os.environ | {"SPARK_CONNECT_MODE_ENABLED": "1"}
    held = [subprocess.Popen(command, text=True, cwd=ROOT, env=env, **pipes) for _ in range(2)]
    try:
        # Both answer before either ends.
        assert [process.stdout.readline() for process in held] == ["3\n", "3\n"]
    finally:
        for process in held:
            process.communicate("\n", PATIENCE)
