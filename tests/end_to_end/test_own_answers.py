"""``diablo pairs``: rows for preference training of a model's own answers, on a model that guesses between two."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tiny import CHAT_TEMPLATE

from diablo.data.reading.formats import to_row
from diablo.models.ready import load_for_generation
from diablo.planning.materials import gather
from diablo.recipes.reading import load_recipe
from diablo.tasks import TASKS, get_task
from diablo.tasks.commonsense import BoolQ

# What the model learns is the form of an answer: nothing in a question says which of the two is right.
CLAIMS = [
    {
        "instruction": f"Is {number} it?\n\nAnswer format: true/false",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }
    for number, answer in enumerate(["true", "false", "false", "true"] * 8)
]
TESTED, VALIDATED = CLAIMS[28:], 4
GREEDY = ["--samples", 1, "--temperature", 0, "--gold"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj", "lm_head"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data; the problems that are tested on stand among those to train on."""
    folder = tmp_path_factory.mktemp("data")
    for split, records in (("train", CLAIMS), ("test", TESTED)):
        (folder / f"boolq.{split}.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def recipes(tiny_model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs by how they put prompts. One has a chat template of its own."""
    made = {}
    for name in ("text", "chat"):
        place = tmp_path_factory.mktemp(name)
        settings = {
            "model": str(tiny_model),
            "task": "boolq",
            "data": {"folder": str(folder), "validation_rows": VALIDATED},
            "method": {"name": "diablo", "num_blocks": 1, "target_modules": TARGETS},
            "training": {"learning_rate": 0.01, "batch_size": 8, "epochs": 30, "logging_steps": 10},
            "evaluation": {"before": False, "after": False},
            "precision": "fp32",
            "output": str(place / "run"),
        }
        if name == "chat":
            settings |= {"chat": True, "chat_template": CHAT_TEMPLATE.replace("<s>", "<s>the ")}
        (place / "recipe.yaml").write_text(yaml.safe_dump(settings))
        made[name] = place / "recipe.yaml"
    return made


@pytest.fixture(scope="module")
def runs(recipes: dict[str, Path]) -> dict[str, Path]:
    """The folders of the runs."""
    from diablo.training import train

    return {name: train(load_recipe(recipe)).folder for name, recipe in recipes.items()}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["text", "chat"])
def test_pairs_put_prompts_token_by_token_as_generation_did(diablo, recipes, runs, folder, tmp_path, name):
    run, out_file = runs[name], tmp_path / "pairs.jsonl"
    status, out, err = diablo("pairs", run, out_file, "--samples", 8, "--seed", 1, "--json")
    assert status == 0, err
    record = json.loads(out)
    tally, rows = record["tasks"]["boolq"], rows_of(out_file)
    assert tally["problems"] == len(CLAIMS) - len(TESTED) - VALIDATED
    assert tally["answers"] == 8 * tally["problems"] == tally["right"] + tally["wrong"] + tally["left_out"]
    assert len(rows) == record["rows"] == tally["rows"] == tally["some_right"] > tally["problems"] / 2
    settings = record["recipe"]
    assert (settings["chat"], settings["objective"], settings["adapter"]) == (name == "chat", "dpo", str(run))

    # Training as the record says: the tokens of the prompt are those that the model was given.
    _, generating = load_for_generation(str(run))
    _, training = load_for_generation(str(run), chat=settings["chat"])
    if name == "chat":
        assert settings["chat_template"] == generating.tokenizer.chat_template
    else:
        assert "chat_template" not in settings
    task = get_task("boolq", folder=folder)
    problems = {tuple(generating.prompt(problem.row)): problem for problem in task.problems("train")}
    left_out = {claim["instruction"] for claim in TESTED}
    left_out |= {row.user for row in (problem.row for problem in validated(recipes[name]))}
    for row in rows:
        for side in ("chosen", "rejected"):
            read, _ = to_row(1, {"prompt": row["prompt"], "completion": row[side]})
            encoded = training.encode(read)
            before = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label < 0]
            problem = problems[tuple(before)]
            assert task.score(row[side] if name == "text" else row[side][0]["content"], problem) == (side == "chosen")
            assert problem.row.user not in left_out
    assert len({json.dumps(row["prompt"]) for row in rows}) == len(rows)

    status, out, _ = diablo("pairs", run, out_file, "--samples", 8, "--seed", 1, "--overwrite")
    assert status == 0
    assert rows_of(out_file) == rows
    assert f"{tally['answers']} answers to {tally['problems']} problems, {tally['right']} right" in out
    assert f"data.train={out_file} chat={str(name == 'chat').lower()} objective=dpo" in out
    assert (f"the chat_template of {run}/recipe.yaml" in out) == (name == "chat")


def validated(recipe: Path) -> list:
    return gather(load_recipe(recipe)).rows.validation_problems["boolq"]


def test_right_answers_alone_are_trained_on_as_the_output_says(diablo, recipes, runs, tmp_path):
    out_file = tmp_path / "right.jsonl"
    status, out, err = diablo(
        "pairs", runs["text"], out_file, "--format", "completions", "--limit", 12, "--batch-size", 7
    )
    assert status == 0, err
    rows = rows_of(out_file)
    assert {tuple(row) for row in rows} == {("prompt", "completion")}
    line = next(line for line in out.splitlines() if "diablo train RECIPE" in line)
    assert "objective" not in line
    (tmp_path / "more.yaml").write_text(f"training: {{max_steps: 1}}\nprecision: fp32\noutput: {tmp_path / 'run'}\n")
    status, out, err = diablo("train", tmp_path / "more.yaml", *line.split()[3:], "--dry-run")
    assert status == 0, err
    assert f"goes on from        {runs['text']}" in out
    assert f"training rows       {len(rows)}:" in out
    assert "warning" not in err.lower()


@pytest.mark.parametrize(("form", "objective"), [("pairs", "dpo"), ("pairs", "orpo"), ("labels", "kto")])
def test_preferences_of_own_answers_are_trained_on_as_the_output_says(diablo, runs, tmp_path, form, objective):
    rows, run = tmp_path / "rows.jsonl", tmp_path / "further"
    status, out, err = diablo("pairs", runs["chat"], rows, "--samples", 4, "--format", form, "--limit", 12, "--json")
    assert status == 0, err
    settings = json.loads(out)["recipe"]
    recipe = tmp_path / "recipe.yaml"
    further = {"training": {"max_steps": 2, "batch_size": 4}, "precision": "fp32", "output": str(run)}
    # It has an adapted output layer, which these objectives do not take.
    assert settings.pop("adapter") == str(runs["chat"])
    further["method"] = {"name": "diablo", "num_blocks": 4}
    nested = {"data": {"train": settings.pop("data.train")}}
    recipe.write_text(yaml.safe_dump(settings | nested | further | {"objective": objective}))
    status, out, err = diablo("train", recipe)
    assert status == 0, err
    record = json.loads((run / "run.json").read_text())
    assert record["data"]["malformed_rows_skipped"] == []
    assert record["training"]["steps"] == 2


def test_labels_say_of_each_answer_whether_it_is_right(diablo, runs, tmp_path):
    out_file = tmp_path / "labels.jsonl"
    status, out, err = diablo("pairs", runs["chat"], out_file, "--format", "labels", "--limit", 12, "--samples", 6)
    assert status == 0, err
    assert "objective=kto" in out
    labels = Counter(row["label"] for row in rows_of(out_file))
    assert labels.keys() == {True, False}
    assert f"{sum(labels.values())} labels" in out


def test_ctrl_c_keeps_whole_lines_and_says_how_many(diablo, runs, tmp_path, monkeypatch):
    out_file, judge, judged = tmp_path / "pairs.jsonl", BoolQ.score_all, []

    def stop_at_the_third(self, texts, problems):
        judged.append(problems)
        if len(judged) == 3:
            raise KeyboardInterrupt
        return judge(self, texts, problems)

    monkeypatch.setattr(BoolQ, "score_all", stop_at_the_third)
    command = ["pairs", runs["text"], out_file, "--samples", 8, "--batch-size", 32]
    status, _, err = diablo(*command)
    assert status == 130
    rows = rows_of(out_file)
    assert 0 < len(rows) <= 8
    assert f"Stopped after 8 of 24 problems. '{out_file}' has their {len(rows)} rows" in err
    # Those that a whole run begins with.
    status, _, err = diablo(*command)
    assert status == 2
    assert "is there already; give another name, or --overwrite" in err
    assert diablo(*command, "--overwrite")[0] == 0
    assert rows_of(out_file)[: len(rows)] == rows


def test_where_no_answer_is_right_the_tasks_own_can_stand_in(diablo, runs, tmp_path):
    # Other words are right here than those that the model has learned.
    for split, question in (("train", "it"), ("test", "that")):
        records = [
            {
                "instruction": CLAIMS[n]["instruction"].replace("it", question),
                "output": "the correct answer is solution1",
                "answer": "solution1",
            }
            for n in range(6)
        ]
        (tmp_path / f"piqa.{split}.json").write_text(json.dumps(records))
    out_file = tmp_path / "pairs.jsonl"
    command = ["pairs", runs["text"] / "adapter", out_file, "--task", "piqa", "--data-folder", tmp_path, "--limit", 4]
    status, _, err = diablo(*command, "--samples", 2, "--temperature", 0.2)
    assert status == 2
    assert "No pair came of 4 problems: 4 have no right answer among 2 samples; raise --samples" in err
    assert not out_file.exists()
    status, out, err = diablo(*command, *GREEDY)
    assert status == 0, err
    assert "4 none right, 4 of them with the task's own answer" in out
    assert [row["chosen"] for row in rows_of(out_file)] == ["the correct answer is solution1"] * 4


def test_a_model_that_never_ends_its_answers_is_told_from_one_that_is_wrong(diablo, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(TASKS["mawps"], "max_new_tokens", 2)
    out_file = tmp_path / "pairs.jsonl"
    status, _, err = diablo("pairs", tiny_model, out_file, "--task", "mawps", "--limit", 3, *GREEDY)
    assert status == 2
    assert "do not end within the task's length limit; train the model on the task first" in err
    assert not out_file.exists()


def test_a_run_that_was_scored_by_likelihood_is_asked_for_a_task(diablo, recipes, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["text"], run)
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["evaluation"]["likelihood"] = True
    (run / "run.json").write_text(json.dumps(record))
    status, _, err = diablo("pairs", run, tmp_path / "pairs.jsonl")
    assert status == 2
    assert "--task: missing" in err
    assert "was scored by likelihood" in err
    assert diablo("pairs", run, tmp_path / "pairs.jsonl", "--task", "boolq", "--limit", 12)[0] == 0
