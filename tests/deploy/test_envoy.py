"""Envoy takes what is rendered, splits by it at once, and tries again only what is safe."""

import itertools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from deploy.proxied import Proxy, proxied
from deploy.served import free, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import stage
from pipelines.deploy import counts, envoy
from pipelines.deploy.envoy import Admin, Way
from pipelines.deploy.replicas import free_port
from pipelines.errors import UserError
from pipelines.params import Params


class Replica:
    """A replica that answers one status, or hangs up, and counts what it was asked."""

    def __init__(self, status: int, after: float = 0.0) -> None:
        self.asked = 0
        outer, waiting = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(200)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                outer.asked += 1
                if not status:
                    self.close_connection = True
                    return
                waiting.wait(after)
                self._answer(status)

            def _answer(self, code: int) -> None:
                self.send_response(code)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def proxy(tmp_path: Path, params: Params) -> Iterator[Proxy]:
    with proxied(tmp_path, free(params.traffic, timeout_seconds=1), params.serve) as made:
        yield made


def test_envoy_itself_takes_the_bootstrap(tmp_path: Path, params: Params) -> None:
    envoy.validate(envoy.prepare(tmp_path, params.traffic, params.serve))


def test_what_envoy_refuses_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "bootstrap.yaml"
    broken.write_text("admin: {adress: nowhere}\n")
    with pytest.raises(UserError, match="Envoy refuses it") as caught:
        envoy.validate(broken)
    assert "\n" not in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=4))
def test_routes_one_after_another_give_the_shares(
    tmp_path: Path, params: Params, cuts: list[int]
) -> None:
    edges = [0, *sorted(cuts), 100]
    percents = [high - low for low, high in itertools.pairwise(edges)]
    ways = [Way(percent, f"c{number}") for number, percent in enumerate(percents)]
    envoy.routes(tmp_path, params.traffic, ways)
    table = stage.read_json(tmp_path / "routes.json")["resources"][0]
    left, shares = 1.0, []
    for route in table["virtual_hosts"][0]["routes"][:-2]:
        part = route["match"]["runtime_fraction"]["default_value"]["numerator"] / 1e6
        shares.append(100 * left * part)
        left *= 1 - part
    assert shares == pytest.approx(percents, abs=0.01)


def test_a_share_and_a_copy(proxy: Proxy) -> None:
    one, two = Replica(200), Replica(201)
    proxy.routes({"one": [one], "two": [two]}, [Way(30, "two", "one"), Way(70, "one", "two")])
    seen = Counter(proxy.ask() for _ in range(400))
    # Of 400 answers the share lies within 12 points but once in ten million times.
    assert seen[201] / 400 == pytest.approx(0.3, abs=0.12)
    assert set(seen) == {200, 201}
    until(lambda: (one.asked, two.asked) == (400, 400))
    until(lambda: max(proxy.admin.counted("two").latency.values(), default=0) == 400)
    assert proxy.admin.counted("two").broken == 0


def test_a_damaged_file_is_written_again(tmp_path: Path, params: Params) -> None:
    envoy.routes(tmp_path, params.traffic, [Way(100, "c")])
    file = tmp_path / "routes.json"
    good = file.read_bytes()
    for damage in (b"", b"x", good[:-9], b"\xff"):
        file.write_bytes(damage)
        envoy.routes(tmp_path, params.traffic, [Way(100, "c")])
        assert file.read_bytes() == good


def test_who_names_a_version_is_answered_by_it_alone(proxy: Proxy) -> None:
    one, two = Replica(200), Replica(201)
    pinned = "/v2/models/flights/versions/{}/infer".format
    clusters = {"one": [one], "two": [two]}
    proxy.routes(clusters, [Way(5, "two", "one", 2), Way(95, "one", "two", 1)])
    assert {proxy.ask(pinned(1)) for _ in range(20)} == {200}
    assert {proxy.ask(pinned(2)) for _ in range(20)} == {201}
    assert (one.asked, two.asked) == (20, 20)
    # Without a share callers see nothing of it.
    proxy.routes(clusters, [Way(0, "two", None, 2), Way(100, "one", None, 1)])
    assert {proxy.ask(pinned(2)) for _ in range(20)} == {200}


def test_another_protocol_is_refused_in_one_line(proxy: Proxy) -> None:
    proxy.routes({"c": [Replica(200)]}, [Way(100, "c")])
    answer = proxy.answer("/predict", connection="upgrade", upgrade="websocket")
    assert answer.status == 403
    assert json.loads(answer.read()) == {"error": "another protocol than HTTP is not spoken here"}


def test_an_encoding_that_nobody_understands_is_the_callers_fault(proxy: Proxy) -> None:
    proxy.routes({"c": [Replica(200)]}, [Way(100, "c")])
    answer = proxy.answer("/predict", transfer_encoding="gzip")
    assert answer.status == 400


@pytest.mark.parametrize("status", [0, 503])
def test_what_nobody_answered_is_tried_again(proxy: Proxy, status: int) -> None:
    """A broken connection, and the 503 of a replica that drains."""
    bad, good = Replica(status), Replica(200)
    proxy.routes({"c": [bad, good]}, [Way(100, "c")])
    assert Counter(proxy.ask() for _ in range(20)) == {200: 20}
    assert bad.asked > 0
    assert good.asked == 20
    assert proxy.admin.counted("c").broken == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_the_largest_body_is_answered_copied_and_tried_again(
    proxy: Proxy, params: Params, chunked: bool
) -> None:
    largest = b" " * params.serve.max_body_bytes
    bad, good, copied = Replica(0), Replica(200), Replica(200)
    proxy.routes({"c": [bad, good], "d": [copied]}, [Way(100, "c", "d")])
    for _ in range(4):
        assert proxy.answer("/predict", [largest] if chunked else largest).status == 200
    assert bad.asked > 0
    assert good.asked == 4
    until(lambda: copied.asked == 4)
    answer = proxy.answer("/predict", [largest, b" "] if chunked else largest + b" ")
    assert answer.status == 413
    assert json.loads(answer.read()) == {"error": "the body is too large; at most 4000000 bytes"}


@pytest.mark.parametrize("status", [400, 422, 429, 500])
def test_an_answer_is_an_answer(proxy: Proxy, status: int) -> None:
    one = Replica(status)
    proxy.routes({"c": [one, Replica(status)]}, [Way(100, "c")])
    for _ in range(10):
        assert proxy.ask() == status
    until(lambda: max(proxy.admin.counted("c").latency.values(), default=0) == 10)
    assert proxy.admin.counted("c").broken == (10 if status == 500 else 0)
    assert one.asked == 5


def test_a_timeout_is_not_tried_again(proxy: Proxy) -> None:
    slow = Replica(200, after=3)
    proxy.routes({"c": [slow]}, [Way(100, "c")])
    assert proxy.ask() == 504
    assert slow.asked == 1
    until(lambda: proxy.admin.counted("c").broken == 1)


def test_beyond_the_breaker_a_caller_is_told_to_come_again(tmp_path: Path, params: Params) -> None:
    """No 5xx for him; for who judges the slot it is one, since its slowness may be the reason."""
    with proxied(tmp_path, free(params.traffic, max_requests=2), params.serve) as proxy:
        proxy.routes({"c": [Replica(200, after=0.3)]}, [Way(100, "c")])
        with ThreadPoolExecutor(20) as pool:
            answers = [pool.submit(proxy.answer, "/predict", b"{}") for _ in range(20)]
        told = [one.result() for one in answers]
        refused = [one for one in told if one.status == 429]
        assert {one.status for one in told} == {200, 429}
        assert {one.headers["retry-after"] for one in refused} == {"1"}
        expected = {"error": "too many requests at once; at most 2"}
        assert json.loads(refused[0].read()) == expected
        until(lambda: proxy.admin.counted("c").broken == len(refused))


def test_one_connection_too_many_is_let_go_and_envoy_tells_on(
    tmp_path: Path, params: Params
) -> None:
    serve = params.serve.model_copy(update={"max_connections": 20})
    with proxied(tmp_path, free(params.traffic), serve) as proxy:
        proxy.routes({"c": [Replica(200)]}, [Way(100, "c")])
        address = ("127.0.0.1", proxy.traffic.port)
        with ExitStack() as held:
            for _ in range(20):
                held.enter_context(socket.create_connection(address))
            until(lambda: _let_go(address))
            assert proxy.admin.healthy()["c"]
        until(lambda: _answers(proxy))


def _answers(proxy: Proxy) -> bool:
    """Envoy counts a connection that ended until it has read its end."""
    try:
        return proxy.ask() == 200
    except ConnectionError:
        return False


def _let_go(address: tuple[str, int]) -> bool:
    with socket.create_connection(address) as more:
        more.settimeout(1)
        try:
            return more.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionResetError:
            return True


def test_no_header_of_a_caller_sets_how_it_is_tried(proxy: Proxy) -> None:
    slow, bad = Replica(200, after=0.3), Replica(500)
    proxy.routes({"slow": [slow]}, [Way(100, "slow")])
    assert proxy.ask(x_envoy_upstream_rq_timeout_ms="20") == 200
    proxy.routes({"slow": [slow], "bad": [bad]}, [Way(100, "bad")])
    assert proxy.ask(x_envoy_retry_on="5xx", x_envoy_max_retries="5") == 500
    assert bad.asked == 1


def test_only_what_is_for_callers_reaches_a_replica(proxy: Proxy) -> None:
    """However the path is spelled; the rest is refused in the form of the service's refusals."""
    one = Replica(200)
    proxy.routes({"c": [one]}, [Way(100, "c")])
    for path in (
        "/metrics", "/%6detrics", "//metrics", "/./metrics", "/metrics/", "/metrics?x", "/METRICS",
        "/v2/../metrics", "/v2/%2e%2e/metrics", "/v2/..%2fmetrics", "/v2/..%5cmetrics",
        "/v2/..\\metrics", "/v2#/../metrics", "http://x/metrics", "/v2x", "/predict/", "/", "*",
    ):  # fmt: skip
        answer = proxy.answer(path)
        assert answer.status in (400, 404), path
        assert json.loads(answer.read())["error"], path
    assert one.asked == 0
    for path in ("/predict", "/%70redict", "/predict?/metrics", "/v2", "/v2/x", "/openapi.json"):
        assert proxy.answer(path).status == 200, path
    assert one.asked == 6
    # How long an answer takes is asked of predictions alone.
    until(lambda: max(proxy.admin.counted("c").latency.values(), default=0) == 3)


def test_where_nothing_can_answer_a_caller_is_told_to_come_again(proxy: Proxy) -> None:
    """Before there is a way, and before a replica of the way is up."""

    def asked() -> None:
        answer = proxy.answer("/predict")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert json.loads(answer.read()) == {"error": "no replica can answer now"}

    asked()
    envoy.endpoints(proxy.folder, "c", [free_port()])
    envoy.clusters(proxy.folder, proxy.traffic, ["c"])
    version = envoy.routes(proxy.folder, proxy.traffic, [Way(100, "c")])
    until(lambda: proxy.admin.applied("rds") == version)
    asked()


def test_a_process_that_dies_while_it_tells_is_one_that_cannot_be_read(params: Params) -> None:
    """Who reads expects an OSError, and what http.client raises is none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def half() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{}")

        threading.Thread(target=half).start()
        with pytest.raises(OSError, match="IncompleteRead"):
            Admin(free(params.traffic, admin_port=port)).healthy()
        with pytest.raises(OSError, match="IncompleteRead"):
            counts.read(port)


def test_a_replica_that_fails_again_and_again_gets_nothing_for_a_while(proxy: Proxy) -> None:
    bad, good = Replica(0), Replica(200)
    proxy.routes({"c": [bad, good]}, [Way(100, "c")])
    for _ in range(60):
        assert proxy.ask() == 200
    asked = bad.asked
    time.sleep(1)  # two health checks, which it passes
    for _ in range(20):
        assert proxy.ask() == 200
    assert bad.asked == asked
