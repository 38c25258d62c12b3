"""An adapter remembers the base weights that it was made for, and says so where it meets other ones."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import CASES, fill, llama, mlp, seeded, tuner_layers

from diablo import DiabloConfig, hotswap_adapter
from diablo.tuner.base_digest import OtherBaseWarning, is_same_base

IN_BF16 = "bfloat16:" + "0" * 32


def saved(model, folder):
    model.save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())


def loaded(base, folder):
    """The model with the adapter, and what was said of the base."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder)
    return model, [str(one.message) for one in said if issubclass(one.category, OtherBaseWarning)]


def another_mlp():
    model = mlp()
    with torch.no_grad():
        model.up.weight.mul_(1.1)
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_base_is_recognised_and_another_one_is_not(case, tmp_path):
    base = seeded(case.build)
    twin, other = copy.deepcopy(base), copy.deepcopy(base)
    settings = saved(fill(get_peft_model(base, case.config())), tmp_path)
    assert is_same_base(settings["base_digest"], settings["base_digest"])
    assert loaded(twin, tmp_path)[1] == []
    # The smallest change that bf16 sees, in one entry of one diagonal.
    name = next(iter(tuner_layers(loaded(copy.deepcopy(other), tmp_path)[0]))).removeprefix("base_model.model.")
    with torch.no_grad():
        entry = other.get_submodule(name).weight.view(-1)[:1]
        entry.add_(entry.abs() * 2**-7 + 1e-3)
    (message,) = loaded(other, tmp_path)[1]
    assert "'default' was made for" in message
    assert "Load the base model that it was trained on" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_is_recognised_in_another_dtype(dtype, tmp_path):
    base = seeded(llama).to(torch.bfloat16)
    saved(fill(get_peft_model(copy.deepcopy(base).to(dtype), DiabloConfig(num_blocks=2))), tmp_path)
    for other in (torch.float32, torch.bfloat16):
        assert loaded(copy.deepcopy(base).to(other), tmp_path)[1] == []


def test_where_it_cannot_be_told_that_is_said(tmp_path):
    saved(fill(get_peft_model(mlp(), DiabloConfig(num_blocks=2, target_modules=["up"]))), tmp_path)
    (message,) = loaded(mlp().half(), tmp_path)[1]
    assert "cannot be told" in message
    assert is_same_base(None, IN_BF16) is is_same_base(IN_BF16, None) is is_same_base(7, IN_BF16) is None


def test_one_configuration_serves_several_models(tmp_path):
    config = DiabloConfig(num_blocks=2, target_modules=["up"])
    digests = []
    for name, base in (("a", mlp()), ("b", another_mlp())):
        digests.append(saved(fill(get_peft_model(copy.deepcopy(base), config)), tmp_path / name)["base_digest"])
        assert loaded(base, tmp_path / name)[1] == []
    assert digests[0] != digests[1]


def test_what_an_adapter_was_made_for_stays_in_its_settings_on_another_base(tmp_path):
    base = mlp()
    settings = saved(fill(get_peft_model(base, DiabloConfig(num_blocks=2, target_modules=["up"]))), tmp_path / "a")
    model, said = loaded(another_mlp(), tmp_path / "a")
    assert len(said) == 1
    assert saved(model, tmp_path / "b")["base_digest"] == settings["base_digest"]


def test_an_adapter_of_a_merged_model_does_not_fit_the_model_before_the_merge(tmp_path):
    config = DiabloConfig(num_blocks=2, target_modules=["up"])
    merged = fill(get_peft_model(mlp(), config)).merge_and_unload()
    saved(fill(get_peft_model(copy.deepcopy(merged), config)), tmp_path)
    assert loaded(merged, tmp_path)[1] == []
    assert len(loaded(mlp(), tmp_path)[1]) == 1


def test_a_second_adapter_is_for_the_base_and_not_for_what_is_merged_into_it(tmp_path):
    config = DiabloConfig(num_blocks=2, target_modules=["up"])
    model = fill(get_peft_model(mlp(), config))
    model.add_adapter("second", config)
    model.eval().merge_adapter()
    model.add_adapter("third", config)
    assert model.base_model.model.up.merged
    model.unmerge_adapter()
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.save_pretrained(tmp_path)
    digests = {
        name: json.loads((tmp_path / name / "adapter_config.json").read_text())["base_digest"]
        for name in ("second", "third", "sum")
    }
    own = json.loads((tmp_path / "adapter_config.json").read_text())["base_digest"]
    assert digests == {"second": own, "third": own, "sum": own} != dict.fromkeys(digests)


@pytest.mark.parametrize("num_blocks", [2, 4])
def test_swapping_compares_the_base_too(num_blocks, tmp_path):
    other = fill(get_peft_model(another_mlp(), DiabloConfig(num_blocks=num_blocks, target_modules=["up"])))
    settings = saved(other, tmp_path / "other")
    own = fill(get_peft_model(mlp(), DiabloConfig(num_blocks=num_blocks, target_modules=["up"])))
    saved(own, tmp_path / "own")
    model = fill(get_peft_model(mlp(), DiabloConfig(num_blocks=2, target_modules=["up"])))
    with pytest.warns(OtherBaseWarning, match="'default' was made for"):
        hotswap_adapter(model, tmp_path / "other")
    assert saved(model, tmp_path / "again")["base_digest"] == settings["base_digest"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherBaseWarning)
        hotswap_adapter(model, tmp_path / "own")
