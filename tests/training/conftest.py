"""The small corpus that the tests of this room train on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tok.model, model.json, and token folders a and b."""
    return tiny.write(tmp_path_factory.mktemp("corpus"))
