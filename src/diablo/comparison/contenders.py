"""Who is compared: methods at the size at which they train as many parameters as DiaBlo, and their optimizers."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from peft import PeftConfig
from pydantic import ValidationError
from transformers import PretrainedConfig

from diablo.comparison.names import FORM
from diablo.devices import choose_device
from diablo.errors import UserError, did_you_mean
from diablo.models.forms import form_of
from diablo.models.heads import head_size
from diablo.models.loading import meta_model
from diablo.planning.making import adapt_on_meta
from diablo.planning.optimizers import choose_optimizer
from diablo.recipes.applying import Shapes, closest_size, nearest_size, peft_config
from diablo.recipes.methods import AnyMethod, DiabloMethod, FullMethod, LoraMethod, MissMethod, PeftMethod
from diablo.recipes.peft_methods import config_keys, peft_type, size_keys, takes_default_targets
from diablo.recipes.training import Optimizer, Training


@dataclass(frozen=True)
class Contender:
    """A method at the size at which it is compared, and with the optimizer, where optimizers are compared.

    Attributes:
        name: what the user calls it: a method's name in a recipe, or ``peft:TYPE:KEY``.
        method: the section of the recipe.
        size: N, rank or KEY, in words.
        trained: trained parameters.
        deviation: by how much that is more than DiaBlo's, as a share of DiaBlo's; None for full fine-tuning, which has
            no size to choose.
        optimizer: the section of the recipe; None where it is the recipe's own.
    """

    name: str
    method: AnyMethod
    size: str
    trained: int
    deviation: float | None
    optimizer: Optimizer | None = None

    @property
    def title(self) -> str:
        """What it is called beside the others: the method's name, with ``+`` and the optimizer's behind it."""
        return self.name if self.optimizer is None else f"{self.name}+{self.optimizer.name}"

    @property
    def folder(self) -> str:
        """The title, as folders may be called."""
        return urllib.parse.quote(self.title.replace(":", "-"), safe="=+")


def optimizers_of(names: Sequence[str], training: Training) -> list[Optimizer]:
    """The sections of optimizers: the recipe's own for its own optimizer, and that of the name alone for others.

    Args:
        names: names that :func:`check_optimizers` lets pass.
        training: the recipe's settings.

    Raises:
        UserError: an optimizer is not installed, or cannot run on this machine.
    """
    own, sections = training.optimizer, []
    for name in names:
        section = own if name == own.name else Optimizer(name=name)
        try:
            choose_optimizer(training.model_copy(update={"optimizer": section}), choose_device())
        except UserError as error:
            raise UserError(f"--optimizers: {str(error).removeprefix('training.optimizer: ')}") from None
        sections.append(section)
    return sections


def contender_of(name: str, diablo: DiabloMethod, config: PretrainedConfig, shapes: Shapes, budget: int) -> Contender:
    """A method with as many trained parameters as DiaBlo has, or as close to that as its sizes come.

    Args:
        name: a name that :func:`diablo.comparison.names.check_methods` lets pass.
        diablo: DiaBlo's section of the recipe, whose targets and dropout all methods share.
        config: the model's config.
        shapes: the layers that DiaBlo adapts.
        budget: the parameters that DiaBlo trains.

    Raises:
        UserError: no size of the method fits the model, or it cannot share the targets or the dropout.
    """
    if name == "diablo":
        return Contender(name, diablo, f"N = {diablo.num_blocks}", budget, 0.0)
    if name == "full":
        full = FullMethod(name="full")
        return Contender(name, full, "all weights", adapt_on_meta(full, config)[1][0], None)
    if name.startswith("peft:"):
        return _of_type(name, diablo, config, shapes, budget)
    common = diablo.model_dump(include={"target_modules", "exclude_modules", "layers_to_transform", "dropout"})
    meta = meta_model(config)

    def at_rank(rank: int) -> LoraMethod | MissMethod:
        section = MissMethod if name == "miss" else LoraMethod
        return section.model_validate({"name": name, "r": rank, **common})

    def adapter(rank: int) -> PeftConfig:
        return peft_config(at_rank(rank), meta)

    # A head is trained whole by every method, and is no part of what their sizes are chosen by.
    of_head = head_size(meta) if form_of(config).has_head else 0
    method = at_rank(nearest_size(adapter, shapes, budget - of_head))
    trained = adapt_on_meta(method, config)[1][0]
    size = f"r = {method.r}, alpha {method.alpha}" if isinstance(method, LoraMethod) else f"r = {method.r}"
    return Contender(name, method, size, trained, trained / budget - 1)


def read_type(name: str) -> tuple[str, str, dict[str, Any]]:
    """A type, the key that is solved for, and further settings, from ``peft:TYPE:KEY:key=value``.

    Raises:
        UserError: PEFT has no such type, or the type no such key.
    """
    _, kind, *rest = name.split(":")
    try:
        kind = peft_type(kind)
    except UserError as error:
        raise UserError(f"--methods: in {name!r}, {error}") from None
    key, settings = (rest or [""])[0], {}
    if key not in size_keys(kind):
        allowed = size_keys(kind)
        raise UserError(
            f"--methods: found {name!r}; give {FORM}. "
            + (
                f"The KEY that is solved for can be {', '.join(allowed)}.{did_you_mean(key, allowed)}"
                if allowed
                else f"{kind} has no key that could be solved for, and so cannot be compared at equal parameters."
            )
        )
    for each in rest[1:]:
        setting, equals, text = each.partition("=")
        if not equals or setting == key or setting not in config_keys(kind):
            allowed = [known for known in config_keys(kind) if known != key]
            raise UserError(
                f"--methods: found {each!r} in {name!r}; give key=value, where key is one of {', '.join(allowed)}."
                f"{did_you_mean(setting, allowed)}"
            )
        try:
            settings[setting] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"--methods: {each!r} in {name!r} is not a valid YAML value.") from None
    return kind, key, settings


def _of_type(name: str, diablo: DiabloMethod, config: PretrainedConfig, shapes: Shapes, budget: int) -> Contender:
    kind, key, settings = read_type(name)
    settings = _shared_with(diablo, kind, name) | settings
    counts: dict[int, int] = {}
    refusals: list[str] = []

    def at_size(size: int) -> PeftMethod:
        try:
            return PeftMethod.model_validate({"name": "peft", "type": kind, key: size, **settings})
        except ValidationError as error:
            raise UserError(error.errors()[0]["msg"]) from None

    def parameters(size: int) -> int | None:
        try:
            counts[size] = adapt_on_meta(at_size(size), config)[1][0]
        except UserError as error:
            refusals.append(str(error))
            return None
        return counts[size]

    # No method trains fewer parameters than it has ranks, tokens or frequencies.
    size = closest_size(parameters, budget, range(1, max(budget, min(map(min, shapes))) + 1))
    if size is None:
        raise UserError(f"--methods: {name!r} fits at no {key}: {refusals[-1]}")
    if len(counts) > 1 and len(set(counts.values())) == 1:
        raise UserError(
            f"--methods: found {name!r}, where {key} does not change how many parameters are trained; {kind} has "
            f"these keys: {', '.join(size_keys(kind))}."
        )
    words = [f"{setting} {value}" for setting, value in read_type(name)[2].items()]
    trained = counts[size]
    return Contender(name, at_size(size), ", ".join([f"{key} = {size}", *words]), trained, trained / budget - 1)


def _shared_with(diablo: DiabloMethod, kind: str, name: str) -> dict[str, Any]:
    """DiaBlo's targets and dropout, by the names that a type has for them."""
    if not takes_default_targets(kind):
        return {}
    given = {
        "target_modules": diablo.target_modules,
        "exclude_modules": diablo.exclude_modules,
        "layers_to_transform": diablo.layers_to_transform,
        f"{kind.lower()}_dropout": diablo.dropout or None,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if absent := given.keys() - config_keys(kind).keys():
        raise UserError(
            f"--methods: {name!r} has no {', '.join(sorted(absent))}, so that it cannot share what the recipe sets "
            "there for DiaBlo; leave the method out, or that setting."
        )
    return given
