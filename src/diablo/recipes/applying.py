"""The methods of a recipe, applied to a model: DiaBlo, and through PEFT the ones it is compared with."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, MissConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.miss import MissLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diablo.errors import UserError
from diablo.models.forms import form_of
from diablo.models.heads import head_modules
from diablo.models.loading import count_parameters
from diablo.models.vocabulary import TrainedTokens
from diablo.recipes.methods import AnyMethod, DiabloMethod, FullMethod, LoraMethod, MissMethod, PeftMethod
from diablo.recipes.peft_methods import build_config, takes_default_targets
from diablo.tuner import DiabloConfig, DiabloLayer
from diablo.tuner.rates import not_watched
from diablo.tuner.targets import default_target_modules, linear_kinds, matches_any


@dataclass(frozen=True)
class TargetKind:
    """The adapted modules of one kind, or the trained tensors of one name that belong to no single module.

    Attributes:
        kind: last part of the modules' names, or the tensors' name.
        count: how many there are.
        shape: ``(in_features, out_features)`` of each; None for tensors, and for modules that are no matrices.
        adapter: what the adapter holds for each, in words: number and shape of blocks, or shapes of factors.
        parameters: trainable parameters of all of them together.
        is_rows: whether rows of tokens are trained, and not a method's own parameters.
    """

    kind: str
    count: int
    shape: tuple[int, int] | None
    adapter: str
    parameters: int
    is_rows: bool = False


Shapes = Mapping[tuple[int, int], int]
"""How many target layers there are of each ``(in_features, out_features)``."""


def peft_config(method: DiabloMethod | LoraMethod | MissMethod | PeftMethod, model: nn.Module) -> PeftConfig:
    """PEFT's configuration for a method; the targets of all that adapt linear layers default to DiaBlo's.

    Raises:
        UserError: the config of a type that PEFT knows refuses its keys.
        ValueError: no targets are given, and no default is known.
    """
    form = form_of(model.config)
    task = form.task_type
    # PEFT itself adds two names.
    head = [name for name in head_modules(model) if name not in _OF_PEFT] if form.has_head else []
    if isinstance(method, PeftMethod):
        options = method.options
        if takes_default_targets(method.type) and not (method.target_modules or options.get("target_parameters")):
            options["target_modules"] = _default_targets(model)
        if head:
            options["modules_to_save"] = [*dict.fromkeys([*(options.get("modules_to_save") or []), *head])]
        return build_config(method.type, options, task)
    common: dict[str, Any] = {
        "task_type": task,
        "modules_to_save": head or None,
        "target_modules": _default_targets(model) if method.target_modules is None else method.target_modules,
        "exclude_modules": method.exclude_modules,
        "layers_to_transform": method.layers_to_transform,
    }
    if isinstance(method, DiabloMethod):
        return DiabloConfig(
            num_blocks=method.num_blocks,
            block_pattern=dict(method.block_pattern),
            diablo_dropout=method.dropout,
            **common,
        )
    if isinstance(method, MissMethod):
        return MissConfig(r=method.r, miss_dropout=method.dropout, **common)
    # There are no singular values to find without weights; the shapes are the same.
    if method.name == "pissa" and not any(parameter.is_meta for parameter in model.parameters()):
        common["init_lora_weights"] = "pissa_niter_16"
    return LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.name == "rslora",
        use_dora=method.name == "dora",
        **common,
    )


_OF_PEFT = ("classifier", "score")
"""Modules that PEFT trains whole where a model labels texts or words."""


def apply_method(model: Any, method: AnyMethod, tokens: TrainedTokens | None = None) -> Any:
    """Make a model trainable by a method. The model may lie on the meta device.

    Args:
        model: the model.
        method: the method.
        tokens: tokens whose rows are trained too. The model has these rows.

    Returns:
        A ``PeftModel``, or for full fine-tuning the model itself with every parameter trainable.

    Raises:
        UserError: the method does not fit the model; the message names the key of the recipe.
    """
    if isinstance(method, FullMethod):
        return model.requires_grad_(True)
    if isinstance(method.target_modules, list):
        # PEFT's methods pass over a name that matches nothing as long as another one matches.
        absent = [target for target in method.target_modules if not matches_any(target, model)]
        if absent:
            raise UserError(
                f"method.target_modules: {', '.join(absent)} match no module of the model; "
                f"allowed: names of its linear layers ({', '.join(linear_kinds(model))}), or all-linear."
            )
    try:
        config: Any = peft_config(method, model)
        if tokens is not None:
            config.trainable_token_indices = tokens.token_indices(model)
        # The plan and the run say what they think of the learning rate; a step of theirs is to wait for nothing.
        with not_watched():
            adapted = get_peft_model(model, config)
    except TypeError as error:
        if tokens is None or "trainable_token_indices" not in str(error):
            raise UserError(f"method: {error}") from None
        raise UserError(
            "method.target_modules: the embedding or the output layer is among them, whose rows new_tokens trains; "
            "leave it out of the targets."
        ) from None
    except ValueError as error:
        # A recipe has another word for it.
        words = str(error).replace("trainable_token_indices has", "new_tokens trains rows of")
        raise UserError(f"method: {words}") from None
    if form_of(model.config).has_head:
        # What is adapted is made fp32 by PEFT; modules that are trained whole are not.
        for parameter in adapted.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
    if not any(parameter.requires_grad and parameter.numel() for parameter in adapted.parameters()):
        raise UserError("method: with these settings nothing would be trained; raise the size of what it trains.")
    return adapted


def _default_targets(model: Any) -> list[str] | str:
    try:
        targets = default_target_modules(model, getattr(model.config, "model_type", None))
    except ValueError:
        if not form_of(model.config).has_head:
            raise
        # Encoders have names of their own: all linear layers below the head.
        targets = {*linear_kinds(getattr(model, model.base_model_prefix, model))}
    return sorted(targets) if isinstance(targets, set) else targets


def target_kinds(adapted: nn.Module) -> list[TargetKind]:
    """What a method adapts and trains, grouped by kind, shape and adapter; empty for full fine-tuning.

    Modules that are adapted come first. Tensors that several of them share, or that are in none, follow.
    """
    if not isinstance(adapted, PeftModel):
        return []
    rows = []
    layers: list[tuple[str, Any]] = [
        (name, module)
        for name, module in adapted.named_modules()
        if isinstance(module, BaseTunerLayer) and not name.endswith(_ROWS_LAYER)
    ]
    owners = Counter(id(parameter) for _, layer in layers for parameter in _trained(layer).values())
    groups: dict[tuple[str, tuple[int, int] | None, str], list[int]] = defaultdict(list)
    for name, layer in layers:
        own = {name: parameter for name, parameter in _trained(layer).items() if owners[id(parameter)] == 1}
        size: Any = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
        shape = None if None in size else (int(size[0]), int(size[1]))
        parameters = sum(parameter.numel() for parameter in own.values())
        groups[name.rpartition(".")[2], shape, _describe(layer, own)].append(parameters)
    for name, parameter in _trained(adapted).items():
        layer, is_rows, _ = name.partition(_ROWS)
        if is_rows:
            text = f"{parameter.shape[0]} rows of {parameter.shape[1]}"
            rows.append(TargetKind(layer.rpartition(".")[2], 1, None, text, parameter.numel(), is_rows=True))
        elif owners[id(parameter)] != 1:
            groups[_short(name), None, _size(parameter)].append(parameter.numel())
    kinds = [TargetKind(kind, len(sizes), shape, text, sum(sizes)) for (kind, shape, text), sizes in groups.items()]
    return kinds + rows


_ROWS_LAYER = ".token_adapter"
"""What PEFT calls the layer that trains rows of an embedding beside a method, behind the embedding's name."""

_ROWS = f"{_ROWS_LAYER}.trainable_tokens_delta."
"""What PEFT calls the trained rows of an embedding or an output layer, behind the layer's name."""


def apply_on_meta(model: Any, method: AnyMethod, tokens: TrainedTokens | None = None) -> Any | None:
    """The same as :func:`apply_method`, to a model on the meta device.

    Returns:
        None for a method whose adapters are made from the values of the weights, which the meta device has not:
        :func:`kinds_by_layer` says what such a method adapts.
    """
    try:
        return apply_method(model, method, tokens)
    except NotImplementedError:  # what torch raises for an operation that needs values
        return None


def kinds_by_layer(method: PeftMethod, model: Any) -> tuple[Any, list[TargetKind]]:
    """What a method adapts whose adapters are made from the values of the weights, which the meta device has not.

    One layer of each shape is adapted on the CPU, with random weights.

    Args:
        method: the method.
        model: the model on the meta device; it is changed.

    Returns:
        The model with a stand-in for the method on the same modules, and the kinds.
    """
    config = peft_config(method, model)
    shared = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    given: dict[str, Any] = {name: getattr(config, name, None) for name in shared}
    stand_in = get_peft_model(model, LoraConfig(r=1, task_type=form_of(model.config).task_type, **given))
    kinds = []
    for kind in target_kinds(stand_in):
        if kind.shape is None:
            kinds.append(kind)
            continue
        [alone] = [each for each in target_kinds(_adapt_layer(config, kind.shape)) if each.shape is not None]
        kinds.append(TargetKind(kind.kind, kind.count, kind.shape, alone.adapter, alone.parameters * kind.count))
    return stand_in, kinds


def shapes_of(kinds: Iterable[TargetKind]) -> Shapes:
    """The shapes of the matrices that a method adapts, with how many modules have each."""
    shapes: dict[tuple[int, int], int] = defaultdict(int)
    for kind in kinds:
        if kind.shape is not None:
            shapes[kind.shape] += kind.count
    return shapes


def nearest_size(
    config: Callable[[int], PeftConfig], shapes: Shapes, wanted: int, sizes: Iterable[int] | None = None
) -> int:
    """The size of a method at which its trained parameters come closest to a number.

    Parameters are counted, not computed: one layer of each shape is adapted on the meta device.

    Args:
        config: PEFT's configuration of the method at a size, such as LoRA's at a rank; its targets are not used.
        shapes: the layers that are to be adapted.
        wanted: the number of parameters.
        sizes: the sizes that may be chosen; 1 to the smallest dimension of a layer where None. The number of
            parameters must grow with them, or shrink.

    Returns:
        The size; of two that are equally close, the one with fewer parameters.
    """

    def parameters(size: int) -> int:
        trained = {shape: count_parameters(_adapt_layer(config(size), shape))[0] for shape in shapes}
        return sum(count * trained[shape] for shape, count in shapes.items())

    chosen = closest_size(parameters, wanted, sorted(range(1, min(map(min, shapes)) + 1) if sizes is None else sizes))
    assert chosen is not None  # every size can be counted
    return chosen


def closest_size(parameters: Callable[[int], int | None], wanted: int, sizes: Sequence[int]) -> int | None:
    """The size at which a number of parameters comes closest to another, found by few counts.

    Args:
        parameters: counts the parameters at a size; None where the method does not take the size, as where blocks must
            divide a dimension. The number must grow with the sizes, or shrink.
        wanted: the number that is wanted.
        sizes: the sizes, in ascending order. Of those that are taken, one may have twice the place of the one before.

    Returns:
        The size, of two that are equally close the one with fewer parameters; None where none of the smallest sizes is
        taken.
    """
    counts: dict[int, int | None] = {}

    def taken(places: Iterable[int]) -> int | None:
        for place in places:
            if place not in counts:
                counts[place] = parameters(sizes[place])
            if counts[place] is not None:
                return place
        return None

    def off(place: int) -> int:
        return (counts[place] or 0) - wanted

    low = taken(range(min(_MOST_TRIES, len(sizes))))
    if low is None:
        return None
    # Sizes are doubled until the number is passed, moves away or stands still.
    still, last = 0, len(sizes) - 1
    high = low
    while low < last and still < _STANDS_STILL:
        high = min(2 * low + 1, last)
        next_taken = taken(range(high, min(2 * high + 2, len(sizes))))
        if next_taken is None or off(low) * off(next_taken) <= 0 or abs(off(next_taken)) > abs(off(low)):
            high = high if next_taken is None else next_taken
            break
        still = still + 1 if off(next_taken) == off(low) else 0
        low = high = next_taken
    while (middle := taken(_outwards(low, high))) is not None:
        if off(low) * off(middle) <= 0:
            high = middle
        else:
            low = middle

    def closest() -> int:
        known = [place for place, count in counts.items() if count is not None]
        return min(known, key=lambda place: (abs(off(place)), off(place)))

    # Where a dimension is not divided evenly, the number of blocks' values goes up and down a little.
    best, before = closest(), None
    while best != before:
        for beside in range(max(best - 2, 0), min(best + 2, last) + 1):
            taken([beside])
        before, best = best, closest()
    return sizes[best]


_MOST_TRIES = 64
"""Sizes that are tried in search of the smallest that a method takes."""

_STANDS_STILL = 3
"""Doublings of a size after which a number that has not changed is taken not to depend on it."""


def _outwards(low: int, high: int) -> Iterator[int]:
    """The numbers between two others, from the middle on."""
    middle = (low + high) // 2
    for distance in range(high - low):
        for number in dict.fromkeys((middle - distance, middle + distance)):
            if low < number < high:
                yield number


def _adapt_layer(config: PeftConfig, shape: tuple[int, int]) -> Any:
    """A layer alone, adapted: without weights, or with random ones on the CPU where the adapter is made from them."""
    config = copy.copy(config)
    alone = {
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "task_type")),
        "trainable_token_indices": None,
        "target_modules": {"layer"},
    }
    vars(config).update({name: value for name, value in alone.items() if hasattr(config, name)})

    def adapt(device: str) -> Any:
        with torch.device(device):
            return get_peft_model(nn.ModuleDict({"layer": nn.Linear(*shape, bias=False)}), copy.copy(config))

    try:
        return adapt("meta")
    except NotImplementedError:  # what torch raises for an operation that needs values, on the meta device
        return adapt("cpu")


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _describe(layer: Any, trained: Mapping[str, nn.Parameter]) -> str:
    if isinstance(layer, DiabloLayer):
        layout = layer.diablo_layout[layer.active_adapters[0]]
        return f"{layout.num_stored_blocks} blocks of {layout.block_in} x {layout.block_out}"
    ranks = layer.miss_r if isinstance(layer, MissLayer) else layer.r if isinstance(layer, LoraLayer) else None
    if ranks is not None:
        return f"rank {ranks[layer.active_adapters[0]]}"
    words = {f"{_short(name)} {_size(parameter)}" for name, parameter in trained.items()}
    if not words:
        return "shared"
    return ", ".join(sorted(words)) if len(trained) == len(words) <= _MOST_WORDS else f"{len(trained)} tensors"


_MOST_WORDS = 4
"""Tensors of an adapted module that are named one by one."""


def _short(name: str) -> str:
    """The part of a tensor's name that tells what it is: the last one that says more than where it lies."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in _SAYS_LITTLE]
    return parts[-1] if parts else name


_SAYS_LITTLE = {"default", "weight", "bias", "modules_to_save", "base_layer"}


def _size(parameter: nn.Parameter) -> str:
    return " x ".join(map(str, parameter.shape)) or "1"
