"""score: the answers are the bundle's own, the same bytes on every engine, and held to a contract."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deploy import tiny
from hypothesis import given
from hypothesis import strategies as st
from train.synthetic import make_features
from world import Checkout

from pipelines import bundle, engine, stage, tables
from pipelines.deploy import expected, score
from pipelines.errors import UserError


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """A checkout with features and a bundle."""
    make_features(checkout)
    tiny.make(checkout.params(), bundle.FOLDER)
    return checkout
