"""Rows of tokens that are trained beside blocks. PEFT's layers train them; here is what PEFT leaves open."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from diablo.tuner.config import DiabloConfig
from diablo.tuner.layers import DiabloLayer
from diablo.tuner.outside import base_layer_of, modules_outside_adapters
from diablo.tuner.weights import is_distributed, is_quantized


def check_tokens(model: nn.Module, config: DiabloConfig, targets: Collection[str]) -> None:
    """Refuse ``trainable_token_indices`` that would fail halfway, or train something else than what was asked for.

    Args:
        model: the model, in which nothing is changed yet.
        config: the adapter's settings.
        targets: the names of the modules that the adapter adapts by blocks.

    Raises:
        ValueError: a layer is not there, has no such row, cannot have trained rows, or is adapted in another way too.
    """
    given = config.trainable_token_indices
    if given is None:
        return
    embedding = input_embedding(model)
    if not isinstance(given, dict):
        if embedding is None:
            raise ValueError(
                f"trainable_token_indices={given!r} means the input embedding, and {type(model).__name__} does not say "
                "which module that is: give a mapping of the embedding's name to the ids."
            )
        given = {embedding: given}
    modules = dict(modules_outside_adapters(model))
    for name, ids in given.items():
        # As PEFT matches them.
        found = {full_name: module for full_name, module in modules.items() if full_name.endswith(name)}
        if not found:
            raise ValueError(f"trainable_token_indices has {name}, which no module of the model is called.")
        for full_name, module in found.items():
            _check_layer(full_name, module, ids, config, targets)
    if embedding in _layers_named(modules, given) and ties_embeddings(model):
        output = _name_of(model, model.get_output_embeddings())  # pyrefly: ignore[not-callable]
        if output is not None and (output in targets or isinstance(modules.get(output), DiabloLayer)):
            raise ValueError(
                f"trainable_token_indices changes {output} as well, which is tied to {embedding}, and {output} is "
                "adapted by blocks: leave it out of the target modules."
            )


def token_layers(model: nn.Module) -> list[TrainableTokensLayer]:
    """PEFT's layers that hold trained rows."""
    return [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]


@contextmanager
def unmerged_tokens(model: nn.Module, without: str | None = None, instead: Collection[str] = ()) -> Generator[None]:
    """Within this context no rows are merged. Behind it, those are that were merged before.

    PEFT refuses, or unmerges and says so, where it finds rows merged. Each row is kept as it was, so that nothing is
    lost.

    Args:
        model: the model.
        without: an adapter whose rows are not merged again.
        instead: adapters whose rows are merged in the place of the others; None of them where it is empty.
    """
    merged = {layer: list(layer.merged_adapters) for layer in token_layers(model) if layer.merged}
    for layer in merged:
        layer.unmerge()
    try:
        yield
    except Exception:
        # What failed has changed nothing, and neither has this.
        without, instead = None, ()
        raise
    finally:
        for layer, names in merged.items():
            chosen = [name for name in instead or names if name != without and name in layer.token_indices]
            if chosen:
                layer.merge(adapter_names=chosen)


def _check_layer(name: str, module: Any, ids: list[int], config: DiabloConfig, targets: Collection[str]) -> None:
    asked = f"trainable_token_indices has {name}"
    saved = tuple(config.modules_to_save or ())
    if name in targets or isinstance(module, DiabloLayer):
        raise ValueError(f"{asked}, which is adapted by blocks: leave it out of the target modules.")
    if isinstance(module, ModulesToSaveWrapper) or (saved and name.endswith(saved)):
        raise ValueError(f"{asked}, which modules_to_save trains whole: leave one of the two out.")
    layer: Any = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else base_layer_of(module)
    if not isinstance(layer, (nn.Embedding, nn.Linear)):
        raise ValueError(f"{asked}, a {type(layer).__name__}: rows of embeddings and of linear layers can be trained.")
    if is_quantized(layer) or is_distributed(layer.weight):
        raise ValueError(f"{asked}, whose weight is quantized or cut over processes: its rows cannot be trained alone.")
    if getattr(layer, "bias", None) is not None:
        raise ValueError(f"{asked}, whose bias PEFT's layer for trained rows would leave out: it cannot be trained so.")
    rows = layer.weight.shape[0]
    if max(ids) >= rows:
        raise ValueError(
            f"{asked} with token {max(ids)}, and it has {rows} rows: call "
            f"model.resize_token_embeddings({max(ids) + 1}) before the adapter is put on the model."
        )


def input_embedding(model: Any) -> str | None:
    """The name of the module that holds the vectors of words; None where a model does not say."""
    try:
        return _name_of(model, model.get_input_embeddings())
    except (AttributeError, NotImplementedError):
        return None


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _layers_named(modules: Collection[str], names: Collection[str]) -> set[str]:
    return {full_name for full_name in modules if full_name.endswith(tuple(names))}


def ties_embeddings(model: Any) -> bool:
    """Whether the output layer has the embedding's weight: as PEFT does, the config alone is asked."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
