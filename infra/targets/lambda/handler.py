"""AWS Lambda: the bundle beside this file answers JSON records. Needs onnxruntime and numpy.

Both come as a layer, made once for the runtime's platform:

    pip install --target layer/python --platform manylinux_2_28_x86_64 --only-binary=:all: \
        --python-version 3.13 onnxruntime numpy
    (cd layer && zip -qr ../layer.zip python -x '*/tests/*' '*/__pycache__/*')

Takes {"records": [...]} or one record, as a function URL or a gateway wraps it, or bare; answers
as the service's /predict. {"ready": true} tells which bundle this is. Every call leaves one line
in the log, from which the target observes: see pipelines/deploy/targets/answered.py.
"""

import base64
import json
import resource
import time
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).parent
RELEASE = json.loads((HERE / "release.json").read_text())
CONTRACT = json.loads((HERE / "bundle.json").read_text())
COLUMNS = {column["name"]: column["type"] for column in CONTRACT["columns"]}
OPTIONS = onnxruntime.SessionOptions()
OPTIONS.intra_op_num_threads = 1
# Outside of the handler: a warm start finds it.
SESSION = onnxruntime.InferenceSession(HERE / "model.onnx", OPTIONS)


def handler(event, context):
    """One call. What breaks the contract is the caller's mistake: 400 with one line."""
    if event.get("ready"):
        return RELEASE
    begun = time.perf_counter()
    try:
        records = read(event)
        feed = tensors(records)
    except (ValueError, TypeError, KeyError) as error:
        return reply(400, {"error": str(error)})
    found = [float(value) for value in SESSION.run(None, feed)[0]]
    good = all(0 <= value <= 1 for value in found)
    note = {
        "bundle": RELEASE["bundle"],
        "seconds": time.perf_counter() - begun,
        "predictions": [value if 0 <= value <= 1 else None for value in found],
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(note), flush=True)
    if not good:
        return reply(500, {"error": "the model gave no probability"})
    limit = CONTRACT["threshold"]
    answers = [{"probability": value, "decision": value >= limit} for value in found]
    return reply(200, {"predictions": answers} | RELEASE)


def read(event):
    """The records of an event."""
    body = event
    if "body" in event:
        text = event["body"] or "{}"
        body = json.loads(base64.b64decode(text) if event.get("isBase64Encoded") else text)
    if not isinstance(body, dict):
        raise ValueError("expected an object: a record, or records")
    records = body.get("records", [body])
    if not isinstance(records, list) or not records:
        raise ValueError("records: expected a list of at least one record")
    return records


def tensors(records):
    """The columns of the contract, as the service takes them: all, and null where missing."""
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"record {number}: expected an object")
        if wrong := set(record) ^ set(COLUMNS):
            said = "is missing" if min(wrong) in COLUMNS else "is not of the contract"
            raise ValueError(f"record {number}: column {min(wrong)} {said}")
    return {name: column(name, kind, records) for name, kind in COLUMNS.items()}


def column(name, kind, records):
    wanted, blank, dtype = (str, "", object) if kind == "string" else (float, np.nan, np.float32)
    values = [record[name] for record in records]
    for number, value in enumerate(values):
        right = isinstance(value, wanted) or (wanted is float and type(value) is int)
        if value is not None and not right:
            raise ValueError(f"record {number}: {name} is {value!r}; expected {kind}")
    return np.array([blank if value is None else value for value in values], dtype)


def reply(status, body):
    headers = {"content-type": "application/json", "x-bundle": RELEASE["bundle"]}
    return {"statusCode": status, "headers": headers, "body": json.dumps(body)}
