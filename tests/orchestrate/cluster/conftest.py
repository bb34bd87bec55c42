"""PostgreSQL for the Airflows of this folder."""

from collections.abc import Iterator

import pytest
from orchestrate import servers


@pytest.fixture(scope="session")
def databases() -> Iterator[dict[str, str]]:
    """Databases of one server, by name."""
    with servers.postgres(["celery", "mlflow", "watch"]) as urls:
        yield urls
