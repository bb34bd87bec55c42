"""One Airflow with the local executor for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from orchestrate.place import Airflow, repository, running

from pipelines.params import Params


@pytest.fixture(scope="session")
def airflow(
    tmp_path_factory: pytest.TempPathFactory, half_year: Path, params: Params
) -> Iterator[Airflow]:
    """Airflow on a repository of its own. Tests share it, and name their runs."""
    home = repository(tmp_path_factory.mktemp("airflow") / "home", half_year)
    with running(home, params.orchestrate.pools) as started:
        yield started
