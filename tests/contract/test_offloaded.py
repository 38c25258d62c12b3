"""Base models that accelerate keeps partly on the CPU or on disk, from where weights come for each forward."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import (
    CASES,
    assert_close,
    assert_same_bits,
    assert_same_output,
    backward,
    fill,
    llama,
    output,
    tuner_layers,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from versions import not_on_oldest_peft

from diablo import DiabloConfig, hotswap_adapter, preview_targets

FILE = "adapter_model.safetensors"
BY_NAME = {case.name: case for case in CASES}
TARGETS = ["q_proj", "v_proj", "up_proj"]
PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
WRAPPED = {f"base_model.model.{name}": place for name, place in PLACES.items()}
pytestmark = [pytest.mark.filterwarnings("ignore:Already unmerged"), not_on_oldest_peft]


def config(**settings):
    return DiabloConfig(**{"num_blocks": 4, "target_modules": TARGETS, **settings})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """PEFT writes a copy of the base's files, under a relative name that it makes of a Hub's."""
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("models--tiny/base")
    for seed, name in ((3, "first"), (4, "second")):
        fill(get_peft_model(whole(), config()), seed=seed).save_pretrained(f"models--tiny/{name}")
    return tmp_path


def whole():
    return LlamaForCausalLM.from_pretrained("models--tiny/base").eval()


def offloaded():
    return AutoModelForCausalLM.from_pretrained("models--tiny/base", device_map=PLACES, offload_folder="off").eval()


def loaded(base, name="first", **settings):
    return PeftModel.from_pretrained(
        base, f"models--tiny/{name}", device_map=WRAPPED, offload_folder="off", **settings
    ).eval()


def expected(name="first"):
    return output(loaded(whole(), name))


def on_disk(model):
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


def test_a_loaded_adapter_gives_the_output_of_the_whole_model():
    model = loaded(offloaded())
    assert_same_output(output(model), expected())
    assert any(".layers.1." in name for name in on_disk(model))
    assert not any("diablo_" in name for name in on_disk(model))
    with model.disable_adapter():
        assert_same_output(output(model), output(whole()))
    assert_same_output(output(model), expected())


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_and_unloading(safe_merge):
    before = output(whole())
    assert_same_output(output(loaded(offloaded()).merge_and_unload(safe_merge=safe_merge)), expected())
    assert_same_output(output(loaded(offloaded()).unload()), before)
    assert (expected() - before).abs().max() > 1e-2


def test_merging_and_unmerging():
    model = loaded(offloaded())
    before = output(model)
    for _ in range(3):
        model.merge_adapter()
        assert_same_output(output(model), expected())
        model.unmerge_adapter()
    # The weights on disk are the base's again, to the bit.
    assert torch.equal(output(model), before)


def test_what_unmerges_by_itself_reaches_the_weights_on_disk():
    model = loaded(offloaded())
    load_second(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert_same_output(output(model), output(whole()))
    assert_same_output(output(model), expected())
    model.merge_adapter()
    model.set_adapter("other")
    assert all(layer.merged_adapters == ["other"] for layer in tuner_layers(model).values())
    assert_same_output(output(model), expected("second"))
    hotswap_adapter(model, "models--tiny/first", "other")
    assert_same_output(output(model), expected())
    model.delete_adapter("other")
    assert not any(layer.merged for layer in tuner_layers(model).values())
    with model.disable_adapter():
        assert_same_output(output(model), output(whole()))


def load_second(model):
    model.load_adapter("models--tiny/second", "other", device_map=WRAPPED, offload_folder="off")
    return model.eval()


def test_adapters_are_switched_and_added_up_also_where_one_is_merged():
    model, plain = (load_second(loaded(base)) for base in (offloaded(), whole()))
    for names in ("other", "default", ["default", "other"]):
        for own in (model, plain):
            own.base_model.set_adapter(names)
        assert_same_output(output(model), output(plain))
    both = output(plain)
    model.merge_adapter(["other"])
    assert_same_output(output(model), both)


def test_an_adapter_is_saved_and_swapped():
    model = loaded(offloaded())
    model.save_pretrained("again")
    assert_same_bits(load_file("again/adapter_model.safetensors"), load_file("models--tiny/first/" + FILE))
    hotswap_adapter(model, "models--tiny/second")
    assert_same_output(output(model), expected("second"))


def train(model, steps=3):
    """Losses and trained blocks."""
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    ids = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, {name: own.diablo_blocks["default"].detach().clone() for name, own in tuner_layers(model).items()}


def load_to_train(base):
    return loaded(base, is_trainable=True)


def adapt(base):
    return fill(get_peft_model(base, config()))


@pytest.mark.parametrize("make", [load_to_train, adapt])
def test_training_is_that_of_the_whole_model(make):
    model = make(offloaded())
    losses, blocks = train(model)
    expected_losses, expected_blocks = train(make(whole()))
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert losses[-1] < losses[0]
    for name, own in expected_blocks.items():
        assert_close(blocks[name], own, 1e-4)
    assert on_disk(model)


def test_the_preview_says_that_the_weight_is_elsewhere():
    preview = preview_targets(offloaded(), config(target_modules=["q_proj"]))
    assert preview.obstacles == {
        "model.layers.0.self_attn.q_proj": "accelerate puts the layer's inputs on its device",
        "model.layers.1.self_attn.q_proj": "accelerate keeps the weight on the CPU or on disk between forwards",
    }
    with pytest.raises(ValueError, match=r"in_place=True is impossible .* accelerate"):
        get_peft_model(offloaded(), config(in_place=True))


# Whole models that accelerate offloads after they were adapted.


def to_cpu(model):
    cpu_offload(model, execution_device="cpu")


def to_disk(model):
    disk_offload(model, "there", execution_device="cpu")


def step(model):
    """One step of training, and what it gives."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    return output(model)


@pytest.mark.parametrize("offload", [to_cpu, to_disk])
@pytest.mark.parametrize("name", ["mlp", "ragged_beside", "conv1d", "llama", "gpt2", "conv_2d", "embedding"])
def test_an_adapted_model_that_is_offloaded_does_what_it_did(offload, name):
    case = BY_NAME[name]
    plain, model = (case.adapted(torch.float32) for _ in range(2))
    # What the first pass has prepared is of weights that are there.
    before = output(model)
    offload(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    # As an optimizer has them.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert_same_output(output(model), before)
    assert not any(parameter.is_meta for parameter in trained)
    assert all(parameter.is_meta for parameter in model.parameters() if not parameter.requires_grad)
    assert_close(step(model), step(plain), 1e-5)
    model.merge_adapter()
    plain.merge_adapter()
    assert_close(output(model), output(plain), 1e-5)
    model.unmerge_adapter()
    assert_close(output(model.unload()), output(case.base(torch.float32)), 1e-5)


@pytest.mark.parametrize("offload", [to_cpu, to_disk])
def test_an_adapted_model_that_is_offloaded_is_saved_at_once(offload, tmp_path):
    model = BY_NAME["llama"].adapted(torch.float32)
    model.save_pretrained(tmp_path / "before")
    offload(model)
    model.save_pretrained(tmp_path / "after")
    assert_same_bits(load_file(tmp_path / "after" / FILE), load_file(tmp_path / "before" / FILE))


@pytest.mark.parametrize("in_place", ["auto", False])
@pytest.mark.parametrize("offload", [to_cpu, to_disk])
def test_fused_experts_that_are_offloaded_have_their_blocks(offload, in_place):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_hidden_layers=1, num_local_experts=3, **sizes))
    settings = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "in_place": in_place}
    plain = get_peft_model(base, DiabloConfig(num_blocks=4, **settings)).eval()
    for name, parameter in plain.named_parameters():
        if ".diablo_blocks." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model = copy.deepcopy(plain)
    offload(model)
    assert_close(output(model), output(plain), 1e-5)
    assert_close(step(model), step(plain), 1e-5)
    with model.disable_adapter(), plain.disable_adapter():
        assert_close(output(model), output(plain), 1e-5)
    model.merge_adapter()
    assert_close(output(model), output(plain), 1e-5)
