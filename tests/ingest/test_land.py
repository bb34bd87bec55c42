"""land: what is in the folder is in the bucket afterwards, whole, once; nothing there is lost."""

import os
import re
import signal

import pytest
from ingest.conftest import Lake
from ingest.test_fetch_s3 import BUSY, impatient, large, wait
from proxy import Fault, Request
from world import Checkout

from pipelines import stage
from pipelines.errors import TransientError, UserError
from pipelines.ingest import fetch, land

PART = 8 << 20  # bytes of a part
SAID = "13 files, {} new, {} replaced, {} already there, at"


def run(checkout: Checkout, lake: Lake) -> None:
    land.run(checkout.params(), str(checkout.source), lake.url)


def source(checkout: Checkout) -> dict[str, bytes]:
    return {
        path.relative_to(checkout.source).as_posix(): path.read_bytes()
        for path in checkout.source.rglob("*.csv")
    }


def writes(lake: Lake) -> list[Request]:
    return lake.proxy.asked("PUT") + lake.proxy.asked("POST") + lake.proxy.asked("DELETE")


def parts(lake: Lake) -> list[int]:
    """The numbers of the parts that were sent, in their order."""
    paths = [request.path for request in lake.proxy.asked("PUT", "partNumber=")]
    return [int(re.findall(r"partNumber=(\d+)", path)[0]) for path in paths]


def test_what_was_landed_is_what_fetch_brings(checkout: Checkout, lake: Lake) -> None:
    (checkout.source / "planes.csv").write_bytes(large(checkout, 2 * PART + 1))
    (checkout.source / "airports.csv").write_bytes(large(checkout, PART))
    (checkout.source / "README.txt").write_text("no table")
    run(checkout, lake)
    assert lake.files() == source(checkout)
    checkout.set(fetch={"source": lake.url})
    fetch.run(checkout.params())
    for name, body in source(checkout).items():
        assert (fetch.RAW / name).read_bytes() == body


def test_files_go_side_by_side(checkout: Checkout, lake: Lake) -> None:
    meeting = lake.meeting("PUT")
    run(checkout, lake)
    assert not meeting.broken


def test_told_twice_it_acts_once(
    checkout: Checkout, lake: Lake, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout.source / "planes.csv").write_bytes(large(checkout, 2 * PART + 1))
    run(checkout, lake)
    assert SAID.format(13, 0, 0) in capsys.readouterr().out
    lake.proxy.requests.clear()
    run(checkout, lake)
    assert SAID.format(0, 0, 13) in capsys.readouterr().out
    assert not writes(lake)


def test_a_corrected_file_is_replaced_and_said_and_nothing_is_deleted(
    checkout: Checkout, lake: Lake, capsys: pytest.CaptureFixture[str]
) -> None:
    run(checkout, lake)
    lake.put("notes/of/others", b"kept")
    path = checkout.source / "flights" / "2013-02.csv"
    path.write_bytes(path.read_bytes().replace(b"N", b"M", 1))  # of the same length
    (checkout.source / "flights" / "2013-03.csv").unlink()
    before = lake.files()
    capsys.readouterr()
    run(checkout, lake)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "land: flights/2013-02.csv was there with other bytes and is replaced"
    assert said[1].startswith("land: 12 files, 0 new, 1 replaced, 11 already there, at s3://")
    assert lake.files() == before | {"flights/2013-02.csv": path.read_bytes()}


def test_a_month_is_landed_beside_those_that_are_there(checkout: Checkout, lake: Lake) -> None:
    only = checkout.source.parent / "june" / "flights"
    only.mkdir(parents=True)
    (only / "2013-06.csv").write_text("year,month\n")
    with pytest.raises(UserError, match=r"june and s3://.*: table weather is missing; expected"):
        land.run(checkout.params(), str(only.parent), lake.url)
    assert not lake.files()
    run(checkout, lake)
    land.run(checkout.params(), str(only.parent), lake.url)
    assert lake.files() == source(checkout) | {"flights/2013-06.csv": b"year,month\n"}


def test_a_killed_land_goes_on_where_it_stood(checkout: Checkout, lake: Lake) -> None:
    (checkout.source / "planes.csv").write_bytes(large(checkout, 3 * PART + 1))
    held: list[Request] = []

    def rule(request: Request) -> Fault | None:
        if "partNumber=3" in request.path and not held:
            held.append(request)
            return Fault(hold=True)
        return None

    lake.proxy.rule = rule
    command = f"pipelines.ingest.land {checkout.source} {lake.url}"
    process = checkout.start(command)
    wait(lambda: bool(held))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    whole = source(checkout)
    assert "planes.csv" not in lake.files()
    assert all(whole[name] == body for name, body in lake.files().items())
    ended = checkout.run(command)
    assert ended.status == 0, ended
    assert lake.files() == whole
    assert parts(lake) == [1, 2, 3, 3, 4]


def test_what_a_killed_land_sent_of_another_version_is_sent_again(
    checkout: Checkout, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkout.source / "planes.csv"
    path.write_bytes(large(checkout, 2 * PART + 1))
    impatient(monkeypatch)
    lake.proxy.rule = lambda request: BUSY if "partNumber=3" in request.path else None
    with pytest.raises(TransientError, match=r"planes\.csv cannot be written: SlowDown: Reduce"):
        run(checkout, lake)
    path.write_bytes(b"id" + path.read_bytes()[2:])
    lake.proxy.rule = lambda _: None
    lake.proxy.requests.clear()
    run(checkout, lake)
    assert lake.files() == source(checkout)
    assert parts(lake) == [1, 3]


def test_a_file_that_changes_while_it_is_sent_is_not_visible(
    checkout: Checkout, lake: Lake
) -> None:
    path = checkout.source / "planes.csv"
    path.write_bytes(large(checkout, 2 * PART + 1))

    def rule(request: Request) -> None:
        if "partNumber=2" in request.path:
            path.write_bytes(path.read_bytes() + b"more\n")

    lake.proxy.rule = rule
    with pytest.raises(TransientError, match=r"planes\.csv changed while it was read; run again"):
        run(checkout, lake)
    assert "planes.csv" not in lake.files()


@pytest.mark.parametrize("size", [1000, PART + 1])
def test_what_another_landed_meanwhile_is_not_overwritten(
    checkout: Checkout, lake: Lake, size: int
) -> None:
    (checkout.source / "planes.csv").write_bytes(large(checkout, size))

    def rule(request: Request) -> None:
        if "planes.csv" in request.path and request.method in ("PUT", "POST"):
            lake.put("planes.csv", b"theirs")

    lake.proxy.rule = rule
    with pytest.raises(TransientError, match=r"planes\.csv does not hold the bytes of .*; run ag"):
        run(checkout, lake)
    assert lake.files()["planes.csv"] == b"theirs"


@pytest.mark.parametrize("size", [1000, PART + 1])
def test_an_answer_that_was_lost_is_no_failure(checkout: Checkout, lake: Lake, size: int) -> None:
    """The request is sent again, and meets what the first one did."""
    (checkout.source / "planes.csv").write_bytes(large(checkout, size))
    lost: list[str] = []

    def rule(request: Request) -> Fault | None:
        last = "PUT" if size < PART else "POST"
        ends = request.method == last and "uploads" not in request.path
        if "planes.csv" in request.path and ends and not lost:
            lost.append(request.path)
            return Fault(lose=True)
        return None

    lake.proxy.rule = rule
    run(checkout, lake)
    assert lost
    assert lake.files() == source(checkout)


def test_a_storm_that_ends_is_waited_for(checkout: Checkout, lake: Lake) -> None:
    (checkout.source / "planes.csv").write_bytes(large(checkout, PART + 1))
    seen: set[str] = set()

    def rule(request: Request) -> Fault | None:
        first = f"{request.method} {request.path}" not in seen
        seen.add(f"{request.method} {request.path}")
        return BUSY if first else None

    lake.proxy.rule = rule
    run(checkout, lake)
    assert lake.files() == source(checkout)


def test_a_wrong_secret_is_one_line(
    checkout: Checkout,
    lake: Lake,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert stage.guarded("land", lambda _: run(checkout, lake)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"land: error: {lake.url} cannot be listed: SignatureDoesNotMatch")


def test_a_bucket_is_never_made(checkout: Checkout, lake: Lake) -> None:
    """SeaweedFS would make it for whoever writes into it."""
    with pytest.raises(UserError, match=r"s3://nowhere/raw cannot be listed: NoSuchBucket"):
        land.run(checkout.params(), str(checkout.source), "s3://nowhere/raw")
    names = [one["Name"] for one in lake.client.list_buckets()["Buckets"]]
    assert "nowhere" not in names


@pytest.mark.parametrize(
    ("folder", "to", "said"),
    [
        ("", "s3://lake/raw", "SOURCE: nothing is not a folder; expected make land SOURCE="),
        ("nowhere", "s3://lake/raw", "SOURCE: nowhere is not a folder; expected make land SOURCE="),
        ("SOURCE", "", "TO: nothing names no bucket; expected s3://bucket/prefix"),
        ("SOURCE", "some/folder", "TO: some/folder names no bucket; expected s3://"),
        (".dvc", "s3://lake/raw", r"SOURCE: \.dvc holds no file of flights: flights, weather, "),
    ],
)
def test_what_cannot_be_landed_is_one_line(
    checkout: Checkout, lake: Lake, folder: str, to: str, said: str
) -> None:
    place = str(checkout.source) if folder == "SOURCE" else folder
    with pytest.raises(UserError, match=said):
        land.run(checkout.params(), place, to)


def test_a_file_that_is_none_leaves_no_other_there(checkout: Checkout, lake: Lake) -> None:
    file = checkout.source / "flights" / "2013-02.csv"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"flights/2013-02\.csv cannot be read: it is no regular"):
        run(checkout, lake)
    assert not lake.files()


def test_a_folder_laid_out_otherwise_is_one_line(checkout: Checkout, lake: Lake) -> None:
    (checkout.source / "flights" / "2013-01.csv").rename(checkout.source / "flights" / "jan.csv")
    with pytest.raises(UserError, match=r"flights/jan\.csv is no month of flights; expected"):
        run(checkout, lake)
    assert not lake.files()
