"""The datasets: a folder each, `events.sql` (raw tables to events) and `features.sql` (events to
features).
"""

from pathlib import Path

from pipelines.errors import UserError


def path(dataset: str, query: str) -> Path:
    """Where `<dataset>/<query>.sql` is. Raises UserError where it is missing."""
    found = Path(__file__).parent / dataset / f"{query}.sql"
    if not found.is_file():
        raise UserError(f"dataset.name: {found} is missing")
    return found


def sql(dataset: str, query: str) -> str:
    """The text of `<dataset>/<query>.sql`. Raises UserError where it is missing."""
    return path(dataset, query).read_text(encoding="utf-8")
