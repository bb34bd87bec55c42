"""A month is made of few others, once: what comes late or corrected costs what it changes."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from world import Checkout

from pipelines import engine, months, stage, tables
from pipelines.ingest import featurize, fetch, load, validate
from pipelines.months import Kept

TABLES = (load.EVENTS, featurize.FEATURES)
Bytes = dict[str, bytes]


@pytest.fixture(scope="module")
def spark() -> Iterator[SparkSession]:
    with engine.session("embedded") as made:
        yield made


@pytest.fixture
def small(checkout: Checkout, spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """January to May, and one engine for all stages of a test."""

    @contextmanager
    def session(_: str) -> Iterator[SparkSession]:
        yield spark

    monkeypatch.setattr(engine, "session", session)
    checkout.set(featurize={"test_days": 10, "val_days": 10})
    return checkout


def _run(checkout: Checkout) -> None:
    """The stages to features, with every event accepted."""
    fetch.run(checkout.params())
    load.run(checkout.params())
    shutil.rmtree(validate.ACCEPTED, ignore_errors=True)
    shutil.copytree(load.EVENTS, validate.ACCEPTED, copy_function=os.link)
    featurize.run(checkout.params())


def _bytes() -> dict[Path, Bytes]:
    return {
        table: {file.name: file.read_bytes() for file in tables.months(table)} for table in TABLES
    }


def _files(table: Path) -> dict[str, int]:
    return {file.stem: file.stat().st_ino for file in tables.months(table)}


def _correct(checkout: Checkout, month: str, row: int) -> None:
    """Another departure delay in one line of the flights of a month."""
    (file,) = (checkout.source / "flights").glob(f"*{month}.csv")
    header, *lines = file.read_text().splitlines(keepends=True)
    at = header.split(",").index("dep_delay")
    fields = lines[row % len(lines)].split(",")
    fields[at] = str(int(fields[at]) + 1) if fields[at].lstrip("-").isdigit() else "7"
    lines[row % len(lines)] = ",".join(fields)
    file.write_text(header + "".join(lines))


MONTHS = ["2013-01", "2013-02", "2013-03", "2013-04", "2013-05"]
CLOCKS = ["2013-02-14T09:30", "2013-03-01", "2013-04-02", "2013-05-01", "2013-06-01"]
STEPS = st.one_of(
    st.tuples(st.just("clock"), st.sampled_from(CLOCKS), st.just(0)),
    st.tuples(st.just("correct"), st.sampled_from(MONTHS), st.integers(0, 10**4)),
    st.tuples(st.just("late"), st.sampled_from(MONTHS[2:]), st.just(0)),
)


@settings(
    # To shrink a failure would take minutes.
    max_examples=4,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(STEPS, min_size=2, max_size=5))
def test_any_order_of_arrival_gives_the_bytes_of_a_rebuild(
    small: Checkout, source: Path, steps: list[tuple[str, str, int]]
) -> None:
    """Clocks that go forth and back, corrected months, and months that come late."""
    shutil.rmtree(small.source)
    shutil.copytree(source, small.source)
    small.set(as_of=CLOCKS[-1])
    for kind, what, row in [*steps, ("clock", CLOCKS[-1], 0)]:
        if kind == "clock":
            small.set(as_of=what)
        elif kind == "correct":
            _correct(small, what, row)
        for file in small.source.glob("*/_late-*.csv"):
            file.rename(file.with_name(file.name.removeprefix("_late-")))
        if kind == "late":
            for file in small.source.glob("*/*.csv"):
                if file.stem >= what:
                    file.rename(file.with_name(f"_late-{file.name}"))
        _run(small)
    came_by_and_by = _bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "ROWS", 3000)  # two months or so at once
        shutil.rmtree(stage.STATE / "months")
        _run(small)
    assert _bytes() == came_by_and_by


def test_a_new_month_costs_a_month(small: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    small.set(as_of="2013-05-05")  # April is settled
    _run(small)
    before = {table: _files(table) for table in TABLES}
    capsys.readouterr()
    small.set(as_of="2013-06-01")
    _run(small)
    said = capsys.readouterr().out
    rows = {table: tables.count(table) for table in TABLES}
    for table, kept in ((load.EVENTS, MONTHS[:4]), (featurize.FEATURES, MONTHS[:3])):
        after = _files(table)
        assert [month for month in kept if after[month] != before[table][month]] == []
        files = [file for file in tables.months(table) if file.stem not in kept]
        made = sum(tables.pq.read_metadata(file).num_rows for file in files)
        assert f"{made:,} of them made: {len(files)} of 5 months are new" in said, (table, rows)


def test_a_table_that_begins_later_has_no_rows_before(small: Checkout) -> None:
    """Also where nothing but months of before it are made."""
    for month in ("2013-01", "2013-02"):
        (small.source / "weather" / f"{month}.csv").unlink()
    _run(small)
    _correct(small, "2013-01", 100)
    _run(small)
    assert tables.read_file(load.EVENTS / "2013-01.parquet")["temp"].null_count > 0
    right = _bytes()
    shutil.rmtree(stage.STATE / "months")
    _run(small)
    assert _bytes() == right


def test_what_is_kept_may_lie_on_another_disk(small: Checkout, tmp_path: Path) -> None:
    _run(small)
    right = _bytes()
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other disk")
    with tempfile.TemporaryDirectory(dir=other) as disk:
        shutil.rmtree(stage.STATE / "months")
        (stage.STATE / "months").symlink_to(disk)
        for _ in range(2):  # kept there, then taken from there
            _run(small)
            assert _bytes() == right
        assert len(list(Path(disk).rglob("*.parquet"))) == 10


def test_a_month_with_rows_goes_before_the_word_that_it_has_none(small: Checkout) -> None:
    _run(small)
    right = _bytes()
    for file in list((stage.STATE / "months").rglob("*.parquet")):
        file.with_name(f"{file.name.split('.')[0]}.none").touch()
    _run(small)
    assert _bytes() == right


def test_a_correction_changes_what_can_see_it(small: Checkout) -> None:
    _run(small)
    before = {table: _files(table) for table in TABLES}
    _correct(small, "2013-02", 100)
    _run(small)
    changed = {
        table: [month for month, inode in _files(table).items() if before[table][month] != inode]
        for table in TABLES
    }
    # March's first hours, on the clock of UTC, are February's in New York.
    assert set(changed[load.EVENTS]) <= {"2013-02", "2013-03", "2013-04"}
    assert set(changed[featurize.FEATURES]) <= {"2013-02", "2013-03", "2013-04"}
    assert "2013-02" in changed[load.EVENTS]


def test_what_is_kept_and_damaged_is_made_again(small: Checkout) -> None:
    _run(small)
    right = _bytes()
    for file in (stage.STATE / "months").rglob("*.parquet"):
        file.chmod(0o644)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.unlink()  # what was linked to it stays as it is
        file.write_bytes(bytes(content))
    _run(small)
    assert _bytes() == right


def test_what_nobody_takes_for_long_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for key in ("a", "b"):
        (tmp_path / key).write_text("rows")
        Kept("some").keep(key, tmp_path / key)
    (old,) = Path(".state/months/some").glob("a.*")
    os.utime(old, (0, 0))
    kept = Kept("some")
    kept.sweep()
    assert not Kept("some").take("a", tmp_path / "out")
    assert Kept("some").take("b", tmp_path / "out")


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30, unique=True).map(sorted),
    st.integers(1, 100),
    st.data(),
)
def test_runs_hold_every_month_once_and_follow_each_other(
    numbers: list[int], most: int, data: st.DataObject
) -> None:
    names = [f"{2013 + number // 12:04}-{number % 12 + 1:02}" for number in numbers]
    rows = {name: data.draw(st.integers(0, 120)) for name in names}
    runs = list(months.runs(names, rows, most))
    assert [name for run in runs for name in run] == names
    for run in runs:
        assert all(months.after(a) == b for a, b in itertools.pairwise(run))
        assert len(run) == 1 or sum(rows[name] for name in run) <= most


def test_two_at_once_make_what_one_makes(checkout: Checkout) -> None:
    """dvc that is killed leaves its stage at work, and who runs it again starts another."""
    fetch.run(checkout.params())
    both = [checkout.start("pipelines.ingest.load") for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    together = {file.name: file.read_bytes() for file in tables.months(load.EVENTS)}
    shutil.rmtree(stage.STATE / "months")
    assert checkout.run("pipelines.ingest.load").status == 0
    assert {file.name: file.read_bytes() for file in tables.months(load.EVENTS)} == together


def test_a_month_whose_file_vanished_is_not_one_without_rows(small: Checkout) -> None:
    out = small.folder / "out"
    out.mkdir()
    with pytest.raises(RuntimeError, match="5 rows were made, and 0 are there"):
        Kept("gone").fill(out, {"2013-01": "key"}, lambda new: 5)
    assert not list((stage.STATE / "months" / "gone").glob("*"))
