"""The tuner: puts DiaBlo layers into a model."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from diablo.layout import BlockLayout
from diablo.tuner.config import DiabloConfig
from diablo.tuner.layer import DiabloLayer, DiabloLinear
from diablo.tuner.targets import default_target_modules, resolve_targets


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
        if peft_config.target_modules is None:
            peft_config.target_modules = default_target_modules(self.model, model_config.get("model_type"))
        return peft_config

    def _prepare_model(self, peft_config: DiabloConfig, model: nn.Module) -> None:  # type: ignore[override]
        # PEFT injects layer by layer: what does not fit has to be found before the first one is replaced.
        targets = resolve_targets(model, peft_config)
        self._layouts: dict[str, BlockLayout] = {target.name: target.layout for target in targets}

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: DiabloConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        layout = self._layouts[current_key]
        if isinstance(target, DiabloLayer):
            target.update_layer(adapter_name, layout, peft_config, inference_mode=peft_config.inference_mode)
            return
        new_module = DiabloLinear(target, adapter_name, layout, peft_config)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)
