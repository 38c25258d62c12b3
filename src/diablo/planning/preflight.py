"""What is checked before the first step. Adapters mostly fail in silence; each check here is a failure that would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from diablo.data.encoding import EncodedRow
from diablo.data.faults import name_places
from diablo.errors import UserError
from diablo.models.forms import ENCODER_DECODER, form_of
from diablo.models.heads import said
from diablo.scoring.losses import summed_completion_loss


def check_supervision(rows: Sequence[EncodedRow], what: str) -> None:
    """Every row must have a token that carries loss.

    Raises:
        UserError: some have none; their numbers are named.
    """
    bare = [row for row in rows if any(each.supervised == 0 for each in row.sequences)]
    if bare:
        raise UserError(
            f"{len(bare)} of {len(rows)} {what} rows have no supervised token ({name_places(bare)}): "
            "there is nothing to learn from them. Give each a completion."
        )


def check_stop_tokens(rows: Sequence[EncodedRow], batch: dict[str, torch.Tensor], stop_ids: frozenset[int]) -> None:
    """The stop tokens must keep their loss in a padded batch, also where padding has the same id.

    Args:
        rows: the rows that the batch was made of.
        batch: what the collator made of them: ``labels`` of shape ``(rows, tokens)``.
        stop_ids: the tokens that end a completion.

    Raises:
        UserError: the collator took the loss off some of them.
    """
    stops = torch.tensor(sorted(stop_ids))
    # The first token of a row is predicted from nothing, whatever its label; an encoder-decoder's from what it reads.
    labels = batch["labels"] if rows[0].read is not None else batch["labels"][:, 1:]
    kept = int(torch.isin(labels, stops).sum())
    expected = sum(label in stop_ids for row in rows for label in row.labels[1:])
    # All of a document is trained on, and most pieces of a long one end in its midst.
    is_text = all(row.labels == row.input_ids for row in rows)
    if kept != expected or (expected == 0 and not is_text):
        raise UserError(
            f"Of {expected} supervised stop tokens in a batch, {kept} carry loss after padding, so that the model "
            "would never learn to stop: the padding token equals the stop token and is masked by its id. Set another "
            "padding token, or mask padding by position."
        )


def check_trainable(model: nn.Module) -> None:
    """Something must be trainable, in a dtype that small updates survive.

    Raises:
        UserError: nothing is trainable, or trainable parameters are not fp32.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise UserError("No parameter is trainable: the method left the model as it was. Check method.target_modules.")
    low = [name for name, parameter in trainable.items() if parameter.dtype != torch.float32]
    if low:
        raise UserError(
            f"{len(low)} trainable parameters are not fp32, such as {low[0]} ({trainable[low[0]].dtype}): updates "
            "smaller than a rounding step would be lost. Load the adapter with autocast_adapter_dtype=True."
        )


def check_towers(model: Any, *, chosen: bool) -> None:
    """A multimodal model's other towers must not be adapted unless the user chose so.

    Args:
        model: the adapted model.
        chosen: whether the user wrote the target modules as a regular expression, which names the tower.

    Raises:
        UserError: modules of another tower than the text model are adapted.
    """
    # Both parts of an encoder-decoder are the text model.
    if chosen or form_of(model.config) == ENCODER_DECODER:
        return
    towers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and _is_other_tower(module.config, _text_config(model))
    ]
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    strays = [name for name in adapted if any(name.startswith(f"{tower}.") for tower in towers)]
    if strays:
        raise UserError(
            f"method.target_modules: {len(strays)} of the adapted modules lie outside the text model, such as "
            f"{strays[0]}; write a regular expression that names what you mean, or use exclude_modules."
        )


def check_gradients(model: Any, batch: dict[str, torch.Tensor], *, checkpointing: bool, has_head: bool = False) -> None:
    """A step must reach the trainable parameters: one small forward and backward, whose gradients are thrown away.

    Args:
        model: the model in training mode, as it will be trained.
        batch: a batch of one row.
        checkpointing: whether gradient checkpointing is on, the usual reason for a failure.
        has_head: whether the model has a head in place of its output layer, which predicts no tokens.

    Raises:
        UserError: no gradient arrives at some trainable parameter.
    """
    if has_head:
        given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        loss = said(model(**given)).float().square().sum()
    else:
        loss = summed_completion_loss(model, batch)
    reached = loss.requires_grad
    if reached:
        loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (not reached or p.grad is None)]
    model.zero_grad(set_to_none=True)
    if without:
        hint = (
            "under gradient checkpointing the inputs must require gradients (model.enable_input_require_grads()), or "
            "set training.gradient_checkpointing to none"
            if checkpointing
            else "they take no part in the forward pass; narrow method.target_modules"
        )
        raise UserError(f"No gradient reaches {len(without)} trainable parameters, such as {without[0]}: {hint}.")


def check_packing(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Packed rows must not see one another: no gradient may go from a row to the one before it.

    Such a gradient is exactly 0 where rows are apart, whatever the dtype and the kernels, and models that do not keep
    them apart do so in silence: those whose layers have a state, and those that read no positions.

    Args:
        model: the model in training mode, as it will be trained.
        batch: ``input_ids`` and ``position_ids`` of one sequence, of two rows.

    Raises:
        UserError: the second row depends on the first one.
    """
    start = int((batch["position_ids"][0] == 0).nonzero()[1])
    embedded: list[torch.Tensor] = []

    def follow(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(follow)
    try:
        given = {name: batch[name] for name in ("input_ids", "position_ids")}
        model(use_cache=False, **given).logits[:, start:].float().square().mean().backward()
    finally:
        handle.remove()
        model.zero_grad(set_to_none=True)
    gradient = embedded[0].grad
    if gradient is None or gradient[:, :start].any():
        raise UserError(
            f"training.packing: found true, but in a model of type {model.config.model_type} packed rows see one "
            "another; leave it out."
        )


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """The optimizer must hold every trainable parameter.

    Raises:
        UserError: it holds none, or misses some.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    missed = len(trainable - held)
    if missed:
        raise UserError(
            f"The optimizer does not hold {missed} of {len(trainable)} trainable parameters: it was made before the "
            "method was applied. Make it afterwards."
        )


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _is_other_tower(config: Any, text_config: Any) -> bool:
    # The whole model and its text part lead to the text config; a tower for images or sound does not.
    return config is not text_config and config.get_text_config() is not text_config


def check_trackers(names: Sequence[str]) -> None:
    """Every tracker must be installed.

    Raises:
        UserError: some are not.
    """
    if not names:
        return
    # It takes seconds to import, and most runs have none.
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    if absent := [name for name in names if name not in installed]:
        raise UserError(
            f"tracking.report_to: found {', '.join(absent)}, whose packages are not installed; install them, or leave "
            f"them out. Installed: {', '.join(installed) or 'none'}."
        )
