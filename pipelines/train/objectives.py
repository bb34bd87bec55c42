"""What a network learns, by task: its loss, how its members become one prediction, and how that is
calibrated.

Shapes: logits (rows, members, width); a score, on which calibration works, (rows,) or for classes
(rows, width); a prediction as in pipelines/metrics.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from pipelines.params import Target

STEPS = 100  # of Newton's method at most: a dozen are enough, but where scores part the classes
ENOUGH = 1e-12  # twice what the next step would take off the loss, which is a sum over rows
Floats = npt.NDArray[np.float64]
Loss = Callable[[Floats], tuple[float, Floats, Floats]]  # of weights: value, gradient, curvature


class Objective(Protocol):
    """What a task asks of training."""

    @property
    def width(self) -> int:
        """Logits of one member."""
        ...

    def known(self, labels: torch.Tensor) -> torch.Tensor:
        """The labels as the members say them."""
        ...

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over rows and members, of labels as the members say them."""
        ...

    def mean(self, logits: torch.Tensor) -> torch.Tensor:
        """The members' mean prediction."""
        ...

    def score(self, mean: torch.Tensor) -> torch.Tensor:
        """What is scaled and shifted to calibrate it."""
        ...

    def answer(self, score: torch.Tensor) -> torch.Tensor:
        """The prediction that a score says."""
        ...

    def calibrate(self, score: Floats, label: Floats) -> tuple[float, Floats]:
        """The scale and the shift, shape () or (width,), with which scores fit the labels best."""
        ...


class _Plain:
    def known(self, labels: torch.Tensor) -> torch.Tensor:
        return labels


@dataclass(frozen=True)
class Binary(_Plain):
    """Cross-entropy; Platt's scaling (1999) of the log odds of the members' mean probability."""

    width = 1

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wanted = labels[:, None, None].expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")

    def mean(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(logits[:, :, 0]).mean(dim=1)

    def score(self, mean: torch.Tensor) -> torch.Tensor:
        known = mean.clamp(1e-6, 1 - 1e-6)
        return torch.log(known) - torch.log1p(-known)

    def answer(self, score: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(score)

    def calibrate(self, score: Floats, label: Floats) -> tuple[float, Floats]:
        x = np.stack([score, np.ones(len(score))], axis=1)

        def log_loss(weights: Floats) -> tuple[float, Floats, Floats]:
            odds = x @ weights
            p = np.exp(-np.logaddexp(0, -odds))
            hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * np.eye(2)
            return float((np.logaddexp(0, odds) - label * odds).sum()), x.T @ (p - label), hessian

        weights = _least(log_loss, np.zeros(2))
        return float(weights[0]), weights[1]


@dataclass(frozen=True)
class Regression(_Plain):
    """Squared error of the label's standard score, which is what the members say; the line through
    the labels (least squares) brings their mean back to the label's unit.
    """

    average: float = 0.0
    spread: float = 1.0

    width = 1

    def known(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels - self.average) / self.spread

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(logits, labels[:, None, None].expand_as(logits), reduction="sum")

    def mean(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, :, 0].mean(dim=1)

    def score(self, mean: torch.Tensor) -> torch.Tensor:
        return mean

    def answer(self, score: torch.Tensor) -> torch.Tensor:
        return score

    def calibrate(self, score: Floats, label: Floats) -> tuple[float, Floats]:
        x = np.stack([score, np.ones(len(score))], axis=1)
        scale, shift = np.linalg.lstsq(x, label, rcond=None)[0]
        return float(scale), shift


@dataclass(frozen=True)
class Multiclass(_Plain):
    """Cross-entropy; temperature scaling (Guo et al., "On Calibration of Modern Neural Networks",
    2017) of the logarithm of the members' mean probabilities, with a shift for each class
    (Alexandari et al., "Maximum Likelihood with Bias-Corrected Calibration", 2020).
    """

    width: int

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wanted = labels.long()[:, None].expand(logits.shape[:2])
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")

    def mean(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.softmax(logits, dim=2).mean(dim=1)

    def score(self, mean: torch.Tensor) -> torch.Tensor:
        return torch.log(mean.clamp(min=1e-6))

    def answer(self, score: torch.Tensor) -> torch.Tensor:
        return torch.softmax(score, dim=1)

    def calibrate(self, score: Floats, label: Floats) -> tuple[float, Floats]:
        """Only the differences of the shifts count, so a little is added to the curvature."""
        rows, width = score.shape
        wanted = (label[:, None] == np.arange(width)).astype(np.float64)
        shifts = np.broadcast_to(np.eye(width), (rows, width, width))
        x = np.concatenate([score[:, :, None], shifts], axis=2)

        def log_loss(weights: Floats) -> tuple[float, Floats, Floats]:
            logits = x @ weights
            log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            p = np.exp(log_p)
            mean = np.einsum("rc,rcw->rw", p, x)
            hessian = np.einsum("rc,rcv,rcw->vw", p, x, x, optimize=True) - mean.T @ mean
            gradient = np.einsum("rc,rcw->w", p - wanted, x)
            return -float((wanted * log_p).sum()), gradient, hessian + 1e-3 * np.eye(width + 1)

        weights = _least(log_loss, np.zeros(width + 1))
        return float(weights[0]), weights[1:]


def _least(loss: Loss, weights: Floats) -> Floats:
    """Where a convex loss, told with its gradient and its curvature, is least: Newton's method from
    `weights`, a step halved while it would raise the loss, as one far from the minimum can (Boyd
    and Vandenberghe, "Convex Optimization", 2004, section 9.5).
    """
    value, gradient, hessian = loss(weights)
    for _ in range(STEPS):
        step = np.linalg.solve(hessian, gradient)
        if gradient @ step < ENOUGH:
            break
        while (found := loss(weights - step))[0] > value:
            step = step / 2
        weights = weights - step
        value, gradient, hessian = found
    return weights


def absent(objective: Objective, labels: Floats) -> set[int]:
    """The classes that none of the labels is; of numbers, none."""
    if isinstance(objective, Regression):
        return set()
    return set(range(max(2, objective.width))) - set(labels.astype(int).tolist())


def of(target: Target, train: npt.ArrayLike = ()) -> Objective:
    """The objective of a task, to learn from the labels `train`; without them, to predict alone."""
    if target.task == "binary":
        return Binary()
    if target.task == "multiclass":
        return Multiclass(len(target.classes))
    labels = np.asarray(train)
    if not labels.size:
        return Regression()
    average, spread = labels.mean(dtype=np.float64), labels.std(dtype=np.float64)
    return Regression(float(average), float(spread) or 1.0)
