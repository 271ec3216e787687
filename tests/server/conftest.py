"""One server that most tests share."""

from collections.abc import Iterator

import pytest
from serve_world import World, running


@pytest.fixture(scope="module")
def world(tiny_processor) -> Iterator[World]:
    with running(tiny_processor) as world:
        yield world
