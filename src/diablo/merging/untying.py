"""Tied weights: a model in which modules no longer share a weight, where an adapter changes it for one of them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from diablo.models.loading import meta_model


def ties_of(model: Any) -> dict[str, str]:
    """The names of the parameters that a model's config ties to another one, each with the other's name."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def untie_config(model: nn.Module) -> None:
    """Have the configs of a model and its parts say that nothing is tied."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and getattr(part.config, "tie_word_embeddings", False):
            part.config.tie_word_embeddings = False


def untied_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same config, of a model in which nothing is tied."""
    model = meta_model(copy.deepcopy(config))
    untie_config(model)
    return model.config


def copies_for(ties: Mapping[str, str], stored: Collection[str]) -> dict[str, str] | None:
    """The tensors that have to be written so that nothing is tied, each with the stored one whose copy it is.

    Args:
        ties: from :func:`ties_of`.
        stored: the names of the stored tensors.

    Returns:
        The copies; None where a tensor is not stored under any of the names that share it.
    """
    sharing: dict[str, list[str]] = {}
    for target, source in ties.items():
        sharing.setdefault(source, [source]).append(target)
    copies: dict[str, str] = {}
    for names in sharing.values():
        present = [name for name in names if name in stored]
        if not present:
            return None
        copies |= {name: present[0] for name in names if name not in stored}
    return copies


@torch.no_grad()
def untie(adapted: PeftModel) -> dict[str, str]:
    """Give each module of a loaded model a weight of its own, where an adapter changes one that is tied.

    Returns:
        The names of the parameters that are their own now, each with that of the one which it was tied to; empty where
        no adapter changes a tied weight.
    """
    model = adapted.get_base_model()
    places = {name: _place(model, name) for pair in ties_of(model).items() for name in pair}
    # Where a model stores two that differ, transformers ties them not, whatever the config says.
    ties = {
        target: source for target, source in ties_of(model).items() if places[target].weight is places[source].weight
    }
    apart = [pair for pair in ties.items() if not _share_rows(*(places[name].owner for name in pair))]
    if not any(places[name].is_adapted for pair in apart for name in pair):
        return {}
    for target in ties:
        place = places[target]
        own = nn.Parameter(place.weight.detach().clone(), requires_grad=place.weight.requires_grad)
        place.module._parameters[place.name] = own
    untie_config(model)
    return ties


@dataclass(frozen=True)
class _Place:
    """Where a parameter of the base model is.

    Attributes:
        module: the module that has it.
        name: its name there.
        is_adapted: whether an adapter changes what the module computes, or takes its place.
        owner: the module, or what an adapter has put around it.
    """

    module: nn.Module
    name: str
    is_adapted: bool
    owner: Any

    @property
    def weight(self) -> torch.Tensor:
        weight = self.module._parameters[self.name]
        assert weight is not None  # a parameter that is tied is there
        return weight


def _place(model: nn.Module, name: str) -> _Place:
    path, _, own = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if isinstance(module, BaseTunerLayer):
        return _Place(module.get_base_layer(), own, True, module)
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _Place(module.original_module, own, True, module)
    return _Place(module, own, False, module)


def _share_rows(target: Any, source: Any) -> bool:
    """Whether an adapter puts the same rows of tokens into two tied modules, so that they stay tied."""
    wrapped = all(isinstance(module, TrainableTokensWrapper) for module in (target, source))
    return wrapped and target.token_adapter.tied_adapter is source.token_adapter
