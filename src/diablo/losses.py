"""The loss on completion tokens, without logits for any other token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel

from diablo.data.encoding import IGNORED


def summed_completion_loss(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the supervised tokens, summed.

    Args:
        model: a causal language model, adapted or not, possibly wrapped for distributed training.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, tokens)``; labels of tokens without
            loss are -100.

    Returns:
        A scalar in fp32, in nats.
    """
    return F.cross_entropy(*_supervised_logits(model, batch), reduction="sum")


def completion_log_likelihoods(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Log-likelihood of each row's supervised tokens, given the tokens before them.

    Args:
        model: as for :func:`summed_completion_loss`.
        batch: as for :func:`summed_completion_loss`.

    Returns:
        ``(rows,)`` in fp32, in nats; 0 for a row without supervised tokens.
    """
    losses = F.cross_entropy(*_supervised_logits(model, batch), reduction="none")
    rows, _ = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
    return losses.new_zeros(len(batch["labels"])).index_add(0, rows, -losses)


def _supervised_logits(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in fp32 that predict the supervised tokens, row by row, and these tokens.

    The output layer, a third of a small model's work, is applied to the positions that predict a supervised token and
    to no others. Whatever the model does to its logits afterwards (scaling, soft-capping) is still done.
    """
    targets = batch["labels"][:, 1:]
    supervised = targets != IGNORED

    def keep_supervised(head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *rest = args
        return hidden[:, :-1][supervised].unsqueeze(0), *rest

    handle = _output_layer(model).register_forward_pre_hook(keep_supervised)
    try:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        handle.remove()
    return output.logits.squeeze(0).float(), targets[supervised]


def _output_layer(model: Any) -> torch.nn.Module:
    model = getattr(model, "module", model)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.get_output_embeddings()
