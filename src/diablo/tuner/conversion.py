"""Conversion to LoRA, for engines that serve LoRA alone. It states the error that it makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from diablo.layout import BlockLayout
from diablo.tuner.layers.base import DiabloLayer
from diablo.tuner.layers.linear import DiabloLinear
from diablo.tuner.layers.tensor_parallel import check_whole


@dataclass(frozen=True)
class LoraConversion:
    """A DiaBlo adapter as LoRA's factors: the best ones of their rank.

    Attributes:
        config: settings of the LoRA adapter. Its scale is 1.
        state_dict: the tensors of its file, by name.
        ranks: rank of each layer by its full name. It is below the given rank where the layer's update has a lower one.
        relative_errors: for each layer, the Frobenius norm of what is left out, divided by that of the update.
        relative_error: the same over all layers together; 0 is exact.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor]
    ranks: dict[str, int]
    relative_errors: dict[str, float]
    relative_error: float

    def record(self) -> dict[str, Any]:
        """What was lost and by what layer, as values of JSON; ``parameters`` are LoRA's."""
        return {
            "parameters": sum(tensor.numel() for tensor in self.state_dict.values()),
            "relative_error": self.relative_error,
            "ranks": self.ranks,
            "relative_errors": self.relative_errors,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT loads without this package."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        save_file(self.state_dict, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


@torch.no_grad()
def convert_to_lora(model: PeftModel, rank: int | float, adapter_name: str = "default") -> LoraConversion:
    """Convert an adapter of linear layers to a LoRA adapter, and say what that loses.

    The singular vectors of a block-diagonal matrix are those of its blocks, so each block is decomposed by itself.
    PEFT's ``convert_to_lora`` decomposes the dense update, which gives the same factors for N^2 times the work. By the
    theorem of Eckart and Young no other factors of that rank come closer.

    Args:
        model: a ``PeftModel`` with a DiaBlo adapter.
        rank: LoRA's rank, or, as a float of at most 1, the share of the squared singular values to keep in each layer.
        adapter_name: the adapter to convert.

    Returns:
        The factors in the dtype of the blocks, ``lora_A`` of ``(rank, in_features)`` and ``lora_B`` of
        ``(out_features, rank)``, and whatever else the adapter has trained (``modules_to_save``).

    Raises:
        TypeError: the model is no ``PeftModel``, or the adapter has blocks on other layers than linear ones.
        ValueError: the rank is out of its range, the adapter is unknown, it has trained biases or rows of tokens, or
            layers are cut over processes.
    """
    if isinstance(rank, bool) or not (0 < rank <= 1 if isinstance(rank, float) else rank >= 1):
        raise ValueError(f"rank={rank!r} is out of range: give an integer from 1, or a share above 0 and up to 1.0.")
    if not isinstance(model, PeftModel):
        raise TypeError(f"convert_to_lora takes a PeftModel, got a {type(model).__name__}.")
    if adapter_name not in model.peft_config:
        raise ValueError(f"The model has no adapter {adapter_name!r}; it has {', '.join(model.peft_config)}.")
    check_whole(model, "Converting to LoRA")
    config: Any = model.peft_config[adapter_name]
    layers = _layers(model, adapter_name)
    if config.bias != "none":
        raise ValueError(
            f"The adapter {adapter_name!r} has trained biases (bias={config.bias!r}), which cannot be converted: "
            "merge the adapter instead."
        )
    check_convertible(config)
    tensors, ranks, errors = {}, {}, {}
    lost = kept = 0.0
    for name, layer in layers.items():
        blocks = layer.diablo_blocks[adapter_name]
        lora_a, lora_b, squares = _factors(blocks, layer.diablo_layout[adapter_name], rank)
        ranks[name] = len(lora_a)
        left_out, total = float(squares[len(lora_a) :].sum()), float(squares.sum())
        errors[name] = (left_out / total) ** 0.5 if total else 0.0
        lost, kept = lost + left_out, kept + total
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a.to(blocks.dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b.to(blocks.dtype)
    others = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors |= {key: value.contiguous() for key, value in others.items() if ".diablo_blocks" not in key}
    usual = max(ranks.values())
    pattern = {name: own for name, own in ranks.items() if own != usual}
    lora = LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=list(layers),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        task_type=config.task_type,
        inference_mode=True,
    )
    return LoraConversion(lora, tensors, ranks, errors, (lost / kept) ** 0.5 if kept else 0.0)


def check_convertible(config: Any) -> None:
    """Check that engines which serve LoRA have a place for all that an adapter of these settings has trained.

    Raises:
        ValueError: it trains rows of tokens, which those engines do not read.
    """
    if ids := getattr(config, "trainable_token_indices", None):
        raise ValueError(
            f"it has trained rows of tokens (trainable_token_indices={ids}), for which engines that serve LoRA have no "
            "place: merge the adapter instead."
        )


def _layers(model: PeftModel, adapter_name: str) -> dict[str, DiabloLinear]:
    found: dict[str, DiabloLayer] = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, DiabloLayer) and adapter_name in module.diablo_blocks
    }
    if not found:
        raise TypeError(f"The adapter {adapter_name!r} has no DiaBlo blocks: only DiaBlo adapters can be converted.")
    linear = {name: layer for name, layer in found.items() if isinstance(layer, DiabloLinear)}
    if other := sorted(found.keys() - linear.keys()):
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise TypeError(
            f"Only the updates of linear layers are converted to LoRA; {adapter_name!r} also has blocks on "
            f"{', '.join(other[:3])}{more}: merge the adapter instead."
        )
    return linear


def _factors(
    blocks: torch.Tensor, layout: BlockLayout, rank: int | float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``lora_A``, ``lora_B`` and the squares of all singular values of one layer's update, the largest first."""
    dtype = torch.promote_types(blocks.dtype, torch.float32)
    decomposed = [torch.linalg.svd(tile.of_blocks(blocks).to(dtype), full_matrices=False) for tile in layout.tiles]
    squares, order = (
        torch.cat([values.flatten() for _, values, _ in decomposed]).double().square().sort(descending=True)
    )
    if isinstance(rank, float):
        rank = int(torch.searchsorted(squares.cumsum(0), rank * squares.sum())) + 1
    chosen = order[:rank]
    lora_a = blocks.new_zeros(len(chosen), layout.in_features, dtype=dtype)
    lora_b = blocks.new_zeros(len(chosen), layout.out_features, dtype=dtype)
    start = 0
    for tile, (left, values, right) in zip(layout.tiles, decomposed, strict=True):
        (rows,) = torch.where((chosen >= start) & (chosen < start + values.numel()))
        block, index = (chosen[rows] - start) // values.shape[1], (chosen[rows] - start) % values.shape[1]
        tile.of_input(lora_a)[block, rows] = left[block, :, index]
        tile.of_output(lora_b)[block, rows] = right[block, index] * values[block, index, None]
        start += values.numel()
    return lora_a, lora_b.T.contiguous(), squares
