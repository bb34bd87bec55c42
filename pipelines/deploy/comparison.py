"""comparison: is the challenger worse than the champion on the same rows?

Events of one day share what that day was like, so rows are not independent: whole days are drawn
(the cluster bootstrap; Davison & Hinkley 1997, section 3.8), the same days for both models.
Differences are challenger minus champion; each has the 2.5 % and 97.5 % points of its draws.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines import metrics
from pipelines.params import Gate

Floats = npt.NDArray[np.float64]
SEED = 13


@dataclass(frozen=True)
class Rows:
    """Test rows, each array of shape (rows,): labels 0 or 1, both probabilities, the day's number,
    and the value of each slice's column.
    """

    label: npt.NDArray[np.int64]
    champion: Floats
    challenger: Floats
    day: npt.NDArray[np.int64]
    slices: Mapping[str, npt.NDArray[Any]]


def compare(rows: Rows, limits: Gate) -> tuple[dict[str, Any], list[str]]:
    """The differences with their intervals, and the reasons why the challenger is worse."""
    drawn = draw(rows.day, limits.resamples)
    found = {
        "log_loss": _interval(_log_loss(rows, drawn)),
        "ap": _interval(_average_precision(rows, drawn)),
    }
    reasons = []
    if found["log_loss"]["high"] > limits.max_log_loss_rise:
        reasons.append(
            f"log loss may rise by {found['log_loss']['high']}; allowed {limits.max_log_loss_rise}"
        )
    if -found["ap"]["low"] > limits.max_ap_fall:
        reasons.append(
            f"average precision may fall by {-found['ap']['low']}; allowed {limits.max_ap_fall}"
        )
    worse = slices(rows, drawn, limits)
    reasons += [
        f"{name}: log loss rises by at least {gap['low']}; allowed {limits.max_slice_log_loss_rise}"
        for name, gap in worse.items()
    ]
    days = int(drawn.shape[1])
    return {"rows": len(rows.label), "days": days, **found, "worse_slices": worse}, reasons


def draw(day: npt.NDArray[np.int64], resamples: int) -> Floats:
    """How often each day is drawn, shape (1 + resamples, days); the first row is every day once."""
    days = int(day.max()) + 1
    random = np.random.default_rng(SEED)
    drawn = random.multinomial(days, np.full(days, 1 / days), resamples)
    return np.vstack([np.ones(days), drawn])


def slices(rows: Rows, drawn: Floats, limits: Gate) -> dict[str, dict[str, float]]:
    """The slices of enough rows that are surely worse: even the good end of the interval is."""
    worse = {}
    for column, values in rows.slices.items():
        for value in np.unique(values):
            held = values == value
            if held.sum() < limits.min_slice_rows:
                continue
            gap = _interval(_log_loss(rows, drawn, held))
            if gap["low"] > limits.max_slice_log_loss_rise:
                worse[f"{column} {value}"] = gap
    return worse


def _log_loss(rows: Rows, drawn: Floats, held: npt.NDArray[np.bool_] | None = None) -> Floats:
    """The difference of mean log loss in each draw; sums per day are all it needs."""
    kept = np.ones(len(rows.label)) if held is None else held.astype(np.float64)
    gap = (_losses(rows.label, rows.challenger) - _losses(rows.label, rows.champion)) * kept
    days = drawn.shape[1]
    total = drawn @ np.bincount(rows.day, gap, days)
    return np.asarray(total / np.maximum(drawn @ np.bincount(rows.day, kept, days), 1))


def _losses(label: npt.NDArray[np.int64], probability: Floats) -> Floats:
    p = np.clip(probability, 1e-7, 1 - 1e-7)
    return -np.where(label == 1, np.log(p), np.log1p(-p))


def _average_precision(rows: Rows, drawn: Floats) -> Floats:
    """The difference of average precision in each draw."""
    both = [metrics.measurer(rows.label, p) for p in (rows.challenger, rows.champion)]
    at = metrics.NAMES.index("ap")
    weights = (draw[rows.day] for draw in drawn)
    return np.array([both[0](w)[at] - both[1](w)[at] for w in weights])


def _interval(drawn: Floats) -> dict[str, float]:
    """The first is of the rows as they are; the others are draws."""
    low, high = np.quantile(drawn[1:], (0.025, 0.975))
    named = {"value": drawn[0], "low": low, "high": high}
    return {name: round(float(value), metrics.DIGITS) for name, value in named.items()}
