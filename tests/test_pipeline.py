"""The whole way on a small world: runs, the same lock twice, killed stages, a full disk."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from deploy.replica import until
from world import Checkout, lenient

from pipelines import tracking

pytestmark = pytest.mark.pipeline
ORDER = ["ingest.fetch", "ingest.load", "ingest.validate", "ingest.featurize",
         "train.fit", "train.evaluate", "train.package", "train.card",
         "deploy.score", "deploy.drift"]  # fmt: skip
OUTS = {
    "ingest.load": ["data/events"], "ingest.validate": ["data/accepted", "data/quarantine"],
    "ingest.featurize": ["data/features"], "train.fit": ["models/fit"],
    "train.evaluate": ["reports/evaluate/verdict.json"], "train.package": ["models/bundle"],
    "train.card": ["reports/model_card.md"],
    "deploy.score": ["data/predictions"], "deploy.drift": ["reports/drift/verdict.json"],
}  # fmt: skip


@pytest.fixture
def small(checkout: Checkout) -> Checkout:
    """A checkout in which training is short and the verdict lenient, under git and DVC."""
    return lenient(checkout)


def test_a_run_ends_in_one_screen_and_a_second_changes_nothing(small: Checkout) -> None:
    first = small.run("pipelines.run")
    assert first.status == 0, first
    for said in ("in quarantine", "gradient boosting", "calibration error", "drift ",
                 "flights version 1, ", "peak MB", "engine-flights.html",
                 "model_card.html", "mlflow server"):  # fmt: skip
        assert said in first.out
    assert "Traceback" not in first.out + first.err
    lock = (small.folder / "dvc.lock").read_bytes()

    store, _ = tracking.client(small.params())
    store.set_registered_model_alias("flights", "challenger", "1")
    second = small.run("pipelines.run")
    assert second.status == 0, second
    assert "Nothing changed, nothing ran" in second.out
    assert "flights version 1, challenger" in second.out
    assert "next        make gate, then make release beside make serve" in second.out
    assert "is not of this run" not in second.out
    assert (small.folder / "dvc.lock").read_bytes() == lock

    # DVC brings a verdict back from its cache, and no page.
    limit = small.params().drift.max_prediction_drift
    small.set(drift={"max_prediction_drift": 0.0})
    assert "is not of this run" not in small.run("pipelines.run").out
    small.set(drift={"max_prediction_drift": limit})
    remake = "dvc repro --force --single-item drift"
    back = small.run("pipelines.run")
    assert f"reports/drift/report.html is not of this run; make it: {remake}" in back.out
    assert small.run(remake).status == 0
    assert "is not of this run" not in small.run("pipelines.run").out
    assert (small.folder / "dvc.lock").read_bytes() == lock

    path = small.source / "flights" / "2013-05.csv"
    good = path.read_text()
    path.write_text(good.replace(",", ";"))
    broken = small.run("pipelines.run")
    assert broken.status == 2, broken
    assert "load: error: data/raw/flights/2013-05.csv: line 1 has no comma" in broken.err
    path.write_text(good)
    mended = small.run("pipelines.run")
    assert mended.status == 0, mended
    assert (small.folder / "dvc.lock").read_bytes() == lock


def test_a_second_run_waits_its_turn_and_an_interrupted_one_says_so(small: Checkout) -> None:
    first = small.start("pipelines.run", start_new_session=True)
    while not (small.folder / ".state" / "run.lock").exists():
        time.sleep(0.02)
    time.sleep(2)
    second = small.run("pipelines.run")
    assert second.status == 2, second
    assert second.err.startswith("run: error: another run is at work in ")
    os.killpg(first.pid, signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130, (out, err)
    assert err.splitlines()[-1] == "run: interrupted"
    assert "Traceback" not in out + err


def test_told_to_end_it_takes_its_stage_with_it(small: Checkout) -> None:
    run = small.start("pipelines.run", start_new_session=True)

    def stages() -> list[psutil.Process]:
        below = psutil.Process(run.pid).children(recursive=True)
        return [one for one in below if f"pipelines.{ORDER[0]}" in " ".join(one.cmdline())]

    until(stages)
    held = stages()
    run.terminate()
    _, err = run.communicate(timeout=60)
    assert (run.returncode, err.splitlines()[-1]) == (130, "run: interrupted")
    assert not any(one.is_running() for one in held)


def test_a_stage_stopped_at_any_moment_leaves_nothing_half_written(small: Checkout) -> None:
    """Ctrl-C while a stage writes ends it at once, kill -9 too; the stage, run again, goes on as
    if nothing had been.
    """
    for name in ORDER:
        process = small.start(f"pipelines.{name}")
        _wait_until_writing(process, small.folder)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)  # a second, on a machine with nothing else to do
        # A stage that had all but ended has nothing to say.
        assert process.returncode in (0, 130, -signal.SIGINT), (name, err)
        assert process.returncode != 130 or err.endswith(": interrupted\n"), (name, err)
        assert "Traceback" not in err, (name, err)
        assert not list(small.folder.rglob("*.partial")), name
        process = small.start(f"pipelines.{name}")
        _wait_until_writing(process, small.folder)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left = {out: _content(small.folder / out) for out in OUTS.get(name, [])}
        ended = small.run(f"pipelines.{name}")
        assert ended.status == 0, ended
        for out, content in left.items():
            whole = _content(small.folder / out)
            assert whole
            assert content in ({}, whole), f"{name} left half of {out}"
        assert not list(small.folder.rglob("*.partial")), name


def _content(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of every file of a folder; nothing where there is neither."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(file): file.read_bytes() for file in files if file.is_file()}


def _wait_until_writing(process: subprocess.Popen[str], folder: Path) -> None:
    """Until a stage has something half-written on disk, or ended."""
    while process.poll() is None:
        if any((folder / part).exists() and any((folder / part).glob(".*.partial")) for part in
               ("data", "models")) or any((folder / ".state" / "scratch").glob("*/*")):  # fmt: skip
            time.sleep(0.3)
            return
        time.sleep(0.02)


@pytest.fixture
def small_disk(checkout: Checkout, tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 megabytes that holds everything a checkout makes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    for name in ("data", "models", "reports", ".state"):
        (disk / name).mkdir()
        (checkout.folder / name).symlink_to(disk / name)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_nothing_half_written(
    small: Checkout, small_disk: Path
) -> None:
    """Every stage on a disk with little room left, and again once there is room."""
    for name in [*ORDER, "deploy.register"]:
        filler = small_disk / "filler"
        # A card is a few kilobytes.
        _fill(filler, but=0 if name == "train.card" else 48 * 1024)
        ended = small.run(f"pipelines.{name}")
        stage = name.partition(".")[2]
        assert ended.status == 1, (name, ended)
        said = ended.err.splitlines()[-1]
        full = f"{stage}: fault: no space left on the disk while writing "
        assert said.startswith(full), (name, ended)
        assert len(said) > len(full) + 4
        assert "Traceback" not in ended.err, ended
        for out in OUTS.get(name, []):
            assert not (small.folder / out).exists(), f"{name} left half of {out}"
        for path in (small.folder / "data" / "raw").rglob("*.csv"):
            copied = small.source / path.relative_to(small.folder / "data" / "raw")
            assert path.read_bytes() == copied.read_bytes()
        assert not list(small_disk.rglob(".*.partial")), name
        filler.unlink()
        again = small.run(f"pipelines.{name}")
        assert again.status == 0, (name, again)


def _fill(path: Path, but: int) -> None:
    """Leave only so many bytes of the disk."""
    free = shutil.disk_usage(path.parent).free
    with path.open("wb") as file:
        file.write(bytes(free - but))
