"""The bundle on the disk is traced to the raw files, whoever made it and wherever."""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from world import Checkout, Ended

from pipelines import stage

pytestmark = pytest.mark.pipeline
SVG = "{http://www.w3.org/2000/svg}"


def traced(checkout: Checkout, *column: str) -> Ended:
    return checkout.run(" ".join(["pipelines.lineage", *column]))


def raw(checkout: Checkout) -> list[Path]:
    return sorted((checkout.folder / "data" / "raw").rglob("*.csv"))


def drawn(checkout: Checkout) -> list[str]:
    """Every text of the picture, in its order."""
    root = ET.parse(checkout.folder / "reports" / "lineage" / "lineage.svg").getroot()
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_the_tree_leads_from_the_bundle_to_every_raw_file(made: Checkout) -> None:
    ended = traced(made)
    assert ended.status == 0, ended
    lines = ended.out.splitlines()
    assert lines[0] == f"bundle {stage.digest(made.folder / 'models' / 'bundle')[:12]}"
    for name in ("package", "fit", "evaluate", "featurize", "validate", "load", "fetch"):
        (line,) = (line for line in lines if line.endswith(f"└─ {name}"))
    lock = yaml.safe_load((made.folder / "dvc.lock").read_text())["stages"]
    entries = {out["path"]: out["md5"] for entry in lock.values() for out in entry["outs"]}
    for path in ("models/bundle", "data/features", "data/accepted", "data/events", "data/raw"):
        (line,) = (
            one for one in lines if re.search(rf"(─ |^){path} +", one) and "(above)" not in one
        )
        assert entries[path][:8] in line
        assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC \S+@\S+$", line)
    for file in raw(made):
        (line,) = (
            line for line in lines if f" {file.relative_to(made.folder / 'data/raw')} " in line
        )
        rows, md5 = line.split()[-2:]
        assert int(rows.replace(",", "")) == len(file.read_text().splitlines()) - 1
        assert (
            md5
            == subprocess.run(
                ["md5sum", file], capture_output=True, text=True, check=True
            ).stdout.split()[0]
        )


def test_the_picture_names_every_stage_month_and_hash(made: Checkout) -> None:
    assert traced(made).status == 0
    texts = drawn(made)
    for name in ("package", "fit", "evaluate", "featurize", "validate", "load", "fetch"):
        assert texts.count(name) == 1
    lock = yaml.safe_load((made.folder / "dvc.lock").read_text())["stages"]
    outs = [out for name in ("fetch", "load", "validate", "featurize", "fit", "evaluate", "package")
            for out in lock[name]["outs"]]  # fmt: skip
    for out in outs:
        assert texts.count(out["path"]) == 1
        assert out["md5"][:8] in texts
    for table in ("flights", "weather"):
        at = texts.index(f"data/raw/{table}")
        months = [file.stem for file in raw(made) if file.parent.name == table]
        assert texts[at + 1 : at + 1 + 3 * len(months) : 3] == months
    for name in ("airlines", "airports", "planes"):
        assert name in texts


def test_it_is_the_same_after_a_checkout_where_no_stage_ever_ran(
    made: Checkout, copied: Checkout
) -> None:
    first = traced(made)
    for name in ("data", "models", "reports", ".state"):
        shutil.rmtree(copied.folder / name)
    assert copied.run("dvc checkout -q").status == 0
    second = traced(copied)
    assert second.status == 0, second
    when = re.compile(r"  \d{4}-\d\d-\d\d \d\d:\d\d UTC \S+$", re.M)
    assert when.search(first.out)
    assert second.out == when.sub("", first.out)


def test_raw_files_that_are_not_on_the_disk_are_known_by_hash(
    made: Checkout, copied: Checkout
) -> None:
    whole = traced(made).out
    shutil.rmtree(copied.folder / "data" / "raw")
    ended = traced(copied)
    assert ended.status == 0
    for file in raw(made):
        name = str(file.relative_to(made.folder / "data" / "raw"))
        (line,) = (line for line in whole.splitlines() if f" {name} " in line)
        (here,) = (line for line in ended.out.splitlines() if f" {name} " in line)
        assert here.split()[-1] == line.split()[-1]
    assert "without rows: not on this disk as it was then" in ended.out


def test_a_bundle_that_dvc_lock_does_not_know_is_refused(copied: Checkout) -> None:
    (copied.folder / "models" / "bundle" / "bundle.json").write_text("{}")
    ended = traced(copied)
    assert ended.status == 2
    assert re.fullmatch(
        r"lineage: error: models/bundle is \w{8}, but the one of dvc\.lock is \w{8}; bring that "
        r"back: dvc checkout models/bundle, or make one anew: dvc repro package\n",
        ended.err,
    )
    shutil.rmtree(copied.folder / "models" / "bundle")
    assert "lineage: error: models/bundle is missing; bring it back" in traced(copied).err


def test_a_lock_whose_stages_do_not_meet_is_refused(copied: Checkout) -> None:
    """As after `dvc repro --single-item featurize`: fit still stands on other features."""
    path = copied.folder / "dvc.lock"
    lock = yaml.safe_load(path.read_text())
    lock["stages"]["featurize"]["outs"][0]["md5"] = "0" * 32 + ".dir"
    path.write_text(yaml.safe_dump(lock))
    ended = traced(copied)
    assert ended.status == 2
    assert "was made of another data/features than featurize gave last" in ended.err


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("data/accepted/2013-02.parquet", "data/accepted/2013-02.parquet is no whole Parquet file"),
        ("dvc.lock", "dvc.lock is not YAML: "),
    ],
)
def test_what_is_damaged_is_named(copied: Checkout, path: str, said: str) -> None:
    file = copied.folder / path
    content = file.read_bytes()
    file.unlink()  # DVC's cache keeps its own
    file.write_bytes(content[: len(content) // 2] + b": [")
    ended = traced(copied)
    assert ended.status == 2
    assert ended.err.startswith(f"lineage: error: {said}")
    assert ended.err.count("\n") == 1


def test_a_column_is_traced_to_the_raw_tables(copied: Checkout) -> None:
    ended = traced(copied, "tail_slack")
    assert ended.out.splitlines() == [
        "data/features         tail_slack",
        "data/accepted         block_minutes, departed_at, scheduled_at",
        "data/events           block_minutes, departed_at, scheduled_at",
        "data/raw/airports     tzone",
        "data/raw/flights      dep_delay, sched_arr_time, sched_dep_time, time_hour",
    ]
    assert "split: featurize makes it, and no SQL says of what" in traced(copied, "split").out
    # The features hold the column that is foretold under this name.
    assert "data/accepted         arr_delay" in traced(copied, "label").out
    unknown = traced(copied, "nothing")
    assert unknown.status == 2
    assert unknown.err.endswith("models/bundle has a column nothing\n")
    query = copied.folder / "pipelines/ingest/datasets/flights/features.sql"
    query.write_text(query.read_text() + "\n")
    changed = traced(copied, "tail_slack")
    assert changed.status == 2
    assert changed.err.endswith("features.sql changed after featurize ran: dvc repro featurize\n")
