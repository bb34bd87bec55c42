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
LARGEST = float(np.finfo(np.float32).max)
OPTIONS = onnxruntime.SessionOptions()
OPTIONS.intra_op_num_threads = 1
# Outside of the handler: a warm start finds it.
SESSION = onnxruntime.InferenceSession(HERE / "model.onnx", OPTIONS)


def handler(event, context):
    """One call. What breaks the contract is the caller's mistake: 400 with one line."""
    if event == {"ready": True}:
        return RELEASE
    begun = time.perf_counter()
    try:
        feed = tensors(read(event))
    except (ValueError, TypeError, RecursionError) as error:
        return reply(400, {"error": " ".join(str(error).split())})
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
    if isinstance(event, dict) and "body" in event:
        text = event["body"] or ""
        text = base64.b64decode(text).decode() if event.get("isBase64Encoded") else text
        body = json.loads(text)
    json.dumps(body, ensure_ascii=False).encode()  # half a pair of surrogates is no text
    many = isinstance(body, dict) and set(body) == {"records"}
    records = body["records"] if many else [body]
    if not isinstance(records, list) or not records:
        raise ValueError("records: expected a list of at least one record")
    return records


def tensors(records):
    """The columns of the contract, as the service takes them: all, and null where missing."""
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"row {number}: expected an object")
        if wrong := set(record) ^ set(COLUMNS):
            raise ValueError(f"row {number}, column {min(wrong)}: missing, or not of the contract")
    return {name: column(name, kind, records) for name, kind in COLUMNS.items()}


def column(name, kind, records):
    text = kind == "string"
    blank, wanted, dtype = ("", [str], object) if text else (np.nan, [int, float], np.float32)
    values = [record[name] for record in records]
    for number, value in enumerate(values):
        # What no float32 holds is refused, and NaN, which is no JSON but is read.
        if not (value is None or (type(value) in wanted and (text or abs(value) <= LARGEST))):
            raise ValueError(f"row {number}, column {name}: expected {kind} or null")
    return np.array([blank if value is None else value for value in values], dtype)


def reply(status, body):
    headers = {"content-type": "application/json", "x-bundle": RELEASE["bundle"]}
    return {"statusCode": status, "headers": headers, "body": json.dumps(body)}
