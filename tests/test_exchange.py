"""put is whole or absent, put_new has one winner: in a folder and in a bucket."""

import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import UserError
from pipelines.exchange import Exchange, Folder, at, plain

VALUES = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20), max_size=4)


@pytest.fixture(params=["folder", "bucket"])
def exchange(request: pytest.FixtureRequest, tmp_path: Path) -> Exchange:
    if request.param == "folder":
        return at(str(tmp_path))
    return at(f"{request.getfixturevalue('race_url')}/deep/prefix")


def test_what_was_put_is_got(exchange: Exchange) -> None:
    @settings(max_examples=30, deadline=None)
    @given(value=VALUES)
    def holds(value: dict[str, object]) -> None:
        exchange.put("a/b/c.json", value)
        assert exchange.get("a/b/c.json") == value

    holds()
    assert exchange.get("a/nothing.json") is None


def test_names_are_those_below_the_folder(exchange: Exchange) -> None:
    for name in ("runs/one/b.json", "runs/one/a.json", "runs/one-more/c.json"):
        exchange.put(name, {})
    assert exchange.names("runs/one") == ["runs/one/a.json", "runs/one/b.json"]
    assert exchange.names("runs/none") == []


def test_of_many_at_once_one_puts(exchange: Exchange) -> None:
    for round_ in range(20 if isinstance(exchange, Folder) else 5):  # a bucket takes seconds each
        gate = threading.Barrier(8)

        def put(number: int, name: str = f"race/{round_}.json", gate: object = gate) -> bool:
            gate.wait()  # type: ignore[attr-defined]
            return exchange.put_new(name, {"writer": number})

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(put, range(8)))
        assert won.count(True) == 1
        assert exchange.get(f"race/{round_}.json") == {"writer": won.index(True)}


def test_a_writer_killed_at_any_moment_leaves_all_or_nothing(tmp_path: Path) -> None:
    value = {str(number): "x" * 1000 for number in range(500)}
    folder = Folder(tmp_path)
    for trial in range(40):
        child = os.fork()
        if child == 0:
            for number in range(1000):
                folder.put(f"kill/{number}.json", value)
            os._exit(0)
        time.sleep(0.002 * (trial % 10))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for name in folder.names("kill"):
            assert json.loads((tmp_path / name).read_bytes()) == value


def test_two_runs_never_have_one_name() -> None:
    runs = ["p.10", "p-10", "日本", "東京", "a+b", "a-b", "a b"]
    parts = [*(("retrain", run) for run in runs), ("retrain-a", "b")]
    names = [plain(*one) for one in parts]
    assert len(set(names)) == len(parts)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names)
    assert plain("retrain", "may") == "retrain-may"


def test_a_remote_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="gs://bucket/dvc is neither a folder nor s3://"):
        at("gs://bucket/dvc")
