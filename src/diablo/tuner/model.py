"""The tuner: puts DiaBlo layers into a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import peft
import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, replicate_layers
from peft.utils.other import _get_submodules
from torch import nn

from diablo.layout import BlockLayout
from diablo.tuner.combining import check_combination, combined_config, write_sum
from diablo.tuner.config import DiabloConfig
from diablo.tuner.given import name_before_compiling, targets_given
from diablo.tuner.layers import DiabloLayer, DiabloParameters, adapt_module
from diablo.tuner.layers.holding import HoldingLayer
from diablo.tuner.layers.quantized import check_backward, keep_backward
from diablo.tuner.layers.tensor_parallel import check_saved_modules
from diablo.tuner.openers import adapted_layers, connect, disconnect
from diablo.tuner.outside import listed
from diablo.tuner.passes import left
from diablo.tuner.rows import BASE, names_for_rows
from diablo.tuner.targets import (
    Target,
    default_target_modules,
    resolve_targets,
    target_obstacle,
    with_replicated_layers,
)
from diablo.tuner.weights import Owners, is_quantized, recomputed


class DiabloModel(BaseTuner):
    """A model with DiaBlo adapters, as ``get_peft_model`` makes it (arXiv 2506.03230).

    Args:
        model: the model to adapt.
        config: a :class:`DiabloConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: make the blocks on the meta device, to be filled by loading.

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

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: DiabloConfig, model_config: dict[str, Any]
    ) -> DiabloConfig:
        if peft_config.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(
                f"bias={peft_config.bias!r} needs PEFT 0.21 or newer, which saves the trained biases; PEFT "
                f"{peft.__version__} would leave them out of the file. Upgrade PEFT, or set bias='none'."
            )
        # A state dict, where there is one, names them all.
        if peft_config.target_modules is None and self._state_dict is None:
            peft_config.target_modules = default_target_modules(self.model, model_config.get("model_type"))
        return peft_config

    def _prepare_model(self, peft_config: DiabloConfig, model: nn.Module) -> None:  # type: ignore[override]
        # PEFT injects layer by layer: what does not fit has to be found before the first one is replaced.
        check_saved_modules(model, peft_config.modules_to_save or ())
        self._check_saved_modules_have_no_blocks(peft_config)
        ranges = self._new_layer_ranges(peft_config)
        whole = with_replicated_layers(model, peft_config) if ranges else model
        if self._state_dict is None:
            targets = resolve_targets(whole, peft_config)
        else:
            targets = targets_given(whole, peft_config, self._state_dict)
        self._targets: dict[str, dict[str, BlockLayout]] = {}
        for target in targets:
            layouts = self._targets.setdefault(name_before_compiling(target.module), {})
            layouts[target.parameter or "weight"] = target.layout
        self._check_not_both_kinds(targets)
        self._check_in_place(targets, peft_config)
        # For the model card, which the configuration writes. A packed weight does not tell how many values it holds.
        packed = any(is_quantized(module) for module in model.modules())
        base = [parameter.numel() for name, parameter in model.named_parameters() if ".diablo_" not in name]
        trained = sum(target.layout.num_parameters for target in targets)
        peft_config._trained_of_all = (trained, 0 if packed else sum(base))
        if ranges:
            replicate_layers(model, ranges)
        keep_backward(model)

    def _check_saved_modules_have_no_blocks(self, peft_config: DiabloConfig) -> None:
        """Refuse to train a layer whole that another adapter adapts: PEFT does so when this one is in the model."""
        saved = tuple(peft_config.modules_to_save or ())
        if names := [name for name in self._layers() if name.endswith(saved)]:
            raise ValueError(
                f"modules_to_save has {listed(names)}, which another adapter of the model adapts by blocks: adapt it "
                "here too as one of the target_modules, or put this adapter on a model without the other one."
            )

    def _new_layer_ranges(self, peft_config: DiabloConfig) -> list[tuple[int, int]] | None:
        """The layers that the model has to be made of anew; None where it is as the adapter needs it."""
        configs: list[Any] = list(self.peft_config.values())
        others = [config.layer_replication for config in configs if config is not peft_config]
        if not others:
            return peft_config.layer_replication
        if peft_config.layer_replication != others[0]:
            raise ValueError(
                f"layer_replication={peft_config.layer_replication!r} differs from that of the model's first adapter, "
                f"{others[0]!r}: all adapters of a model have the same layers."
            )
        return None

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: DiabloConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        # PEFT gives the name without it where a state dict names the targets.
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
        """Set training mode, in which every quantized layer, adapted or not, has to have a backward."""
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
        """Put an adapter's layers into the model; arguments are those of PEFT's ``BaseTuner``.

        Where a ``state_dict`` is given, its keys say what is adapted and the shapes of its blocks say N.
        """
        self._state_dict = state_dict
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            self._state_dict = None
        if state_dict is not None and self._with_parameters:
            # Not before: PEFT does not allow them beside a state dict.
            config: Any = self.peft_config[adapter_name]
            config.target_parameters = sorted(
                f"{module}.{name}" for module in self._with_parameters for name in self._targets[module]
            )
        connect(self.model)
        owners = Owners(self.model)
        for layer in self._layers().values():
            if isinstance(layer, HoldingLayer):
                parameters = layer.get_base_layer()._parameters
                layer.settle(is_shared=any(len(owners.of(parameters.get(name))) > 1 for name in layer.weights))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT 0.21 makes new parameters of those that it casts, which are trained, whatever the old ones were.
        trained = [
            [blocks.requires_grad for blocks in layer.blocks_of(adapter_name).values()]
            for layer in self._layers().values()
        ]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer, were in zip(self._layers().values(), trained, strict=True):
            for blocks, was in zip(layer.blocks_of(adapter_name).values(), were, strict=True):
                blocks.requires_grad_(was)

    def _check_in_place(self, targets: list[Target], config: DiabloConfig) -> None:
        """Refuse ``in_place=True`` where it is impossible, before anything is changed."""
        if config.in_place is not True:
            return
        owners = Owners(self.model)
        for target in targets:
            reason = target_obstacle(self.model, target, config, owners)
            if reason is not None:
                raise ValueError(
                    f"in_place=True is impossible for {target.name}: {reason}. Set in_place='auto', which writes the "
                    "blocks into the weights where that is possible and adds their product beside elsewhere."
                )

    def _inject_parameters(  # type: ignore[override]
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
        # PEFT before 0.21 does not take the names from what is returned.
        self.targeted_parameter_names += [name for name in names if name not in self.targeted_parameter_names]
        return names

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, DiabloLayer) or recomputed(child):
            # PEFT hands the weight of an unloaded layer on; experts and some quantized layers have none of that name.
            # And it looks at the weight of a new one, which some norms compute from another state then.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_not_both_kinds(self, targets: list[Target]) -> None:
        """Refuse what is adapted as a module and by its parameters, in this adapter or another one."""
        by_themselves = [target for target in targets if target.parameter is not None]
        self._with_parameters = {name_before_compiling(target.module) for target in by_themselves}
        layers = self._layers()
        for target in targets:
            layer = layers.get(target.module)
            by_parameters = target.parameter is not None
            if (not by_parameters and name_before_compiling(target.module) in self._with_parameters) or (
                layer is not None and isinstance(layer, DiabloParameters) != by_parameters
            ):
                raise ValueError(
                    f"{target.module} is adapted both as a module and by its parameters: name it in target_modules or "
                    "in target_parameters, the same for every adapter."
                )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters.

        A merged model in evaluation mode stays merged, now with these: one pass over the diagonal of each weight,
        1/N of it. In training mode it is unmerged, with a warning, as PEFT does for every method.

        Args:
            adapter_name: one name, or several, whose updates add up.
            inference_mode: whether they are frozen.
        """
        layers = self._layers().values()
        merged = {layer: layer.merged_adapters for layer in layers if layer.merged}
        if self.training or not merged:
            super().set_adapter(adapter_name, inference_mode)
            return
        self._check_merge_allowed()
        try:
            for layer in merged:
                # PEFT unmerges what is merged.
                layer.merged_adapters = []
            super().set_adapter(adapter_name, inference_mode)
        finally:
            for layer, names in merged.items():
                layer.merged_adapters = names
        for layer in layers:
            layer.merge_instead(layer.active_adapters)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose update is the weighted sum of others' updates, exactly: updates are linear in blocks.

        The new adapter is not active; ``set_adapter`` makes it so.

        Args:
            adapters: names of the adapters to combine. Where one of them has no blocks on a layer, it counts as zero.
            weights: a factor for each, of any sign.
            adapter_name: name of the new adapter.
            combination_type: ``"linear"``, the one that exists.

        Raises:
            ValueError: a name is unknown or taken, the lists differ in length, the combination type does not exist, the
                adapters train more than blocks, or two of them cut a layer into different blocks.
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
        unloaded = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        disconnect(self.model)
        return unloaded

    def _layers(self) -> dict[str, DiabloLayer]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, DiabloLayer)}

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where it is merged, the weights become what they would be without it, to the bit.

        PEFT refuses to delete a merged adapter, since for most methods unmerging is not exact. Here it is.
        """
        if adapter_name in self.peft_config:
            for layer in self._layers().values():
                if adapter_name in layer.merged_adapters:
                    layer.merge_instead([name for name in layer.merged_adapters if name != adapter_name])
        super().delete_adapter(adapter_name)

    def _check_merge_allowed(self) -> None:
        """Refuse to merge where it would be lost, or change another module's output.

        Raises:
            ValueError: a weight is computed anew in each forward, or another module shares it.
        """
        super()._check_merge_allowed()
        owners = Owners(self.model)
        for name, layer in self._layers().items():
            base_layer = layer.get_base_layer()
            if (how := recomputed(base_layer)) is not None:
                raise ValueError(
                    f"{name} has no weight to merge into, since {how.by} computes it anew in each forward: use the "
                    f"adapter unmerged, or call {how.undo} first, where layer is the model's module of that name."
                )
            sharing = max((owners.of(base_layer._parameters.get(own)) for own in layer.weights), key=len)
            if len(sharing) > 1:
                raise ValueError(
                    f"{name} shares its weight with {', '.join(other for other in sharing if other != name)}: merging "
                    "would change both. Untie them first (load the model with tie_word_embeddings=False and copy the "
                    "weight), or use the adapter unmerged."
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # PEFT loads adapters with strict=False and at most warns; torch raises what stands in error_msgs, the last
        # argument, in either mode.
        error_msgs: list[str] = args[-1]
        expected = {f"{prefix}model.{layer}.{key}" for layer, key in self._block_keys()}
        given = {key for key in state_dict if ".diablo_blocks" in key}
        adapters = {_adapter_of(key) for key in given}
        missing = sorted(key for key in expected - given if _adapter_of(key) in adapters)
        unexpected = sorted(given - expected)
        if not given and not any(key in state_dict for key in self.state_dict(prefix=prefix)):
            missing = sorted(expected)
        for fault, keys in (("lacks", missing), ("has more tensors than the model takes:", unexpected)):
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                error_msgs.append(f"the adapter's file {fault} {', '.join(keys[:3])}{more}.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _block_keys(self) -> Iterator[tuple[str, str]]:
        for layer_name, layer in self._layers().items():
            for key, _ in layer.named_parameters():
                if key.startswith("diablo_blocks."):
                    yield layer_name, key

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT enters around a forward or a whole generation: one pass for all of it.

        ``adapter_names`` are handed to every adapted layer meanwhile: rows of one batch differ in adapter.
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


def _adapter_of(key: str) -> str:
    return key.rpartition("diablo_blocks.")[2].partition(".")[0]
