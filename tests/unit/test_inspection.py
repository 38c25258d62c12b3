"""Norms and effective ranks of blocks, against figures that are known."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from diablo import DiabloConfig, DiabloLayer
from diablo.models.inspection import inspect_model


def blocks_of(model) -> dict[str, torch.nn.Parameter]:
    return {
        name.removeprefix("base_model.model."): module.blocks_of("default")["weight"]
        for name, module in model.named_modules()
        if isinstance(module, DiabloLayer)
    }


@pytest.fixture
def adapted(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return get_peft_model(model, DiabloConfig(num_blocks=4, target_modules=["q_proj", "up_proj"]))


def test_the_figures_of_known_blocks(adapted):
    name = "model.layers.1.mlp.up_proj"
    blocks = blocks_of(adapted)[name]  # 4 blocks of 8 x 16
    weight = adapted.get_submodule(f"base_model.model.{name}").base_layer.weight.detach()
    with torch.no_grad():
        blocks[0] = 3 * weight[:16, :8].T
        blocks[1] = torch.outer(torch.arange(1.0, 9), torch.ones(16))
        blocks[2, :, :8] = 5 * torch.eye(8)
    (found,) = (each for each in inspect_model(adapted) if each.name == name)
    assert (found.kind, found.layer) == ("up_proj", 1)
    assert found.relative_norms[0] == pytest.approx(3)
    assert found.norms[1:] == pytest.approx([math.sqrt(204 * 16), math.sqrt(8 * 25), 0])
    assert found.effective_ranks[1:] == pytest.approx([1, 8, 0], abs=1e-3)
    assert found.norm == pytest.approx(blocks.detach().norm().item())
    diagonal = torch.stack([weight[16 * i : 16 * i + 16, 8 * i : 8 * i + 8] for i in range(4)])
    assert found.relative_norm == pytest.approx((blocks.detach().norm() / diagonal.norm()).item())


def test_a_weight_of_the_other_orientation_and_ragged_sizes():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=10, vocab_size=11, n_positions=8))
    adapted = get_peft_model(model, DiabloConfig(num_blocks=4, target_modules=["c_attn"]))
    (blocks,) = blocks_of(adapted).values()
    assert blocks.shape == (4, 3, 8)  # 10 inputs and 30 outputs are cut into 3, 3, 3, 1 and 8, 8, 8, 6
    torch.nn.init.ones_(blocks)
    (found,) = inspect_model(adapted)
    weight = adapted.get_submodule("base_model.model.transformer.h.0.attn.c_attn").base_layer.weight.detach()
    assert weight.shape == (10, 30)
    assert found.norms == pytest.approx([24**0.5] * 3 + [6**0.5])
    assert found.base_norms == pytest.approx(
        [weight[3 * i : 3 * i + 3, 8 * i : 8 * i + 8].norm().item() for i in range(3)] + [weight[9:, 24:].norm().item()]
    )


@pytest.fixture
def saved(tiny_model, tmp_path):
    folders = []
    for number, num_blocks in enumerate((4, 8)):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model = get_peft_model(model, DiabloConfig(num_blocks=num_blocks))
        for blocks in blocks_of(model).values():
            torch.nn.init.normal_(blocks, std=0.01)
        folders.append(tmp_path / f"adapter-{number}")
        model.save_pretrained(folders[-1])
    return folders


def test_modules_of_one_name_in_several_places_are_kinds_of_their_own():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    for model, targets, expected in (
        (
            t5,
            ["q", "wi"],
            [
                "encoder SelfAttention q",
                "decoder SelfAttention q",
                "decoder EncDecAttention q",
                "encoder wi",
                "decoder wi",
            ],
        ),
        # What is not adapted tells places apart too, so that adapters of one model have the same kinds.
        (gpt2, r".*\.mlp\.c_proj", ["mlp c_proj"]),
    ):
        weights = list(inspect_model(get_peft_model(model, DiabloConfig(num_blocks=4, target_modules=targets))))
        assert {weight.kind for weight in weights} == set(expected)
        for kind in expected:
            assert [weight.layer for weight in weights if weight.kind == kind] == [0, 1]


def test_the_command_shows_modules_and_layers(diablo, saved, tmp_path):
    status, out, _ = diablo("inspect", saved[0], "--plot", tmp_path / "map.png", "--out", tmp_path / "figures.json")
    assert status == 0
    for kind in ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"):
        assert kind in out
    assert "of the base" in out
    assert (tmp_path / "map.png").stat().st_size > 1000
    (record,) = json.loads((tmp_path / "figures.json").read_text())["adapters"]
    assert len(record["weights"]) == 10
    assert all(len(weight["norms"]) == 4 for weight in record["weights"])


def test_two_adapters_stand_side_by_side(diablo, saved, tmp_path):
    status, out, _ = diablo("inspect", *saved, "--plot", tmp_path / "map.png", "--out", tmp_path / "figures.json")
    assert status == 0
    assert "A  " in out
    assert "B  " in out
    record = json.loads((tmp_path / "figures.json").read_text())["adapters"]
    norms = [math.hypot(*(n for w in each["weights"] if w["kind"] == "q_proj" for n in w["norms"])) for each in record]
    assert f"{norms[0]:.3g} · {norms[1]:.3g}" in out


def test_an_adapter_of_another_method_is_refused(diablo, tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    status, _, err = diablo("inspect", tmp_path / "lora")
    assert status == 2
    assert "is an adapter of LORA; only DiaBlo's has blocks to inspect." in err


def test_where_a_figure_cannot_be_written_is_said_before_anything_is_loaded(diablo, saved, tmp_path):
    status, _, err = diablo("inspect", saved[0], "--plot", tmp_path / "nowhere" / "map.png")
    assert status == 2
    assert "--plot" in err
