"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from fedmide.checkpoints import locate


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny random model."""
    return locate("tiny-random", tmp_path_factory.mktemp("models"))
