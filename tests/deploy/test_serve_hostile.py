"""Whatever a client sends, slowly or in masses, it gets a 4xx or is let go: never a 5xx, and the
memory of the replica does not grow with it.
"""

import json
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from deploy import bundles
from deploy.proxied import proxied
from deploy.replica import Replica, serving, until
from deploy.served import free
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipelines.deploy.envoy import Way
from pipelines.params import load

ROW = {"origin": "JFK", "x": 0.5, "y": None}
MANY = 10_000
FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
HEAD = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """A sound model, so that a fallback would be a defect; a client has a second for a body."""
    place = tmp_path_factory.mktemp("hostile")
    digest = bundles.make(place / "bundle")
    arguments = ("--bundle", place / "bundle", "--digest", digest)
    with serving(place / "home", *arguments, read_seconds=1, log_share=0.0) as made:
        yield made
        assert made.logs("Exception in ASGI application") == []
        assert made.logs("a fault of the service") == []
        assert made.metric("headrace_fallback_total") == 0
        for route in ("predict", "infer"):
            assert made.metric("headrace_requests_total", route=route, status="500") == 0


@pytest.fixture(scope="module")
def proxy(replica: Replica, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """Envoy, as if it were the replica behind it."""
    folder, params = tmp_path_factory.mktemp("envoy"), load(replica.folder / "params.yaml")
    with proxied(folder, free(params.traffic), params.serve) as made:
        made.routes({"c": [replica]}, [Way(100, "c")])
        yield Replica(folder, made.traffic.port, made.process)


@pytest.fixture(params=["replica", "proxy"])
def door(request: pytest.FixtureRequest) -> Replica:
    """Where a client comes in."""
    found: Replica = request.getfixturevalue(request.param)
    return found


def _memory(replica: Replica) -> int:
    assert replica.process is not None
    return int(psutil.Process(replica.process.pid).memory_info().rss)


def _connect(replica: Replica) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", replica.port), timeout=20)
    made.settimeout(20)
    return made


def _rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes, in whatever way."""
    parts = []
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_everything_that_its_openapi_allows_and_forbids(replica: Replica) -> None:
    """schemathesis: answers as documented; what the schema allows is taken, the rest refused.

    That the tensors of an inference are of one length, and each column is there once, no schema
    says: there, what it allows may be refused.
    """
    document = replica.folder / "openapi.json"
    document.write_bytes(replica.get("/openapi.json").body)
    told = json.loads(document.read_text())
    assert set(told["components"]["schemas"]["Record"]["properties"]) == {"origin", "x", "y"}
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", str(document),
        "--url", f"http://127.0.0.1:{replica.port}", "--max-examples", "10", "--seed", "1",
        "--phases", "examples,coverage,fuzzing", "--generation-database", "none", "--no-color",
        "--suppress-health-check", "all",
    ]  # fmt: skip
    for beyond in (
        ["--exclude-path-regex", "infer$"],
        ["--include-path-regex", "infer$", "--exclude-checks", "positive_data_acceptance"],
    ):
        ran = subprocess.run(
            [*command, *beyond], capture_output=True, text=True, cwd=replica.folder
        )
        assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["origin", "x", "y"]),
        st.none() | st.text() | st.floats(width=32, allow_nan=False, allow_infinity=False),
        min_size=3,
    )
)
def test_a_record_is_taken_if_and_only_if_its_types_are_right(
    replica: Replica, record: dict[str, Any]
) -> None:
    right = not isinstance(record["origin"], float) and not any(
        isinstance(record[name], str) for name in ("x", "y")
    )
    answer = replica.post("/predict", record)
    assert answer.status == (200 if right else 422), answer


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@FUZZ
@given(body=st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
@example(b'{"records": [' * 10_000)
@example(b'{"inputs": ' * 10_000)
@example(b"\x00")
@example(b"\xef\xbb\xbf{}")
@example(
    b'{"inputs": [{"name": "x", "shape": [9223372036854775808], "datatype": "FP32", "data": []}]}'
)
@pytest.mark.parametrize("path", ["/predict", "/v2/models/flights/infer"])
def test_any_body_gets_an_answer_in_one_line(replica: Replica, path: str, body: bytes) -> None:
    answer = replica.post(path, body)
    assert 400 <= answer.status < 500, answer
    assert "\n" not in answer.json["error"]


@FUZZ
@given(st.binary(max_size=200))
@example(b"GET / HTTP/9.9\r\n\r\n")
@example(b"GET \xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n")
@example(b"GET http://[::1 HTTP/1.1\r\nhost: x\r\n\r\n")
@example(b"GET /%ff%00 HTTP/1.1\r\nhost: x\r\n\r\n")
@example(b"GET /v2/models/%0d%0a HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
@example(HEAD + b"content-length: -1\r\n\r\n")
@example(HEAD + b"content-length: 99999999999999999999999\r\n\r\n")
@example(HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}")
@example(HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n")
@example(HEAD + b"x-request-id: a\x01b\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
@example(HEAD + b"authorization: Bearer \xff\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
@example(HEAD + b"upgrade: websocket\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\n{}")
def test_any_bytes_on_the_wire_are_no_fault(replica: Replica, sent: bytes) -> None:
    with _connect(replica) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        found = _rest(connection)
    assert not found or found.split(b" ")[1][:1] in (b"2", b"4"), found


@pytest.mark.parametrize(
    "begun",
    [b"", b"POST /pre", HEAD, HEAD + b"content-length: 100\r\n\r\n{"],
    ids=["says nothing", "half a line", "half a header", "half a body"],
)
def test_a_slow_client_is_let_go(replica: Replica, begun: bytes) -> None:
    """One that sends a letter now and then too."""
    answer = _until_let_go(replica, begun)
    if begun.endswith(b"{"):
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the body did not come within 1 s" in answer


@pytest.mark.parametrize(
    "begun",
    [b"POST /pre", HEAD, HEAD + b"content-length: 100\r\n\r\n{"],
    ids=["half a line", "half a header", "half a body"],
)
def test_envoy_lets_a_slow_client_go(proxy: Replica, begun: bytes) -> None:
    answer = _until_let_go(proxy, begun)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the request did not come within 1 s" in answer


def _until_let_go(door: Replica, begun: bytes) -> bytes:
    """Begin, send a letter now and then, and return what is answered."""
    with _connect(door) as connection:
        connection.sendall(begun)
        begin, over = time.monotonic(), threading.Event()

        def drip() -> None:
            while begun and not over.wait(0.3):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        found = _rest(connection)
        over.set()
        dripping.join()
    assert time.monotonic() - begin < 10
    return found


@pytest.mark.parametrize("chunked", [False, True])
def test_a_hundred_megabytes_are_refused_and_not_kept(door: Replica, chunked: bool) -> None:
    before = _memory(door)
    left, piece = 100_000_000, b'{"x": ' * 10_000
    with _connect(door) as connection:
        length = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % left
        connection.sendall(HEAD + length + b"\r\n\r\n")
        connection.setblocking(False)  # who waits until all is taken hears nothing
        part = b""
        while left > 0 and not select.select([connection], [connection], [], 20)[0]:
            part = part or (b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            sent = connection.send(part)
            part, left = part[sent:], left - sent
        connection.settimeout(20)
        answered = connection.recv(65536)
        while b"}" not in answered:
            answered += connection.recv(65536)
    assert answered.startswith(b"HTTP/1.1 413 "), answered
    assert b"the body is too large; at most" in answered
    assert _memory(door) - before < 40_000_000
    assert door.post("/predict", ROW).status == 200


def test_many_half_bodies_are_not_all_kept(replica: Replica) -> None:
    """Bodies that never end cannot fill the memory: beyond a sum they are refused."""
    statuses, most = _half_bodies(replica, 100)
    assert statuses <= {b"HTTP/1.1 408", b"HTTP/1.1 429", b"closed"}
    assert most < 250_000_000
    assert replica.post("/predict", ROW).status == 200


def test_many_half_bodies_are_not_all_kept_by_envoy(proxy: Replica) -> None:
    statuses, most = _half_bodies(proxy, 500)
    assert statuses <= {b"HTTP/1.1 408", b"HTTP/1.1 429", b"closed"}
    assert most < 800_000_000
    assert proxy.post("/predict", ROW).status == 200


def _half_bodies(door: Replica, count: int) -> tuple[set[bytes], int]:
    """Clients that send 3 MB each and then nothing: what they got, and by how much the memory grew
    meanwhile.
    """
    before, half = _memory(door), b" " * 3_000_000
    statuses: set[bytes] = set()

    def send() -> None:
        with _connect(door) as connection:
            try:
                connection.sendall(HEAD + b"content-length: 3900000\r\n\r\n" + half)
                statuses.add(connection.recv(12))
            except OSError:
                statuses.add(b"closed")

    threads = [threading.Thread(target=send) for _ in range(count)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, _memory(door) - before)
        time.sleep(0.02)
    return statuses, most


def test_half_bodies_wait_in_envoy_and_hold_no_replica(replica: Replica, proxy: Replica) -> None:
    """More of them than Envoy may have connections to replicas; other callers are answered."""
    with _files(), ExitStack() as held:
        slow = [held.enter_context(_connect(proxy)) for _ in range(1100)]
        for connection in slow:
            connection.sendall(HEAD + b"content-length: 100\r\n\r\n{")
        assert {proxy.post("/predict", ROW).status for _ in range(20)} == {200}
        assert _open(replica) < 100
        assert {connection.recv(12) for connection in slow} == {b"HTTP/1.1 408"}


def test_ten_thousand_connections_are_held_answered_and_let_go(tmp_path: Path) -> None:
    """As many of them as this process may open."""
    digest = bundles.make(tmp_path / "bundle")
    arguments = ("--bundle", tmp_path / "bundle", "--digest", digest)
    with _files() as hard, serving(tmp_path / "home", *arguments) as replica:
        _hold(replica, min(MANY, hard - 500))
        first = _memory(replica)
        # Later, the memory of the first serves again.
        _hold(replica, min(MANY, hard - 500) // 2)
        assert _memory(replica) - first < 20_000_000
        assert first < 600_000_000


@contextmanager
def _files() -> Iterator[int]:
    """As many open files as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _hold(replica: Replica, count: int) -> None:
    """Open so many, ask on all of them, take every answer, close."""
    body = json.dumps(ROW).encode()
    request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    with ExitStack() as held:
        connections = [held.enter_context(_connect(replica)) for _ in range(count)]
        for connection in connections:
            connection.sendall(request)
        assert {connection.recv(12) for connection in connections} == {b"HTTP/1.1 200"}
    until(lambda: _open(replica) < 100)


def _open(replica: Replica) -> int:
    assert replica.process is not None
    return psutil.Process(replica.process.pid).num_fds()
