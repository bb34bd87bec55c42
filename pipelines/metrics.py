"""Quality of predictions by task, with bootstrap intervals.

binary      label: shape (rows,), 0 or 1; prediction: probability of 1, shape (rows,)
regression  label: shape (rows,), any number; prediction: the same
multiclass  label: shape (rows,), 0, 1, … of the classes; prediction: their probabilities, shape
            (rows, classes), of which the last class is watched

All figures are rounded to six digits: sums of floats repeat no further across machines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
DIGITS = 6
BINS = 20
NAMES = ("auc", "ap", "log_loss", "brier", "calibration_error")
Numbers = npt.NDArray[np.integer] | npt.NDArray[np.floating]
# From row weights, shape (rows,), to figures.
Measure = Callable[[Floats], Floats]


class Interval(TypedDict):
    """A figure on the rows as they are, and the 2.5 % and 97.5 % points of its bootstrap about
    it.
    """

    value: float
    low: float
    high: float


def with_intervals(
    label: Numbers, prediction: Numbers, resamples: int, seed: int, task: str = "binary"
) -> dict[str, Interval]:
    """Every figure of the task with its percentile bootstrap interval (Efron 1979), rows drawn with
    replacement, less the bootstrap's estimate of bias, the mean of the draws minus the figure
    (Efron & Tibshirani 1993, section 10.3). Gaps are absolute: drawn rows, with noise of their own,
    show a larger calibration error than the rows they are drawn from.
    """
    measure = TASKS[task].measurer(label, prediction)
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
        for at, name in enumerate(TASKS[task].names)
    }


def point(label: Numbers, prediction: Numbers, task: str = "binary") -> dict[str, float]:
    """Every figure of the task on the rows as they are. AUC is 0.5 where one class is missing."""
    value = TASKS[task].measurer(label, prediction)(np.ones(len(label)))
    return {name: round(float(value[at]), DIGITS) for at, name in enumerate(TASKS[task].names)}


def measurer(label: Numbers, probability: Numbers) -> Measure:
    """The figures of NAMES, of probabilities of 1. Sorts once, then costs O(rows).

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
    bins = _bins(len(p))

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


def _bins(rows: int) -> npt.NDArray[np.int64]:
    """The bin of each of the rows, which are in order."""
    return np.arange(rows) * BINS // rows


def of_numbers(label: Numbers, prediction: Numbers) -> Measure:
    """The root of the mean squared error, the mean absolute error, the share of the label's
    variance that is left (1 - R²), and the calibration error as for probabilities.
    """
    order = np.argsort(-prediction, kind="stable")
    y, value = (one[order].astype(np.float64) for one in (label, prediction))
    error, bins = value - y, _bins(len(y))

    def measure(weights: Floats) -> Floats:
        w = weights[order]
        total = w.sum()
        squared = (w * error**2).sum() / total
        variance = (w * (y - (w * y).sum() / total) ** 2).sum() / total
        gap = np.abs(np.bincount(bins, w * error, minlength=BINS)).sum() / total
        absolute = (w * np.abs(error)).sum() / total
        return np.array([np.sqrt(squared), absolute, squared / max(variance, 1e-12), gap])

    return measure


def of_classes(label: Numbers, prediction: Numbers) -> Measure:
    """AUC, average precision and calibration error are means over the classes, each against the
    rest; log loss, Brier score (summed over classes) and accuracy are of the row.
    """
    classes = prediction.shape[1]
    right = label[:, None] == np.arange(classes)
    each = [measurer(right[:, at], prediction[:, at]) for at in range(classes)]
    p = prediction.astype(np.float64)
    losses = -np.log(np.clip(p[right], 1e-7, None))
    squares = ((p - right) ** 2).sum(axis=1)
    hits = p.argmax(axis=1) == label

    def measure(weights: Floats) -> Floats:
        auc, ap, _, _, gap = np.mean([one(weights) for one in each], axis=0)
        of_rows = [(weights * one).sum() / weights.sum() for one in (losses, squares, hits)]
        return np.array([auc, ap, *of_rows, gap])

    return measure


def unit(label: npt.NDArray[Any], task: str) -> float:
    """What tells how large a difference of predictions is: of a probability 1, of a number the
    standard deviation of its labels.
    """
    return float(label.std()) or 1.0 if task == "regression" else 1.0


@dataclass(frozen=True)
class Task:
    """How the predictions of a kind of label are measured.

    loss: the figure that training makes small. told: the one that is told beside it. compared: the
    figures that must be no worse than a baseline's, the main one first.
    """

    name: str
    names: tuple[str, ...]
    measurer: Callable[[Any, Any], Measure]
    loss: str
    told: str
    compared: tuple[str, ...]

    @property
    def main(self) -> str:
        """The figure by which a model is spoken of."""
        return self.compared[0]


_TASKS = (
    Task("binary", NAMES, measurer, "log_loss", "auc", ("auc", "ap")),
    Task(
        "regression",
        ("rmse", "mae", "unexplained", "calibration_error"),
        of_numbers,
        "rmse",
        "unexplained",
        ("rmse", "mae"),
    ),
    Task(
        "multiclass",
        ("auc", "ap", "log_loss", "brier", "accuracy", "calibration_error"),
        of_classes,
        "log_loss",
        "accuracy",
        ("auc", "ap", "log_loss"),
    ),
)
TASKS = {task.name: task for task in _TASKS}


def sign(name: str) -> int:
    """1 where more of a figure is better, -1 where less is."""
    return 1 if name in ("auc", "ap", "accuracy") else -1


def ends(name: str) -> tuple[str, str]:
    """The worse end of a figure's interval, and the better one."""
    return ("low", "high") if sign(name) > 0 else ("high", "low")


def title(name: str) -> str:
    """A figure's name as people write it."""
    return name.upper() if name in ("auc", "ap", "rmse", "mae") else name.replace("_", " ")


def watched(prediction: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The one number of a prediction that is watched, shape (rows,): of classes, the last one's."""
    return prediction if prediction.ndim == 1 else prediction[:, -1]


def outcome(label: npt.NDArray[Any], prediction: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What the watched number foretells, shape (rows,): of classes, 1 where it was the last."""
    return label if prediction.ndim == 1 else (label == prediction.shape[1] - 1).astype(label.dtype)


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


def reliability(label: Numbers, prediction: Numbers) -> list[dict[str, float]]:
    """Mean prediction and mean label in BINS bins of equal count, from low to high."""
    order = np.argsort(prediction, kind="stable")
    return [
        {
            "prediction": round(float(prediction[part].mean()), DIGITS),
            "label": round(float(label[part].mean()), DIGITS),
            "rows": len(part),
        }
        for part in np.array_split(order, min(BINS, len(order)))
    ]
