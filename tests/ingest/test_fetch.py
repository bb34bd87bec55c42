"""fetch copies what is new, before the clock, whole; every source gives the same files."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from world import Checkout

from pipelines.errors import TransientError, UserError
from pipelines.ingest import fetch, transfer


def _files() -> dict[str, str]:
    return {
        path.relative_to(fetch.RAW).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()
        for path in fetch.RAW.rglob("*")
        if path.is_file()
    }


def test_a_folder_is_copied_up_to_the_clock(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.set(as_of="2013-04-01")
    fetch.run(checkout.params())
    assert "flights/2013-03.csv" in _files()
    assert "flights/2013-04.csv" not in _files()
    for name, digest in _files().items():
        assert hashlib.md5((checkout.source / name).read_bytes()).hexdigest() == digest
    assert "9 files, 9 new or changed" in capsys.readouterr().out


def test_only_what_changed_is_copied_again(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    params = checkout.params()
    fetch.run(params)
    assert not fetch.changed(params)
    path = checkout.source / "flights" / "2013-02.csv"
    path.write_bytes(path.read_bytes()[:-200].rpartition(b"\n")[0] + b"\n")
    assert fetch.changed(params)
    capsys.readouterr()
    fetch.run(params)
    assert ", 1 new or changed" in capsys.readouterr().out
    assert not fetch.changed(params)


def test_an_earlier_clock_forgets_later_months(checkout: Checkout) -> None:
    fetch.run(checkout.params())
    whole = _files()
    checkout.set(as_of="2013-03-01")
    fetch.run(checkout.params())
    assert "flights/2013-03.csv" not in _files()
    checkout.set(as_of="2013-06-01")
    fetch.run(checkout.params())
    assert _files() == whole


def test_a_partial_file_of_a_killed_run_is_removed(checkout: Checkout) -> None:
    fetch.run(checkout.params())
    (fetch.RAW / "flights" / ".2013-01.csv.partial").write_text("half")
    fetch.run(checkout.params())
    assert not list(fetch.RAW.rglob("*.partial"))


def test_a_future_month_is_never_read(checkout: Checkout) -> None:
    (checkout.source / "flights" / "2014-07.csv").write_text("nothing that could be read\n")
    fetch.run(checkout.params())
    assert "flights/2014-07.csv" not in _files()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda s: (s / "flights" / "2013-03.csv").unlink(),
            r"flights/2013-03\.csv is missing; later months",
        ),
        (
            lambda s: (s / "flights" / "2013-05.csv").unlink(),
            r"flights/2013-05\.csv is missing; weather has months up to 2013-05",
        ),
        (lambda s: (s / "planes.csv").unlink(), r"table planes is missing; expected planes\.csv"),
        (lambda s: [p.unlink() for p in (s / "weather").iterdir()], "table weather is missing"),
        (
            lambda s: ((s / "planes.csv").unlink(), (s / "planes.csv").mkdir()),
            r"planes\.csv cannot be read: Is a dir",
        ),
    ],
)
def test_a_broken_folder_is_one_line(checkout: Checkout, spoil: object, said: str) -> None:
    spoil(checkout.source)  # type: ignore[operator]
    with pytest.raises(UserError, match=said):
        fetch.run(checkout.params())


def test_a_folder_of_months_is_named(checkout: Checkout) -> None:
    """Whoever keeps a folder for each year would miss all its rows."""
    months = checkout.source / "flights"
    (months / "2012").mkdir()
    (months / "2013-05.csv").rename(months / "2012" / "12.csv")
    with pytest.raises(UserError, match="flights/2012 is no month of flights; expected"):
        fetch.run(checkout.params())


@pytest.mark.parametrize("name", ["2013-5.csv", "2013-05.csv.gz", "2013-05.CSV", "may.csv"])
def test_a_file_that_is_no_month_is_named(checkout: Checkout, name: str) -> None:
    """Nobody would miss its rows."""
    folder = checkout.source / "flights"
    (folder / "2013-05.csv").rename(folder / name)
    with pytest.raises(UserError, match=f"flights/{re.escape(name)} is no month of flights; exp"):
        fetch.run(checkout.params())
    (folder / name).rename(folder / "2013-05.csv")
    for other in (".DS_Store", "_SUCCESS"):
        (folder / other).touch()
    fetch.run(checkout.params())


def _out(source: Path) -> Path:
    """A file beside the source, which is no business of it."""
    return Path(shutil.copy(source / "planes.csv", source.parent / "secret.csv"))


def _swap(link: Path, target: Path | str) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda s: _swap(s / "planes.csv", _out(s)),
            r"planes\.csv leads to .*; expected a file in",
        ),
        (lambda s: _swap(s / "planes.csv", "../source/../secret.csv"), r"planes\.csv leads to "),
        (
            lambda s: (
                (s / "flights").rename(s.parent / "moved"),
                _swap(s / "flights", "../moved"),
            ),
            r"flights/2013-0\d\.csv leads to .*/moved/2013-0\d\.csv; expected",
        ),
        (lambda s: _swap(s / "planes.csv", "nowhere"), r"planes\.csv cannot be read: No such file"),
        (lambda s: _swap(s / "planes.csv", "planes.csv"), r"planes\.csv cannot be read: .*link"),
        (
            lambda s: ((s / "planes.csv").unlink(), os.mkfifo(s / "planes.csv")),
            r"planes\.csv cannot be read: it is no regular file",
        ),
    ],
)
def test_what_leads_out_of_the_folder_is_one_line(
    checkout: Checkout, spoil: object, said: str
) -> None:
    _out(checkout.source)
    spoil(checkout.source)  # type: ignore[operator]
    with pytest.raises(UserError, match=said):
        fetch.run(checkout.params())
    led = "flights/*.csv" if "flights" in said else "planes.csv"
    assert not list(fetch.RAW.glob(led))


def test_a_link_that_stays_in_the_folder_is_a_file(checkout: Checkout) -> None:
    plain = (checkout.source / "planes.csv").read_bytes()
    (checkout.source / "planes.csv").rename(checkout.source / "planes-2.csv")
    (checkout.source / "planes.csv").symlink_to("planes-2.csv")
    fetch.run(checkout.params())
    assert (fetch.RAW / "planes.csv").read_bytes() == plain
    assert not (fetch.RAW / "planes.csv").is_symlink()


def test_a_file_that_changes_while_it_is_read_is_not_taken(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkout.source / "planes.csv"
    read = transfer.pieces

    def and_written(one: Path, size: int) -> Iterator[bytes]:
        yield from read(one, size)
        if one == path:
            path.write_bytes(path.read_bytes() + b"more\n")

    monkeypatch.setattr(transfer, "pieces", and_written)
    with pytest.raises(TransientError, match=r"planes\.csv changed while it was read; run again"):
        fetch.run(checkout.params())
    assert not (fetch.RAW / "planes.csv").exists()


def test_a_bucket_without_a_name_is_one_line(checkout: Checkout) -> None:
    checkout.set(fetch={"source": "s3://"})
    with pytest.raises(UserError, match=r"fetch\.source: s3:// names no bucket; expected s3://b"):
        fetch.run(checkout.params())


def test_no_folder_is_one_line(checkout: Checkout) -> None:
    checkout.set(fetch={"source": "nowhere"})
    with pytest.raises(UserError, match=r"fetch\.source: nowhere is not a folder"):
        fetch.run(checkout.params())


@pytest.mark.parametrize("folder", ["data/raw", "data", "data/raw/flights"])
def test_what_fetch_would_prune_is_no_source(checkout: Checkout, folder: str) -> None:
    Path(folder).mkdir(parents=True)
    checkout.set(fetch={"source": folder})
    with pytest.raises(UserError, match=rf"fetch\.source: {folder} overlaps data/raw"):
        fetch.run(checkout.params())


def test_no_month_before_the_clock_is_one_line(checkout: Checkout) -> None:
    checkout.set(as_of="2012-01-01")
    with pytest.raises(UserError, match="has no month before as_of 2012-01-01"):
        fetch.run(checkout.params())


@pytest.fixture
def bucket(checkout: Checkout, s3: str) -> str:
    """The small source on an S3 server."""
    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket="lake")
    for path in checkout.source.rglob("*.csv"):
        client.upload_file(str(path), "lake", f"raw/{path.relative_to(checkout.source).as_posix()}")
    return "s3://lake/raw"


def test_a_bucket_gives_what_the_folder_gives(checkout: Checkout, bucket: str) -> None:
    fetch.run(checkout.params())
    folder = _files()
    for path in fetch.RAW.rglob("*.csv"):
        path.unlink()
    checkout.set(fetch={"source": bucket})
    fetch.run(checkout.params())
    assert _files() == folder
    assert not fetch.changed(checkout.params())


def test_a_missing_bucket_is_one_line(checkout: Checkout, bucket: str) -> None:
    checkout.set(fetch={"source": "s3://elsewhere/raw"})
    with pytest.raises(UserError, match=r"s3://elsewhere/raw cannot be listed: .*NoSuchBucket"):
        fetch.run(checkout.params())


def test_the_sample_is_cut_without_loss(params: object, tmp_path: Path) -> None:
    from world import ROOT

    from pipelines import params as parameters

    files = fetch.listing(parameters.load(ROOT / "params.yaml"))
    lines = sum(file.content.count(b"\n") - 1 for file in files if file.name.startswith("flights/"))
    assert lines == 336_776
