"""One thin source for all tests of the orchestrator."""

from pathlib import Path

import pytest
from world import thin

from pipelines.params import Params


@pytest.fixture(scope="session")
def half_year(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    """January to June 2013 of the sample as a folder source, a twelfth of the flights."""
    return thin(tmp_path_factory.mktemp("half_year"), params, until="2013-06")
