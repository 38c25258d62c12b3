"""The ablations on a tiny model: that they measure what they say, not what a real model makes of it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from peft import MissConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from diablo import BlockLayout
from diablo.data.rows import Row
from diablo.tasks import Problem
from experiments import (
    choice_of_n,
    inputs_seen,
    learning_rate,
    near_copies,
    sparsity_patterns,
    stability,
    update_parts,
    variants,
)
from experiments.patterns import MIXTURES, PATTERNS, Pattern, RandomBlocks, apply_pattern


def make_pattern(name: str, num_blocks: int = 4, seed: int = 0):
    torch.manual_seed(1)
    base = nn.Linear(16, 24).double()
    pattern = PATTERNS[name](base, num_blocks, torch.Generator().manual_seed(seed)).double()
    nn.init.normal_(pattern.values)
    return pattern


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_computes_with_its_dense_update(name):
    pattern = make_pattern(name)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = nn.functional.linear(x, pattern.base.weight + pattern.dense(), pattern.base.bias)
    torch.testing.assert_close(pattern(x), expected)


def gradients_of(pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a loss by a pattern's values, and by the whole weight that they are part of."""
    x = torch.randn(7, 16, dtype=torch.float64)
    target = torch.randn(7, 24, dtype=torch.float64)
    (pattern(x) - target).square().sum().backward()
    weight = (pattern.base.weight + pattern.dense()).detach().requires_grad_()
    (nn.functional.linear(x, weight, pattern.base.bias) - target).square().sum().backward()
    return pattern.values.grad, weight.grad


@pytest.mark.parametrize("name", PATTERNS)
def test_a_patterns_gradient_is_that_of_its_dense_update(name):
    pattern = make_pattern(name)
    of_values, of_weight = gradients_of(pattern)
    direction = torch.randn_like(pattern.values)
    with torch.no_grad():
        pattern.values.copy_(direction)
    assert (of_values * direction).sum().item() == pytest.approx((of_weight * pattern.dense()).sum().item())


@pytest.mark.parametrize("name", MIXTURES)
def test_every_output_of_a_mixture_sees_every_input(name):
    pattern = make_pattern(name)
    assert (pattern.dense() != 0).all()
    assert pattern.values.numel() == pattern.layout.num_parameters


def test_pooled_inputs_are_what_miss_trains():
    pattern = make_pattern("pooled inputs")
    model = nn.Sequential(nn.Linear(16, 24).double())
    adapted = get_peft_model(model, MissConfig(r=pattern.layout.block_in, target_modules=["0"]))
    with torch.no_grad():
        adapted.base_model.model[0].miss_block["default"].copy_(pattern.values)
        model[0].base_layer.load_state_dict(pattern.base.state_dict())
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(pattern(x), adapted(x), check_dtype=False)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name not in MIXTURES])
def test_a_patterns_gradient_is_the_whole_gradient_at_its_entries(name):
    pattern = make_pattern(name)
    _, of_weight = gradients_of(pattern)
    # A small step along the values' gradient is one along the masked gradient.
    before = pattern.dense()
    with torch.no_grad():
        pattern.values -= pattern.values.grad
    moved = before - pattern.dense()
    mask = (moved != 0).double()
    torch.testing.assert_close(moved, of_weight * mask)
    assert int(mask.sum()) == pattern.values.numel() == pytest.approx(16 * 24 / 4, abs=24)


def test_the_entries_depend_on_the_seed():
    for name in PATTERNS.keys() - {"diagonal blocks", "interleaved blocks", "pooled inputs"}:
        first, again, other = (make_pattern(name, seed=seed).dense() for seed in (0, 0, 1))
        if name not in MIXTURES:
            first, again, other = first != 0, again != 0, other != 0
        assert torch.equal(first, again)
        assert not torch.equal(first, other), name


def test_random_blocks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"num_blocks=3 does not divide 16 x 24"):
        RandomBlocks(nn.Linear(16, 24), 3, torch.Generator())


def test_a_pattern_trains_nothing_else(tiny_model):
    model = apply_pattern(AutoModelForCausalLM.from_pretrained(tiny_model), "random rows", 4, {"q_proj", "up_proj"}, 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"model.layers.{layer}.{where}.values" for layer in (0, 1) for where in ("self_attn.q_proj", "mlp.up_proj")
    }


def test_the_patterns_are_trained_at_equal_sizes(tiny_model, tmp_path):
    results = sparsity_patterns.run(str(tiny_model), num_blocks=4, rows=48, held_out=8, rates=(1e-2, 1e-1), seeds=2)
    assert [found["pattern"] for found in results["patterns"]] == list(sparsity_patterns.COMPARED)
    sizes = [found["parameters"] for found in results["patterns"]]
    assert max(sizes) <= 1.1 * min(sizes)
    for found in results["patterns"]:
        assert found["curve"][-1] < found["curve"][0], "it learned nothing"
        assert f"{found['rate']:g}" == min(found["sweep"], key=found["sweep"].get)
        assert len(found["held_out_losses"]) == 2
        assert found["kept_bytes"] > 0
    # A copy of every weight is kept for the backward.
    kept = {found["pattern"]: found["kept_bytes"] for found in results["patterns"]}
    assert kept["random entries"] > kept["diagonal blocks"]
    assert all(sparsity_patterns.EXPERIMENT.report(results))
    sparsity_patterns.EXPERIMENT.publish({}, results, tmp_path)


def test_loras_a_has_no_gradient_at_the_first_step_and_blocks_have(tiny_model, tmp_path):
    results = stability.run(str(tiny_model), num_blocks=4, rows=48, held_out=8, rates=(1e-3, 1e-2))
    first = {method: runs[0]["norms_by_kind"][0] for method, runs in results["runs"].items()}
    assert first["lora"]["A"] == 0 < first["lora"]["B"]
    assert first["diablo"]["blocks"] > 0
    for runs in results["runs"].values():
        for found in runs:
            kinds = found["norms_by_kind"][-1].values()
            assert found["norms"][-1] == pytest.approx(math.hypot(*kinds), rel=1e-4)
            assert found["coefficient_of_variation"] ** 2 * found["mean_norm"] ** 2 == pytest.approx(
                found["variance_of_norm"]
            )
    assert all(stability.EXPERIMENT.report(results))
    stability.EXPERIMENT.publish({}, results, tmp_path)


def test_fewer_blocks_train_more_and_modules_are_compared_at_equal_sizes(tiny_model, tmp_path):
    results = choice_of_n.run(
        str(tiny_model),
        rows=16,
        held_out=8,
        problems=2,
        num_blocks=(2, 8),
        rates=(1e-3,),
        modules={"attention": choice_of_n.ATTENTION, "MLP": choice_of_n.MLP},
        reference=8,
    )
    few, many = results["by_num_blocks"]
    assert few["parameters"] == 4 * many["parameters"]
    for found in results["by_modules"]:
        assert found["parameters"] == pytest.approx(many["parameters"], rel=0.35)
    assert all(choice_of_n.EXPERIMENT.report(results))
    choice_of_n.EXPERIMENT.publish({}, results, tmp_path)


def test_variants_are_trained_at_their_best_rates_with_every_seed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(learning_rate, "FARTHEST", 1)
    names = ["blocks", "interleaved blocks", "average of steps", "longer warm-up", "LoRA"]
    results = variants.run(str(tiny_model), names=",".join(names), rows=16, held_out=4, seeds=2)
    assert [found["variant"] for found in results["variants"]] == names
    for found in results["variants"]:
        assert min(found["sweep"].values()) == found["losses"][0] < found["before"]
        ahead = found["losses"][0] <= results["variants"][0]["losses"][0]
        assert len(found["losses"]) == (2 if ahead else 1)
    # Every variant does something.
    assert len({found["losses"][0] for found in results["variants"]}) == len(names)
    assert len(list(variants.EXPERIMENT.report(results))) == len(names)
    variants.EXPERIMENT.publish({}, results, tmp_path)


def test_variants_go_on_after_an_interruption(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(learning_rate, "FARTHEST", 1)
    settings = {"names": "blocks", "rows": 16, "held_out": 4, "seeds": 1, "kept": str(tmp_path / "losses.jsonl")}
    first = variants.run(str(tiny_model), **settings)
    monkeypatch.setattr(variants, "tuned", None)
    assert variants.run(str(tiny_model), **settings) == first


def test_blocks_of_other_sizes_train_as_many_parameters():
    layers = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "up_proj": (576, 1536)}
    layers["down_proj"] = (1536, 576)
    counts = []
    for name in ("blocks", "larger in attention", "larger in the MLP"):
        method = variants.VARIANTS[name].method
        numbers = {kind: method.block_pattern.get(kind, method.num_blocks) for kind in layers}
        counts.append(sum(BlockLayout(*layers[kind], numbers[kind]).num_parameters for kind in layers))
    assert counts == pytest.approx([counts[0]] * 3, rel=0.02)


def test_parts_of_an_update_are_of_equal_size_and_what_they_say():
    delta = torch.randn(64, 48, dtype=torch.float64)
    parts = {name: part(delta) for name, part in update_parts.parts_of(4, 7).items()}
    assert torch.linalg.matrix_rank(parts["their rank 7"]) == 7
    assert int((parts["their largest entries"] != 0).sum()) == int((parts["their diagonal x 1"] != 0).sum()) == 64 * 12
    assert parts["their largest entries"].norm() > parts["their diagonal x 1"].norm()
    torch.testing.assert_close(parts["their diagonal x 4"], 4 * parts["their diagonal x 1"])
    torch.testing.assert_close(parts["all but their diagonal"] + parts["their diagonal x 1"], delta)


def test_the_whole_update_is_worth_what_full_fine_tuning_gains(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(update_parts, "RATES", {"full": (1e-3, 1e-2), "diablo": (1e-2,), "lora": (1e-2,)})
    results = update_parts.run(str(tiny_model), rows=32, held_out=8, num_blocks=4, rank=2)
    losses = results["losses"]
    assert losses["all weights"] == min(results["trained"]["full"].values()) < losses["nothing"]
    assert losses["the adapted layers, whole"] < losses["nothing"]
    assert losses["all but the adapted layers"] < losses["nothing"]
    assert results["energy"]["the adapted layers, whole"] == 1
    assert results["energy"]["their rank 2"] > results["energy"]["their diagonal x 1"]
    assert update_parts.gained(results, losses["all weights"]) == 1
    assert all(update_parts.EXPERIMENT.report(results))
    update_parts.EXPERIMENT.publish({}, results, tmp_path)


def test_a_merged_pattern_computes_as_before_and_is_gone(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    base = {name: weight.clone() for name, weight in model.named_parameters()}
    apply_pattern(model, "rotated blocks", 4, {"q_proj", "up_proj"}, 0)
    for module in model.modules():
        if isinstance(module, Pattern):
            nn.init.normal_(module.values, std=0.1)
    ids = torch.arange(12)[None]
    before = model(ids).logits
    norm = inputs_seen.merge_patterns(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    weights = dict(model.named_parameters())
    assert weights.keys() == base.keys()
    changed = {name for name in base if not torch.equal(weights[name], base[name])}
    assert len(changed) == 4
    square = {name: (weights[name] - base[name]).square().sum().item() for name in changed}
    assert norm == pytest.approx(
        (sum(square.values()) / sum(base[name].square().sum().item() for name in changed)) ** 0.5
    )


def test_few_inputs_and_all_of_them_are_trained_on_a_recipe(tiny_model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\ntask: mawps\ndata: {{limit: 24, validation_rows: 8}}\nmethod: {{num_blocks: 4}}\n"
        "training: {batch_size: 8}\nevaluation: {limit: 4, batch_size: 4}\noutput: unused\n"
    )
    rates = {"diagonal blocks": (1e-3, 1e-1), "rotated blocks": (1e-1,)}
    settings = {"recipe": str(recipe), "rates": rates, "names": ",".join(rates), "seeds": 2}
    results = inputs_seen.run(**settings, kept=str(tmp_path / "runs.jsonl"))
    diagonal, rotated = results["patterns"]
    assert [run["rate"] for run in diagonal["sweep"]] == [1e-3, 1e-1]
    assert diagonal["best"][0] == min(diagonal["sweep"], key=lambda run: run["loss"])
    assert [run["seed"] for run in rotated["best"]] == [0, 1]
    assert diagonal["best"][0]["parameters"] == rotated["best"][0]["parameters"]
    assert diagonal["sweep"][0]["relative_norm"] < diagonal["sweep"][1]["relative_norm"]
    runs = [run for each in results["patterns"] for run in (*each["sweep"], *each["best"])]
    assert all(run["forgetting"] != 0 for run in runs)
    assert all(inputs_seen.EXPERIMENT.report(results))
    inputs_seen.EXPERIMENT.publish({}, results, tmp_path)
    # What is kept is not run again.
    recipe.write_text(recipe.read_text().replace("limit: 24", "limit: 16"))
    assert inputs_seen.run(**settings, kept=str(tmp_path / "runs.jsonl")) == results


def problems_of(*prompts: str) -> list[Problem]:
    return [Problem(Row(number, prompt, "x=1"), 1) for number, prompt in enumerate(prompts, start=1)]


def test_numbers_and_what_stands_in_every_prompt_do_not_make_problems_alike():
    asked = problems_of("Problem: Tom has 3 red apples .", "Problem: how far is it ?")
    trained = problems_of("Problem: Tom has 99 red apples !", "Problem: Ann has 3 pears .")
    assert near_copies.likenesses(asked, trained) == [1.0, 0.0]


def test_halves_hold_every_problem_once_and_the_likest_in_the_first():
    likeness = [0.1, 0.9, 0.5, 0.9, 0.2]
    assert near_copies.halves(likeness) == {"near copies": [1, 2, 3], "others": [0, 4]}


def test_methods_are_told_apart_on_each_half_of_the_test_problems(tiny_model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\ntask: mawps\ndata: {{validation_rows: 128}}\nmethod: {{num_blocks: 4}}\noutput: unused\n"
    )
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(tiny_model)

    def run_of(method: str, solved: str) -> dict[str, object]:
        return {"method": method, "stage": "test", "learning_rate": 1e-3, "seed": 0, "folder": "runs/tiny"} | {
            "solved": {"mawps": solved}
        }

    def part(runs: list[dict[str, object]], **options: Any) -> dict[str, Any]:
        (tmp_path / "record.json").write_text(json.dumps({"runs": runs}))
        return near_copies.run(str(recipe), str(tmp_path / "record.json"), **options)

    likeness = part([run_of("none", "0" * 238)])["likeness"]
    # The one method has solved the near copies, the other one the others.
    near = set(near_copies.halves(likeness)["near copies"])
    copies = "".join(str(int(number in near)) for number in range(238))
    runs = [run_of("one", copies), run_of("other", copies.translate({48: 49, 49: 48}))]
    results = part(runs, adapters=str(tmp_path), asked=3)
    one, other = results["contenders"]
    assert one["solved"] == {"near copies": [{"mawps": "1" * 119}], "others": [{"mawps": "0" * 119}]}
    assert other["solved"] == {"near copies": [{"mawps": "0" * 119}], "others": [{"mawps": "1" * 119}]}
    assert [0 <= share <= 1 for share in one["trained_on"]] == [True]
    assert results["least_of_near_copies"] >= max(likeness[number] for number in range(238) if number not in near)
    said = list(near_copies.EXPERIMENT.report(results))
    assert said[0] == "other at 0.001, near copies: -100.0 ± 0.0 points against one at 0.001"
    near_copies.EXPERIMENT.publish({}, results, tmp_path)
