"""What every network must know of its inputs."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.params import Fit
from pipelines.train.data import Encoding, Rows

SAMPLE = 100_000  # rows from which quantiles are read, evenly spaced


@dataclass(frozen=True)
class Inputs:
    """cardinalities: codes per category, the one for missing included.

    quantiles: shape (numbers, fit.quantiles), of the train rows' known values, not decreasing.
    """

    cardinalities: list[int]
    quantiles: npt.NDArray[np.float32]

    @classmethod
    def of(cls, encoding: Encoding, train: Rows, fit: Fit) -> "Inputs":
        """Read from the train rows. A number that is never known gets zeros."""
        numbers = train.arrays[1]
        sample = np.asarray(numbers[:: max(1, len(numbers) // SAMPLE)], dtype=np.float64)
        points = np.linspace(0, 1, fit.quantiles)
        columns = [
            np.quantile(known, points) if len(known := column[~np.isnan(column)]) else np.zeros(len(points))
            for column in sample.T
        ]
        return cls(_cardinalities(encoding), np.array(columns, np.float32).reshape(-1, fit.quantiles))

    @classmethod
    def blank(cls, encoding: Encoding, fit: Fit) -> "Inputs":
        """The right shapes, to be filled from saved weights."""
        return cls(_cardinalities(encoding), np.zeros((len(encoding.numbers), fit.quantiles), np.float32))


def _cardinalities(encoding: Encoding) -> list[int]:
    return [len(values) + 1 for values in encoding.vocabulary.values()]
