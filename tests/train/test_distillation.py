"""A student is taught what the teacher says."""

import numpy as np
import torch
from world import Checkout

from pipelines.train import data, distillation, fitted, models, objectives
from pipelines.train.fitted import Fitted
from pipelines.train.models.inputs import Inputs


def test_the_teachers_probabilities_stand_for_labels_and_nothing_else_changes(
    features: Checkout,
) -> None:
    params = features.params()
    names = params.dataset.features
    encoding = data.learn(names.categories, names.numbers, params.dataset.target)
    train = data.materialise(encoding, "train", features.folder / "rows")
    torch.manual_seed(0)
    network = models.build(Inputs.of(encoding, train), params.fit)
    mean = fitted.said(network, objectives.Binary(), train)
    calibrated = fitted.calibrate(network, objectives.Binary(), mean, train.labels)
    teacher = Fitted(calibrated, encoding)
    taught = distillation.taught(teacher, train, features.folder / "taught")
    np.testing.assert_array_equal(taught.arrays[2], teacher.predict(train))
    for before, after in zip(train.arrays[:2], taught.arrays[:2], strict=True):
        np.testing.assert_array_equal(after, before)
    assert set(np.unique(train.arrays[2])) == {0, 1}


def test_a_student_is_one_small_perceptron(features: Checkout) -> None:
    params = features.params()
    fit = distillation.student(params.fit, params.package.distilled)
    assert (fit.model, fit.members, fit.hidden) == ("mlp", 1, params.package.distilled.hidden)
    assert fit.max_epochs == params.package.distilled.epochs
    assert fit.seed == params.fit.seed
