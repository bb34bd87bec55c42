"""What names a person is gone before anything is kept; what is broken is apart, and can heal."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from world import Checkout

from pipelines import tables
from pipelines.errors import UserError
from pipelines.ingest import datasets, featurize, fetch, load, quarantine, validate

DATASETS = Path("pipelines/ingest/datasets")
SECRET = "a secret of more than sixteen letters"
MAY = "flights/2013-05.csv"


@pytest.fixture
def contract(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The contract of the checkout's own dataset."""
    monkeypatch.setattr(datasets, "__file__", str(checkout.folder / DATASETS / "__init__.py"))
    return checkout.folder / DATASETS / "flights" / datasets.CONTRACT


def _declare(contract: Path, column: str, **changes: Any) -> None:
    values = yaml.safe_load(contract.read_text())
    values["events"][column] |= changes
    contract.write_text(yaml.safe_dump(values))


def _loaded(checkout: Checkout) -> None:
    fetch.run(checkout.params())
    load.run(checkout.params())


def _holding(folder: Path, text: str) -> list[str]:
    """Every file of the checkout but the raw ones that holds the text, Parquet unpacked."""
    found = []
    for file in folder.rglob("*"):
        if not file.is_file() or load.RAW in file.relative_to(folder).parents:
            continue
        values = pq.read_table(file).to_pydict() if file.suffix == ".parquet" else {}
        if text in str(values) or text.encode() in file.read_bytes():
            found.append(file.relative_to(folder).as_posix())
    return found


@pytest.mark.parametrize("rule", ["drop", "hash"])
@pytest.mark.parametrize("pii", ["direct", "indirect"])
def test_nothing_that_names_a_person_is_kept(
    checkout: Checkout, contract: Path, monkeypatch: pytest.MonkeyPatch, pii: str, rule: str
) -> None:
    """Neither in accepted rows nor apart, in scratch, in what is kept of months or in a page."""
    name = "N-JANE-DOE"
    source = checkout.source / MAY
    first = source.read_text().splitlines()[1].split(",")
    tail = first[source.read_text().splitlines()[0].split(",").index("tailnum")]
    source.write_text(source.read_text().replace(f",{tail},", f",{name},"))
    # Some of that aircraft's rows break a rule, and a page shows what broke it.
    suite = checkout.folder / "expectations" / "flights.json"
    broken = '{"type": "expect_column_values_to_match_regex", "kwargs": '
    broken += '{"column": "tailnum", "regex": "^N-?[0-9A-Z]{2,6}$|^[0-9a-f]{64}$"}}, '
    head, _, rest = suite.read_text().partition('"expectations": [')
    suite.write_text(f'{head}"expectations": [{broken if rule == "hash" else ""}{rest}')
    _declare(contract, "tailnum", pii=pii)
    checkout.set(load={"pii": {pii: rule}}, as_of="2013-06-01")
    monkeypatch.setenv(load.SECRET, SECRET)
    _loaded(checkout)
    assert _holding(checkout.folder, name) == []
    assert _holding(checkout.folder, SECRET) == []
    if rule == "drop":
        assert "tailnum" not in tables.read(load.EVENTS).column_names
        # The suite and features.sql want the column: a dataset decides which.
        with pytest.raises(UserError, match=r"flights\.json: data/events has no column tailnum"):
            validate.run(checkout.params())
        shutil.copytree(load.EVENTS, validate.ACCEPTED)
        with pytest.raises(UserError, match=r"features\.sql: .*tailnum"):
            featurize.run(checkout.params())
        return
    validate.run(checkout.params())
    featurize.run(checkout.params())
    assert _holding(checkout.folder, name) == []
    assert _holding(checkout.folder, SECRET) == []
    # Still the same person wherever he stands, and another under another secret.
    hashed = set(tables.read(validate.ACCEPTED, ["tailnum"])["tailnum"].to_pylist()) - {None}
    assert {len(one) for one in hashed} == {64}
    monkeypatch.setenv(load.SECRET, SECRET[::-1])
    load.run(checkout.params())
    other = set(tables.read(load.EVENTS, ["tailnum"])["tailnum"].to_pylist()) - {None}
    assert len(other) >= len(hashed)
    assert not other & hashed


def test_without_a_secret_nothing_is_hashed(
    checkout: Checkout, contract: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _declare(contract, "tailnum", pii="indirect")
    for value in ("", "short"):
        monkeypatch.setenv(load.SECRET, value)
        with pytest.raises(UserError, match=f"tailnum .* set {load.SECRET} to a secret"):
            _loaded(checkout)
    assert not load.EVENTS.exists()


@pytest.mark.parametrize(("column", "pii"), [("scheduled_at", "indirect"), ("origin", "direct")])
def test_a_key_cannot_be_personal(
    checkout: Checkout, contract: Path, column: str, pii: str
) -> None:
    _declare(contract, column, pii=pii)
    with pytest.raises(UserError, match=f"{column} is personal, but dataset.key or time names it"):
        _loaded(checkout)


def test_a_column_that_nobody_described_stops_the_run(checkout: Checkout, contract: Path) -> None:
    values = yaml.safe_load(contract.read_text())
    del values["events"]["air_time"]
    contract.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"contract\.yaml: events has no air_time.*; describe it"):
        _loaded(checkout)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pii": "maybe"}, "events.temp.pii: input should be 'none', 'indirect' or 'direct'"),
        ({"description": ""}, "events.temp.description: string should have at least 1"),
        (
            {"colour": "red"},
            "events.temp.colour: unknown key; allowed here: description, unit",
        ),
    ],
)
def test_a_bad_contract_is_one_line(
    checkout: Checkout, contract: Path, change: dict[str, str], said: str
) -> None:
    _declare(contract, "temp", **change)
    with pytest.raises(UserError, match=said):
        _loaded(checkout)


def test_every_column_of_the_events_is_described(checkout: Checkout) -> None:
    _loaded(checkout)
    described = datasets.contract("flights").events
    assert list(described) == tables.read(load.EVENTS).column_names


def test_a_corrected_file_heals_its_rows(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each row apart says every expectation that it broke; the others stay where they are."""
    source = checkout.source / MAY
    good = source.read_text()
    header, first, *rest = good.splitlines(keepends=True)
    fields = dict(zip(header.strip().split(","), first.strip().split(","), strict=True))
    fields |= {"distance": "99999", "arr_delay": "-999"}
    source.write_text(header + ",".join(fields.values()) + "\n" + "".join(rest))
    _loaded(checkout)
    validate.run(checkout.params())
    apart = tables.read(validate.QUARANTINE)
    (row,) = [one for one in apart.to_pylist() if one["distance"] == 99999]
    assert [reason.partition(":")[0] for reason in row["reasons"]] == [
        "arr_delay", "distance", "elapsed_minutes",
    ]  # fmt: skip
    shown = quarantine.show(checkout.params(), 50)
    assert "distance: column_values_to_be_between" in shown
    (line,) = [one for one in shown.splitlines() if "99999" in one]
    assert line.split()[-2:] == ["distance:", "column_values_to_be_between"]
    before = {file.name: file.stat().st_ino for file in tables.months(validate.ACCEPTED)}

    source.write_text(good)
    _loaded(checkout)
    validate.run(checkout.params())
    healed = tables.read(validate.ACCEPTED, ["scheduled_at", "origin", "carrier", "flight"])
    assert {name: row[name] for name in healed.column_names} in healed.to_pylist()
    assert tables.count(validate.QUARANTINE) == apart.num_rows - 1
    after = {file.name: file.stat().st_ino for file in tables.months(validate.ACCEPTED)}
    assert {name for name in after if after[name] != before[name]} <= {
        "2013-02.parquet",  # it holds rows apart, and is written each time
        "2013-05.parquet", "2013-06.parquet",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        # Far beyond the day when all is settled; no outcome that is not known yet.
        ({"arr_delay": "9000"}, ["arr_delay"]),
        ({"arr_delay": "2147483647"}, ["arr_delay"]),
        ({"dep_delay": "99999"}, ["dep_delay", "elapsed_minutes"]),
        # A time beyond the calendar of Python.
        ({"arr_delay": "-2000000000"}, ["arr_delay", "elapsed_minutes"]),
        # One row that moves the mean of all.
        ({"dep_delay": "-2000000"}, ["dep_delay", "elapsed_minutes"]),
        ({"dest": "\u202eX\x1b[31m"}, ["dest"]),
    ],
)
def test_an_absurd_value_is_apart_with_its_reason_and_can_be_shown(
    checkout: Checkout, changes: dict[str, str], reasons: list[str]
) -> None:
    source = checkout.source / MAY
    header, first, *rest = source.read_text().splitlines(keepends=True)
    fields = dict(zip(header.strip().split(","), first.strip().split(","), strict=True))
    source.write_text(header + ",".join((fields | changes).values()) + "\n" + "".join(rest))
    _loaded(checkout)
    validate.run(checkout.params())
    (apart,) = tables.read_file(validate.QUARANTINE / "2013-05.parquet")["reasons"].to_pylist()
    assert [reason.partition(":")[0] for reason in apart] == reasons
    shown = quarantine.show(checkout.params(), 50)
    assert f"{reasons[0]}: column_values" in shown
    assert all(line.isprintable() for line in shown.splitlines())


def test_an_empty_quarantine_says_so(checkout: Checkout) -> None:
    _loaded(checkout)
    shutil.rmtree(validate.QUARANTINE, ignore_errors=True)
    none = pq.read_schema(tables.months(load.EVENTS)[0]).append(validate.REASONS).empty_table()
    tables.write(none, validate.QUARANTINE / "2013-01.parquet")
    assert quarantine.show(checkout.params(), 5) == "no row is in quarantine"


def test_what_is_past_its_retention_goes_from_every_table(checkout: Checkout) -> None:
    _loaded(checkout)
    assert len(tables.months(load.EVENTS)) == 5
    checkout.set(fetch={"retention_days": 70})  # to the 23rd of March
    _loaded(checkout)
    left = ["2013-03", "2013-04", "2013-05"]
    for folder in (load.RAW / "flights", load.RAW / "weather", load.EVENTS):
        assert sorted(file.stem for file in folder.iterdir()) == left
    checkout.set(fetch={"retention_days": None})
    _loaded(checkout)
    assert len(tables.months(load.EVENTS)) == 5
