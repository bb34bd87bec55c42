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


def _capture(shelf: Shelf, digest: str, answers: dict[str, float | None]) -> None:
    table = pa.table(
        {
            "request_id": list(answers),
            "row": pa.array([0] * len(answers), pa.int32()),
            PREDICTION: pa.array(list(answers.values()), pa.float32()),
        }
    )
    shelf.put(f"{time.time_ns()}-1-abcd-{digest[:12]}.parquet", table)


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
