"""One little cluster for all tests of this folder, and data on the file system that its nodes share."""

from collections.abc import Iterator

import pytest

from tests.data_tools.conftest import tokenizer_path  # noqa: F401 (a fixture)
from tests.slurm.cluster import Cluster, little_cluster, missing_programs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"Slurm is not installed here ({', '.join(missing)} missing): apt-get install slurm-wlm munge")
    with little_cluster() as started:
        yield started
