"""The datasets: a folder each, `events.sql` (raw tables to events), `features.sql` (events to
features) and `contract.yaml` (what the columns mean).
"""

from pathlib import Path

from pipelines import params
from pipelines.errors import UserError
from pipelines.params import Contract

CONTRACT = "contract.yaml"


def path(dataset: str, name: str) -> Path:
    """Where a file of the dataset is. Raises UserError where it is missing."""
    found = Path(__file__).parent / dataset / name
    if not found.is_file():
        raise UserError(f"dataset.name: {found} is missing")
    return found


def sql(dataset: str, query: str) -> str:
    """The text of `<dataset>/<query>.sql`. Raises UserError where it is missing."""
    return path(dataset, f"{query}.sql").read_text(encoding="utf-8")


def contract(dataset: str) -> Contract:
    """What the columns of the dataset's tables mean. Raises UserError with one line."""
    return params.checked(path(dataset, CONTRACT), Contract)
