"""What training a model would take, from its config alone: trained parameters by kind, and memory by method."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig

from diablo.devices import choose_device, choose_dtype
from diablo.errors import UserError
from diablo.layout import BlockLayout
from diablo.models.choices import check_checkpointing
from diablo.models.forms import check_form
from diablo.models.heads import Head
from diablo.models.loading import (
    count_parameters,
    load_config,
    meta_model,
    resolve_model,
)
from diablo.models.vocabulary import TrainedTokens, config_with_rows
from diablo.planning.kept import ATTENTION, kept_on_meta
from diablo.planning.making import adapt_layers
from diablo.planning.optimizers import state_bytes
from diablo.planning.plan import Plan
from diablo.planning.rates import share_of, stored_learning_rate
from diablo.planning.suited import check_suited, is_encoder_decoder
from diablo.planning.tokens import tokens_of_recipe
from diablo.recipes.applying import TargetKind, apply_method, apply_on_meta, nearest_size, shapes_of, target_kinds
from diablo.recipes.methods import AnyMethod, DiabloMethod, FullMethod, LoraMethod, PeftMethod
from diablo.recipes.objectives import LabelObjective
from diablo.recipes.recipe import Recipe
from diablo.recipes.training import Optimizer
from diablo.tuner import DiabloLayer

_QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
"""Bytes of a weight that bitsandbytes holds; with nf4, 64 of them share a scale in fp32."""


@dataclass(frozen=True)
class Memory:
    """An estimate of the memory of training by one method, in bytes.

    Attributes:
        method: the method, in words.
        trained: trained parameters.
        weights: the model's weights.
        adapter: the adapter's parameters and, for DiaBlo, the base values of the diagonals.
        gradients: of the trained parameters, in fp32.
        optimizer: what the optimizer keeps of each trained parameter; of AdamW two moments in fp32.
        activations: the most that is kept for the backward at a time: all that the forward keeps or, where layers are
            computed again, what is left of it and what one of them then keeps.
    """

    method: str
    trained: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations

    def record(self) -> dict[str, Any]:
        """The same as values of JSON."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Sizes:
    """What training a model would take.

    Attributes:
        method: the method, in words.
        num_blocks: DiaBlo's N; None for another method.
        targets: what is adapted, by kind; empty for full fine-tuning.
        trained: trained parameters.
        total: parameters of the model with its adapter, as PEFT counts them.
        dtype: dtype of the frozen weights and of the activations.
        memory: an estimate for the method and, beside it, for full fine-tuning and, where the method is DiaBlo, for
            LoRA of as many trained parameters. There is none for a method whose adapters are made from the values of
            the weights, which the meta device has not.
        length: the tokens of a row that the memory is for.
        tokens: tokens whose rows are trained; None where there are none.
        learning_rate: the rate that suits DiaBlo's blocks in a long run, by the model's files; None for another method,
            or where the files are not here, or hold quantized weights.
    """

    method: str
    num_blocks: int | None
    targets: list[TargetKind]
    trained: int
    total: int
    dtype: torch.dtype
    memory: list[Memory]
    length: int
    tokens: TrainedTokens | None = None
    learning_rate: float | None = None

    def record(self) -> dict[str, Any]:
        """The same as values of JSON. Memory is in bytes."""
        return {
            "method": self.method,
            "num_blocks": self.num_blocks,
            "targets": [asdict(target) for target in self.targets],
            "parameters": {"trainable": self.trained, "total": self.total, "share": self.trained / self.total},
            "trained_tokens": self.tokens and self.tokens.record(),
            "learning_rate": self.learning_rate,
            "dtype": str(self.dtype).removeprefix("torch."),
            "memory": [each.record() for each in self.memory],
        }


def plan_sizes(
    model: str,
    *,
    num_blocks: int | None = None,
    budget: float | None = None,
    target_modules: list[str] | str | None = None,
    batch_size: int = 1,
    length: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: str = "none",
) -> Sizes:
    """Work out what training a model by DiaBlo would take.

    Only its config is read; the model is built on the meta device.

    Args:
        model: a folder, a hub id or ``builtin:NAME``.
        num_blocks: DiaBlo's N; 64 where neither this nor ``budget`` is given.
        budget: the largest share of all parameters, the blocks among them, to train, from 0 to 1, in place of
            ``num_blocks``.
        target_modules: what to adapt; DiaBlo's default where None.
        batch_size: rows of a forward.
        length: tokens of a row.
        dtype: dtype of the frozen weights and of the activations.
        checkpointing: ``training.gradient_checkpointing`` of the recipe.

    Raises:
        UserError: the model is not known, both or neither of the two sizes fit, no N keeps to the budget, or the way of
            gradient checkpointing is not known.
    """
    check_checkpointing(checkpointing)
    if num_blocks is not None and budget is not None:
        raise UserError(f"--num-blocks and --budget: found {num_blocks} and {budget:.3%}; give one of the two.")
    if budget is not None and not 0 < budget < 1:
        raise UserError(f"--budget: found {budget:.3%}; give a share above 0 and below 100 %.")
    config = load_config(resolve_model(model))
    check_form(config)
    if budget is not None:
        num_blocks = _fitting_num_blocks(config, budget, target_modules)
    method = DiabloMethod(num_blocks=num_blocks or 64, target_modules=target_modules)
    return sizes_of(
        config,
        method,
        batch_size=batch_size,
        length=length,
        dtype=dtype,
        checkpointing=checkpointing,
        files_of=resolve_model(model),
    )


def sizes_of(
    config: PretrainedConfig,
    method: AnyMethod,
    *,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    checkpointing: str = "none",
    quantization: str | None = None,
    tokens: TrainedTokens | None = None,
    optimizer: Optimizer | None = None,
    files_of: str | None = None,
) -> Sizes:
    """Work out what training a model by a method would take, on the meta device.

    Args:
        config: the model's config.
        method: the method of a recipe.
        batch_size: rows of a forward.
        length: tokens of a row.
        dtype: dtype of the frozen weights and of the activations.
        checkpointing: ``training.gradient_checkpointing`` of the recipe.
        quantization: how bitsandbytes holds the frozen weights of linear layers: ``"nf4"``, ``"int8"`` or, for as they
            are, None.
        tokens: tokens whose rows are trained too; the config has these rows.
        optimizer: the optimizer; AdamW where nothing is said.
        files_of: the folder or hub id of the model, whose weights say which learning rate suits; they are not asked
            where None.

    Raises:
        UserError: the method does not fit the model.
    """
    adapted = _adapted(config, method, dtype, tokens)
    if adapted is None:
        assert isinstance(method, PeftMethod)
        _, targets, (trained, total) = adapt_layers(method, config)
    else:
        targets, (trained, total) = target_kinds(adapted), count_parameters(adapted)
    # The weights that are trained are kept in fp32; autocast lowers what is computed with them.
    full = FullMethod(name="full")
    compared: list[AnyMethod] = [] if isinstance(method, FullMethod) else [full]
    if isinstance(method, DiabloMethod):
        # The rows of tokens are the same for every method.
        rows = sum(target.parameters for target in targets if target.is_rows)
        rank = nearest_size(lambda size: LoraConfig(r=size), shapes_of(targets), trained - rows)
        compared.insert(0, LoraMethod(name="lora", r=rank, target_modules=method.target_modules))

    optimizer = optimizer or Optimizer()

    def memory(method: AnyMethod, adapted: Any) -> Memory:
        kept = kept_on_meta(adapted, batch_size, length, checkpointing)
        return _memory(method, adapted, kept, optimizer, quantization)

    own = [] if adapted is None else [memory(method, adapted)]

    return Sizes(
        method=method.with_size,
        num_blocks=method.num_blocks if isinstance(method, DiabloMethod) else None,
        targets=targets,
        trained=trained,
        total=total,
        dtype=dtype,
        memory=[*own, *(memory(each, _adapted(config, each, dtype, tokens)) for each in compared)],
        length=length,
        tokens=tokens,
        learning_rate=None if files_of is None or adapted is None else stored_learning_rate(files_of, adapted),
    )


def recipe_sizes(recipe: Recipe) -> Sizes:
    """Work out what a recipe's training would take, from its model's config alone, for rows of the longest length.

    Args:
        recipe: the recipe.

    Raises:
        UserError: there is no such model, or the method does not fit it.
    """
    name = resolve_model(recipe.model)
    config = load_config(name)
    is_encoder_decoder(recipe, config)
    tokens = tokens_of_recipe(recipe, name, config)[1] if recipe.new_tokens or recipe.adapter else None
    config, kind = config_with_rows(config, tokens), recipe.objective.head
    if kind is not None:
        # The rows are not read for this. A head of more labels is hardly larger.
        labels = recipe.objective.labels or ["0", "1"] if isinstance(recipe.objective, LabelObjective) else []
        Head(kind, tuple(labels)).put_into(config, pad_token_id=0)
    length = recipe.training.max_length
    if kind is not None:
        length = min(length, getattr(config.get_text_config(), "max_position_embeddings", None) or length)
    dtype = choose_dtype(recipe.precision, choose_device())
    check_suited(recipe, config, dtype, [recipe.method])
    sizes = sizes_of(
        config,
        recipe.method,
        # A pair is two sequences.
        batch_size=recipe.training.batch_size * (2 if recipe.objective.rows in ("pairs", "texts") else 1),
        length=length,
        dtype=dtype,
        checkpointing=recipe.training.gradient_checkpointing,
        quantization=recipe.quantization,
        tokens=tokens,
        optimizer=recipe.training.optimizer,
        files_of=name,
    )
    if sizes.learning_rate is None:
        return sizes
    return replace(sizes, learning_rate=share_of(sizes.learning_rate, recipe.objective))


def run_memory(plan: Plan) -> Memory | None:
    """Estimate the memory of a run at the batch of its longest rows.

    Args:
        plan: the run's plan.

    Returns:
        The estimate; None where rows have images, where completions are written in training, and for a method whose
        adapters are made from the values of the weights.
    """
    recipe = plan.recipe
    if plan.rewards is not None or plan.images:
        return None
    adapted = _adapted(copy.deepcopy(plan.config), recipe.method, plan.dtype, plan.trained_tokens)
    if adapted is None:
        return None
    sequences = recipe.training.batch_size * len(plan.train[0].sequences)
    kept = kept_on_meta(adapted, sequences, plan.longest, recipe.training.gradient_checkpointing)
    return _memory(recipe.method, adapted, kept, recipe.training.optimizer, recipe.quantization)


def _adapted(config: PretrainedConfig, method: Any, dtype: torch.dtype, tokens: TrainedTokens | None) -> Any | None:
    config._attn_implementation = ATTENTION
    adapted = apply_on_meta(meta_model(config).to(dtype), method, tokens)
    return None if adapted is None else adapted.train()


def _fitting_num_blocks(config: PretrainedConfig, budget: float, target_modules: list[str] | str | None) -> int:
    """The smallest N that trains at most a share of all parameters, the blocks among them."""
    model = meta_model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    whole = DiabloMethod(num_blocks=1, target_modules=target_modules)
    shapes = shapes_of(target_kinds(apply_method(model, whole)))
    most = min(map(min, shapes))
    for number in range(1, most + 1):
        blocks = sum(BlockLayout(*shape, number).num_parameters * count for shape, count in shapes.items())
        if blocks <= budget * (total + blocks):
            return number
    raise UserError(
        f"--budget: found {budget:.3%}; the smallest share of this model that blocks on these targets can be is "
        f"{blocks / (total + blocks):.3%}, with N = {most}. Raise it, or name fewer --target-modules."
    )


def _memory(method: AnyMethod, model: Any, activations: int, optimizer: Optimizer, quantization: str | None) -> Memory:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count, is_full = sum(parameter.numel() for parameter in trained), isinstance(method, FullMethod)
    adapter = sum(parameter.nbytes for parameter in trained)
    # In place, the diagonal of each weight is kept as it was: as many values as there are in the blocks.
    adapter += sum(
        layer.diablo_layout["default"].num_parameters * layer.get_base_layer().weight.element_size()  # pyrefly: ignore[not-callable]
        for layer in model.modules()
        if isinstance(layer, DiabloLayer)
    )
    return Memory(
        method=method.with_size,
        trained=count,
        weights=4 * count if is_full else _frozen_bytes(model, quantization),
        adapter=0 if is_full else adapter,
        gradients=4 * count,
        optimizer=state_bytes(optimizer, trained),
        activations=activations,
    )


def _frozen_bytes(model: Any, quantization: str | None) -> int:
    """Bytes of the weights that are not trained; bitsandbytes leaves the output layer and embeddings as they are."""
    frozen = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    if quantization is None:
        return frozen
    head = model.get_output_embeddings()
    kept = [module for module in (head, model.get_input_embeddings()) if module is not None]
    left = {id(parameter) for module in kept for parameter in module.parameters()}
    held = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and id(module.weight) not in left
    ]
    saved = sum(weight.nbytes - weight.numel() * _QUANTIZED_BYTES[quantization] for weight in held)
    return frozen - round(saved)
