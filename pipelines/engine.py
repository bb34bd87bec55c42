"""The engine: one Spark Connect session, embedded or on a cluster, and tables written in canonical
form.
"""

import errno
import logging
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines import tables
from pipelines.errors import TransientError, UserError, naming

# What one query takes at once: memory holds so many rows with all their features, however long the
# table grows.
ROWS = 1_000_000
HOST = "127.0.0.1"
REACH = 5  # seconds until a cluster must have taken a connection
PORTS = {"sc": 15002, "spark": 7077}  # where none is named


@contextmanager
def session(engine: str) -> Iterator[SparkSession]:
    """Yield a session on `engine`: embedded, local[N], spark://… or sc://…; times are UTC
    everywhere, in this process too: what is collected is naive, on the clock of the process, and an
    hour that comes twice on it would be two.
    """
    os.environ["TZ"] = "UTC"
    time.tzset()
    if "://" in engine:
        _reach(engine)
    if engine == "embedded":
        with _embedded() as url:
            yield from _connected(SparkSession.builder.remote(url), embedded=True)
    elif engine.startswith("sc://"):
        yield from _connected(SparkSession.builder.remote(engine))
    else:
        with _started(engine) as url:
            yield from _connected(SparkSession.builder.remote(url))


def _reach(engine: str) -> None:
    """Raises TransientError where nobody listens: the client would ask for ten minutes. Of several
    masters any may be the one.
    """
    scheme, _, rest = engine.partition("://")
    why = ""
    for place in rest.partition("/")[0].split(","):
        host, _, port = place.partition(":")
        if port and not port.isdigit():
            raise UserError(f"engine: {engine}: the port is {port!r}; expected a number")
        try:
            where = host, int(port or PORTS[scheme])
            socket.create_connection(where, REACH).close()
            if scheme == "sc" and "use_ssl=true" not in rest.lower():
                _speaks(*where)
            return
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
    raise TransientError(f"engine: {engine} cannot be reached: {why}")


def _speaks(host: str, port: int) -> None:
    """Raises OSError where who listens does not speak gRPC: a client would wait for ever."""
    import grpc

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(REACH)
        except grpc.FutureTimeoutError:
            raise OSError(errno.EPROTO, "no Spark Connect server listens there") from None


@contextmanager
def _embedded() -> Iterator[str]:
    os.environ.setdefault("RUST_LOG", "error")
    from pysail.spark import SparkConnectServer

    server = SparkConnectServer()
    server.start()
    host, port = server.listening_address
    try:
        yield f"sc://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def _started(master: str) -> Iterator[str]:
    """A Connect server in a JVM of this process, on a port of its own.

    PySpark's own start of one takes a fixed port, which two stages of one machine would both ask
    for.
    """
    home = os.environ.get("JAVA_HOME")
    java = Path(home, "bin/java") if home else Path("java")
    if shutil.which(java) is None:
        raise UserError(
            f"engine: {master} needs Java, and {java} cannot be run; install it, or set engine: "
            "embedded, which needs none"
        )
    os.environ.setdefault("SPARK_LOCAL_IP", HOST)
    os.environ["SPARK_CONNECT_AUTHENTICATE_TOKEN"] = secrets.token_urlsafe()
    # Left by a session of the process that started this one: with it, PySpark makes no context.
    os.environ.pop("SPARK_CONNECT_MODE_ENABLED", None)
    from pyspark import SparkConf, SparkContext

    settings = {
        "spark.plugins": "org.apache.spark.sql.connect.SparkConnectPlugin",
        "spark.connect.grpc.binding.address": HOST,
        "spark.connect.grpc.binding.port": "0",
        "spark.ui.enabled": "false",
    }
    context = SparkContext(master, conf=SparkConf().setAll(list(settings.items())))
    try:
        service = "org.apache.spark.sql.connect.service.SparkConnectService$"
        port = getattr(getattr(context._jvm, service), "MODULE$").localPort()
        # By this name only, the client sends its token to a server without a certificate.
        yield f"sc://localhost:{port}"
    finally:
        context.stop()


def _connected(builder: SparkSession.Builder, embedded: bool = False) -> Iterator[SparkSession]:
    spark = builder.create()
    # It tells each error of a query over again, on many screens.
    logging.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)
    if embedded:
        # The client would ask a server that is gone for ten minutes: here it is this process.
        spark.client.set_retry_policies([])
    spark.conf.set("spark.sql.session.timeZone", "UTC")
    if embedded and threading.current_thread() is threading.main_thread():
        # Once it has answered, the server has put its own end on Ctrl-C; give it back to Python.
        signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT))
    try:
        yield spark
    finally:
        spark.stop()


def write_runs(
    frames: Iterable[DataFrame],
    time: str,
    key: Sequence[str],
    folder: Path,
    scratch: Path,
    engine: str,
) -> int:
    """Write frames of at most about ROWS rows, none of whose months is another's, as `write_months`
    does. Returns their rows.

    From the embedded engine a frame comes over as it is, and is sorted and written while the engine
    computes the next: memory holds two. A JVM would hold it in the heap of its driver, which is
    1 GB where nobody says more.
    """
    if engine != "embedded":
        written = (
            write_months(frame, time, key, folder, scratch / str(number))
            for number, frame in enumerate(frames)
        )
        return sum(sum(counts.values()) for counts in written)
    made = 0
    with ThreadPoolExecutor(1) as writer:
        before = writer.submit(int)
        for frame in frames:
            rows = frame.toArrow()
            made += before.result()
            before = writer.submit(tables.write_months, rows, time, key, folder)
        return made + before.result()


def write_months(
    frame: DataFrame, time: str, key: Sequence[str], folder: Path, scratch: Path
) -> dict[str, int]:
    """Write `frame`, of any number of rows, as one Parquet file per month of `time`, rows in order
    of `key`. Returns the rows of each month that has any. Raises UserError where a time is missing,
    or a key stands twice.

    Engines do not keep an order through their own writers, and name files at random. So the frame
    is computed once into `scratch`, then read back, sorted and written month by month: memory
    holds one month.
    """
    path = str(scratch.resolve())
    named = F.coalesce(F.date_format(time, "yyyy-MM"), F.lit("none"))
    monthly = frame.withColumn("_month", named)
    with naming(scratch):
        monthly.write.partitionBy("_month").parquet(path)
    stored = frame.sparkSession.read.parquet(path)
    names = sorted(row["_month"] for row in stored.select("_month").distinct().collect())
    if "none" in names:
        raise UserError(f"a row has no {time}; expected the time of each")
    counts = {}
    for name in names:
        month = stored.where(F.col("_month") == name).drop("_month").orderBy(*key).toArrow()
        tables.write_month(month, key, folder / f"{name}.parquet")
        counts[name] = month.num_rows
    return counts
