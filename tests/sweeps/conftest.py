"""The fake model with its data and strategies, for sweeps that take no time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_segmentation import FakePlugin

from tokenprune.plugins import registry


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Registered while the tests of a module run."""
    registry.register_plugin(FakePlugin(tmp_path_factory.mktemp("fake-model")), "fakes")
    yield
    registry.unregister_plugin("fakes")
