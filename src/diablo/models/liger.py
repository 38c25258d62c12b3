"""Liger's kernels in the place of a model's norms and gated layers."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from diablo.devices import title_of

# Each of these would do more than change the modules of one model. The fused loss would replace the model's forward
# and with it the computation of logits for supervised positions only. The cross-entropy would replace torch's own for
# the whole process, and the rotary embedding would replace that of all models of a type.
_OFF = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}


def liger_obstacle(model_type: str, device: torch.device) -> str | None:
    """Why Liger's kernels cannot compute for a model on a device, with what to do; None where they can.

    Args:
        model_type: as the model's config has it.
        device: where the model is trained.
    """
    if device.type not in ("cuda", "xpu"):
        return f"Liger's kernels are for GPUs of CUDA, ROCm and XPU, and this is {title_of(device)}; leave it out"
    if not find_spec("liger_kernel"):
        return "Liger's kernels are not installed; install them with: pip install 'diablo-peft[liger]'"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger has no kernels for models of type {model_type!r}; leave it out"
    return None


def apply_liger(model: Any) -> None:
    """Let Liger's kernels compute the norms and gated layers of a model that has no adapter yet.

    An adapter around a norm or an expert then finds the kernel inside. The loss stays ours, of the model's own logits.
    Models that are loaded later are not changed.

    Args:
        model: a transformers model of a type that :func:`liger_obstacle` knows no obstacle for.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    with _models_unchanged():
        _apply_liger_kernel_to_instance(model=model, **_OFF)


@contextmanager
def _models_unchanged() -> Generator[None]:
    """A context after which transformers' modules define what they did before.

    Liger also replaces classes there, for models that are made later. Such a model may be one on the CPU, for which
    Liger has no kernel.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]
    before = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, names in zip(modules, before, strict=True):
            vars(module).update(names)
