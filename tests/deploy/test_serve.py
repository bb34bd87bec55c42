"""A replica answers as the bundle's scorer does, says what is wrong with a request, and answers in
the model's place where the model faults.
"""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deploy import bundles
from deploy.replica import Replica, serving, until

from pipelines import bundle, tables

INFER = "/v2/models/flights/infer"
ROW = {"origin": "JFK", "x": 0.5, "y": None}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def replica(place: Path) -> Iterator[Replica]:
    """A model that faults when asked to, with the one before as fallback; all is captured."""
    digest = bundles.make(place / "bundle", faults=True)
    before = bundles.make(place / "before", shift=1.0)
    arguments = ("--bundle", place / "bundle", "--digest", digest, "--version", 7)
    spare = ("--fallback", place / "before", "--fallback-digest", before)
    capture = {"share": 1.0, "rows": 100_000, "seconds": 1, "folder": "captured"}
    with serving(place / "home", *arguments, *spare, capture=capture, max_rows=200) as made:
        yield made


def _tensors(table: pa.Table, shape: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "name": column["name"],
            "datatype": "BYTES" if column["type"] == "string" else "FP32",
            "shape": shape,
            "data": table[column["name"]].to_pylist(),
        }
        for column in bundles.COLUMNS
    ]


def _probabilities(answer: Any) -> list[float]:
    return [prediction["probability"] for prediction in answer["predictions"]]


@pytest.mark.parametrize("count", [1, 2, 64, 200])
def test_both_ways_to_ask_give_what_the_scorer_gives(
    replica: Replica, place: Path, count: int
) -> None:
    table = bundles.rows(count)
    expected = bundle.load(place / "bundle").predict(table).tolist()
    answer = replica.post("/predict", {"records": table.to_pylist()})
    assert answer.status == 200, answer
    assert _probabilities(answer.json) == expected
    for shape in ([count], [count, 1]):
        inferred = replica.post(INFER, {"inputs": _tensors(table, shape)})
        assert inferred.status == 200, inferred
        assert inferred.json["outputs"] == [
            {"name": "probability", "datatype": "FP32", "shape": [count], "data": expected}
        ]


def test_one_record_is_a_body_too_and_the_answer_says_whose_it_is(replica: Replica) -> None:
    answer = replica.post("/predict", ROW, x_request_id="mine")
    assert answer.headers["x-request-id"] == "mine"
    body = answer.json
    (prediction,) = body.pop("predictions")
    assert prediction["decision"] is (prediction["probability"] >= 0.5)
    assert body == {"model": "flights", "version": 7, "bundle": answer.headers["x-bundle"]}


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "ü"])
def test_an_id_that_is_none_is_replaced(replica: Replica, given: str) -> None:
    answer = replica.post("/predict", ROW, x_request_id=given)
    assert answer.status == 200
    assert len(answer.headers["x-request-id"]) == 32


def test_the_protocols_other_routes(replica: Replica) -> None:
    assert replica.get("/v2").json == {"name": "headrace", "version": "2", "extensions": []}
    assert replica.get("/v2/health/live").json == {"live": True}
    assert replica.get("/v2/health/ready").json == {"ready": True}
    assert replica.get("/v2/models/flights/ready").json == {"name": "flights", "ready": True}
    found = replica.get("/v2/models/flights/versions/7").json
    assert found["versions"] == ["7"]
    assert [(one["name"], one["datatype"]) for one in found["inputs"]] == [
        ("origin", "BYTES"),
        ("x", "FP32"),
        ("y", "FP32"),
    ]
    assert replica.get("/v2/models/flights").json == found


@pytest.mark.parametrize("path", ["/v2", "/v2/health/ready", "/openapi.json", "/metrics"])
def test_what_is_told_has_a_head(replica: Replica, path: str) -> None:
    told = urllib.request.Request(f"http://127.0.0.1:{replica.port}{path}", method="HEAD")
    with urllib.request.urlopen(told) as answer:
        assert (answer.status, answer.read()) == (200, b"")
        assert int(answer.headers["content-length"]) > 0


def test_a_request_said_again_is_no_second_proof(replica: Replica) -> None:
    def firsts() -> float:
        return replica.metric("headrace_first_predictions_bucket", le="+Inf")

    before = firsts()
    for _ in range(3):
        for x in (0.125, 0.25):
            assert replica.post("/predict", ROW | {"x": x}).status == 200
    assert firsts() == before + 2
    asked = {"id": "42", "inputs": _tensors(bundles.rows(3), [3]), "parameters": {"any": 1}}
    answer = replica.post("/v2/models/flights/versions/7/infer", asked).json
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("42", "flights", "7")


RECORDS: dict[str, tuple[Any, int, str]] = {
    "a text for a number": (ROW | {"x": "1"}, 422, "row 0, column x: expected a number or null"),
    "a number for a text": (ROW | {"origin": 1}, 422, "row 0, column origin: expected a text"),
    "a boolean for a number": (ROW | {"x": True}, 422, "column x: expected a number or null"),
    "a column less": ({"origin": "JFK", "x": 1}, 422, "row 0: the record lacks column y"),
    "a column more": (ROW | {"z": 1}, 422, "row 0: the record has the unknown column z"),
    "a later row": ({"records": [ROW, ROW | {"y": []}]}, 422, "row 1, column y: expected a number"),
    "beyond float32": (ROW | {"x": 1e39}, 422, "row 0, column x: expected a number or null <="),
    "an integer of 400 digits": (ROW | {"x": 10**399}, 422, "row 0, column x: number out of range"),
    "no record": ({"records": []}, 422, "records: expected array of length >= 1"),
    "too many": ({"records": [ROW] * 201}, 422, "201 records; at most 200 at once"),
    "a list": ([ROW], 422, "expected object, got array"),
    "nothing": (b"", 400, "the body is no JSON"),
    "NaN": (b'{"origin": null, "x": NaN, "y": 1}', 400, "the body is no JSON"),
    "infinity": (b'{"origin": null, "x": Infinity, "y": 1}', 400, "the body is no JSON"),
    "half a body": (b'{"origin": "JFK", ', 400, "the body is no JSON"),
    "bad UTF-8": (b'{"origin": "\xff", "x": 1, "y": 1}', 400, "the body is no JSON"),
    "half a surrogate": (b'{"origin": "\\ud800", "x": 1, "y": 1}', 400, "the body is no JSON"),
    "deep nesting": (b"[" * 100_000, 422, "expected object, got array"),
    "deep nesting inside": (b'{"x": ' + b'{"x": ' * 100_000, 422, "column x: expected a number"),
}


@pytest.mark.parametrize("how", RECORDS)
def test_a_record_that_breaks_the_contract_is_told_where(replica: Replica, how: str) -> None:
    body, status, said = RECORDS[how]
    answer = replica.post("/predict", body)
    assert (answer.status, said in answer.json["error"]) == (status, True), answer


def _spoiled(**change: Any) -> dict[str, Any]:
    """An inference of two rows whose second tensor, x, was changed."""
    tensors = _tensors(bundles.rows(2), [2])
    tensors[1] |= change
    return {"inputs": tensors}


TENSORS: dict[str, tuple[Any, int, str]] = {
    "another type": (_spoiled(datatype="FP64"), 422, "tensor x: datatype FP64; expected FP32"),
    "another shape": (_spoiled(shape=[1, 2]), 422, "tensor x: shape [1, 2]; expected [rows]"),
    "no rows": (_spoiled(shape=[0], data=[]), 422, "tensor x: shape [0]"),
    "too many rows": (_spoiled(shape=[201]), 422, "with 1 to 200 rows"),
    "more than said": (_spoiled(data=[1, 2, 3]), 422, "tensor x: 3 values; its shape says 2"),
    "more than others": (_spoiled(shape=[1], data=[1]), 422, "tensor x: 1 rows; expected 2"),
    "a text": (_spoiled(data=[1, "2"]), 422, "tensor x: Expected float | null, got str"),
    "another name": (_spoiled(name="z"), 422, "tensor z: no column of the model"),
    "twice": (_spoiled(name="y"), 422, "a tensor stands twice"),
    "one less": ({"inputs": _spoiled()["inputs"][:2]}, 422, "tensor y: missing; expected FP32"),
    "another output": (_spoiled() | {"outputs": [{"name": "z"}]}, 422, "output z: expected prob"),
    "none": ({}, 422, "missing required field inputs"),
    "deep parameters": (
        b'{"inputs": [], "parameters": {"a": ' + b"[" * 100_000, 400, "the body is no JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", TENSORS)
def test_a_tensor_that_breaks_the_contract_is_named(replica: Replica, how: str) -> None:
    body, status, said = TENSORS[how]
    answer = replica.post(INFER, body)
    assert (answer.status, said in answer.json["error"]) == (status, True), answer


def test_what_is_asked_in_another_way_is_told_so(replica: Replica) -> None:
    assert replica.post("/v2/models/other/infer", {}).status == 404
    assert replica.post("/v2/models/flights/versions/8/infer", {}).status == 404
    assert replica.get("/v2/models/flights/versions/8/ready").status == 404
    assert replica.get("/nowhere").status == 404
    assert replica.get("/predict/").status == 404
    wrong = replica.get("/predict")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert replica.post("/predict", ROW, content_type="text/csv").status == 415
    assert replica.post("/predict", ROW, content_encoding="gzip").status == 415
    assert replica.post("/predict", b"x" * 5_000_000).status == 413


@pytest.mark.parametrize(("x", "y"), [(-5000.0, 1.0), (1.0, 5000.0)], ids=["NaN", "raises"])
def test_the_previous_champion_answers_where_the_model_faults(
    replica: Replica, place: Path, x: float, y: float
) -> None:
    count = replica.metric("headrace_fallback_total")
    row = {"origin": "JFK", "x": x, "y": y}
    expected = bundle.load(place / "before").predict(
        pa.Table.from_pylist([row], bundles.rows(1).schema)
    )
    answer = replica.post("/predict", row)
    assert (answer.status, answer.json["fallback"]) == (200, "previous champion")
    assert _probabilities(answer.json) == expected.tolist()
    inferred = replica.post(INFER, {"inputs": _tensors(pa.Table.from_pylist([row]), [1])}).json
    assert inferred["parameters"]["fallback"] == "previous champion"
    assert replica.metric("headrace_fallback_total") == count + 2
    until(lambda: replica.logs("the model faults"))


def test_what_is_counted(replica: Replica) -> None:
    def counts() -> dict[str, float]:
        return {
            "good": replica.metric("headrace_requests_total", route="predict", status="200"),
            "bad": replica.metric("headrace_requests_total", route="predict", status="422"),
            "in place": replica.metric(
                "headrace_requests_total", route="predict", status="fallback"
            ),
            "seconds": replica.metric("headrace_request_seconds_count"),
            "predictions": replica.metric("headrace_predictions_bucket", le="+Inf"),
            "first": replica.metric("headrace_first_predictions_bucket", le="+Inf"),
            "rows": replica.metric("headrace_rows_total"),
            "missing": replica.metric("headrace_missing_total", column="y"),
            "no text": replica.metric("headrace_missing_total", column="origin"),
        }

    before = counts()
    replica.post("/predict", {"records": [ROW, ROW | {"y": 1, "origin": None}]})
    replica.post("/predict", ROW | {"x": -5000})
    replica.post("/predict", {})
    moved = {name: value - before[name] for name, value in counts().items()}
    assert moved == {
        "good": 1, "bad": 1, "in place": 1, "seconds": 2, "predictions": 2, "first": 1,
        "rows": 3, "missing": 2, "no text": 1,
    }  # fmt: skip
    digest = replica.post("/predict", ROW).json["bundle"]
    assert replica.metric("headrace_bundle_info", bundle=digest, version="7") == 1
    assert replica.metric("process_resident_memory_bytes") > 10_000_000


def test_what_is_asked_is_captured_with_its_answer(replica: Replica) -> None:
    table = bundles.rows(150)
    answer = replica.post("/predict", {"records": table.to_pylist()}, x_request_id="captured")
    replica.post("/predict", ROW | {"x": -5000}, x_request_id="captured-too")

    def kept() -> pa.Table:
        files = sorted((replica.folder / "captured").glob("*.parquet"))
        made = pa.concat_tables([tables.pq.read_table(file) for file in files]) if files else table
        if "request_id" not in made.column_names:
            return made.slice(0, 0)
        return made.filter(pa.compute.equal(made["request_id"], "captured"))

    until(lambda: kept().num_rows == 150, 10)
    found = kept()
    assert found.select(["origin", "x", "y"]).equals(table)
    assert found["prediction"].to_pylist() == _probabilities(answer.json)
    assert found["row"].to_pylist() == list(range(150))
    assert set(found["bundle"].to_pylist()) == {answer.json["bundle"]}
    assert set(found["version"].to_pylist()) == {7}
    assert found["fallback"].null_count == 150
    assert [file.name for file in (replica.folder / "captured").glob(".*")] == []


def test_every_refusal_is_logged_with_its_request(replica: Replica) -> None:
    replica.post("/predict", {}, x_request_id="logged")
    until(lambda: any(line["request"] == "logged" for line in replica.logs("answered")))
    (line,) = [line for line in replica.logs("answered") if line["request"] == "logged"]
    assert (line["route"], line["status"]) == ("predict", 422)
    assert "lacks column" in line["reason"]


def test_a_json_number_loses_nothing_on_its_way(replica: Replica, place: Path) -> None:
    """The shortest text of a float32, of a float64 and of an integer mean the same number."""
    for value in (np.float32(0.1), 0.1, 16777217, 1e-45, 3.4028234663852886e38):
        row = {"origin": None, "x": float(value), "y": None}
        table = pa.Table.from_pylist([row], bundles.rows(1).schema)
        body = json.dumps(row).encode()
        answer = _probabilities(replica.post("/predict", body).json)
        assert answer == bundle.load(place / "bundle").predict(table).tolist()
