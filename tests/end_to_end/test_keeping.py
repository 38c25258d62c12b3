"""What a run ends with: the last parameters, the best ones, or an average, after all steps or fewer; also resumed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_several_processes import FSDP, NEEDS_DEEPSPEED, SHARDED, launch
from torch._dynamo.utils import counters

from diablo.errors import UserError
from diablo.models.adapters import load_adapter
from diablo.models.compiling import compiled_layers
from diablo.models.loading import load_model
from diablo.planning.making import make_plan
from diablo.recipes.reading import load_recipe
from diablo.scoring.generation import held_out_loss
from diablo.training import train
from diablo.training.engines import check_shardable
from diablo.training.measuring import Losses
from diablo.training.trainers import supervised

# With this rate the held-out loss falls until step 4 of the average, and rises.
AVERAGED = ["training.ema=0.5", "training.keep=best", "training.eval_steps=1"]
STOPPED = [*AVERAGED, "training.early_stopping_patience=3"]


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    """A recipe of 16 steps with a checkpoint after each, whose held-out rows have other completions."""
    (tmp_path / "train.jsonl").write_text(rows(32, lambda n: f" x = {n} + {n % 7}"))
    (tmp_path / "eval.jsonl").write_text(rows(8, lambda n: f" Ann had {n} dogs"))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_model}\ndata: {{train: {tmp_path / 'train.jsonl'}, eval: {tmp_path / 'eval.jsonl'}}}\n"
        "method: {name: diablo, num_blocks: 4, dropout: 0.1}\n"
        "training: {learning_rate: 0.1, batch_size: 4, epochs: 2, schedule: constant, logging_steps: 1, save_steps: 1, "
        "save_total_limit: 99}\n"
        f"precision: fp32\noutput: {tmp_path / 'run'}\n"
    )
    return path


def rows(count: int, completion: Callable[[int], str]) -> str:
    lines = [{"prompt": f"How many apples are {n} and {n % 7}?", "completion": completion(n)} for n in range(count)]
    return "\n".join(map(json.dumps, lines))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def loss_of(recipe: Path, adapter: Path) -> float:
    """The held-out loss of an adapter, loaded from its files."""
    plan = make_plan(load_recipe(recipe))
    model, tokenizer = load_adapter(adapter, dtype=torch.float32)
    return held_out_loss(model, plan.held_out, tokenizer.pad_token_id)


def best_of(record: dict[str, Any]) -> int:
    return min((loss, step) for step, loss in record["held_out_loss"] if step > 0)[1]


def test_the_average_weighs_the_steps_and_forgets_where_training_started(recipe: Path, tmp_path: Path) -> None:
    record = train(load_recipe(recipe, ["training.ema=0.9"])).record["training"]
    run = tmp_path / "run"
    steps = [weights(run / "checkpoints" / f"checkpoint-{step}") for step in range(1, 17)]
    shares = [0.9 ** (16 - step) for step in range(1, 17)]
    for name, values in weights(run / "adapter").items():
        of_steps = [share * step[name].double() for share, step in zip(shares, steps, strict=True)]
        expected = torch.stack(of_steps).sum(0) / sum(shares)
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-7)
    # What is measured at the end is what is saved.
    step, loss = record["held_out_loss"][-1]
    assert (step, loss) == (16, pytest.approx(loss_of(recipe, run / "adapter"), rel=1e-6))


def test_training_goes_on_from_its_parameters_and_not_from_the_average(recipe: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe, [*AVERAGED, f"output={tmp_path / 'averaged'}"]))
    train(load_recipe(recipe))
    for step in (3, 16):
        name = f"checkpoints/checkpoint-{step}"
        assert_same(weights(tmp_path / "averaged" / name), weights(tmp_path / "run" / name))


def test_steps_that_are_left_out_have_no_part_in_the_average(recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    loss = supervised.summed_completion_loss
    calls = []

    def spoiled(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return loss(*arguments, **options) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(supervised, "summed_completion_loss", spoiled)
    overrides = ["training.ema=0.5", "training.on_nonfinite=skip", "training.max_steps=4"]
    record = train(load_recipe(recipe, overrides)).record["training"]
    assert record["skipped_steps"] == [3]
    steps = [weights(tmp_path / "run" / "checkpoints" / f"checkpoint-{step}") for step in (1, 2, 4)]
    for name, values in weights(tmp_path / "run" / "adapter").items():
        expected = (steps[0][name] + 2 * steps[1][name] + 4 * steps[2][name]) / 7
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-7)


def test_the_best_parameters_become_the_adapter(recipe: Path, tmp_path: Path) -> None:
    overrides = ["training.keep=best", "training.eval_steps=2", "evaluation.general=" + str(tmp_path / "general.txt")]
    (tmp_path / "general.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 4)
    result = train(load_recipe(recipe, overrides))
    record = result.record["training"]
    kept = record["kept_step"]
    assert kept == best_of(record) < 16
    assert not record["stopped_early"]
    assert [step for step, _ in record["held_out_loss"]] == list(range(0, 17, 2))
    run = tmp_path / "run"
    assert_same(weights(run / "adapter"), weights(run / "checkpoints" / f"checkpoint-{kept}"))
    assert dict(record["held_out_loss"])[kept] == pytest.approx(loss_of(recipe, run / "adapter"), rel=1e-6)


def test_the_last_step_can_be_the_best_without_being_one_that_is_measured_in_between(recipe: Path) -> None:
    overrides = ["training.keep=best", "training.eval_steps=2", "training.max_steps=3", "training.learning_rate=1e-3"]
    record = train(load_recipe(recipe, overrides)).record["training"]
    assert [step for step, _ in record["held_out_loss"]] == [0, 2, 3]
    assert record["kept_step"] == best_of(record) == 3


def test_training_stops_where_the_held_out_loss_has_not_become_better_for_long_enough(
    recipe: Path, tmp_path: Path, diablo: Any
) -> None:
    status, said, _ = diablo("train", recipe, *STOPPED)
    assert status == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())["training"]
    best = best_of(record)
    assert record["stopped_early"]
    assert record["steps"] == best + 3 < 16
    assert record["kept_step"] == best
    assert f"stopped early    after step {best + 3}" in said
    assert f"kept             step {best}, of the best held-out loss" in said
    assert f"{dict(record['held_out_loss'])[best]:.3f} per token" in said


@pytest.fixture
def questions(tiny_model: Path, tmp_path: Path) -> Path:
    """A recipe of a task, with 12 of its training problems kept out, whose score goes up and down in 8 steps."""
    for split, first, count in (("train", 0, 44), ("test", 100, 4)):
        records = []
        for number in range(first, first + count):
            answer = f"solution{1 + number * 7 % 5 % 2}"
            asked = f"How many are {number}?\n\nSolution1: ten\nSolution2: two\n\nAnswer format: solution1/solution2"
            record = {"instruction": asked, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
            records.append(record)
        (tmp_path / f"piqa.{split}.json").write_text(json.dumps(records))
    path = tmp_path / "questions.yaml"
    path.write_text(
        f"model: {tiny_model}\ntask: piqa\n"
        f"data: {{folder: {tmp_path}, validation_rows: 12, held_out: validation}}\n"
        "method: {name: diablo, num_blocks: 4, dropout: 0.1}\n"
        "training: {learning_rate: 0.03, batch_size: 8, epochs: 2, schedule: constant, logging_steps: 1, "
        "save_steps: 1, save_total_limit: 99, keep: best, best_by: score, eval_steps: 1}\n"
        "evaluation: {before: false, after: false, likelihood: true}\n"
        f"precision: fp32\noutput: {tmp_path / 'run'}\n"
    )
    return path


def test_the_step_of_the_best_score_on_validation_problems_is_kept(
    questions: Path, tmp_path: Path, diablo: Any
) -> None:
    status, said, _ = diablo("train", questions)
    assert status == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())["training"]
    scores, losses = dict(record["validation_score"]), dict(record["held_out_loss"])
    assert list(scores) == list(range(1, record["steps"] + 1))
    # So that the test could tell a choice by the loss from one by the score.
    assert best_of(record) != record["kept_step"] == max(scores, key=lambda step: (scores[step], -losses[step]))
    assert f"validation       {scores[record['kept_step']]:.1%} at step {record['kept_step']}" in said
    plan = make_plan(load_recipe(questions))
    assert len(plan.validation_problems["piqa"]) == 12
    trained = [plan.encoder.tokenizer.decode(row.input_ids) for row in plan.train]
    assert not any(row.startswith(p.row.prompt) for row in trained for p in plan.validation_problems["piqa"])
    model, _ = load_adapter(tmp_path / "run" / "adapter", dtype=torch.float32)
    again = Losses()
    again.measure_score(model, plan, 0)
    assert again.scores[0][1] == scores[record["kept_step"]]
    lines = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert {line["step"]: line["validation_score"] for line in lines if "validation_score" in line} == scores
    # Measuring a step does not take its training loss out of the log.
    assert [line["step"] for line in lines if "loss" in line] == list(scores)
    assert [line["seconds"] for line in lines if "seconds" in line] == sorted(
        line["seconds"] for line in lines if "seconds" in line
    )
    log = (tmp_path / "run" / "train.log").read_text()
    for step, score in scores.items():
        assert f"step {step} of 8: held-out loss {losses[step]:.4f}, validation score {score:.1%}" in log


def test_a_score_in_the_course_of_training_compiles_nothing(questions: Path) -> None:
    plan = make_plan(load_recipe(questions, ["evaluation.likelihood=false"]))
    model, losses = load_model(plan.model_name, torch.float32), Losses()
    torch._dynamo.reset()
    counters.clear()
    with compiled_layers(model):
        losses.measure_score(model, plan, 1)
    assert losses.scores
    assert not counters["frames"]


def test_the_plan_says_what_the_best_step_is_chosen_by(questions: Path, recipe: Path, diablo: Any) -> None:
    patience = "training.early_stopping_patience=2"
    _, by_score, _ = diablo("train", questions, patience, "--dry-run")
    assert "kept                the step of the best score on the validation rows" in by_score
    assert "early stopping      after 2 measurements without a better score on the validation rows" in by_score
    _, by_loss, _ = diablo("train", recipe, *STOPPED, "training.keep=best", "--dry-run")
    assert "kept                the step of the best held-out loss" in by_loss
    assert "early stopping      after 3 measurements without a better held-out loss" in by_loss


def test_a_run_that_goes_by_a_score_is_resumed_to_the_same(questions: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["training.early_stopping_patience=1"]
    first = train(load_recipe(questions, overrides)).record["training"]
    undisturbed = weights(run / "adapter")
    (run / "run.json").unlink()
    shutil.rmtree(run / "adapter")
    for path in (run / "checkpoints").glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > 2:
            shutil.rmtree(path)
    resumed = train(load_recipe(questions, overrides), resume=True).record["training"]
    assert_same(weights(run / "adapter"), undisturbed)
    for key in ("held_out_loss", "validation_score", "kept_step", "stopped_early", "steps", "loss"):
        assert resumed[key] == first[key], key


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.keep=last", "training.best_by: found score, and nothing goes by it; set training.keep to best"),
        ("data.held_out=test", "training.best_by: found score, which is that of a task on rows that are kept out"),
    ],
)
def test_a_score_to_go_by_needs_something_that_goes_by_it_and_rows_that_are_kept_out(
    questions: Path, setting: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(questions, [setting])


GROUPS = (
    "training.optimizer={name: adamw_8bit, options: {min_8bit_size: 16}, groups: [{modules: [mlp], weight_decay: 1}]}"
)


@pytest.mark.parametrize(
    ("overrides", "resumed_from"),
    [
        pytest.param(STOPPED, 3, id="before the best"),
        pytest.param(STOPPED, 6, id="after the best"),
        pytest.param(STOPPED, 7, id="where it has stopped"),
        pytest.param(AVERAGED, 16, id="after the last step"),
        pytest.param(["training.keep=best", "training.eval_steps=3", "method=full"], 10, id="all weights"),
        pytest.param([GROUPS, "training.schedule=cosine", "training.min_learning_rate=0.01"], 7, id="groups in 8 bits"),
        pytest.param(["training.optimizer=adafactor", "training.neftune_noise_alpha=5"], 7, id="adafactor and noise"),
        pytest.param(["training.optimizer=lion_32bit"], 7, id="lion"),
        pytest.param(["training.learning_rate=auto"], 7, id="a rate that is found in the weights"),
    ],
)
def test_a_resumed_run_ends_with_the_same_to_the_bit(
    recipe: Path, tmp_path: Path, overrides: list[str], resumed_from: int
) -> None:
    run = tmp_path / "run"
    first = train(load_recipe(recipe, overrides)).record["training"]
    folder = run / ("model" if "method=full" in overrides else "adapter")
    file = folder / ("model.safetensors" if "method=full" in overrides else "adapter_model.safetensors")
    undisturbed = load_file(file)
    assert first["steps"] == (7 if overrides == STOPPED else 16)
    (run / "run.json").unlink()
    shutil.rmtree(folder)
    for path in (run / "checkpoints").glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > resumed_from:
            shutil.rmtree(path)
    resumed = train(load_recipe(recipe, overrides), resume=True).record["training"]
    assert_same(load_file(file), undisturbed)
    for key in ("held_out_loss", "kept_step", "stopped_early", "steps", "loss"):
        assert resumed[key] == first[key], key


def test_what_decides_cannot_be_changed_where_a_run_is_resumed(recipe: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe, [*STOPPED, "training.max_steps=2"]))
    (tmp_path / "run" / "run.json").unlink()
    for change in ("training.eval_steps=2", "training.ema=0.9", "training.keep=last", "training.optimizer=sgd"):
        key = change.partition("=")[0]
        with pytest.raises(UserError, match=f"^{key}[a-z.]*: changed since the run that is to be resumed"):
            train(load_recipe(recipe, [*STOPPED, "training.max_steps=2", change]), resume=True)


@pytest.mark.parametrize(
    "engine",
    [
        "none",
        pytest.param("fsdp", marks=pytest.mark.slow),
        pytest.param("zero-2", marks=[NEEDS_DEEPSPEED, pytest.mark.slow]),
    ],
)
def test_several_processes_stop_and_keep_together(recipe: Path, tmp_path: Path, engine: str) -> None:
    recipe.write_text(recipe.read_text().replace("dropout: 0.1", "dropout: 0.0"))
    # What several processes compute differs in the last digits, which a lower rate does not magnify.
    settings = [each for each in STOPPED if engine == "none" or "ema" not in each]
    settings += ["training.learning_rate=0.03", "training.early_stopping_patience=1"]
    one = train(load_recipe(recipe, settings)).record["training"]
    assert one["kept_step"] < 16
    two = tmp_path / "two"
    command = ["-m", "diablo_cli"] if engine == "none" else ["tests/end_to_end/sharding_cpus.py"]
    done = launch(
        *command, "train", str(recipe), *settings, "training.batch_size=2", f"output={two}",
        settings=SHARDED.get(engine),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((two / "run.json").read_text())["training"]
    assert record["processes"] == 2
    assert (record["steps"], record["kept_step"]) == (one["steps"], one["kept_step"])
    for name, values in weights(tmp_path / "run" / "adapter").items():
        torch.testing.assert_close(weights(two / "adapter")[name], values, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.optimizer=adamw_8bit", "found 'adamw_8bit', and the state of a sharded model"),
        ("training.optimizer.options={amsgrad: true}", "training.optimizer.options: the parameters of a sharded model"),
        (
            "training.optimizer.groups=[{modules: [mlp], weight_decay: 1}]",
            "training.optimizer.groups: the parameters of a sharded model",
        ),
        ("training.ema=0.9", "training.ema: a sharded model has no average"),
    ],
)
def test_what_a_sharded_model_cannot_have_is_refused(
    recipe: Path, monkeypatch: Any, setting: str, message: str
) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        check_shardable(make_plan(load_recipe(recipe, [setting])))


def test_a_sharded_model_goes_by_no_score(questions: Path, monkeypatch: Any) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"training\.best_by: found score, and nothing is generated by a sharded model"):
        check_shardable(make_plan(load_recipe(questions)))
