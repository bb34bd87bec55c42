"""A few thousand rows of features with a known law, so that training takes seconds."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
from world import Checkout

from pipelines import tables

ROWS = 6000


def make_features(checkout: Checkout, leak: str | None = None, late: bool = False) -> None:
    """Write data/features for the columns of params.yaml; tail_slack and origin make the label."""
    params = checkout.params()
    random = np.random.default_rng(0)
    begin = datetime(2013, 1, 1, tzinfo=UTC)
    step = (params.as_of - begin) / ROWS
    at = [begin + step * row for row in range(ROWS)]
    slack = random.normal(size=ROWS)
    origin = random.choice(["EWR", "JFK", "LGA"], ROWS)
    minute = random.normal(size=ROWS)
    odds = -1 - slack + minute + (origin == "EWR")
    label = (random.random(ROWS) < 1 / (1 + np.exp(-odds))).astype(np.int64)
    columns: dict[str, object] = {
        "scheduled_at": at,
        "origin": origin,
        "carrier": random.choice(["UA", "B6"], ROWS),
        "flight": np.arange(ROWS),
        "prediction_time": [moment - timedelta(hours=2) for moment in at],
        "known_at": [moment - timedelta(hours=1 if late else 3) for moment in at],
        "label": label,
        "part_of_day": random.choice(["morning", "evening"], ROWS),
        "split": [
            "test" if m >= params.test_from else "val" if m >= params.val_from else "train"
            for m in at
        ],
    }
    for name in params.dataset.features.categories:
        columns.setdefault(name, random.choice(["a", "b", None], ROWS))
    for name in params.dataset.features.numbers:
        values = random.normal(size=ROWS).astype(np.float32)
        values[random.random(ROWS) < 0.05] = np.nan
        columns[name] = pa.array(values, from_pandas=True)
    columns["tail_slack"] = pa.array(slack.astype(np.float32))
    columns["departure_minute"] = pa.array(minute.astype(np.float32))
    if leak is not None:
        columns[leak] = pa.array((label + 0.1 * random.normal(size=ROWS)).astype(np.float32))
    tables.write(pa.table(columns), Path("data/features/2013.parquet"))
