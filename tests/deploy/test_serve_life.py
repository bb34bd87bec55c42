"""A replica's life: what it refuses to serve, changing bundles under load, draining, keys."""

import asyncio
import hashlib
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from deploy import bundles
from deploy.replica import Replica, serving, until
from world import ROOT

from pipelines import bundle, signing, stage, tables
from pipelines.deploy.serve import routes
from pipelines.deploy.serve.capture import Capture
from pipelines.deploy.serve.keys import Key, Keys
from pipelines.deploy.serve.metrics import Metrics
from pipelines.deploy.serve.model import Holder, Named
from pipelines.deploy.serve.refusal import Refusal
from pipelines.deploy.serve.service import Service
from pipelines.errors import UserError
from pipelines.params import Params

ROW = {"origin": "JFK", "x": 0.5, "y": None}


@pytest.fixture(autouse=True)
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signing.VARIABLE, str(tmp_path / "keys" / "signing.pem"))


def _slot(folder: Path, version: int, digest: str, /, **change: Any) -> Path:
    """The file of a slot, signed."""
    statement = {"model": "flights", "version": version, "bundle": digest}
    entry = {
        "model": "flights", "version": version, "bundle": str(folder / f"bundle-{version}"),
        "digest": digest, "signature": signing.sign(statement),
    }  # fmt: skip
    stage.write_json(folder / "slot.json", entry | change)
    return folder / "slot.json"


def _expected(folder: Path) -> float:
    table = pa.Table.from_pylist([ROW], bundles.rows(1).schema)
    return float(bundle.load(folder).predict(table)[0])


@contextmanager
def _asking(replica: Replica, callers: int = 4) -> Iterator[Counter[tuple[Any, ...]]]:
    """Callers who ask without a pause until the block ends: (version, answer) or what failed."""
    seen: Counter[tuple[Any, ...]] = Counter()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                answer = replica.post("/predict", ROW)
                body = answer.json
                if answer.status == 200:
                    seen[body["version"], body["predictions"][0]["probability"]] += 1
                else:
                    seen["failed", answer.status] += 1
            except OSError as error:
                seen["failed", str(error)] += 1

    threads = [threading.Thread(target=ask) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_bundles_change_under_load_without_a_failed_or_mixed_answer(tmp_path: Path) -> None:
    digests = {n: bundles.make(tmp_path / f"bundle-{n}", shift=n / 10) for n in (1, 2, 3)}
    slot = _slot(tmp_path, 1, digests[1])
    with serving(tmp_path / "home", "--slot", slot) as replica, _asking(replica) as seen:
        for number, version in enumerate((2, 3, 1, 3), start=1):
            time.sleep(0.2)
            _slot(tmp_path, version, digests[version])
            replica.signal(signal.SIGHUP)
            until(lambda: replica.metric("headrace_reloads_total", result="taken") == number)  # noqa: B023
        time.sleep(0.2)
    expected = {(n, _expected(tmp_path / f"bundle-{n}")) for n in (1, 2, 3)}
    assert set(seen) == expected, seen


def test_what_is_refused_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    one, two, three = (bundles.make(tmp_path / f"bundle-{n}", shift=n) for n in (1, 2, 3))
    with (tmp_path / "bundle-3" / bundle.MODEL).open("ab") as file:
        file.write(b"x")
    refused: list[Callable[[], object]] = [
        lambda: _slot(tmp_path, 3, three),  # a changed byte
        lambda: _slot(tmp_path, 1, one),  # older than accepted, and signed
        lambda: _slot(tmp_path, 2, two, version=4),  # signed as another version
        lambda: _slot(tmp_path, 2, two, signature=""),
        lambda: _slot(tmp_path, 2, two, digest=None),
        lambda: (tmp_path / "slot.json").write_text("{}"),
        lambda: (tmp_path / "slot.json").unlink(),
    ]
    slot = _slot(tmp_path, 2, two)
    with serving(tmp_path / "home", "--slot", slot, "--at-least", 2) as replica:
        for number, spoil in enumerate(refused, start=1):
            spoil()
            replica.signal(signal.SIGHUP)
            until(lambda: replica.metric("headrace_reloads_total", result="refused") == number)  # noqa: B023
            assert replica.post("/predict", ROW).json["bundle"] == two
        until(lambda: len(replica.logs("bundle refused")) >= len(refused))
        assert len(replica.logs("bundle refused")) == len(refused)


@pytest.mark.parametrize("how", ["changed", "unsigned", "replayed", "not JSON"])
def test_a_replica_does_not_start_with_what_it_must_refuse(tmp_path: Path, how: str) -> None:
    digest = bundles.make(tmp_path / "bundle-1")
    slot = _slot(tmp_path, 1, digest)
    arguments: tuple[object, ...] = ("--slot", slot)
    if how == "changed":
        (tmp_path / "bundle-1" / "more.pkl").write_bytes(b"x")
    if how == "unsigned":
        _slot(tmp_path, 1, digest, signature="AAAA")
    if how == "replayed":
        arguments += ("--at-least", 2)
    if how == "not JSON":
        slot.write_bytes(b"\x80\x04K\x01.")
    replica = Replica(tmp_path / "home")
    replica.configure()
    replica.start(*arguments)
    assert replica.ended() == 2
    (line,) = (replica.folder / "log").read_text().splitlines()
    assert line.startswith("serve: error: ")


def test_told_to_end_it_is_ready_no_more_answers_what_runs_and_writes_what_it_kept(
    tmp_path: Path,
) -> None:
    digest = bundles.make(tmp_path / "bundle")
    arguments = ("--bundle", tmp_path / "bundle", "--digest", digest)
    capture = {"share": 1.0, "folder": "captured"}
    with serving(tmp_path / "home", *arguments, capture=capture, drain_seconds=1) as replica:
        with _asking(replica) as seen:
            time.sleep(0.3)
            replica.signal(signal.SIGTERM)
            until(lambda: replica.get("/v2/health/ready").status == 503)
            time.sleep(0.3)
        assert replica.post("/predict", ROW).headers["connection"] == "close"
        assert replica.ended() == 0
    assert [kind for kind in seen if kind[0] == "failed"] == []
    (file,) = (replica.folder / "captured").glob("*.parquet")
    assert tables.pq.read_metadata(file).num_rows == sum(seen.values()) + 1


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    digest = bundles.make(tmp_path / "bundle")
    replica = Replica(tmp_path / "home")
    replica.configure(drain_seconds=0.1)
    arguments = ("--bundle", tmp_path / "bundle", "--digest", digest, "--with-parent")
    replica.start(*arguments, stdin=subprocess.PIPE)
    replica.wait_ready()
    assert replica.process is not None
    assert replica.process.stdin is not None
    replica.process.stdin.close()
    assert replica.ended() == 0


def test_without_another_bundle_the_base_rate_answers(tmp_path: Path) -> None:
    digest = bundles.make(tmp_path / "bundle", faults=True)
    # Nothing can be written below a file: what is captured is dropped, and nobody notices.
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "file").write_text("x")
    capture = {"share": 1.0, "folder": "file", "seconds": 1}
    # One that is damaged is none, and no reason not to serve.
    spare = ("--fallback", tmp_path / "nowhere", "--fallback-digest", digest)
    arguments = ("--bundle", tmp_path / "bundle", "--digest", digest, *spare)
    with serving(tmp_path / "home", *arguments, capture=capture) as replica:
        until(lambda: replica.logs("fallback refused"))
        assert len(replica.logs("fallback refused")) == 1
        answer = replica.post("/predict", {"records": [ROW, ROW | {"x": -5000}]})
        assert answer.status == 200
        assert answer.json["fallback"] == "base rate"
        found = [one["probability"] for one in answer.json["predictions"]]
        assert found == [bundles.BASE_RATE] * 2
        until(lambda: replica.metric("headrace_capture_rows_total", result="dropped") == 2)
        assert replica.post("/predict", ROW).status == 200


def test_only_keys_that_are_known_are_answered_and_not_too_often(tmp_path: Path) -> None:
    digest = bundles.make(tmp_path / "bundle")
    replica = Replica(tmp_path / "home")
    replica.configure(keys="keys.txt", drain_seconds=0.1)
    made = []
    for name in ("alice", "bob"):
        done = _make_key(replica, name)
        assert done.returncode == 0, done.stderr
        made.append(done.stdout.strip())
    alice, bob = made
    assert _make_key(replica, "bob").returncode == 2
    file = replica.folder / "keys.txt"
    assert hashlib.sha256(bob.encode()).hexdigest() in file.read_text()
    assert bob not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text(file.read_text().strip() + " 1\n")  # bob's line is the last

    replica.start("--bundle", tmp_path / "bundle", "--digest", digest)
    try:
        replica.wait_ready()
        for given in ({}, {"authorization": "Bearer x"}, {"authorization": alice}):
            answer = replica.post("/predict", ROW, **given)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        statuses = [_as(replica, alice).status for _ in range(20)]
        assert statuses == [200] * 20
        replies = [_as(replica, bob) for _ in range(3)]
        assert replies[0].status == 200
        assert (replies[-1].status, replies[-1].headers["retry-after"]) == (429, "1")
        assert replica.get("/v2/health/ready").status == 200
        assert replica.metric("headrace_requests_total", route="predict", status="401") == 3

        file.write_text(file.read_text().splitlines()[1] + "\n")
        replica.signal(signal.SIGHUP)
        until(lambda: _as(replica, alice).status == 401)
    finally:
        replica.signal(signal.SIGTERM)
        assert replica.ended() == 0


def _as(replica: Replica, key: str) -> Any:
    return replica.post("/predict", ROW, authorization=f"Bearer {key}")


def _make_key(replica: Replica, name: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "pipelines.deploy.serve.keys", name],
        cwd=replica.folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("keys", [".", "params.yaml/keys", "binary"])
def test_what_can_be_no_file_of_keys_is_one_line(tmp_path: Path, keys: str) -> None:
    replica = Replica(tmp_path)
    replica.configure(keys=keys)
    (tmp_path / "binary").write_bytes(b"\xff")
    done = _make_key(replica, "alice")
    assert done.returncode == 2
    assert done.stderr.startswith(f"keys: error: {keys}: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_key_with_no_requests_at_all_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {'0' * 64} 0\n")
    with pytest.raises(UserError, match="line 1: expected: name sha256"):
        Keys(file, None)


def test_a_fault_of_the_service_is_counted_and_shows_nothing(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = bundles.make(tmp_path / "bundle")
    holder = Holder(lambda: Named(tmp_path / "bundle", digest), None, params.serve)
    service = Service(params.serve, holder, None)
    monkeypatch.setattr(service.bodies, "read", lambda *_: {}["a secret"])
    app = routes.Door(routes.build(service))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/predict", json=ROW)

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()) == (500, {"error": "a fault of the service"})
    assert service.metrics.requests["predict", "500"] == 1


def test_old_captures_are_removed(tmp_path: Path, params: Params) -> None:
    settings = params.serve.capture.model_copy(update={"folder": str(tmp_path)})
    day, now = 86400 * 10**9, time.time_ns()
    kept = f"{now - (settings.retention_days - 1) * day}-1-a-b.parquet"
    for name in (kept, f"{now - (settings.retention_days + 1) * day}-1-a-b.parquet"):
        (tmp_path / name).touch()

    async def live() -> None:
        capture = Capture(settings, Metrics(lambda: ("", 1)))
        capture.end()
        await capture.run()

    asyncio.run(live())
    assert [file.name for file in tmp_path.iterdir()] == [kept]


def test_what_is_captured_as_a_replica_ends_is_written_too(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a slow disk that still writes what came before."""
    digest = bundles.make(tmp_path / "bundle")
    holder = Holder(lambda: Named(tmp_path / "bundle", digest), None, params.serve)
    settings = params.serve.capture.model_copy(
        update={"share": 1.0, "folder": str(tmp_path / "captured"), "rows": 1}
    )
    service = Service(params.serve.model_copy(update={"capture": settings}), holder, None)
    put = service.capture.shelf.put

    def slow(name: str, table: pa.Table) -> None:
        time.sleep(0.3)
        put(name, table)

    monkeypatch.setattr(service.capture.shelf, "put", slow)
    app = routes.Door(routes.build(service))

    async def live() -> None:
        writing = asyncio.create_task(service.capture.run())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            for _ in range(2):
                await client.post("/predict", json=ROW)
                await asyncio.sleep(0.1)
        service.capture.end()
        await writing

    asyncio.run(live())
    files = list((tmp_path / "captured").glob("*.parquet"))
    assert sum(tables.pq.read_metadata(file).num_rows for file in files) == 2
    assert service.metrics.captured == {"written": 2, "dropped": 0}


def test_a_bucket_gives_its_rate_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    held = Key("name", b"", rate=10.0, at=0.0)
    given = 0
    for tick in range(1000):
        now[0] = tick / 100
        with suppress(Refusal):
            held.take()
            given += 1
    assert given == pytest.approx(100, abs=1)
    held.left = 0.0
    with pytest.raises(Refusal) as refused:
        held.take()
    assert (refused.value.status, refused.value.headers) == (429, {"retry-after": "1"})
