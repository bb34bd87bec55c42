"""A fit as a process, seen by what it says and by its checkpoints."""

import random
import subprocess
import time
from pathlib import Path

import pytest
import torch
from world import Checkout

from pipelines.params import Params
from pipelines.train import checkpoints, data
from pipelines.train.data import Encoding, Rows

FIT = "pipelines.train.fit"
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def arrays(params: Params) -> tuple[Encoding, Rows, Rows]:
    """The train and validation rows of the features, as the encoding of them has them."""
    names = params.dataset.features
    encoding = data.learn(names.categories, names.numbers, params.dataset.target)
    train, val = (data.materialise(encoding, one, Path("rows")) for one in ("train", "val"))
    return encoding, train, val


def saved() -> list[Path]:
    """The checkpoints of all fits, the oldest step first."""
    return sorted(checkpoints.FOLDER.glob("*/*.safetensors"))


def past_an_epoch(checkout: Checkout) -> subprocess.Popen[str]:
    """A fit whose first epoch is done."""
    process = checkout.start(FIT)
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 1 of" in line:
            break
    return process


def somewhere(checkout: Checkout, chance: random.Random) -> subprocess.Popen[str]:
    """A fit at some moment after it saved for the first time."""
    before = saved()
    process = checkout.start(FIT)
    while saved() == before and process.poll() is None:
        time.sleep(0.005)
    time.sleep(chance.random() * 0.1)
    return process
