"""The optimizer of a plan: its class and arguments, checked against what the class takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.training_args import OptimizerNames

from diablo.errors import UserError, did_you_mean, first_line, shortened
from diablo.muon import Muon
from diablo.recipes.training import DEFAULT_OPTIMIZER, OUR_OPTIMIZERS, Optimizer, ParameterGroup, Training

# Arguments that have a key of their own in a recipe.
_KEYS = {
    "lr": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "betas": "training.optimizer.betas",
    "eps": "training.optimizer.epsilon",
}
# Arguments that follow from the optimizer's name, and some that a training run has no use for.
_WITHHELD = {"params", "fused", "foreach", "optim_bits", "is_paged", "scale_parameter", "relative_step", "warmup_init"}
_WITHHELD |= {"maximize", "capturable", "differentiable", "args"}
# What bitsandbytes takes and does nothing with.
_WITHOUT_EFFECT = {"amsgrad", "momentum", "centered"}

# What is called otherwise where it is not paged.
_NOT_PAGED = {"paged_adamw_32bit": DEFAULT_OPTIMIZER, "paged_ademamix_32bit": "ademamix"}


# How many values of each parameter are kept, by what an optimizer's name has in it; the first that fits counts.
_MOMENTS = {
    "ademamix": 3,
    "grokadamw": 3,
    "adamw": 2,
    "lion": 1,
    "muon": 1,
    "adagrad": 1,
    "rmsprop": 1,
    "sgd": 0,
}
_LEAST_IN_8_BITS = 4096
"""Values of a tensor, below which bitsandbytes keeps its state in 32 bits."""


def state_bytes(settings: Optimizer, parameters: Iterable[torch.Tensor]) -> int:
    """An estimate of the memory of an optimizer's state, in bytes.

    Args:
        settings: the optimizer of a recipe.
        parameters: what it trains, on any device.
    """
    name = settings.name
    if name == "adafactor":
        # A row and a column of second moments for each matrix, in fp32; Shazeer and Stern, 2018.
        return sum(
            4 * (values.numel() // values.shape[-1] + values.numel() // values.shape[-2])
            if values.dim() > 1
            else values.nbytes
            for values in parameters
        )
    moments = next(count for part, count in _MOMENTS.items() if part in name)
    if name == "sgd" and settings.options.get("momentum"):
        moments = 1
    bits = 8 if "8bit" in name else 4 if "4bit" in name else 32
    return sum(
        moments * values.numel() * (bits if values.numel() >= _LEAST_IN_8_BITS else 32) // 8 for values in parameters
    )


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer that is known to be there and to take its arguments.

    Attributes:
        name: as a recipe calls it.
        kind: its class.
        arguments: of the class, the learning rate among them.
    """

    name: str
    kind: type[torch.optim.Optimizer]
    arguments: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"name": self.name, "class": f"{self.kind.__module__}.{self.kind.__qualname__}", **self.arguments}


def choose_optimizer(training: Training, device: torch.device) -> OptimizerChoice:
    """Find the optimizer that a recipe asks for, and check what it is told.

    Args:
        training: the recipe's settings.
        device: where it is to run.

    Raises:
        UserError: it is not installed, cannot run there, or does not take what it is told.
    """
    settings = training.optimizer
    if settings.name.startswith("paged_") and device.type not in ("cuda", "xpu"):
        plain = _NOT_PAGED.get(settings.name, settings.name.removeprefix("paged_"))
        raise UserError(
            f"training.optimizer: found {settings.name!r}, which moves its state out of a GPU's memory, and there "
            f"is no GPU with a memory of its own; take {plain!r}."
        )
    kind, arguments = _ours(training) if settings.name in OUR_OPTIMIZERS else _of_transformers(training)
    if device.type == "mps" and kind.__module__.startswith("bitsandbytes") and "8bit" in settings.name:
        raise UserError(
            f"training.optimizer: found {settings.name!r}, and bitsandbytes has no optimizer in 8 bits for MPS; take "
            f"{DEFAULT_OPTIMIZER!r}."
        )
    taken = inspect.signature(kind).parameters
    arguments |= _own_keys(settings, taken) | _options(settings, kind, taken)
    try:
        kind([nn.Parameter(torch.zeros(1))], **arguments)
    except Exception as error:  # each optimizer has checks and errors of its own
        raise UserError(
            f"training.optimizer: {settings.name} does not take its settings: {first_line(error)}"
        ) from None
    return OptimizerChoice(settings.name, kind, arguments)


def _ours(training: Training) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class and the arguments of Muon."""
    return Muon, {"lr": training.rate, "weight_decay": training.weight_decay}


def _of_transformers(training: Training) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class and the arguments that transformers has for a name."""
    # What it reads of its TrainingArguments, which would choose a device.
    told: Any = SimpleNamespace(
        optim=OptimizerNames(training.optimizer.name),
        optim_args=None,
        learning_rate=training.rate,
        weight_decay=training.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
    )
    # It takes seconds to import, and what can be refused before is not to wait for it.
    from transformers import Trainer

    try:
        kind, arguments = Trainer.get_optimizer_cls_and_kwargs(told)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"training.optimizer: found {training.optimizer.name!r}, whose package is not installed: "
            f"{first_line(error)}"
        ) from None
    return kind, dict(arguments)


def _own_keys(settings: Optimizer, taken: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The arguments that ``betas`` and ``epsilon`` are."""
    found: dict[str, Any] = {}
    if settings.betas is not None:
        if "betas" not in taken:
            raise UserError(f"training.optimizer.betas: {settings.name} has no betas; leave them out.")
        count = len(taken["betas"].default)
        if len(settings.betas) != count:
            raise UserError(
                f"training.optimizer.betas: found {settings.betas}; {settings.name} has {count} of them, by default "
                f"{list(taken['betas'].default)}."
            )
        found["betas"] = tuple(settings.betas)
    if settings.epsilon is not None:
        if not _has_epsilon(taken):
            raise UserError(f"training.optimizer.epsilon: {settings.name} has no epsilon; leave it out.")
        found["eps"] = settings.epsilon
    return found


def _has_epsilon(taken: Mapping[str, inspect.Parameter]) -> bool:
    # Adafactor has two, which are options.
    return "eps" in taken and not isinstance(taken["eps"].default, tuple)


def _options(settings: Optimizer, kind: type, taken: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    keys = {name: key for name, key in _KEYS.items() if name != "eps" or _has_epsilon(taken)}
    withheld = _WITHHELD | (_WITHOUT_EFFECT if kind.__module__.startswith("bitsandbytes") else set())
    allowed = [name for name in taken if name not in keys and name not in withheld]
    for name, value in settings.options.items():
        where = f"training.optimizer.options.{name}"
        if name in keys:
            raise UserError(f"{where}: write {keys[name]} in its place.")
        if name not in allowed:
            listed = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
            raise UserError(f"{where}: {settings.name} has no such option; {listed}.{did_you_mean(name, allowed)}")
        default = taken[name].default
        if (kind_of := _kind_of(default)) and kind_of != _kind_of(value):
            raise UserError(f"{where}: found {shortened(value)}; allowed: {kind_of}, by default {default}.")
    return dict(settings.options)


def _kind_of(value: Any) -> str:
    """What a value is, in words; empty where it says nothing."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return f"a list of {len(value)}" if isinstance(value, (list, tuple)) else "text" if isinstance(value, str) else ""


def group_members(names: Iterable[str], groups: Sequence[ParameterGroup]) -> list[list[str]]:
    """The trained parameters of each group.

    A module's name stands for every module that is called so, or ends with it after a dot, and for what is inside.

    Args:
        names: of the trained parameters.
        groups: the groups.

    Raises:
        UserError: a name matches no trained parameter, or two groups have a parameter.
    """
    dotted = {name: f".{name}." for name in names}
    members: list[list[str]] = []
    for number, group in enumerate(groups):
        found = [name for name in dotted if any(f".{module}." in dotted[name] for module in group.modules)]
        for module in group.modules:
            if not any(f".{module}." in each for each in dotted.values()):
                raise UserError(
                    f"training.optimizer.groups: {shortened(module)} of group {number + 1} is in the name of no "
                    f"trained parameter, such as {next(iter(dotted))}; give modules that the method trains."
                )
        for name in found:
            if other := next((index for index, earlier in enumerate(members, 1) if name in earlier), None):
                raise UserError(
                    f"training.optimizer.groups: {name} is in groups {other} and {number + 1}; give modules that no "
                    "two groups share."
                )
        members.append(found)
    return members
