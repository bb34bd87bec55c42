"""One thin source, and one Airflow for all tests that need one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from orchestrate.place import Airflow, repository, running
from world import thin

from pipelines.params import Params


@pytest.fixture(scope="session")
def half_year(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    """January to June 2013 of the sample as a folder source, a twelfth of the flights."""
    return thin(tmp_path_factory.mktemp("half_year"), params, until="2013-06")


@pytest.fixture(scope="session")
def airflow(
    tmp_path_factory: pytest.TempPathFactory, half_year: Path, params: Params
) -> Iterator[Airflow]:
    """Airflow on a repository of its own. Tests share it, and name their runs."""
    home = repository(tmp_path_factory.mktemp("airflow") / "home", half_year)
    with running(home, params.orchestrate.pools) as started:
        yield started
