"""A checkout with a few thousand rows of features, so that training takes seconds."""

import pytest
from train.synthetic import make_features
from world import Checkout


@pytest.fixture
def features(checkout: Checkout) -> Checkout:
    """A checkout with made-up features."""
    checkout.set(fit={"batch_size": 256}, evaluate={"resamples": 20, "min_auc": 0.6})
    make_features(checkout)
    return checkout
