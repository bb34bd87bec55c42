"""The datasets: a folder each, `events.sql` (raw tables to events) and `features.sql` (events to
features).
"""

from pathlib import Path

from pipelines.errors import UserError


def sql(dataset: str, query: str) -> str:
    """The text of `<dataset>/<query>.sql`. Raises UserError where it is missing."""
    path = Path(__file__).parent / dataset / f"{query}.sql"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"dataset.name: {path} is missing") from None
