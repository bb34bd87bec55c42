"""Quality of a binary classifier's probabilities, with bootstrap intervals.

label: shape (rows,), 0 or 1. probability: shape (rows,), in [0, 1]. All figures are rounded to six
digits: sums of floats repeat no further across machines.
"""

from collections.abc import Callable
from typing import TypedDict

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
DIGITS = 6
BINS = 20
NAMES = ("auc", "ap", "log_loss", "brier", "calibration_error")


class Interval(TypedDict):
    """A figure on the rows as they are, and the 2.5 % and 97.5 % points of its bootstrap about
    it.
    """

    value: float
    low: float
    high: float


def with_intervals(
    label: npt.NDArray[np.integer], probability: npt.NDArray[np.floating], resamples: int, seed: int
) -> dict[str, Interval]:
    """Every figure of NAMES with its percentile bootstrap interval (Efron 1979), rows drawn with
    replacement, less the bootstrap's estimate of bias, the mean of the draws minus the figure
    (Efron & Tibshirani 1993, section 10.3). Gaps are absolute: drawn rows, with noise of their own,
    show a larger calibration error than the rows they are drawn from.
    """
    measure = measurer(label, probability)
    rows = len(label)
    random = np.random.default_rng(seed)
    drawn = np.array(
        [
            measure(np.bincount(random.integers(0, rows, rows), minlength=rows).astype(np.float64))
            for _ in range(resamples)
        ]
    )
    value = measure(np.ones(rows))
    bias = drawn.mean(axis=0) - value
    low, high = np.maximum(np.quantile(drawn, (0.025, 0.975), axis=0) - bias, 0)
    return {
        name: Interval(
            value=round(float(value[at]), DIGITS),
            low=round(float(low[at]), DIGITS),
            high=round(float(high[at]), DIGITS),
        )
        for at, name in enumerate(NAMES)
    }


def point(
    label: npt.NDArray[np.integer], probability: npt.NDArray[np.floating]
) -> dict[str, float]:
    """Every figure of NAMES on the rows as they are. AUC is 0.5 where one class is missing."""
    value = measurer(label, probability)(np.ones(len(label)))
    return {name: round(float(value[at]), DIGITS) for at, name in enumerate(NAMES)}


def measurer(
    label: npt.NDArray[np.integer], probability: npt.NDArray[np.floating]
) -> Callable[[Floats], Floats]:
    """A function from row weights, shape (rows,), to the figures of NAMES. Sorts once, then costs
    O(rows).

    AUC is the area by trapezoids, average precision the sum of precision over steps of recall,
    both over distinct probabilities; the calibration error is the mean gap between rate and
    probability over BINS bins of equal count.
    """
    order = np.argsort(-probability, kind="stable")
    y = label[order].astype(np.float64)
    p = np.clip(probability[order].astype(np.float64), 1e-7, 1 - 1e-7)
    ends = np.append(
        np.flatnonzero(np.diff(p)), len(p) - 1
    )  # the last row of each distinct probability
    losses = -np.where(y == 1, np.log(p), np.log1p(-p))
    squares = (p - y) ** 2
    bins = np.arange(len(p)) * BINS // len(p)

    def measure(weights: Floats) -> Floats:
        w = weights[order]
        total = w.sum()
        hits = np.cumsum(w * y)[ends]
        asked = np.cumsum(w)[ends]
        misses = asked - hits
        positives, negatives = hits[-1], misses[-1]
        auc = 0.5
        if positives > 0 and negatives > 0:
            auc = float(
                np.trapezoid(np.append(0, hits), np.append(0, misses)) / (positives * negatives)
            )
        gained = np.diff(hits, prepend=0)
        ap = float((gained * hits / np.maximum(asked, 1e-12)).sum() / max(positives, 1e-12))
        gap = np.abs(np.bincount(bins, w * (p - y), minlength=BINS)).sum() / total
        return np.array([auc, ap, (w * losses).sum() / total, (w * squares).sum() / total, gap])

    return measure


def auc_at_least(auc: float, positives: int, negatives: int) -> float:
    """The lower end of the 95 % interval of an AUC, from the standard error of Hanley & McNeil
    (1982).
    """
    if not positives or not negatives:
        return 0.0
    both = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc)
    variance += (positives - 1) * (both[0] - auc**2) + (negatives - 1) * (both[1] - auc**2)
    return float(auc - 1.96 * np.sqrt(variance / (positives * negatives)))


def reliability(
    label: npt.NDArray[np.integer], probability: npt.NDArray[np.floating]
) -> list[dict[str, float]]:
    """Mean probability and observed rate in BINS bins of equal count, from low to high."""
    order = np.argsort(probability, kind="stable")
    return [
        {
            "probability": round(float(probability[part].mean()), DIGITS),
            "rate": round(float(label[part].mean()), DIGITS),
            "rows": len(part),
        }
        for part in np.array_split(order, min(BINS, len(order)))
    ]
