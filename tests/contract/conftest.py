"""What several tests of the tuner are given."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny_models import fill


@pytest.fixture
def second(tmp_path):
    """Saves an adapter of other values for a case and gives its folder and a model that has it."""

    def make(case, dtype=torch.float32, **settings):
        model = fill(get_peft_model(case.base(dtype), case.config(**settings)), seed=11).eval()
        model.save_pretrained(tmp_path / "second")
        return tmp_path / "second", model

    return make
