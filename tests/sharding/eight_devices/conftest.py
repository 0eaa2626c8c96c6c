"""What the files of `eight_devices` share."""

from collections.abc import Iterator

import pytest

from tests.conftest import forget_where_many


@pytest.fixture(autouse=True)
def forget_programs_between_tests() -> Iterator[None]:
    """Free compiled programs within a file too: one of many meshes comes to 65 530 mappings, where XLA crashes."""
    yield
    forget_where_many()
