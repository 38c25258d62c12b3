"""Layers whose weight is computed anew in each forward: torch's norms, other parametrizations and pruning."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import assert_close, dense_delta, fill
from torch import nn
from torch.nn.utils import parametrizations, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as spectral_norm_by_hook
from torch.nn.utils import weight_norm as weight_norm_by_hook
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from transformers.pytorch_utils import Conv1D

from diablo import DiabloConfig, preview_targets

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")

UNDOING = {
    "torch.nn.utils.parametrize.remove_parametrizations": remove_parametrizations,
    "torch.nn.utils.prune.remove": prune.remove,
    "torch.nn.utils.remove_weight_norm": remove_weight_norm,
    "torch.nn.utils.remove_spectral_norm": remove_spectral_norm,
}


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def halved(layer: nn.Module, name: str = "weight") -> nn.Module:
    return register_parametrization(layer, name, Halved())


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.4)


def linear() -> nn.Module:
    return nn.Linear(8, 6)


def conv() -> nn.Module:
    return nn.Conv1d(8, 6, 3, padding=1)


def embedding() -> nn.Module:
    return nn.Embedding(8, 6)


@dataclass(frozen=True)
class Case:
    name: str
    plain: Callable[[], nn.Module]
    prepare: Callable[[nn.Module], nn.Module]
    computed_by: str


CASES = [
    Case("weight_norm", linear, parametrizations.weight_norm, "WeightNorm"),
    Case("weight_norm_conv", conv, parametrizations.weight_norm, "WeightNorm"),
    Case("weight_norm_embedding", embedding, parametrizations.weight_norm, "WeightNorm"),
    Case("spectral_norm", linear, parametrizations.spectral_norm, "SpectralNorm"),
    Case("orthogonal", linear, parametrizations.orthogonal, "Orthogonal"),
    Case("two", linear, lambda layer: halved(halved(layer)), "Halved, Halved"),
    Case("weight_norm_by_hook", linear, weight_norm_by_hook, "WeightNorm"),
    Case("weight_norm_by_hook_conv", conv, weight_norm_by_hook, "WeightNorm"),
    Case("spectral_norm_by_hook", conv, spectral_norm_by_hook, "SpectralNorm"),
    Case("pruned", linear, pruned, "L1Unstructured"),
    Case("pruned_twice", linear, lambda layer: pruned(pruned(layer)), "PruningContainer"),
    Case("pruned_conv1d", lambda: Conv1D(6, 8), pruned, "L1Unstructured"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


def net(case: Case) -> Net:
    torch.manual_seed(0)
    return Net(case.prepare(case.plain())).eval()


def config(**settings) -> DiabloConfig:
    return DiabloConfig(**{"num_blocks": 2, "target_modules": ["layer"], **settings})


def adapted(case: Case) -> PeftModel:
    return fill(get_peft_model(net(case), config())).eval()


def run(model: nn.Module, case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if case.plain is embedding:
        return model(torch.randint(8, (2, 5), generator=generator))
    return model(torch.randn((2, 8, 5) if case.plain is conv else (2, 5, 8), generator=generator))


def output(model: nn.Module, case: Case) -> torch.Tensor:
    with torch.no_grad():
        return run(model, case).clone()


@every_case
def test_the_update_is_added_to_what_is_computed(case):
    base = net(case)
    model = get_peft_model(net(case), config()).eval()
    assert torch.equal(output(model, case), output(base, case))
    fill(model)
    layer = model.base_model.model.layer
    plain = copy.deepcopy(case.plain())
    delta = dense_delta(layer.diablo_blocks["default"], plain)
    with torch.no_grad():
        # Norms by hooks have computed it in the forward above.
        plain.weight.copy_(base.layer.weight + delta)
        if case.plain is not embedding:
            plain.bias.copy_(base.layer.bias)
    assert torch.equal(layer.get_delta_weight("default"), delta)
    assert_close(output(model, case), output(Net(plain), case), 1e-5)
    with model.disable_adapter():
        assert torch.equal(output(model, case), output(base, case))
    assert torch.equal(output(model.unload(), case), output(base, case))


@every_case
def test_blocks_are_trained_and_nothing_else(case):
    model = adapted(case).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run(model, case).square().sum().backward()
    torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"base_model.model.layer.diablo_blocks.default"}


@every_case
def test_the_preview_and_in_place_say_what_computes_the_weight(case):
    reason = f"{case.computed_by} computes the weight anew in each forward"
    assert f"beside: {reason}" in str(preview_targets(net(case), config()))
    with pytest.raises(ValueError, match=f"in_place=True is impossible for layer: {reason}"):
        get_peft_model(net(case), config(in_place=True))


@every_case
def test_a_saved_adapter_loads(case, tmp_path):
    model = adapted(case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(case), tmp_path).eval()
    assert torch.equal(output(loaded, case), output(model, case))


@every_case
def test_merging_is_refused_with_what_to_do_which_helps(case):
    model = adapted(case)
    before = output(model, case)
    words = rf"^layer has no weight to merge into, since {case.computed_by} computes it anew in each forward: .* call "
    with pytest.raises(ValueError, match=words) as refusal:
        model.merge_adapter()
    with pytest.raises(ValueError, match=words):
        model.merge_and_unload()
    layer = model.base_model.model.layer
    with pytest.raises(RuntimeError, match=f"{case.computed_by} computes the weight of this"):
        layer.merge()
    assert torch.equal(output(model, case), before)

    ((function, rest),) = re.findall(r"call ([a-z_.]+)\(layer\.base_layer(, 'weight')?\) first", str(refusal.value))
    UNDOING[function](layer.base_layer, *(["weight"] if rest else []))
    assert_close(output(model, case), before, 1e-6)
    model.merge_adapter()
    assert_close(output(model, case), before, 1e-5)
    model.unmerge_adapter()
    assert_close(output(model, case), before, 1e-6)
    assert_close(output(model.merge_and_unload(), case), before, 1e-5)


def test_nothing_is_computed_when_an_adapter_is_added_or_previewed():
    # In training mode, each reading of the weight changes what the norm is computed from.
    torch.manual_seed(0)
    model = Net(parametrizations.spectral_norm(linear())).train()
    known = {name: value.clone() for name, value in model.state_dict().items()}
    preview_targets(model, config())
    get_peft_model(model, config())
    for name, value in known.items():
        assert torch.equal(model.state_dict()[name.replace("layer.", "layer.base_layer.")], value), name


def test_a_bias_that_is_computed_leaves_the_weight_alone():
    model = Net(halved(linear(), "bias")).eval()
    assert "beside: Halved computes the bias anew in each forward" in str(preview_targets(model, config()))
    x = torch.randn(3, 8)
    adapted = fill(get_peft_model(model, config())).eval()
    before = adapted(x)
    adapted.merge_adapter()
    assert_close(adapted(x), before, 1e-5)


def test_what_is_left_alone_is_listed_with_its_shape():
    model = nn.ModuleDict({"layer": linear(), "other": parametrizations.weight_norm(conv())})
    (other,) = preview_targets(model, config()).skipped
    assert (other.name, other.shape, other.reason) == ("other", (6, 8, 3), "not in target_modules")


@pytest.mark.parametrize("name", ["parametrizations.weight.original1", "weight_v", "weight_orig"])
def test_what_the_weight_is_computed_from_cannot_be_adapted(name):
    prepare = {"weight_v": weight_norm_by_hook, "weight_orig": pruned}.get(name, parametrizations.weight_norm)
    with pytest.raises(TypeError, match="name the module in target_modules instead"):
        get_peft_model(Net(prepare(linear())), DiabloConfig(num_blocks=2, target_parameters=[name]))


def test_kinds_that_are_not_supported_stay_refused():
    grouped = parametrizations.weight_norm(nn.Conv1d(8, 8, 3, groups=4))
    with pytest.raises(TypeError, match=r"layer \(a ParametrizedConv1d of 4 groups"):
        get_peft_model(Net(grouped), config())


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[9]], ids=lambda case: case.name)
def test_the_compiled_model_gives_the_same(case):
    model = adapted(case)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert_close(run(compiled, case), run(model, case), 1e-6)
