"""Training on pairs and on judged completions, from the command line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from diablo.data.batching import collate
from diablo.models.loading import load_model
from diablo.planning.making import make_plan
from diablo.recipes.reading import load_recipe
from diablo.scoring.losses import summed_completion_loss

OBJECTIVES = ["dpo", "orpo", "kto"]


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    """A recipe of pairs, six of them held out, that has no output yet."""
    pairs = [
        {"prompt": f"How many are {n} and {n % 5}?", "chosen": f" x = {n}", "rejected": f" The dog sleeps on {n}."}
        for n in range(24)
    ]
    judged = [
        {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
        for pair in pairs
        for key in ("chosen", "rejected")
    ]
    for name, rows in (("pairs", pairs), ("judged", judged)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_model}\ndata: {{train: {tmp_path / 'pairs.jsonl'}, eval: 25%}}\nobjective: dpo\n"
        "training: {learning_rate: 0.01, batch_size: 6, epochs: 2, logging_steps: 1}\nprecision: fp32\n"
    )
    return path


def of(objective: str, tmp_path: Path) -> list[str]:
    rows = "judged" if objective == "kto" else "pairs"
    return [f"objective={objective}", f"data.train={tmp_path / rows}.jsonl", "method={name: diablo, num_blocks: 4}"]


def record_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_better_completions_are_preferred_after_training(diablo, recipe, tmp_path, objective):
    run = tmp_path / "run"
    arguments = ["train", recipe, *of(objective, tmp_path), "training.eval_steps=2", f"output={run}"]
    status, out, _ = diablo(*arguments)
    assert status == 0
    training = record_of(run)["training"]
    figures = training["held_out_figures"]
    (_, before), *_, (_, after) = training["held_out_loss"]
    assert before > after
    assert figures["margin"][-1][1] > figures["margin"][0][1]
    unit = "completion" if objective == "kto" else "pair"
    assert f"held-out loss    {before:.3f} -> {after:.3f} per {unit}" in out
    assert f"held-out margin  {figures['margin'][0][1]:.3f} -> {figures['margin'][-1][1]:.3f}" in out
    # The model is its own reference before the first step.
    if objective == "dpo":
        assert before == pytest.approx(math.log(2), abs=1e-6)
        assert training["loss"][0][1] == pytest.approx(math.log(2), abs=1e-6)
        assert figures["accuracy"][-1] == [training["steps"], 1.0]
    if objective == "kto":
        assert before == pytest.approx(0.5, abs=1e-6)
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    # A batch of completions of one kind has none.
    assert any("rewards/margins" in line for line in lines if "loss" in line)
    assert all("held_out_margin" in line and "rewards/margins" not in line for line in lines if "loss" not in line)
    assert f"| margin on held-out rows | {figures['margin'][0][1]:.4f} |" in (run / "adapter" / "README.md").read_text()
    # One adapter is saved, and its blocks alone.
    assert all(name.endswith(".diablo_blocks") and ".ref" not in name for name in adapter_of(run))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_ends_with_the_same_adapter_to_the_bit(diablo, recipe, tmp_path, objective):
    run = tmp_path / "run"
    arguments = [
        *("train", recipe, *of(objective, tmp_path), f"output={run}"),
        *("training.save_steps=1", "training.eval_steps=1", "training.save_total_limit=9"),
    ]
    assert diablo(*arguments)[0] == 0
    undisturbed, training = adapter_of(run), record_of(run)["training"]
    shutil.rmtree(run / "adapter")
    for step in range(3, training["steps"] + 1):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step}")
    (run / "run.json").unlink()
    assert diablo(*arguments, "--resume")[0] == 0
    resumed = adapter_of(run)
    assert all(torch.equal(values, resumed[name]) for name, values in undisturbed.items())
    again = record_of(run)["training"]
    assert all(again[key] == training[key] for key in ("loss", "held_out_loss", "held_out_figures"))


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("method", ["{name: diablo, num_blocks: 4}", "{name: lora, r: 4}", "pissa", "full"])
def test_the_reference_is_the_model_that_training_starts_from(diablo, recipe, tmp_path, objective, method):
    first, second = tmp_path / "first", tmp_path / "second"
    given = [*of(objective, tmp_path)[:2], f"method={method}"]
    assert diablo("train", recipe, *given, f"output={first}")[0] == 0
    start = f"model={first / 'model'}" if method == "full" else f"adapter={first}"
    given = given if method == "full" else given[:2]
    assert diablo("train", recipe, *given, start, f"output={second}")[0] == 0
    for run in (first, second):
        training = record_of(run)["training"]
        assert training["held_out_figures"]["margin"][0] == [0, pytest.approx(0, abs=1e-4)]
        assert training["held_out_figures"]["margin"][-1][1] > 0.01


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_that_is_trained_whole_has_no_second_model_beside_it(diablo, recipe, tmp_path, monkeypatch, objective):
    loaded = []
    for kind in ("dpo", "kto"):
        load = f"trl.trainer.{kind}_trainer.create_model_from_path"
        monkeypatch.setattr(load, lambda name, **options: loaded.append(name))
    run = tmp_path / "run"
    status, _, error = diablo("train", recipe, *of(objective, tmp_path)[:2], "method=full", f"output={run}")
    assert status == 0, error
    assert loaded == []
    assert record_of(run)["training"]["held_out_figures"]["margin"][-1][1] > 0.01


def test_an_adapter_that_was_trained_with_dropout_goes_on_without(diablo, recipe, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    method = "method={name: diablo, num_blocks: 4, dropout: 0.5}"
    assert diablo("train", recipe, "objective=orpo", method, f"output={first}")[0] == 0
    status, out, _ = diablo("train", recipe, f"adapter={first}", f"output={second}", "--dry-run")
    assert status == 0
    assert "dropout             off: the adapter was trained with 0.5" in out
    assert diablo("train", recipe, f"adapter={first}", f"output={second}")[0] == 0
    assert record_of(second)["training"]["loss"][0] == [1, pytest.approx(math.log(2), abs=1e-6)]


def test_judged_completions_are_learned_without_an_estimate_too(diablo, recipe, tmp_path):
    given = [*of("kto", tmp_path), "objective={name: kto, loss: apo_zero_unpaired}", "training.batch_size=1"]
    assert diablo("train", recipe, *given, f"output={tmp_path / 'run'}")[0] == 0
    figures = record_of(tmp_path / "run")["training"]["held_out_figures"]
    assert figures["margin"][0][1] == pytest.approx(0, abs=1e-6)
    assert figures["margin"][-1][1] > 0.01


def test_gradient_accumulation_and_checkpointing_change_nothing(diablo, recipe, tmp_path):
    runs = {
        "whole": [],
        "parts": ["training.batch_size=3", "training.gradient_accumulation=2"],
        "again": ["training.gradient_checkpointing=full"],
    }
    for name, overrides in runs.items():
        given = [*of("dpo", tmp_path), *overrides, f"output={tmp_path / name}"]
        assert diablo("train", recipe, *given)[0] == 0
    whole = record_of(tmp_path / "whole")["training"]
    for name in ("parts", "again"):
        other = record_of(tmp_path / name)["training"]
        for (_, loss), (_, expected) in zip(other["loss"], whole["loss"], strict=True):
            assert loss == pytest.approx(expected, abs=1e-4)


def test_the_reference_has_the_log_likelihoods_of_the_supervised_loss(diablo, recipe, tmp_path):
    """The margin of a run's end, from its own adapter's and the base's losses."""
    run = tmp_path / "run"
    assert diablo("train", recipe, *of("dpo", tmp_path), f"output={run}")[0] == 0
    plan = make_plan(load_recipe(recipe, [*of("dpo", tmp_path), f"output={tmp_path / 'other'}"]))
    base = load_model(plan.model_name, plan.dtype)
    adapted = PeftModel.from_pretrained(load_model(plan.model_name, plan.dtype), run / "adapter")
    margins = []
    for row in plan.held_out:
        assert row.rejected is not None
        scores = []
        for each in (row, row.rejected):
            batch = collate([each.features], plan.encoder.tokenizer.pad_token_id)
            with torch.no_grad():
                scores.append(summed_completion_loss(base, batch) - summed_completion_loss(adapted, batch))
        margins.append(0.1 * float(scores[0] - scores[1]))
    found = record_of(run)["training"]["held_out_figures"]["margin"][-1][1]
    assert found == pytest.approx(sum(margins) / len(margins), abs=1e-3)


def test_the_dry_run_shows_both_completions(diablo, recipe, tmp_path):
    status, out, _ = diablo("train", recipe, *of("dpo", tmp_path), f"output={tmp_path / 'run'}", "--dry-run")
    assert status == 0
    assert "objective           dpo: beta 0.1, loss sigmoid\n" in out
    assert "pairs, 24 rows" in out
    assert out.count("How many are 0 and 0?") == 2
    status, out, _ = diablo("train", recipe, *of("kto", tmp_path), f"output={tmp_path / 'run'}", "--dry-run")
    assert "good and" in next(line for line in out.splitlines() if line.startswith("judged"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["objective=dpoo"], "objective: found "),
        (["objective.beta=0"], "objective.beta: found 0; allowed: a number above 0"),
        (["objective.loss=log"], "objective.loss: found 'log'; allowed: one of sigmoid"),
        (["objective.loss=exo_pair"], "objective.label_smoothing: found 0, and exo_pair needs some"),
        (["objective={name: dpo, loss: [sigmoid, sft], loss_weights: [1]}"], "objective.loss_weights: found 1 for 2"),
        (["objective={name: orpo, loss: sigmoid}"], "objective.loss: unknown key; allowed: name, beta"),
        (["training.packing=true"], "training.packing: found true, which is for objective: sft"),
        (["training.label_smoothing=0.1"], "training.label_smoothing: found 0.1, which is for objective: sft"),
        (["method={dropout: 0.1}"], "method.dropout: found 0.1, and dpo compares the model"),
        (["objective=kto", "training.batch_size=1"], "training.batch_size: found 1, and kto compares the rows"),
        (["task=mawps", "data={}"], "task: found mawps, whose rows have one completion each, and objective dpo needs"),
        (["data.columns={prompt: a, completion: b}"], "data.columns: found 'completion' as a column of a format"),
        (["objective=kto"], "it has what objective: dpo needs"),
        (["objective=sft"], "it has what objective: dpo needs"),
        (["new_tokens=['<think>']", "method.num_blocks=4"], "objective: found dpo, which is not computed with trained"),
        (["method={name: peft, type: DIABLO, num_blocks: 4, modules_to_save: [lm_head]}"], "objective: found dpo"),
        (["method={target_modules: [lm_head], num_blocks: 4}"], "the output layer is among them, and objective dpo"),
    ],
)
def test_what_does_not_fit_is_refused(diablo, recipe, tmp_path, overrides, says):
    overrides = [each if each != "data={}" else f"data={{folder: {tmp_path}}}" for each in overrides]
    status, _, err = diablo("train", recipe, f"output={tmp_path / 'run'}", *overrides)
    assert status == 2
    assert says in err
    assert not (tmp_path / "run").exists()
