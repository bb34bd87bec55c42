"""fetch from S3: what is there arrives whole, checked and once, whatever happens on the way."""

import functools
import re
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import boto3
import proxy
import pytest
from botocore.config import Config
from ingest.conftest import Lake
from proxy import Fault, Request
from world import Checkout

import pipelines.run
from pipelines import s3, stage
from pipelines.errors import TransientError, UserError
from pipelines.ingest import fetch, transfer

JANUARY = "flights/2013-01.csv"
BUSY = Fault(busy=True)
DAMAGE = (b"manufacturer", b"manufacturor")  # of planes.csv, on the way


def here() -> dict[str, bytes]:
    """All that is visible in data/raw."""
    files = {p.relative_to(fetch.RAW).as_posix(): p for p in fetch.RAW.rglob("*") if p.is_file()}
    return {
        name: path.read_bytes() for name, path in files.items() if not path.name.startswith(".")
    }


def partials() -> list[Path]:
    return list(fetch.RAW.rglob("*.partial"))


def once(part: str, fault: Fault, also: Callable[[], object] = lambda: None) -> Callable:
    """A rule: the first time that an object is asked for, do this and break so."""
    told: list[Request] = []

    def rule(request: Request) -> Fault | None:
        if request.method == "GET" and part in request.path and not told:
            told.append(request)
            also()
            return fault
        return None

    return rule


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "client", functools.partial(s3.client, attempts=2))


def in_parts(lake: Lake, name: str, body: bytes, part: int) -> None:
    """Upload with parts of a size that is not ours, as others may."""
    place = {"Bucket": lake.bucket, "Key": f"{lake.prefix}/{name}"}
    upload = lake.client.create_multipart_upload(**place)["UploadId"]
    parts = [
        lake.client.upload_part(
            **place, UploadId=upload, PartNumber=number, Body=body[start : start + part]
        )
        for number, start in enumerate(range(0, len(body), part), start=1)
    ]
    named = [{"PartNumber": n, "ETag": one["ETag"]} for n, one in enumerate(parts, start=1)]
    lake.client.complete_multipart_upload(
        **place, UploadId=upload, MultipartUpload={"Parts": named}
    )


def large(checkout: Checkout, size: int) -> bytes:
    """planes.csv over and over: real lines, no two parts alike."""
    lines = (checkout.source / "planes.csv").read_bytes()
    return b"".join(b"%d,%s" % (n, lines) for n in range(size // len(lines) + 1))[:size]


def test_what_is_there_is_read_once(filled: Lake, checkout: Checkout) -> None:
    params = checkout.params()
    fetch.run(params)
    assert here() == filled.files()
    filled.proxy.requests.clear()
    assert not fetch.changed(params)
    fetch.run(params)
    assert {request.path.partition("?")[0] for request in filled.proxy.requests} == {"/lake"}
    changed = filled.files()[JANUARY][:-50].rpartition(b"\n")[0] + b"\n"
    filled.put(JANUARY, changed)
    assert fetch.changed(params)
    fetch.run(params)
    (asked,) = filled.proxy.asked("GET", f"{filled.prefix}/")
    assert JANUARY in asked.path
    assert here()[JANUARY] == changed


def test_objects_come_side_by_side(filled: Lake, checkout: Checkout) -> None:
    meeting = filled.meeting("GET")
    fetch.run(checkout.params())
    assert not meeting.broken


def test_an_object_in_parts_is_read_once(filled: Lake, checkout: Checkout) -> None:
    """Its ETag is no MD5 of it, and with parts of another size than ours says nothing at all."""
    in_parts(filled, "planes.csv", large(checkout, 7 << 20), part=5 << 20)
    filled.client.put_object(
        Bucket="lake", Key=f"{filled.prefix}/airports.csv", Body=large(checkout, 9 << 20)
    )  # in one part, though we would take two
    params = checkout.params()
    fetch.run(params)
    assert here() == filled.files()
    filled.proxy.requests.clear()
    assert not fetch.changed(params)
    fetch.run(params)
    assert not filled.proxy.asked("GET", f"{filled.prefix}/")


def test_an_object_in_parts_of_the_usual_size_needs_no_note(
    filled: Lake, checkout: Checkout, tmp_path: Path
) -> None:
    (tmp_path / "planes.csv").write_bytes(large(checkout, 17 << 20))
    filled.client.upload_file(str(tmp_path / "planes.csv"), "lake", f"{filled.prefix}/planes.csv")
    fetch.run(checkout.params())
    assert not filled.proxy.asked("HEAD")  # its ETag proved it
    for note in (stage.STATE / "fetch").rglob("*.txt"):
        note.unlink()
    assert not fetch.changed(checkout.params())


@pytest.mark.parametrize("checksum", ["when_supported", "when_required"])
def test_an_etag_that_is_no_hash_is_not_taken_for_one(
    checkout: Checkout, s3: str, monkeypatch: pytest.MonkeyPatch, checksum: str
) -> None:
    """Under a key of KMS it looks like an MD5 and is another's."""
    bucket = f"kms-{checksum.replace('_', '-')}"
    etag = under_kms(checkout, bucket, checksum).encode()
    with proxy.before(s3) as between:
        between.disguise = (etag, etag[::-1])
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        fetch.run(checkout.params())
        between.requests.clear()
        fetch.run(checkout.params())
        assert not between.asked("GET", ".csv")
    assert here()["planes.csv"] == (checkout.source / "planes.csv").read_bytes()


def test_the_checksum_tells_where_the_etag_does_not(
    checkout: Checkout, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_kms(checkout, "kms-damaged", "when_supported")
    with proxy.before(s3) as between:
        between.disguise = DAMAGE
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        with pytest.raises(TransientError, match=r"planes\.csv arrived with other bytes than its"):
            fetch.run(checkout.params())
    assert "planes.csv" not in here()


def under_kms(checkout: Checkout, bucket: str, checksum: str) -> str:
    """Put the source there, and let fetch fetch it; the ETag of planes.csv."""
    client = boto3.client("s3", config=Config(request_checksum_calculation=checksum))
    client.create_bucket(Bucket=bucket)
    checkout.set(fetch={"source": f"s3://{bucket}"})
    etags = {}
    for path in checkout.source.rglob("*.csv"):
        key = path.relative_to(checkout.source).as_posix()
        made = client.put_object(
            Bucket=bucket, Key=key, Body=path.read_bytes(), ServerSideEncryption="aws:kms"
        )
        etags[key] = made["ETag"].strip('"')
    return etags["planes.csv"]


def test_a_storm_that_ends_is_waited_for(filled: Lake, checkout: Checkout) -> None:
    seen: dict[str, int] = {}

    def rule(request: Request) -> Fault | None:
        """The first two attempts of everything."""
        seen[request.path] = seen.get(request.path, 0) + 1
        return BUSY if seen[request.path] <= 2 else None

    filled.proxy.rule = rule
    fetch.run(checkout.params())
    assert here() == filled.files()


def test_a_storm_without_an_end_is_one_line(
    filled: Lake,
    checkout: Checkout,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status 1: a scheduler may try again later."""
    impatient(monkeypatch)
    filled.proxy.rule = lambda request: BUSY if "weather" in request.path else None
    assert stage.guarded("fetch", fetch.run) == 1
    (line,) = capsys.readouterr().err.splitlines()
    where = rf"s3://lake/{filled.prefix}/weather/2013-0\d\.csv"
    assert re.fullmatch(rf"fetch: fault: {where} cannot be read: SlowDown: .*", line)
    assert not partials() or all(path.stat().st_size == 0 for path in partials())
    filled.proxy.rule = lambda _: None
    fetch.run(checkout.params())
    assert here() == filled.files()


def test_a_cut_connection_goes_on_where_it_stood(filled: Lake, checkout: Checkout) -> None:
    body = large(checkout, 6 << 20)
    filled.put("planes.csv", body)
    filled.proxy.rule = once("planes.csv", Fault(after=4_000_000))
    fetch.run(checkout.params())
    assert here()["planes.csv"] == body
    served = [request.served for request in filled.proxy.asked("GET", "planes.csv")]
    assert served == [4_000_000, len(body) - 4_000_000]


def test_a_killed_fetch_goes_on_where_it_stood(filled: Lake, checkout: Checkout) -> None:
    body = large(checkout, 6 << 20)
    filled.put("planes.csv", body)
    filled.proxy.rule = once("planes.csv", Fault(hold=True, after=5_000_000))
    process = checkout.start("pipelines.ingest.fetch")
    wait(lambda: any(path.stat().st_size == 4 << 20 for path in partials()))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    whole = filled.files()
    assert "planes.csv" not in here()
    assert all(whole[name] == held for name, held in here().items())
    ended = checkout.run("pipelines.ingest.fetch")
    assert ended.status == 0, ended
    assert here() == whole
    assert not partials()
    assert filled.proxy.asked("GET", "planes.csv")[-1].served == len(body) - (4 << 20)


def test_what_a_killed_fetch_began_of_another_version_is_of_no_use(
    filled: Lake, checkout: Checkout
) -> None:
    filled.put("planes.csv", large(checkout, 6 << 20))
    filled.proxy.rule = once("planes.csv", Fault(hold=True, after=5_000_000))
    process = checkout.start("pipelines.ingest.fetch")
    wait(lambda: any(path.stat().st_size == 4 << 20 for path in partials()))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    body = large(checkout, 7 << 20)[1 << 20 :]
    filled.put("planes.csv", body)
    fetch.run(checkout.params())
    assert here() == filled.files()
    assert not partials()


def test_an_object_that_changes_while_it_is_read_is_one_line(
    filled: Lake, checkout: Checkout
) -> None:
    new = large(checkout, 6 << 20)[1:]
    filled.put("planes.csv", large(checkout, 6 << 20))
    filled.proxy.rule = once(
        "planes.csv", Fault(after=4_000_000), also=lambda: filled.put("planes.csv", new)
    )
    # Whichever version the first request met, its end is of the same one or is not taken.
    with pytest.raises(TransientError, match=r"planes\.csv cannot be read: it changed meanwhile;"):
        fetch.run(checkout.params())
    assert "planes.csv" not in here()
    fetch.run(checkout.params())
    assert here() == filled.files()


def test_a_bucket_that_vanishes_is_one_line(
    checkout: Checkout, lake: Lake, capsys: pytest.CaptureFixture[str]
) -> None:
    lake.client.create_bucket(Bucket="passing")
    passing = Lake(lake.client, lake.proxy, "passing", "raw")
    passing.fill(checkout.source)
    checkout.set(fetch={"source": passing.url})
    lake.proxy.rule = once("/passing/raw/", Fault(), also=passing.drop)
    assert stage.guarded("fetch", fetch.run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"fetch: error: s3://passing/raw/\S+ cannot be read: NoSuch.*", line)
    for name, held in here().items():  # what came before
        assert held == (checkout.source / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"),
        (None, "Unable to locate credentials"),
    ],
)
def test_wrong_credentials_are_one_line(
    filled: Lake,
    checkout: Checkout,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str | None,
    said: str,
) -> None:
    if name:
        monkeypatch.setenv(name, "wrong")
    else:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    assert stage.guarded("fetch", fetch.run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fetch: error: {filled.url} cannot be listed: {said}")
    assert not here()


def test_an_endpoint_where_nobody_answers_is_one_line(
    filled: Lake,
    checkout: Checkout,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    impatient(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert stage.guarded("fetch", fetch.run) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f'{filled.url} cannot be listed: Could not connect to the endpoint URL: "http://' in line


def test_a_run_that_cannot_ask_the_source_is_one_line(
    filled: Lake,
    checkout: Checkout,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fetch.run(checkout.params())
    impatient(monkeypatch)
    filled.proxy.rule = lambda _: BUSY
    monkeypatch.setattr(sys, "argv", ["run"])
    assert pipelines.run.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"run: fault: {filled.url} cannot be listed: SlowDown: Reduce")


def test_bytes_that_are_not_the_objects_are_not_taken(filled: Lake, checkout: Checkout) -> None:
    filled.proxy.disguise = DAMAGE
    with pytest.raises(TransientError, match=r"planes\.csv arrived with other bytes than its own"):
        fetch.run(checkout.params())
    assert "planes.csv" not in here()
    filled.proxy.disguise = (b"", b"")
    fetch.run(checkout.params())
    assert here() == filled.files()


def test_a_listing_of_many_pages_is_read_to_its_end(filled: Lake, checkout: Checkout) -> None:
    for number in range(1_001):  # before the months, in the order of a listing
        filled.put(f"flights/.notes/{number:04}", b"")
    fetch.run(checkout.params())
    assert len([name for name in here() if name.startswith("flights/")]) == 5
    assert len(filled.proxy.asked("GET", "list-type=2")) == 2


def test_names_that_lead_elsewhere_are_left_out_or_refused(
    checkout: Checkout, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """SeaweedFS takes none of them; other servers do."""
    client = boto3.client("s3")
    client.create_bucket(Bucket="odd")
    for path in checkout.source.rglob("*.csv"):
        client.upload_file(str(path), "odd", f"raw/{path.relative_to(checkout.source).as_posix()}")
    left = ["../flights.csv", "/etc/passwd", "planes/../../x.csv", "flights\\2014-01.csv", "a\tb"]
    for name in [*left, "flights/", ""]:
        client.put_object(Bucket="odd", Key=f"raw/{name}", Body=b"x")
    checkout.set(fetch={"source": "s3://odd/raw"})
    fetch.run(checkout.params())
    said = capsys.readouterr().out
    assert sorted(re.findall(r"s3://odd/raw: (.*) is left out: it may lead elsewhere", said)) == (
        sorted([*left[:-1], "'a\\tb'"])
    )
    assert len(here()) == 13
    for name in ("flights/../2014-01.csv", "flights/2014-01.csv\0", "flights//2014-01.csv"):
        client.put_object(Bucket="odd", Key=f"raw/{name}", Body=b"x")
        with pytest.raises(UserError, match=r"2014-01\S+ is no month of flights") as refused:
            fetch.run(checkout.params())
        assert str(refused.value).isprintable()
        client.delete_object(Bucket="odd", Key=f"raw/{name}")


def test_no_object_is_held_in_memory(filled: Lake, checkout: Checkout) -> None:
    body = large(checkout, 48 << 20)
    filled.put("planes.csv", body)
    del body
    params = checkout.params()
    tracemalloc.start()
    try:
        fetch.run(params)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (fetch.RAW / "planes.csv").stat().st_size == 48 << 20
    assert peak < 30 << 20  # 8 threads with some pieces each, and boto3 itself


def test_a_long_transfer_tells_how_far_it_is(
    filled: Lake,
    checkout: Checkout,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(transfer, "EVERY", 0.0)
    filled.put("planes.csv", large(checkout, 4 << 20))
    fetch.run(checkout.params())
    said = re.findall(r"^fetch: \d+ of 13 files, (\d+) MB so far$", capsys.readouterr().out, re.M)
    assert [int(mb) for mb in said] == sorted(map(int, said))
    assert int(said[-1]) >= 4


def test_two_at_once_are_told(checkout: Checkout) -> None:
    with (
        stage.alone(stage.STATE / "fetch.lock", "busy"),
        pytest.raises(UserError, match="another fetch is at work in"),
    ):
        fetch.run(checkout.params())


def wait(until: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)
