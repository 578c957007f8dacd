import pytest
from families import write_family


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Family -> path of a checkpoint with random weights."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = write_family(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get
