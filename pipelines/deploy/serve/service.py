"""The service: predict and infer share one path: admit, read, ask, answer, count.

The path is short, since it is the cost: it gets the raw request, reads it with msgspec in one pass,
and answers with bytes.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from pipelines import stage
from pipelines.deploy.serve import oip
from pipelines.deploy.serve.body import Bodies
from pipelines.deploy.serve.capture import Capture, Kept, digest_of, share_of
from pipelines.deploy.serve.contract import Columns
from pipelines.deploy.serve.keys import Keys
from pipelines.deploy.serve.metrics import Metrics
from pipelines.deploy.serve.model import Holder, Model, Probabilities
from pipelines.deploy.serve.refusal import Refusal
from pipelines.params import Serve

log = logging.getLogger("headrace")
# More rows than this go to a thread: others must not wait for them.
INLINE_ROWS = 64
_ID = re.compile(rb"[!-~]{1,128}")
_encode = msgspec.json.Encoder().encode
Read = Callable[[Model, bytes], tuple[Columns, str | UnsetType]]
Write = Callable[[Model, Probabilities, str | None, str | UnsetType], bytes]


class Service:
    """One replica: what answers, who may ask, and what is counted."""

    def __init__(self, params: Serve, holder: Holder, keys: Keys | None) -> None:
        self.params, self.holder, self.keys = params, holder, keys
        self.metrics = Metrics(lambda: (holder.current.digest, holder.current.version))
        self.capture = Capture(params.capture, self.metrics)
        self.bodies = Bodies(params)
        self.draining = False

    async def predict(self, request: Request) -> Response:
        """The probability of every record, and on which side of the threshold it is."""
        return await self._answer(request, "predict", _read_records, _write_records)

    async def infer(self, request: Request, name: str) -> Response:
        """An inference request of the Open Inference Protocol."""
        return await self._answer(request, "infer", self._read_tensors, _write_tensors)

    async def infer_version(self, request: Request, name: str, version: str) -> Response:
        """The same, where the version must be the one that is served."""
        return await self._answer(request, "infer", self._read_tensors, _write_tensors)

    def model(self, name: str, version: str | None = None) -> Model:
        """The model, if that is its name. Raises Refusal."""
        model = self.holder.current
        if name != model.name or version not in (None, str(model.version)):
            asked = name[:50] + (f" version {version[:20]}" if version else "")
            raise Refusal(404, f"no model {asked}; here is {model.name} version {model.version}")
        return model

    async def _answer(self, request: Request, route: str, read: Read, write: Write) -> Response:
        headers = dict(request.scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
        try:
            if self.keys is not None:
                self.keys.admit(headers.get(b"authorization", b"").decode("latin-1"))
            body = await self.bodies.read(request, headers)
            begun = time.perf_counter()
            # From here on this one, whatever takes over meanwhile.
            named = request.path_params
            model = self.model(**named) if named else self.holder.current
            columns, given_id = read(model, body)
            answer, by = await self._ask(model, columns)
            content = write(model, answer, by, given_id)
            seconds = time.perf_counter() - begun
            self.metrics.asked(model.contract, columns)
            self.metrics.answered(route, body, seconds, answer, by is not None)
            share = share_of(request_id, body)
            if share < self.params.capture.share:
                kept = Kept(request_id, digest_of(body), time.time(), model, columns, answer, by)
                self.capture.keep(kept)
            if share < self.params.log_share:
                _log(request_id, route, 200, rows=columns.rows, seconds=round(seconds, 6))
            return Response(content, 200, self._headers(request_id, model), "application/json")
        except Refusal as refusal:
            return self._refused(request_id, route, refusal)
        except Exception:
            log.exception("a fault of the service", extra={"fields": {"request": request_id}})
            return self._refused(request_id, route, Refusal(500, "a fault of the service"))

    def _refused(self, request_id: str, route: str, refusal: Refusal) -> Response:
        self.metrics.refused(route, refusal.status)
        _log(request_id, route, refusal.status, refusal.line)
        return refused(refusal, request_id)

    def _headers(self, request_id: str, model: Model) -> dict[str, str]:
        headers = {"x-request-id": request_id, "x-bundle": model.digest}
        if self.draining:
            headers["connection"] = "close"
        return headers

    async def _ask(self, model: Model, columns: Columns) -> tuple[Probabilities, str | None]:
        """The model's answer, or one in its place and whose that is."""
        try:
            if columns.rows <= INLINE_ROWS:
                return model.probabilities(columns), None
            return await asyncio.to_thread(model.probabilities, columns), None
        except Exception as error:
            fields = {"bundle": model.digest, "fault": stage.one_line(error)}
            log.error("the model faults", extra={"fields": fields})
        return await asyncio.to_thread(self.holder.in_place, model, columns)

    def _read_tensors(self, model: Model, body: bytes) -> tuple[Columns, str | UnsetType]:
        return oip.read(model.contract, body)


def _read_records(model: Model, body: bytes) -> tuple[Columns, UnsetType]:
    return model.contract.read(body), UNSET


def _write_records(
    model: Model, answer: Probabilities, by: str | None, _: str | UnsetType
) -> bytes:
    made: dict[str, Any] = {
        "predictions": [
            {"probability": value, "decision": value >= model.threshold}
            for value in answer.tolist()
        ],
        "model": model.name,
        "version": model.version,
        "bundle": model.digest,
    }
    if by is not None:
        made["fallback"] = by
    return _encode(made)


def _write_tensors(
    model: Model, answer: Probabilities, by: str | None, given_id: str | UnsetType
) -> bytes:
    parameters = {"bundle": model.digest, "threshold": model.threshold}
    if by is not None:
        parameters["fallback"] = by
    made: dict[str, Any] = {"model_name": model.name, "model_version": str(model.version)}
    if given_id is not UNSET:
        made["id"] = given_id
    output = {"name": oip.OUTPUT, "datatype": "FP32", "shape": [len(answer)]}
    made |= {"parameters": parameters, "outputs": [output | {"data": answer.tolist()}]}
    return _encode(made)


def _log(request_id: str, route: str, status: int, reason: str = "", **fields: Any) -> None:
    said = {"request": request_id, "route": route, "status": status} | fields
    log.info("answered", extra={"fields": said | ({"reason": reason} if reason else {})})


def refused(refusal: Refusal, request_id: str) -> Response:
    """A refusal as an answer."""
    headers = refusal.headers | {"x-request-id": request_id}
    return Response(_encode({"error": refusal.line}), refusal.status, headers, "application/json")
