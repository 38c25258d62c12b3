"""Which versions are installed, where a test can be run with some of them only, or expects something else."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import transformers
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTuner

saves_biases = pytest.mark.skipif(
    not hasattr(BaseTuner, "_get_learnable_bias_state_dict"), reason="this PEFT saves no biases of other methods"
)

not_on_oldest_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"), reason="does not work with PEFT 0.19, as docs/tuner.md says"
)

PROCESSORS_SAY_WHAT_THEY_PUT = Version(transformers.__version__) >= Version("5.23")
"""Whether processors of images that older versions of transformers have in another way are taken."""


def is_pinned(package: str) -> bool:
    """Whether a package has the version of constraints.txt."""
    text = Path(__file__).parents[1].joinpath("constraints.txt").read_text(encoding="utf-8")
    found = re.search(rf"^{package}==(.+)$", text, re.MULTILINE)
    return found is not None and found[1] == version(package)
