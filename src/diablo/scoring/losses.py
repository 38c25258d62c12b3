"""The loss on completion tokens, without logits for any other token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.utils.checkpoint import checkpoint

_CHUNK = 1024
"""Number of supervised tokens whose logits are cast to fp32 at a time."""

_NOT_GIVEN = ("attention_mask", "labels", "predicting")
"""What of a batch a causal language model is not given."""


def summed_completion_loss(
    model: Any, batch: Mapping[str, torch.Tensor], *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of the supervised tokens, summed. The host never waits for the device.

    Args:
        model: a causal language model or an encoder-decoder, adapted or not, possibly wrapped for distributed
            training.
        batch: what :func:`diablo.data.batching.collate` makes; and what the model is given of images.
        label_smoothing: the share of a token's target that is spread evenly over the vocabulary, from 0 to below 1.

    Returns:
        A scalar in fp32, in nats.
    """
    logits, targets = _supervised_logits(model, batch)
    if len(targets) <= _CHUNK:
        return _summed(logits, targets, label_smoothing)
    # In fp32, all logits together would take several times their memory. So they are cast one part at a time, and the
    # backward casts each part again.
    parts = zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=True)
    losses = [checkpoint(_summed, *part, label_smoothing, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum()


def completion_log_likelihoods(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihoods of completions, for every token in the place of the last one.

    One forward of a row so serves all completions that differ from it in their last token only.

    Args:
        model: as for :func:`summed_completion_loss`.
        batch: as for :func:`summed_completion_loss`; every row has a supervised token.

    Returns:
        Two tensors in fp32, in nats. ``(rows,)``: the log-likelihood of each row's supervised tokens without the last
        one, each given the tokens before it. ``(rows, vocabulary)``: the log-likelihood of every token in the place of
        the last one.
    """
    logits, targets = _supervised_logits(model, batch)
    rows = batch["predicting"] // batch["labels"].shape[1]
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = rows[1:] != rows[:-1]
    log_probabilities = logits.float().log_softmax(-1)
    of_targets = log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1).masked_fill(last, 0)
    before = of_targets.new_zeros(len(batch["labels"])).index_add(0, rows, of_targets)
    return before, log_probabilities[last]


def _summed(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)


def _supervised_logits(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that predict the supervised tokens, ``(supervised, vocabulary)``, and the ids of these tokens.

    They are in the order of the rows. The output layer takes a third of a small model's work, so it is applied only to
    the positions that predict a supervised token. Whatever the model does to its logits afterwards (scaling,
    soft-capping) is still done. No attention mask is given: rows are padded on the right, where no token of a causal
    model looks, and packed rows are told apart by their positions. Prompts that were learned are put before the tokens,
    and have no part in the logits.

    An encoder sees what is behind a token, and is given the mask. The model's own shift makes the decoder's inputs.
    """
    base, positions, labels = _base_of(model), batch["predicting"], batch["labels"]
    length, given = labels.shape[1], {name: batch[name] for name in batch if name not in _NOT_GIVEN}
    targets = labels.flatten().index_select(0, positions if base.config.is_encoder_decoder else positions + 1)
    if base.config.is_encoder_decoder:
        given |= {
            "attention_mask": batch["attention_mask"],
            "decoder_input_ids": base.prepare_decoder_input_ids_from_labels(labels=labels),
        }

    def keep_predicting(head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *rest = args
        return hidden[:, -length:].flatten(0, 1).index_select(0, positions).unsqueeze(0), *rest

    handle = base.get_output_embeddings().register_forward_pre_hook(keep_predicting)
    try:
        output = model(use_cache=False, **given)
    finally:
        handle.remove()
    return output.logits.squeeze(0), targets


def _base_of(model: Any) -> Any:
    """The model of transformers inside of an adapted or wrapped one."""
    model = getattr(model, "module", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model
