"""distillation: a small network is taught what a fitted one says, not what happened.

The fitted network's calibrated prediction of every train row stands where its label stood (Hinton
et al., "Distilling the Knowledge in a Neural Network", 2015, at a temperature of one): it says of a
row more than a label of 0 or 1 does, and has less noise. A label is one number: so several classes
are not taught.
"""

from pathlib import Path

import numpy as np

from pipelines import stage
from pipelines.params import Distilled, Fit
from pipelines.train.data import Rows
from pipelines.train.fitted import Fitted

# Few units have none to spare, and what a teacher says is harder to overfit than labels are.
DROPOUT = 0.1


def taught(teacher: Fitted, train: Rows, folder: Path) -> Rows:
    """The train rows, with the teacher's predictions for labels, one number each, in a new
    `folder`.
    """
    folder.mkdir(parents=True)
    for name in ("codes", "numbers"):
        stage.link(folder / f"{name}.npy", train.folder / f"{name}.npy")
    np.save(folder / "labels.npy", teacher.predict(train))
    return Rows(folder)


def student(fit: Fit, asked: Distilled) -> Fit:
    """An mlp of one member."""
    shape = {"model": "mlp", "members": 1, "hidden": asked.hidden, "dropout": DROPOUT}
    return fit.model_copy(update=shape | {"max_epochs": asked.epochs})
