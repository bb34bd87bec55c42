"""score: what the bundle says of the newest rows, month by month, in batches.

in:   models/bundle/, data/features/
out:  data/predictions/<month>.parquet: the rows of the last score.window_days before as_of, as the
      model saw them: time, label, every column of the bundle's contract, and `prediction`
run:  dvc repro score
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import bundle, stage, tables
from pipelines.errors import UserError
from pipelines.params import Params

FEATURES = Path("data/features")
PREDICTIONS = Path("data/predictions")


def run(params: Params) -> None:
    scorer = bundle.load(bundle.FOLDER)
    rows = 0
    with stage.fresh(PREDICTIONS) as folder:
        for month, window in newest(params, scorer.contract["columns"]):
            scored = window.append_column(bundle.PREDICTION, pa.array(scorer.predict(window)))
            tables.write(scored, folder / month)
            rows += scored.num_rows
        if not rows:
            raise UserError(
                f"{FEATURES}: no row in the {params.score.window_days} days before as_of "
                f"{params.as_of:%Y-%m-%d}"
            )
    stage.say("score", f"{rows:,} rows of the last {params.score.window_days} days")


def newest(params: Params, columns: list[dict[str, str]]) -> Iterator[tuple[str, pa.Table]]:
    """The rows of the window by month file: time, label and the bundle's columns."""
    time = params.dataset.time
    names = [time, "label", *(column["name"] for column in columns)]
    for file in tables.months(FEATURES):
        held = pq.read_schema(file).names
        if lacking := [name for name in names if name not in held]:
            raise UserError(f"{file}: column {lacking[0]} is missing; the bundle wants it")
        table = pq.read_table(file, columns=names)
        window = table.filter(pc.greater_equal(table[time], pa.scalar(params.window_from)))
        if window.num_rows:
            yield file.name, window


if __name__ == "__main__":
    stage.main(run)
