"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama with a tokenizer and a chat template; not to be written to."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
