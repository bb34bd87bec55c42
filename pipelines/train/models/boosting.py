"""boosting: trees that grow one after another, each on what those before got wrong; they are held
as tensors, and so are saved, exported and explained as a network is.

scikit-learn grows them on histograms (Ke et al., "LightGBM", 2017). A value of a category is its
mean label on the train rows, drawn towards the mean of all where it is seldom (Micci-Barreca, "A
Preprocessing Scheme for High-Cardinality Categorical Attributes", 2001). All trees are asked at
once, by a product of matrices (Nakandala et al., "A Tensor Compiler for Unified Machine Learning
Prediction Serving", 2020).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from pipelines import tables
from pipelines.errors import UserError
from pipelines.params import Fit
from pipelines.train.data import BATCH, FEATURES, Rows
from pipelines.train.models.inputs import Inputs
from pipelines.train.objectives import Objective, Regression, absent

PRIOR = 100  # rows of the mean label that are added to those of a value
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def build(inputs: Inputs, fit: Fit) -> "Trees":
    """No tree yet: see `grow`. Of fit only seed and boosting say something here."""
    return Trees(inputs)


class Trees(nn.Module):
    """codes (rows, categories), numbers (rows, numbers), NaN: missing -> logits (rows, 1, width).

    In a node a row goes left where the feature in its column is at most its cut. It is in the leaf
    whose path has an entry of 1 for nodes where it went left, all `lefts` of them, and -1 for none.
    """

    means: torch.Tensor  # (categories, largest cardinality)
    columns: torch.Tensor  # (width, trees, nodes)
    cuts: torch.Tensor  # (width, trees, nodes, 1)
    paths: torch.Tensor  # (width, trees, leaves, nodes)
    lefts: torch.Tensor  # (width, trees, leaves, 1)
    leaves: torch.Tensor  # (width, trees, 1, leaves)
    start: torch.Tensor  # (width, 1): what the trees of a logit add to

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        shape = len(inputs.cardinalities), max(inputs.cardinalities, default=1)
        start = np.zeros((inputs.width, 1), np.float32)
        self._hold(means=np.zeros(shape, np.float32), start=start, **_tensors([], inputs.width, 1))

    def _hold(self, **arrays: npt.NDArray[Any]) -> None:
        for name, array in arrays.items():
            self.register_buffer(name, torch.from_numpy(array))

    def __len__(self) -> int:
        return self.columns.shape[0] * self.columns.shape[1]

    def forward(self, codes: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        features = self._features(codes, numbers)
        went_left = (F.embedding(self.columns, features) <= self.cuts).float()
        reached = (self.paths.float() @ went_left == self.lefts).float()
        # Products so far are of whole numbers, or have one summand: exact, in whatever order. This
        # sum is not: its order must not depend on the number of rows, as a product's does.
        said = (self.leaves @ reached).squeeze(2).sum(dim=1)
        return (self.start + said).T[:, None, :]

    def _features(self, codes: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Shape (categories + 2 * numbers, rows). A missing number is below every cut in its first
        line and above every cut in its second: a node has the one that sends it where it should go.
        """
        missing = torch.isnan(numbers)
        below = torch.where(missing, -torch.inf, numbers)
        above = torch.where(missing, torch.inf, numbers)
        return torch.cat([self.means.gather(1, codes.T.long()), below.T, above.T])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """The saved ones alone tell how many trees there are."""
        for name, held in list(self.named_buffers()):
            setattr(self, name, torch.empty_like(state_dict.get(prefix + name, held)))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def grow(self, train: Rows, val: Rows, objective: Objective, fit: Fit) -> None:
        """Grow until the loss of the validation rows has not fallen for boosting.patience rounds,
        and keep what has the smallest. Of more rows than boosting.rows, so many are seen of each.

        Raises UserError where a class has no train row.
        """
        from threadpoolctl import threadpool_limits

        numeric = isinstance(objective, Regression)
        sample, held_out = (tables.spaced(len(rows), fit.boosting.rows) for rows in (train, val))
        known, judged = (
            objective.known(torch.from_numpy(rows.arrays[2][some].astype(np.float64))).numpy()
            for rows, some in ((train, sample), (val, held_out))
        )
        if lost := absent(objective, known):
            raise UserError(
                f"{FEATURES}: none of the {len(sample):,} train rows that trees see (at most "
                f"fit.boosting.rows) has the label {min(lost)}"
            )
        means = _means(train.arrays[0][sample], known, self.means.shape)
        seen, unseen = _matrix(train, sample, means), _matrix(val, held_out, means)
        # scikit-learn takes no column of which nothing is known.
        seen[:, np.isnan(seen).all(axis=0)] = 0
        learner = _learner(fit, numeric)
        with threadpool_limits(fit.trainer.threads, user_api="openmp"):
            learner.fit(seen, known, X_val=unseen, y_val=judged)
        best = max(1, int(np.argmax(learner.validation_score_)))
        nodes = [tree.nodes for grown in learner._predictors[:best] for tree in grown]
        start = learner._baseline_prediction.reshape(-1, 1).astype(np.float32)
        trees = _tensors(nodes, len(start), fit.boosting.leaves, seen.shape[1], len(means))
        self._hold(means=means, start=start, **trees)


def _learner(fit: Fit, numeric: bool) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    asked = fit.boosting
    return (HistGradientBoostingRegressor if numeric else HistGradientBoostingClassifier)(
        max_iter=asked.rounds,
        learning_rate=asked.learning_rate,
        max_leaf_nodes=asked.leaves,
        min_samples_leaf=asked.leaf_rows,
        l2_regularization=asked.l2,
        max_features=asked.features,
        early_stopping=True,
        n_iter_no_change=asked.patience,
        tol=0,
        categorical_features=None,
        random_state=fit.seed,
    )


def _means(codes: npt.NDArray[np.int32], labels: Doubles, shape: tuple[int, ...]) -> Floats:
    """The mean label of every value of every category, shape (categories, largest cardinality)."""
    means = np.empty(shape, np.float32)
    for at, column in enumerate(codes.T):
        count = np.bincount(column, minlength=shape[1])
        total = np.bincount(column, labels, minlength=shape[1])
        means[at] = (total + PRIOR * labels.mean()) / (count + PRIOR)
    return means


def _matrix(rows: Rows, some: npt.NDArray[np.int64], means: Floats) -> Doubles:
    """Shape (some, categories + numbers); in float64, of which scikit-learn makes no copy."""
    matrix = np.empty((len(some), len(means) + rows.arrays[1].shape[1]))
    for at in range(0, len(some), BATCH):
        codes, numbers, _ = rows.take(some[at : at + BATCH])
        matrix[at : at + BATCH, : len(means)] = means[np.arange(len(means)), codes.numpy()]
        matrix[at : at + BATCH, len(means) :] = numbers.numpy()
    return matrix


def _tensors(
    trees: list[npt.NDArray[Any]], width: int, leaves: int, columns: int = 0, categories: int = 0
) -> dict[str, npt.NDArray[Any]]:
    """What `Trees` holds of trees, whose nodes are as scikit-learn has them: in each round one tree
    for each logit, a parent before its children, a cut in float64.
    """
    shape, nodes = (width, len(trees) // width), leaves - 1
    held: dict[str, npt.NDArray[Any]] = {
        "columns": np.zeros((*shape, nodes), np.int64),
        "cuts": np.zeros((*shape, nodes, 1), np.float32),
        "paths": np.zeros((*shape, leaves, nodes), np.int8),
        # No row went left less often than never: what a tree has no leaf for is never reached.
        "lefts": np.full((*shape, leaves, 1), -1, np.float32),
        "leaves": np.zeros((*shape, 1, leaves), np.float32),
    }
    for number, tree in enumerate(trees):
        at = number % width, number // width
        inner, leaf = (np.flatnonzero(tree["is_leaf"] == is_leaf) for is_leaf in (0, 1))
        path = np.zeros((len(tree), nodes), np.int8)
        for place, parent in enumerate(inner):
            for side, child in ((1, tree["left"][parent]), (-1, tree["right"][parent])):
                path[child] = path[parent]
                path[child, place] = side
        split = tree[inner]
        above = (split["feature_idx"] >= categories) & (split["missing_go_to_left"] == 0)
        held["columns"][at][: len(inner)] = split["feature_idx"] + above * (columns - categories)
        held["cuts"][at][: len(inner), 0] = _float32_below(split["num_threshold"])
        held["paths"][at][: len(leaf)] = path[leaf]
        held["lefts"][at][: len(leaf), 0] = (path[leaf] > 0).sum(axis=1)
        held["leaves"][at][0, : len(leaf)] = tree[leaf]["value"]
    return held


def _float32_below(cuts: npt.NDArray[np.float64]) -> Floats:
    """The largest float32 that is no larger: a float32 is at most the one where it is at most the
    other. And finite, so that what is missing may be above it.
    """
    nearest = cuts.astype(np.float32)
    below = np.where(nearest > cuts, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    return np.minimum(below, np.finfo(np.float32).max)
