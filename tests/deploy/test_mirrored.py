"""Two answers to one request meet once, by its id; a label meets them when it comes."""

import math
import re
import time
from pathlib import Path

import boto3
import pyarrow as pa
import pytest

from pipelines.bundle import PREDICTION
from pipelines.deploy.mirrored import Mirrored
from pipelines.deploy.shelf import Shelf

CHAMPION, CHALLENGER = "a" * 64, "b" * 64


def _capture(
    shelf: Shelf, digest: str, answers: dict[str, float | None], body: str = "", clock: int = 0
) -> None:
    table = pa.table(
        {
            "request_id": list(answers),
            "row": pa.array([0] * len(answers), pa.int32()),
            "body": [body or one for one in answers],
            PREDICTION: pa.array(list(answers.values()), pa.float32()),
        }
    )
    at = time.time_ns() + clock * 10**9
    shelf.put(f"{at}-1-abcd-{digest[:12]}.parquet", table)


@pytest.fixture(params=["folder", "bucket"])
def mirrored(request: pytest.FixtureRequest, tmp_path: Path) -> Mirrored:
    place = str(tmp_path)
    if request.param == "bucket":
        request.getfixturevalue("s3")
        bucket = re.sub(r"[^a-z0-9]+", "-", tmp_path.name.lower()).strip("-")
        boto3.client("s3").create_bucket(Bucket=bucket)
        place = f"s3://{bucket}/some"
    captures, labels = Shelf(f"{place}/captures"), Shelf(f"{place}/labels")
    return Mirrored(captures, labels, CHAMPION, CHALLENGER)


def test_each_pair_is_told_once(mirrored: Mirrored) -> None:
    assert mirrored.look() == ([], [])
    _capture(mirrored.captures, CHAMPION, {"one": 0.2, "two": 0.5, "alone": 0.9})
    assert mirrored.look() == ([], [])
    _capture(mirrored.captures, CHALLENGER, {"one": 0.3, "two": None})
    near, nothing = mirrored.look()[0]
    assert near == pytest.approx(0.1)
    assert math.isnan(nothing)
    assert mirrored.look() == ([], [])


def test_a_label_that_comes_later_is_a_difference_of_log_loss(mirrored: Mirrored) -> None:
    _capture(mirrored.captures, CHAMPION, {"late": 0.8, "on time": 0.2})
    _capture(mirrored.captures, CHALLENGER, {"late": 0.4, "on time": 0.2})
    mirrored.look()
    labels = {"request_id": ["late", "on time", "unknown"], "row": [0, 0, 0], "label": [1, 0, 1]}
    mirrored.labels.put("today.parquet", pa.table(labels))
    _, losses = mirrored.look()
    assert losses == pytest.approx([math.log(0.8 / 0.4), 0.0])
    assert mirrored.look() == ([], [])


def test_what_was_captured_before_the_release_says_nothing(mirrored: Mirrored) -> None:
    _capture(mirrored.captures, CHAMPION, {"one": 0.2})
    _capture(mirrored.captures, CHALLENGER, {"one": 0.9})
    later = Mirrored(mirrored.captures, mirrored.labels, CHAMPION, CHALLENGER)
    assert later.look() == ([], [])


@pytest.mark.parametrize("clock", [-600, 600])
def test_replicas_whose_clock_is_another_are_heard(mirrored: Mirrored, clock: int) -> None:
    _capture(mirrored.captures, CHAMPION, {"before": 0.2})
    later = Mirrored(mirrored.captures, mirrored.labels, CHAMPION, CHALLENGER)
    for digest in (CHAMPION, CHALLENGER):
        _capture(mirrored.captures, digest, {"one": 0.5}, clock=clock)
    assert later.look() == ([0.0], [])


def test_an_id_that_was_used_twice_pairs_the_same_question(mirrored: Mirrored) -> None:
    _capture(mirrored.captures, CHAMPION, {"one": 0.2}, body="a")
    _capture(mirrored.captures, CHALLENGER, {"one": 0.9}, body="b")
    assert mirrored.look() == ([], [])
    _capture(mirrored.captures, CHALLENGER, {"one": 0.2}, body="a")
    assert mirrored.look() == ([0.0], [])


def test_what_is_no_capture_or_of_another_time_is_passed_by(mirrored: Mirrored) -> None:
    day = 86400
    _capture(mirrored.captures, CHAMPION, {"ahead": 0.5}, clock=day)
    mirrored.captures.put("notes.parquet", pa.table({"a": [1]}))
    later = Mirrored(mirrored.captures, mirrored.labels, CHAMPION, CHALLENGER)
    for digest in (CHAMPION, CHALLENGER):
        _capture(mirrored.captures, digest, {"one": 0.5})
    assert later.look() == ([0.0], [])


def test_a_question_that_was_answered_says_nothing_new(mirrored: Mirrored) -> None:
    for digest, answer in ((CHAMPION, 0.2), (CHALLENGER, 0.6)):
        _capture(mirrored.captures, digest, {"one": answer, "two": answer}, body="a")
    assert mirrored.look() == ([pytest.approx(0.4)], [])
    for digest, answer in ((CHAMPION, 0.2), (CHALLENGER, 0.6)):
        _capture(mirrored.captures, digest, {"three": answer}, body="a")
    assert mirrored.look() == ([], [])


def _cut(shelf: Shelf, name: str) -> None:
    """As whoever does not write it whole may leave it."""
    if not shelf.bucket:
        file = shelf.folder / name
        file.write_bytes(file.read_bytes()[:-9])
        return
    named = {"Bucket": shelf.bucket, "Key": shelf.prefix + name}
    client = boto3.client("s3")
    client.put_object(**named, Body=client.get_object(**named)["Body"].read()[:-9])


@pytest.mark.parametrize("damage", ["cut", "null", "no 0 or 1", "another column"])
def test_a_bad_file_of_labels_is_left_out_and_said_once(
    mirrored: Mirrored, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for digest, answer in ((CHAMPION, 0.8), (CHALLENGER, 0.4)):
        _capture(mirrored.captures, digest, {"one": answer})
    label = {"null": None, "no 0 or 1": 2}.get(damage, 1)
    name = "labels" if damage == "another column" else "label"
    table = pa.table({"request_id": ["one"], "row": [0], name: [label]})
    mirrored.labels.put("today.parquet", table)
    if damage == "cut":
        _cut(mirrored.labels, "today.parquet")
    for distances in ([pytest.approx(0.4)], []):
        assert mirrored.look() == (distances, [])
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "today.parquet is left out" in line] == said[:1] == said
    # Mended in its place it counts.
    mirrored.labels.put(
        "today.parquet", pa.table({"request_id": ["one"], "row": [0], "label": [1]})
    )
    assert mirrored.look()[1] == [pytest.approx(math.log(0.8 / 0.4))]


def test_a_bucket_that_cannot_be_reached_is_asked_again(
    mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for digest in (CHAMPION, CHALLENGER):
        _capture(mirrored.captures, digest, {"one": 0.5})
    with monkeypatch.context() as broken:
        broken.setattr(Shelf, "rows", _broken)
        broken.setattr(Shelf, "names", _broken)
        assert mirrored.look() == ([], [])
        assert "is left out: OSError: cut" in capsys.readouterr().out
    assert mirrored.look() == ([0.0], [])


def _broken(*_: object) -> None:
    raise OSError("cut")


def test_the_rows_of_one_request_are_one_answer(mirrored: Mirrored) -> None:
    """They are alike: as many outcomes they would be a proof of what one caller asked."""
    for digest, values in ((CHAMPION, [0.2, 0.2, 0.5]), (CHALLENGER, [0.2, 0.5, 0.5])):
        table = {
            "request_id": ["one", "one", "two"], "row": pa.array([0, 1, 0], pa.int32()),
            "body": ["a", "a", "b"], PREDICTION: pa.array(values, pa.float32()),
        }  # fmt: skip
        mirrored.captures.put(f"{time.time_ns()}-1-abcd-{digest[:12]}.parquet", pa.table(table))
    assert mirrored.look() == ([pytest.approx(0.15), 0.0], [])
