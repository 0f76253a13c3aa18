import pytest
from story import Story


@pytest.fixture
def tell(tmp_path):
    """Begin a story: `tell(machines=3, min_ready=1, ...)`."""
    told = []

    def begin(**kinds):
        told.append(Story(tmp_path, **kinds))
        return told[-1]

    yield begin
    for story in told:
        story.die()
