"""The experiments that ask which learning rate suits blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from diablo import DiabloConfig
from experiments import learning_rate, learning_rate_steps, learning_rate_widths
from experiments.learning_rate import RULE, groups_of, rescale, sweep


@pytest.mark.parametrize("best", [-4.3, -0.4, 0.2, 2.6])
def test_a_sweep_goes_on_until_the_best_rate_is_inside(best: float) -> None:
    found = sweep(lambda multiple: 1 + (math.log2(multiple) - best) ** 2, before=30.0)
    assert found["best"] == pytest.approx(2.0**best)
    assert found["rule_loss"] == pytest.approx(1 + best**2)
    assert found["best_loss"] == min(found["losses"].values())
    powers = [math.log2(float(multiple)) for multiple in found["losses"]]
    assert powers == sorted(powers)
    assert powers[0] < best < powers[-1]


def test_a_sweep_ends_where_the_loss_falls_without_end() -> None:
    found = sweep(lambda multiple: -math.log2(multiple), before=1.0)
    assert len(found["losses"]) < 24


def test_rates_differ_by_layer_as_is_asked_for(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(model, DiabloConfig(num_blocks=4, target_modules=["up_proj", "down_proj"]))
    by_rows = [group["lr"] for group in groups_of(model, RULE, "rows")]
    # 32 and 64 inputs in 4 blocks.
    assert by_rows == pytest.approx([RULE / 8, RULE / 16] * 2)
    assert len({group["lr"] for group in groups_of(model, RULE, "one")}) == 1
    for layer in learning_rate.layers_of(model):
        layer.get_base_layer().weight.data.mul_(3)
    gained = [group["lr"] for group in groups_of(model, RULE, "gain")]
    tripled = [3 * group["lr"] for group in groups_of(model, RULE, "gain", usual=3.0)]
    assert gained == pytest.approx(tripled)


def test_a_rescaled_model_computes_the_same(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    ids = torch.arange(12)[None]
    before = model(ids).logits
    rescale(model, 4.0)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_all_experiments_run_and_are_drawn(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_rate, "FARTHEST", 1)
    texts = learning_rate_widths.read_texts()
    short = replace(texts, judged=texts.judged[:4096])
    monkeypatch.setattr(learning_rate_widths, "read_texts", lambda: short)
    real = learning_rate.run(str(tiny_model), rows=32, held_out=4, num_blocks=(4,), kinds=("up_proj",))
    assert {name: len(settings) for name, settings in real.items()} == {"factors": 3, "scale": 2, "kind": 1, "N": 1}
    small = learning_rate_widths.run(widths=(64,), num_blocks=(8,), kinds=("v_proj",), steps=3, pretraining=1, seeds=1)
    settings = {"lengths": ((2, 1), (3, 1)), "warmups": ((3, 2),), "held_out": 4, "kept": str(tmp_path / "kept.jsonl")}
    lengths = learning_rate_steps.run(str(tiny_model), **settings)
    found = [(each["steps"], each["warmup"]) for each in (*lengths["steps"], *lengths["warmup"])]
    assert found == [(2, 1), (3, 1), (3, 2)]
    monkeypatch.setattr(learning_rate_steps, "finetune", None)  # what is kept is not run again
    assert learning_rate_steps.run(str(tiny_model), **settings) == lengths
    for experiment, results in (
        (learning_rate.EXPERIMENT, real),
        (learning_rate_widths.EXPERIMENT, small),
        (learning_rate_steps.EXPERIMENT, lengths),
    ):
        assert all(experiment.report(results))
        experiment.publish({}, results, tmp_path)
        assert (tmp_path / f"experiment-{experiment.name}.png").is_file()
