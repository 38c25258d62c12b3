"""What several tests of the tuner are given.

Libraries are imported in the fixtures: pytest reads this file before tests/conftest.py has set Triton's switch.
"""

from __future__ import annotations

import pytest


@pytest.fixture
def second(tmp_path):
    """Saves an adapter of other values for a case and gives its folder and a model that has it."""
    import torch
    from peft import get_peft_model
    from tiny_models import fill

    def make(case, dtype=torch.float32, **settings):
        model = fill(get_peft_model(case.base(dtype), case.config(**settings)), seed=11).eval()
        model.save_pretrained(tmp_path / "second")
        return tmp_path / "second", model

    return make
