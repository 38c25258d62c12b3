"""The tuner: puts DiaBlo layers into a model."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import peft
import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, replicate_layers
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import _get_submodules
from torch import nn

from diablo.layout import BlockLayout
from diablo.tuner.base_digest import digest_under, warn_of_other_base
from diablo.tuner.checks import (
    check_in_place,
    check_mergeable,
    check_not_saved_whole,
    modules_with_parameters,
    new_layer_ranges,
)
from diablo.tuner.combining import check_combination, combined_config, write_sum
from diablo.tuner.config import DiabloConfig
from diablo.tuner.given import name_before_compiling, targets_given
from diablo.tuner.layers import DiabloLayer, DiabloParameters, adapt_module
from diablo.tuner.layers.holding import HoldingLayer
from diablo.tuner.layers.offloading import offloading_hook
from diablo.tuner.layers.quantized import check_backward, keep_backward
from diablo.tuner.layers.tensor_parallel import check_saved_modules
from diablo.tuner.openers import adapted_layers, connect, disconnect
from diablo.tuner.passes import left
from diablo.tuner.rates import watch_learning_rate
from diablo.tuner.rows import BASE, names_for_rows
from diablo.tuner.targets import (
    default_target_modules,
    resolve_targets,
    sees_images,
    with_replicated_layers,
)
from diablo.tuner.tokens import check_tokens, token_layers, unmerged_tokens
from diablo.tuner.weights import Owners, is_quantized, recomputed


class DiabloModel(BaseTuner):
    """A model with DiaBlo adapters, as ``get_peft_model`` makes it (arXiv 2506.03230).

    Args:
        model: the model to adapt.
        config: a :class:`DiabloConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: whether the blocks are made on the meta device, to be filled by loading.

    Example::

        import diablo
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        model = get_peft_model(model, diablo.DiabloConfig(num_blocks=64))
        model.print_trainable_parameters()
    """

    prefix: str = "diablo_"
    tuner_layer_cls = DiabloLayer
    # Whether somebody looks at the learning rate of the first step.
    _is_watched = False

    def _prepare_adapter_config(  # pyrefly: ignore[bad-override]
        self, peft_config: DiabloConfig, model_config: dict[str, Any]
    ) -> DiabloConfig:
        if peft_config.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(
                f"bias={peft_config.bias!r} needs PEFT 0.21 or newer, which saves the trained biases; PEFT "
                f"{peft.__version__} would leave them out of the file. Upgrade PEFT, or set bias='none'."
            )
        # A state dict, if there is one, names all targets.
        if peft_config.target_modules is None and self._state_dict is None:
            peft_config.target_modules = default_target_modules(self.model, model_config.get("model_type"))
        return peft_config

    def _prepare_model(self, peft_config: DiabloConfig, model: nn.Module) -> None:  # pyrefly: ignore[bad-override]
        # PEFT replaces layer by layer. What does not fit has to be found before the first layer is replaced.
        layers = self._layers()
        check_saved_modules(model, peft_config.modules_to_save or ())
        check_not_saved_whole(layers, peft_config)
        ranges = new_layer_ranges(self.peft_config.values(), peft_config)
        whole = with_replicated_layers(model, peft_config) if ranges else model
        if self._state_dict is None:
            targets = resolve_targets(whole, peft_config)
        else:
            targets = targets_given(whole, peft_config, self._state_dict)
        self._targets: dict[str, dict[str, BlockLayout]] = {}
        for target in targets:
            layouts = self._targets.setdefault(name_before_compiling(target.module), {})
            layouts[target.parameter or "weight"] = target.layout
        self._with_parameters = modules_with_parameters(targets, layers)
        check_tokens(model, peft_config, self._targets.keys())
        check_in_place(model, targets, peft_config)
        # These counts are for the model card, which the configuration writes. A packed weight does not tell how many
        # values it holds.
        packed = any(is_quantized(module) for module in model.modules())
        base = [parameter.numel() for name, parameter in model.named_parameters() if ".diablo_" not in name]
        trained = sum(target.layout.num_parameters for target in targets)
        peft_config._trained_of_all = (trained, 0 if packed else sum(base))
        peft_config._sees_images = sees_images(model)
        if ranges:
            replicate_layers(model, ranges)
        keep_backward(model)

    def _create_and_replace(  # pyrefly: ignore[bad-override]
        self,
        peft_config: DiabloConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        # PEFT gives the name without the compiler's prefix where a state dict names the targets.
        name = name_before_compiling(current_key)
        layouts = self._targets[name]
        if isinstance(target, DiabloLayer):
            target.update_layer(adapter_name, layouts, peft_config, inference_mode=peft_config.inference_mode)
            return
        new_module = (
            DiabloParameters(target, adapter_name, layouts, peft_config)
            if name in self._with_parameters
            else adapt_module(self.model, current_key, target, adapter_name, layouts["weight"], peft_config)
        )
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def train(self, mode: bool = True) -> DiabloModel:
        """Set training mode. In it every quantized layer, adapted or not, must have a backward."""
        if mode:
            check_backward(self.model, "Training")
        super().train(mode)
        return self

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Put an adapter's layers into the model. The arguments are those of PEFT's ``BaseTuner``.

        If a ``state_dict`` is given, its keys say what is adapted, and the shapes of its blocks say N.
        """
        self._state_dict = state_dict
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            self._state_dict = None
        config: Any = self.peft_config[adapter_name]
        if state_dict is not None and self._with_parameters:
            # They are set only now, because PEFT does not allow them beside a state dict.
            config.target_parameters = sorted(
                f"{module}.{name}" for module in self._with_parameters for name in self._targets[module]
            )
        connect(self.model)
        owners = Owners(self.model)
        for layer in self._layers().values():
            if isinstance(layer, HoldingLayer):
                parameters = layer.get_base_layer()._parameters
                layer.settle(is_shared=any(len(owners.of(parameters.get(name))) > 1 for name in layer.weights))
        config._made_for = self.digest_base(adapter_name)
        if not (config.inference_mode or self._is_watched):
            self._is_watched = True
            watch_learning_rate(self)

    def note_base(self, adapter_name: str, saved: Any) -> None:
        """Warn if the weights that a saved adapter was made for differ from those that it is loaded onto.

        Args:
            adapter_name: the adapter that has received its values.
            saved: the settings that it was saved with.
        """
        config: Any = self.peft_config[adapter_name]
        # The settings keep the base that the adapter was made for, whatever it is loaded onto.
        config._made_for = saved.base_digest or self.base_digests[adapter_name]
        if saved.base_digest is not None:
            own = getattr(self.model, "name_or_path", "") or type(self.model).__name__
            warn_of_other_base(adapter_name, saved, self.base_digests[adapter_name], own)

    def digest_base(self, adapter_name: str) -> str | None:
        """Take the digest of the base weights that an adapter is on. Merged blocks do not count.

        Returns:
            The digest, which ``base_digests`` now holds; None where the weights are out of reach.
        """
        self.base_digests[adapter_name] = digest_under(self._layers().values(), adapter_name)
        return self.base_digests[adapter_name]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # This is PEFT's last call when it loads an adapter. Before it, PEFT has dispatched an offloaded model anew.
        self._take_blocks_back()
        # PEFT 0.21 makes new parameters where it casts. These are trained, even if the old ones were not.
        trained = [parameter.requires_grad for parameter in self._parameters_of(adapter_name)]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for parameter, was in zip(self._parameters_of(adapter_name), trained, strict=True):
            parameter.requires_grad_(was)

    def _parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """The blocks of an adapter, and the rows of tokens that it trains."""
        blocks = [own for layer in self._layers().values() for own in layer.blocks_of(adapter_name).values()]
        rows = [layer.trainable_tokens_delta for layer in token_layers(self.model)]
        return blocks + [own[adapter_name] for own in rows if adapter_name in own]

    def _inject_parameters(  # pyrefly: ignore[bad-override]
        self, peft_config: DiabloConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        names: list[str] = []
        for module_name, layouts in self._targets.items():
            if module_name not in self._with_parameters:
                continue
            parent, module, target_name = _get_submodules(model, module_name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    peft_config, adapter_name, module, target_name, parent, current_key=module_name
                )
            names += [f"{module_name}.{name}" for name in layouts]
        # PEFT before 0.21 does not use the returned names.
        self.targeted_parameter_names += [name for name in names if name not in self.targeted_parameter_names]
        return names

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        is_whole = isinstance(child, AuxiliaryTrainingWrapper)
        if isinstance(child, DiabloLayer) or is_whole or recomputed(child) or offloading_hook(child) is not None:
            # PEFT's own method does three things that fail here. It hands on the attribute `weight` of an unloaded
            # layer, which experts, some quantized layers and heads of several layers do not have, and which is no
            # parameter where rows of tokens are trained. It reads the weight of a new layer, and some norms then
            # compute it from another state. And it moves the blocks to the device of the weight, and an offloaded
            # weight has none.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters.

        A merged model in evaluation mode stays merged, now with these. This takes one sweep over the diagonal of each
        weight, 1/N of it. In training mode the model is unmerged, with a warning, as PEFT does for every method.

        Args:
            adapter_name: one name, or several. The updates of several add up.
            inference_mode: whether they are frozen.
        """
        layers = self._layers().values()
        merged = {layer: layer.merged_adapters for layer in layers if layer.merged}
        if self.training or not merged:
            super().set_adapter(adapter_name, inference_mode)
            return
        self._check_merge_allowed()
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        try:
            for layer in merged:
                # PEFT unmerges what it finds merged, so it must find nothing.
                layer.merged_adapters = []
            with unmerged_tokens(self.model, instead=names):
                super().set_adapter(adapter_name, inference_mode)
        finally:
            for layer, names in merged.items():
                layer.merged_adapters = names
        for layer in layers:
            layer.merge_instead(layer.active_adapters)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose update is exactly the weighted sum of others' updates.

        The sum is exact, because updates are linear in the blocks. The new adapter is not active: call ``set_adapter``.

        Args:
            adapters: names of the adapters to combine. Where one of them has no blocks on a layer, it counts as zero.
            weights: a factor for each, of any sign.
            adapter_name: name of the new adapter.
            combination_type: ``"linear"``, the one that exists.

        Raises:
            ValueError: a name is unknown or taken, the lists differ in length, the combination type does not exist, an
                adapter trains more than blocks, or two of them cut a layer into different blocks.
        """
        layers = self._layers()
        check_combination(self.peft_config, adapters, weights, adapter_name, combination_type)
        self.peft_config[adapter_name] = combined_config(self.peft_config[adapters[0]], layers, adapters)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        write_sum(self._layers().values(), adapters, weights, adapter_name)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        self._take_blocks_back()
        unloaded = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        disconnect(self.model)
        return unloaded

    def _take_blocks_back(self) -> None:
        for layer in self._layers().values():
            layer.take_blocks_back()

    def _layers(self) -> dict[str, DiabloLayer]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, DiabloLayer)}

    @cached_property
    def base_digests(self) -> dict[str, str | None]:
        """By adapter, the digest of the base weights at its targets when it was put on the model, or None."""
        return {}

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it is merged, the weights become what they would be without it, to the bit.

        PEFT refuses to delete a merged adapter, since for most methods unmerging is not exact. Here it is.
        """
        if adapter_name in self.peft_config:
            for layer in self._layers().values():
                if adapter_name in layer.merged_adapters:
                    layer.merge_instead([name for name in layer.merged_adapters if name != adapter_name])
        with unmerged_tokens(self.model, without=adapter_name):
            super().delete_adapter(adapter_name)
        self.base_digests.pop(adapter_name, None)

    def _check_merge_allowed(self) -> None:
        """Refuse to merge where the merged blocks would be lost, or would change another module's output.

        Raises:
            ValueError: a weight is computed anew in each forward, or another module shares it.
        """
        super()._check_merge_allowed()
        # PEFT fetches offloaded weights through accelerate before it merges, and the blocks must be in place by then.
        self._take_blocks_back()
        check_mergeable(self.model, self._layers())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # pyrefly: ignore[bad-override]
        # PEFT loads adapters with strict=False and at most warns. torch raises what stands in error_msgs, the last
        # argument, whether strict or not.
        error_msgs: list[str] = args[-1]
        own = {f"{prefix}model.{layer}.{key}": blocks.shape for layer, key, blocks in self._blocks()}
        expected = own.keys()
        given = {key for key in state_dict if ".diablo_blocks" in key}
        adapters = {_adapter_of(key) for key in given}
        missing = sorted(key for key in expected - given if _adapter_of(key) in adapters)
        rows = {key for key in state_dict if key.endswith(_ROWS) or f"{_ROWS}." in key}
        unexpected = sorted((given - expected) | (rows - self.state_dict(prefix=prefix).keys()))
        if not given and not any(key in state_dict for key in self.state_dict(prefix=prefix)):
            missing = sorted(expected)
        for fault, keys in (("lacks", missing), ("has more tensors than the model takes:", unexpected)):
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                error_msgs.append(f"the adapter's file {fault} {', '.join(keys[:3])}{more}.")
        # If a tensor does not fit, torch reports it, and the bases need no comparison.
        if not (missing or unexpected) and all(state_dict[key].shape == own[key] for key in given):
            for adapter_name in adapters:
                self.note_base(adapter_name, self.peft_config[adapter_name])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _blocks(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        for layer_name, layer in self._layers().items():
            for key, parameter in layer.named_parameters():
                if key.startswith("diablo_blocks."):
                    yield layer_name, key, parameter

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """Open one pass for a forward or a whole generation. PEFT enters this context around it.

        Meanwhile ``adapter_names`` are handed to every adapted layer, so that rows of one batch can differ in adapter.
        """
        names: list[str] | None = kwargs.get("adapter_names")
        if torch.compiler.is_compiling() and names is None:
            yield
            return
        if names is None:
            with self._pass((args, kwargs)):
                yield
            return
        if self.training:
            raise ValueError("adapter_names is for inference: call model.eval() first.")
        if unknown := sorted(set(names) - self.peft_config.keys() - {BASE}):
            raise ValueError(
                f"adapter_names has {', '.join(unknown)}; the model has {', '.join(self.peft_config)}, "
                f"and {BASE!r} stands for none."
            )
        with names_for_rows(self.model, names, kwargs.get("num_beams") or 1), self._pass((args, kwargs), bare=True):
            yield

    def _pass(self, inputs: Any, bare: bool = False) -> AbstractContextManager[Any]:
        if torch.compiler.is_compiling() or not (layers := adapted_layers(self.model)):
            return nullcontext()
        return left(layers[0].passes.begin(layers, inputs, bare))


# What PEFT calls the trained rows of tokens in a file.
_ROWS = ".trainable_tokens_delta"


def _adapter_of(key: str) -> str:
    return key.rpartition("diablo_blocks.")[2].partition(".")[0]
