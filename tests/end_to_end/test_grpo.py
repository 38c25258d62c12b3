"""GRPO from the command line: rewards of the model's own completions, resumed runs, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_early_refusals import run as run_apart
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from diablo.data.batching import GroupSampler
from diablo.planning.making import make_plan
from diablo.recipes.reading import load_recipe
from diablo.training import train
from diablo.training.trainers.groups import GroupTrainer
from diablo.tuner.layers import DiabloLayer

REWARDS = """
SEEN = []


def letter(completions, **columns):
    SEEN.append((completions, columns))
    return [float("e" in text) for text in completions]


def answered(prompts, completions, kind):
    SEEN.append((prompts, completions, kind))
    return [len(completion[0]["content"]) for completion in completions]
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The tiny model with a head that tells tokens apart: its own makes all of them about as likely."""
    folder = make_tiny_model(tmp_path_factory.mktemp("grpo") / "model")
    loud = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        loud.lm_head.weight.mul_(10)
    loud.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    """A recipe that rewards a letter, of prompts of several lengths; its output is ``run`` beside it."""
    rows = [{"prompt": f"The dog {'asks ' * (n % 3)}{n}", "kind": n} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards.py").write_text(REWARDS)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {model}\ndata: {{train: {tmp_path / 'prompts.jsonl'}}}\nmethod: {{name: diablo, num_blocks: 4}}\n"
        f"objective: {{name: grpo, generations: 4, rewards: '{tmp_path / 'rewards.py'}:letter', max_new_tokens: 8}}\n"
        "training: {learning_rate: 0.03, batch_size: 8, max_steps: 6, logging_steps: 1, save_total_limit: 99}\n"
        f"precision: fp32\noutput: {tmp_path / 'run'}\n"
    )
    return path


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(values, second[name]) for name, values in first.items())


def test_completions_come_to_have_what_a_function_of_the_users_rewards(diablo, recipe, tmp_path):
    settings = ["training.max_steps=16", "training.schedule=constant", "training.batch_size=16"]
    settings += ["objective.generations=8", "objective.max_new_tokens=12"]
    status, said, _ = diablo("train", recipe, *settings, "--dry-run")
    assert status == 0
    assert "objective           grpo: 8 completions of each prompt, rewards" in said
    assert "completions         up to 12 tokens" in said
    assert "effective batch     16 completions, 8 of each of 2 prompts" in said
    status, said, error = diablo("train", recipe, *settings)
    assert status == 0, error
    record, lines = record_of(tmp_path / "run"), lines_of(tmp_path / "run")
    rewards = [reward for _, reward in record["training"]["reward"]]
    assert len(rewards) == 16
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.15
    assert f"reward           {rewards[0]:.3f} -> {rewards[-1]:.3f} of completions" in said
    assert [line["reward"] for line in lines] == rewards
    for name in ("reward_std", "rewards/letter/mean", "completions/mean_length", "frac_reward_zero_std", "entropy"):
        assert name in lines[0]
    assert "kl" not in lines[0]
    [of_file] = record["training"]["rewards"]
    assert of_file["file"] == str(tmp_path / "rewards.py")
    assert len(of_file["sha256"]) == 64
    assert (tmp_path / "run" / "loss.png").is_file()
    # A step whose groups have no difference is one that nothing is learned from.
    idle = [line["step"] for line in lines if line["frac_reward_zero_std"] == 1]
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("so that nothing was learned") == len(idle)
    # The best and the worst completion of a step are there to be read.
    assert log.count(": advantage +") == 16
    assert diablo("generate", tmp_path / "run", "The dog 3", "--max-new-tokens", 4)[0] == 0


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["objective.beta=0.1", "method=lora", "training.gradient_checkpointing=selective"],
        ["objective.iterations=2", "training.gradient_accumulation=2", "training.batch_size=4", "objective.beta=0.1"],
    ],
)
def test_a_resumed_run_ends_with_the_same_adapter_to_the_bit(diablo, recipe, tmp_path, settings):
    run, arguments = tmp_path / "run", ["train", recipe, *settings, "training.save_steps=1", "training.max_steps=5"]
    # The last step is the third one of an epoch of six, and with iterations it goes on with completions of the second.
    assert diablo(*arguments)[0] == 0
    adapter, rewards = adapter_of(run), record_of(run)["training"]["reward"]
    assert any(bool(values.any()) for values in adapter.values())
    for step in (4, 5):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step}")
    (run / "run.json").unlink()
    status, _, error = diablo(*arguments, "--resume")
    assert status == 0, error
    assert_same(adapter_of(run), adapter)
    assert record_of(run)["training"]["reward"] == rewards
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4, 5]


def test_a_run_is_not_resumed_with_another_function(diablo, recipe, tmp_path):
    arguments = ["train", recipe, "training.save_steps=1", "training.max_steps=1"]
    assert diablo(*arguments)[0] == 0
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "rewards.py").write_text(REWARDS + "\n# Another file.\n")
    status, _, error = diablo(*arguments, "--resume")
    assert status == 2
    assert "rewards.py has changed since the run that is to be resumed; set it back" in " ".join(error.split())


def test_a_run_of_several_epochs_is_resumed_in_the_second_one(diablo, recipe, tmp_path):
    run, arguments = tmp_path / "run", ["train", recipe, "training.save_steps=3", "training.batch_size=24"]
    assert diablo(*arguments)[0] == 0
    adapter = adapter_of(run)
    shutil.rmtree(run / "checkpoints" / "checkpoint-6")
    (run / "run.json").unlink()
    assert diablo(*arguments, "--resume")[0] == 0
    assert_same(adapter_of(run), adapter)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_adapter_to_the_bit(recipe):
    recipe.write_text(recipe.read_text().replace("logging_steps: 1", "logging_steps: 1, save_steps: 1"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    script = Path(__file__).parent / "kill_scenarios.py"
    command = [sys.executable, str(script), str(recipe), "4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == []
    assert sum(found["killed"].values()) == 4


def test_padding_with_the_stop_token_changes_nothing(diablo, recipe, model, tmp_path):
    same = tmp_path / "same"
    shutil.copytree(model, same)
    tokenizer = AutoTokenizer.from_pretrained(same)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(same)
    # The stop token is likely enough for completions to end with it.
    for folder in (model, same):
        assert diablo("train", recipe, f"model={folder}", f"output={tmp_path / folder.name}-run")[0] == 0
    first, second = tmp_path / "model-run", tmp_path / "same-run"
    assert any(line["completions/clipped_ratio"] < 1 for line in lines_of(first))
    assert_same(adapter_of(first), adapter_of(second))


@pytest.mark.parametrize("method", ["{name: diablo, num_blocks: 4, dropout: 0.2}", "{name: pissa, r: 4}"])
def test_the_reference_is_the_model_as_it_starts_and_nothing_is_dropped(diablo, recipe, tmp_path, method):
    first, second = tmp_path / "first", tmp_path / "second"
    rows = [{"prompt": f"The dog {n}", "completion": f" asks {n}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    moved = ["training.learning_rate=0.05", "training.max_steps=3"]
    supervised = ["objective=sft", f"data.train={tmp_path / 'rows.jsonl'}", f"method={method}", f"output={first}"]
    assert diablo("train", recipe, *supervised, *moved)[0] == 0
    recipe.write_text(recipe.read_text().replace("method: {name: diablo, num_blocks: 4}\n", ""))
    arguments = ["train", recipe, f"adapter={first}", f"output={second}", "objective.beta=0.01", *moved]
    status, said, _ = diablo(*arguments, "--dry-run")
    assert status == 0
    assert ("dropout             off: the adapter was trained with 0.2" in said) == ("dropout" in method)
    assert diablo(*arguments)[0] == 0
    divergences = [line["kl"] for line in lines_of(second)]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[-1] > 1e-4
    # Neither a second adapter nor a second model is left behind in the file.
    assert adapter_of(second).keys() == adapter_of(first).keys()
    assert not list((second / "adapter").glob("ref*"))


def test_blocks_are_written_once_for_a_whole_generation_and_weights_are_the_bases_afterwards(recipe, monkeypatch):
    writes, changed = [], []
    plain = GroupTrainer._generate_single_turn

    def watched(trainer: Any, *arguments: Any, **options: Any) -> Any:
        model: Any = trainer.model
        layers = [module for module in model.modules() if isinstance(module, DiabloLayer)]
        passes = layers[0].passes
        before = [layer.get_base_layer().weight.clone() for layer in layers]
        put = type(passes).put

        def counted(self: Any, plan: Any) -> None:
            written = self.written
            put(self, plan)
            writes.append(self.written is not written and self.written is not None)

        with monkeypatch.context() as patch:
            patch.setattr(type(passes), "put", counted)
            result = plain(trainer, *arguments, **options)
        changed.append(
            any(not torch.equal(layer.get_base_layer().weight, was) for layer, was in zip(layers, before, strict=True))
        )
        return result

    monkeypatch.setattr(GroupTrainer, "_generate_single_turn", watched)
    train(load_recipe(str(recipe), ["training.max_steps=3"]))
    assert sum(writes) == 3
    assert changed == [False] * 3


def test_a_tasks_problems_are_judged_by_the_task_and_validation_problems_choose_the_step(diablo, recipe, tmp_path):
    text = recipe.read_text().replace(f"data: {{train: {tmp_path / 'prompts.jsonl'}}}\n", "task: mawps\n")
    recipe.write_text(text)
    rewards = "[{name: right_answer, weight: 2}, format, {name: length, tokens: 4, weight: 0.5}]"
    settings = [f"objective.rewards={rewards}", "training.max_length=300", "training.max_steps=2"]
    settings += ["data.limit=6", "data.validation_rows=3", "data.held_out=validation", "evaluation.limit=2"]
    settings += ["training.eval_steps=1", "training.keep=best", "training.best_by=score"]
    status, said, error = diablo("train", recipe, *settings)
    assert status == 0, error
    record, lines = record_of(tmp_path / "run"), lines_of(tmp_path / "run")
    training = record["training"]
    assert [each["name"] for each in training["rewards"]] == ["right_answer", "format", "length"]
    assert [step for step, _ in training["validation_score"]] == [1, 2]
    assert [step for step, _ in training["held_out_figures"]["reward"]] == [0, 1, 2]
    assert training["held_out_loss"] == []
    assert record["data"]["rows"] == 6
    step = next(line for line in lines if "reward" in line)
    parts = [step[f"rewards/{name}/mean"] for name in ("right_answer", "format", "length")]
    assert step["reward"] == pytest.approx(2 * parts[0] + parts[1] + 0.5 * parts[2], abs=1e-6)
    assert -1 <= parts[2] < 0
    assert [line["step"] for line in lines if "held_out_reward" in line] == [0, 1, 2]
    assert "held-out reward " in said
    assert set(record["scores"]) == {"before", "after"}


def test_held_out_rewards_choose_the_step_that_is_kept_and_a_resumed_run_chooses_alike(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    settings = [f"data.eval={tmp_path / 'prompts.jsonl'}", "training.eval_steps=1", "training.keep=best"]
    arguments = ["train", recipe, *settings, "training.save_steps=1"]
    assert diablo(*arguments)[0] == 0
    first = record_of(run)["training"]
    measured = first["held_out_figures"]["reward"]
    assert [step for step, _ in measured] == list(range(7))
    best = max(reward for step, reward in measured if step)
    assert first["kept_step"] == next(step for step, reward in measured if step and reward == best)
    adapter = adapter_of(run)
    for step in range(3, 7):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step}")
    (run / "run.json").unlink()
    assert diablo(*arguments, "--resume")[0] == 0
    again = record_of(run)["training"]
    assert (again["held_out_figures"], again["kept_step"]) == (first["held_out_figures"], first["kept_step"])
    assert_same(adapter_of(run), adapter)


def test_prompts_that_are_turns_reach_functions_as_trl_hands_them_over(recipe, tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "user asks"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": turns, "kind": n}) for n in range(2)))
    settings = ["chat=true", f"objective.rewards={tmp_path / 'rewards.py'}:answered", "training.max_steps=1"]
    recipe_read = load_recipe(str(recipe), settings)
    plan = make_plan(recipe_read)
    assert isinstance(plan.sampler, GroupSampler)
    # The prompt is what `diablo generate` starts from.
    assert plan.encoder.tokenizer.decode(plan.train[0].input_ids).endswith("user asks</s>\n<s>assistant\n")
    assert plan.train[0].input_ids == plan.encoder.prompt(plan.train[0].row)
    train(recipe_read)
    file = str(tmp_path / "rewards.py")
    [module] = [each for each in list(sys.modules.values()) if getattr(each, "__file__", None) == file]
    prompts, completions, kinds = module.SEEN[-1]
    assert prompts == [turns] * 8
    assert {completion[0]["role"] for completion in completions} == {"assistant"}
    assert sorted(kinds) == [0] * 4 + [1] * 4


def test_a_function_that_fails_in_training_is_named_with_its_row(diablo, recipe, tmp_path):
    text = "import math\n\n\ndef odd(completions, kind):\n    return [1.0 if k != 7 else math.nan for k in kind]\n"
    (tmp_path / "rewards.py").write_text(text)
    status, _, error = diablo("train", recipe, f"objective.rewards={tmp_path / 'rewards.py'}:odd")
    assert status == 2
    assert "rewards.py:odd gave nan for a completion of row 8; give a finite number for each." in error


Refused = list[tuple[list[str], str]]


def refusals(text: Callable[[str], str]) -> Refused:
    """Settings, and what is said of them."""
    own = text("mine.py")
    return [
        (
            ["training.batch_size=6"],
            "training.batch_size: found 6, with gradient_accumulation 1; that is 6 completions",
        ),
        (["objective.generations=1"], "objective.generations: found 1; allowed: an integer of at least 2"),
        (["objective.temperature=0"], "objective.temperature: found 0; allowed: a number above 0"),
        (["objective.rewards=right_anwser"], "found 'right_anwser'; allowed: right_answer, format, length, and a"),
        (["objective.rewards=right_answer"], "right_answer is what a task says of an answer, and data.train has none"),
        (
            ["objective.rewards=right_answer", "data={}", "task=code_alpaca_2k"],
            "right_answer is what a task says of an answer, and code_alpaca_2k has no right answers; leave it out",
        ),
        (["objective.rewards=none.py:f"], "objective.rewards: there is no file 'none.py'"),
        ([f"objective.rewards={own}:lettr"], "has no function 'lettr'; it has: letter, short, asks, breaks, later"),
        ([f"objective.rewards={own}:NUMBER"], "NUMBER of"),
        ([f"objective.rewards={own}:short"], "gave 1 values for 2 completions; give one for each"),
        ([f"objective.rewards={own}:asks"], "asks for difficulty, which the first row does not have; it is given"),
        ([f"objective.rewards={own}:breaks"], "mine.py:breaks fails on row 1: line 19: ZeroDivisionError"),
        ([f"objective.rewards={own}:later"], "is asynchronous"),
        ([f"objective.rewards={text('torn.py')}:f"], "torn.py cannot be imported: line 1: SyntaxError"),
        (["objective.rewards=[{name: length}]"], "objective.rewards: length needs tokens"),
        (["objective.rewards=[{name: length, tokens: 8}]"], "length with tokens 8 penalises nothing"),
        (["objective.rewards=[{name: length, tokens: 4, wait: 1}]"], "unknown key; allowed: name, weight, tokens"),
        ([f"objective.rewards=[{own}:letter, {own}:letter]"], "found letter, letter; name each once"),
        ([f"objective.rewards=[{{name: '{own}:letter', weight: 0}}]"], "has weight 0, which changes nothing"),
        (["objective.max_new_tokens=1024"], "objective.max_new_tokens: found 1024, and training.max_length, which is"),
        (["objective.epsilon=0.1"], "objective.epsilon: found 0.1 with iterations: 1"),
        (["objective.beta=0.1", "method=full"], "objective.beta: found 0.1 with method: full"),
        (["method={name: diablo, num_blocks: 4, dropout: 0.1}"], "method.dropout: found 0.1, and grpo trains on"),
        (["training.packing=true"], "training.packing: found true, which is for objective: sft"),
        (["training.label_smoothing=0.1"], "training.label_smoothing: found 0.1, which is for objective: sft"),
        (["training.neftune_noise_alpha=5"], "training.neftune_noise_alpha: found 5, which is for objective: sft"),
        (["speed.activation_offloading=true"], "speed.activation_offloading: found true, which grpo does not have"),
        (["data.train=empty.jsonl"], "Row 1: prompt is empty; give the text that is to be completed."),
        (["data.train=answered.jsonl", "chat=true"], "prompt ends with the assistant's turn; leave that turn out"),
        (["data.train=other.jsonl"], "has question; needs prompt; or say which columns these are"),
    ]


def test_what_cannot_work_is_refused_before_torch_is_imported(recipe, tmp_path):
    (tmp_path / "mine.py").write_text(
        "NUMBER = 3\n\n\n"
        "def letter(completions):\n    return [1.0 for _ in completions]\n\n\n"
        "def short(completions):\n    return [1.0]\n\n\n"
        "def asks(completions, difficulty):\n    return difficulty\n\n\n"
        "def breaks(completions):\n    values = []\n    for text in completions:\n"
        "        values.append(1 / len(text))\n    return values\n\n\n"
        "async def later(completions):\n    return [1.0 for _ in completions]\n"
    )
    (tmp_path / "torn.py").write_text("def f(:\n")
    (tmp_path / "empty.jsonl").write_text('{"prompt": " "}\n')
    (tmp_path / "other.jsonl").write_text('{"question": "a"}\n')
    turn = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    (tmp_path / "answered.jsonl").write_text(json.dumps({"prompt": turn}))
    refused = refusals(lambda name: str(tmp_path / name))
    outcomes = run_apart(tmp_path, [["train", "recipe.yaml", *settings] for settings, _ in refused])
    for (settings, expected), (status, error, heavy) in zip(refused, outcomes, strict=True):
        assert status == 2, (settings, error)
        assert expected in error, (settings, error)
        assert not heavy, settings
    assert not (tmp_path / "run").exists()


def test_methods_are_not_compared_by_rewards(diablo, recipe):
    status, _, error = diablo("compare", recipe)
    assert status == 2
    assert "objective: found grpo, which has no loss on held-out rows" in error


def test_each_batch_is_whole_groups_and_an_epoch_has_every_prompt():
    sampler = GroupSampler([3, 9, 4, 8, 5], 8, 0, 4, 2, 3)
    batches = sampler.batches()
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert all(len(set(batch[first : first + 4])) == 1 for batch in batches for first in (0, 4))
    assert {index for batch in batches for index in batch} == set(range(5))
    assert list(sampler) == [index for batch in batches for _ in range(6) for index in batch]
    assert len(sampler) == len(list(sampler))
    assert sampler.steps == 6
    sampler.set_epoch(1)
    assert sampler.batches() != batches
    # Fewer prompts than a batch takes: each is in several groups.
    assert GroupSampler([3], 8, 0, 4, 1, 1).batches() == [[0] * 8]
