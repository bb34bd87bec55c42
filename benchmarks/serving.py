"""serving: what one replica answers in a second, beside its peers on the same model and columns.

Three servers, each one process: a bare ASGI handler around ONNX Runtime (orjson, no checks, no
counting), this service (contract, API key, metrics, logs as in params.yaml), and `mlflow models
serve` with the columns as its signature. One row of named columns a request, 32 connections; the
servers are asked in turn, several rounds, and the median counts. Beside the rate stands the
processor time of a request, which other work on the machine moves less. Then 1,000 requests a
second to this service on a fixed plan, each timed from the moment it was due.

Needs wrk (apt-get install wrk) and models/bundle (make run). Run: python benchmarks/serving.py
"""

import asyncio
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml
from bench import ROOT

from pipelines import bundle, stage
from pipelines.deploy.serve import keys

ROUNDS, SECONDS, CONNECTIONS = 3, 6, 32
RATE, PLANNED = 1000, 20  # requests per second, seconds
PORTS = {"bare": 18211, "service": 18212, "mlflow": 18213}
PATHS = {"bare": "/predict", "service": "/predict", "mlflow": "/invocations"}
BARE = """
import sys
import numpy, onnxruntime, orjson, uvicorn
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
session = onnxruntime.InferenceSession(
    sys.argv[1], options, providers=["CPUExecutionProvider"])
kinds = {i.name: object if "string" in i.type else numpy.float32 for i in session.get_inputs()}
async def app(scope, receive, send):
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    row = orjson.loads(body)
    feed = {name: numpy.array([row[name]], dtype=kind) for name, kind in kinds.items()}
    answer = orjson.dumps({"probability": float(session.run(None, feed)[0][0])})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
uvicorn.run(app, port=int(sys.argv[2]), log_level="error", access_log=False, lifespan="off")
"""


def main() -> None:
    if shutil.which("wrk") is None:
        sys.exit("serving: error: wrk is missing; install it: apt-get install wrk")
    folder = ROOT / bundle.FOLDER
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        home = Path(name)
        key = configured(home)
        row = json.dumps(one_row(folder))
        bodies = {"bare": row, "service": row, "mlflow": f'{{"dataframe_records": [{row}]}}'}
        commands = {
            "bare": [sys.executable, "-c", BARE, str(folder / bundle.MODEL)],
            "service": [
                sys.executable, "-m", "pipelines.deploy.serve", "--bundle", str(folder),
                "--digest", stage.digest(folder), "--port",
            ],
            "mlflow": [
                "mlflow", "models", "serve", "-m", str(as_mlflow(home, folder)), "--env-manager",
                "local", "--workers", "1", "--port",
            ],
        }  # fmt: skip
        running = {}
        for server, command in commands.items():
            whole = [*command, str(PORTS[server])]
            running[server] = servers.enter_context(started(home, whole, PORTS[server]))
        scripts = {server: script(home, server, body, key) for server, body in bodies.items()}
        found: dict[str, list[tuple[float, float, float]]] = {server: [] for server in commands}
        for _ in range(ROUNDS):
            for server, process in running.items():
                found[server].append(measured(server, scripts[server], process))
        table(found)
        running["mlflow"].suspend()
        running["bare"].suspend()
        late = asyncio.run(open_loop(PORTS["service"], row.encode(), key))
        running["mlflow"].resume()
        running["bare"].resume()
        print(
            f"\nservice, {RATE:,} requests/s on a plan for {PLANNED} s: p50 {late[50]:.1f} ms, "
            f"p99 {late[99]:.1f} ms, p99.9 {late[99.9]:.1f} ms"
        )


def configured(home: Path) -> str:
    """params.yaml with API keys on, in a folder of its own. Returns a key."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["serve"] |= {"keys": "keys.txt", "rate_limit": 1e9}
    (home / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return keys.make(home / "keys.txt", "bench")


def one_row(folder: Path) -> dict[str, Any]:
    """A row of the reference without a missing value, so that every server takes it."""
    contract = bundle.contract(folder)
    names = [column["name"] for column in contract["columns"]]
    rows = pq.read_table(folder / bundle.REFERENCE, columns=names).to_pylist()
    return next(row for row in rows if all(v is not None and v == v for v in row.values()))


def as_mlflow(home: Path, folder: Path) -> Path:
    """The same network as an MLflow model with the columns as its signature."""
    import mlflow
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    contract = bundle.contract(folder)
    kinds = {"string": "string", "float32": "double"}
    columns = [ColSpec(kinds[c["type"]], c["name"]) for c in contract["columns"]]
    mlflow.onnx.save_model(
        onnx.load(folder / bundle.MODEL),
        home / "mlflow",
        signature=ModelSignature(Schema(columns), Schema([ColSpec("float", "probability")])),
        pip_requirements=["onnxruntime"],
        save_as_external_data=False,
    )
    return home / "mlflow"


@contextmanager
def started(home: Path, command: list[str], port: int) -> Iterator[psutil.Process]:
    """A server in a process group of its own that accepts connections; it ends with the block."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    with (home / f"{port}.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=home, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        end = time.monotonic() + 120
        while not answers(port):
            if process.poll() is not None or time.monotonic() > end:
                sys.exit((home / f"{port}.log").read_text()[-3000:])
            time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.connect()
    except OSError:
        return False
    finally:
        connection.close()
    return True


def script(home: Path, server: str, body: str, key: str) -> Path:
    """What wrk sends. Fails where the server does not answer it with 200."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    connection = http.client.HTTPConnection("127.0.0.1", PORTS[server], timeout=60)
    connection.request("POST", PATHS[server], body, headers)
    answer = connection.getresponse()
    if answer.status != 200:
        sys.exit(f"{server} answers {answer.status}: {answer.read()[:500]!r}")
    lines = ['wrk.method = "POST"', f"wrk.body = {json.dumps(body)}"]
    lines += [f'wrk.headers["{name}"] = {json.dumps(value)}' for name, value in headers.items()]
    path = home / f"{server}.lua"
    path.write_text("\n".join(lines))
    return path


def measured(server: str, lua: Path, process: psutil.Process) -> tuple[float, float, float]:
    """Requests per second, their p99 in ms, and microseconds of processor time for each."""
    url = f"http://127.0.0.1:{PORTS[server]}{PATHS[server]}"
    load = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "--latency", "-s", str(lua), url]
    before = processor(process)
    out = subprocess.run(load, capture_output=True, text=True, check=True).stdout
    spent = processor(process) - before
    words = out.split()
    if "Non-2xx" in words:
        sys.exit(f"{server}: {out}")
    count = int(words[words.index("requests") - 1])
    units = {"us": 1e-3, "ms": 1.0, "s": 1e3}
    text = words[words.index("99%") + 1]
    unit = text.lstrip("0123456789.")
    p99 = float(text.removesuffix(unit)) * units[unit]
    return float(words[words.index("Requests/sec:") + 1]), p99, spent / count * 1e6


def processor(process: psutil.Process) -> float:
    """Seconds of processor time of a process and its children."""
    times = [one.cpu_times() for one in [process, *process.children(recursive=True)]]
    return sum(one.user + one.system for one in times)


def table(found: dict[str, list[tuple[float, float, float]]]) -> None:
    middle = {
        server: tuple(median(figures) for figures in zip(*rounds, strict=True))
        for server, rounds in found.items()
    }
    rate = middle["service"][0]
    print(f"one row a request, {CONNECTIONS} connections, median of {ROUNDS} rounds")
    print(f"  {'':<10}{'requests/s':>12}{'p99 ms':>9}{'µs of processor':>17}{'service is':>12}")
    for server, (per_second, p99, micro) in middle.items():
        times = f"{rate / per_second:.2f} x"
        print(f"  {server:<10}{per_second:>12,.0f}{p99:>9.1f}{micro:>17,.0f}{times:>12}")


async def open_loop(port: int, body: bytes, key: str) -> dict[float, float]:
    """Ask at `RATE` whatever the answers do. Returns percentiles of the lateness in ms."""
    head = (
        f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    request = head.encode() + body
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        free.put_nowait(await asyncio.open_connection("127.0.0.1", port))
    late: list[float] = []

    async def ask(due: float) -> None:
        reader, writer = await free.get()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]
        await reader.readexactly(int(length))
        late.append((time.perf_counter() - due) * 1e3)
        free.put_nowait((reader, writer))

    begin = time.perf_counter() + 0.1
    asked = []
    for number in range(RATE * PLANNED):
        due = begin + number / RATE
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        asked.append(asyncio.create_task(ask(due)))
    await asyncio.gather(*asked)
    late.sort()
    return {part: late[int(len(late) * part / 100) - 1] for part in (50, 99, 99.9)}


if __name__ == "__main__":
    main()
