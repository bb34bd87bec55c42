"""The bundle that answers, the one that answers in its place, and how they are changed.

A bundle is verified before it is opened, and opened before it takes over: requests that run keep
the one they began with, so none fails while bundles change.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipelines import bundle, signing, stage
from pipelines.deploy.serve.contract import Columns, Contract
from pipelines.errors import UserError
from pipelines.params import Serve

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

log = logging.getLogger("headrace")
Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Named:
    """A bundle in a folder, the hash it must have, and what the registry calls it: version 0 is
    none of the registry.
    """

    folder: Path
    digest: str
    version: int = 0


@dataclass(frozen=True)
class Model:
    """A bundle, verified and opened."""

    name: str
    version: int
    digest: str
    contract: Contract
    threshold: float
    base_rate: float
    session: "InferenceSession"
    outputs: list[str]

    def probabilities(self, columns: Columns) -> Probabilities:
        """Shape (rows,). Raises where the model faults or its answer is no probability."""
        feed: dict[str, Any] = dict(zip(self.contract.texts, columns.texts, strict=True))
        feed.update(zip(self.contract.numbers, columns.numbers, strict=True))
        # run() of the session itself first looks up each of its names in a list of all of them:
        # for sixty columns that costs a fifth of the model.
        answer: Probabilities = self.session._sess.run(self.outputs, feed, None)[0]
        if answer.shape != (columns.rows,):
            raise RuntimeError(f"the answer has shape {answer.shape} for {columns.rows} rows")
        if not all(0 <= value <= 1 for value in answer.tolist()):
            raise RuntimeError("the answer is no probability")
        return answer


def load(named: Named, params: Serve) -> Model:
    """Verify, open, and ask once, so that the first caller does not wait for it.

    Raises UserError where the bundle is not what it should be.
    """
    found = bundle.verified(named.folder, named.digest)
    if (task := bundle.task(found.contract)) != "binary":
        raise UserError(f"{named.folder}: its task is {task}; what is served is binary")
    try:
        session = bundle.open_session(found.model, params.threads)
    except Exception as error:
        raise UserError(
            f"{named.folder}: ONNX Runtime refuses it: {stage.one_line(error)}"
        ) from None
    contract = Contract(found.contract["columns"], params.max_rows)
    model = Model(
        name=found.contract["dataset"],
        version=named.version,
        digest=named.digest,
        contract=contract,
        threshold=found.contract["threshold"],
        base_rate=found.base_rate(),
        session=session,
        outputs=[output.name for output in session.get_outputs()],
    )
    try:
        model.probabilities(
            contract.columns([[None]] * len(contract.texts), [[None]] * len(contract.numbers))
        )
    except Exception as error:  # it may still answer others, and the judge must see what it does
        log.warning(
            "the model faults on a row of missing values",
            extra={"fields": {"fault": stage.one_line(error)}},
        )
    return model


def of_slot(slot: Path, at_least: int) -> Named:
    """What the slot file names, if its signature is right and it is no older than allowed."""
    try:
        held = json.loads(slot.read_bytes())
        named = Named(Path(held["bundle"]), str(held["digest"]), int(held["version"]))
        statement = {"model": held["model"], "version": named.version, "bundle": named.digest}
        signature = held["signature"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{slot}: {stage.one_line(error)}; expected model, version, bundle, digest, signature"
        ) from None
    signing.check(statement, signature, at_least)
    return named


class Holder:
    """The model that answers now, and what answers where it faults."""

    def __init__(self, find: Callable[[], Named], fallback: Named | None, params: Serve) -> None:
        self.find, self.params = find, params
        self.current = load(find(), params)
        self.fallback = None
        if fallback is not None:
            try:
                self.fallback = load(fallback, params)
            except UserError as error:  # the base rate still answers in its place
                log.error("fallback refused", extra={"fields": {"reason": str(error)}})

    def reload(self) -> bool:
        """Change to the bundle that is named now. False, and nothing changed, if it is refused."""
        try:
            self.current = load(self.find(), self.params)
        except UserError as error:
            log.error("bundle refused", extra={"fields": {"reason": str(error)}})
            return False
        log.info("bundle taken", extra={"fields": {"bundle": self.current.digest}})
        return True

    def in_place(self, model: Model, columns: Columns) -> tuple[Probabilities, str]:
        """The answer in the place of a model that faulted, and whose it is."""
        other = self.fallback
        if other is not None and other.contract.order == model.contract.order:
            try:
                return other.probabilities(columns), "previous champion"
            except Exception as error:
                log.error(
                    "the fallback faults too", extra={"fields": {"fault": stage.one_line(error)}}
                )
        return np.full(columns.rows, model.base_rate, np.float32), "base rate"
