"""diablo init: what it writes is a recipe that trains, whoever is asked."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from diablo.recipes.data import DataSource
from diablo.recipes.reading import load_recipe

PLAIN = {"prompt": "Problem: 2 and 3 ?\nEquation:", "completion": " x = 2 + 3"}
CONVERSATION = {"messages": [{"role": "user", "content": "2 and 3?"}, {"role": "assistant", "content": "5"}]}


class Terminal(io.StringIO):
    """Somebody who types some lines."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, and nobody at a terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return tmp_path


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("row", "chat"), [(PLAIN, False), (CONVERSATION, True)], ids=["plain", "conversations"])
def test_what_is_written_from_options_trains(diablo, tiny_model, folder, row, chat):
    rows, held_out = (write_rows(folder / name, row, row) for name in ("a: #1.jsonl", "held_out.jsonl"))
    options = ("--model", tiny_model, "--data", rows.name, "--eval", held_out.name, "--num-blocks", 4)
    status, out, error = diablo("init", *options)
    assert (status, error) == (0, "")
    assert "Next: diablo train recipe.yaml --dry-run" in out
    recipe = load_recipe("recipe.yaml")
    assert (recipe.data.train, recipe.data.eval) == ((DataSource(path=rows.name),), (DataSource(path=held_out.name),))
    assert recipe.chat is chat
    assert recipe.training.learning_rate == "auto"
    assert recipe.output == Path("runs/a: #1")
    status, out, _ = diablo("train", "recipe.yaml", "--dry-run", "precision=fp32")
    assert status == 0
    assert "4 blocks of" in out


def test_columns_of_a_table_are_guessed_and_shown(diablo, tiny_model, folder):
    write_rows(folder / "q.csv", "level,question,answer", "1,What is 2 + 2?,4", "2,What is 3 + 3?,6")
    assert diablo("init", "--model", tiny_model, "--data", "q.csv", "--num-blocks", 4)[0] == 0
    written = (folder / "recipe.yaml").read_text()
    assert "columns: {prompt: '{{ question }} Answer:', completion: ' {{ answer }}'}" in written
    status, out, _ = diablo("train", "recipe.yaml", "--dry-run", "precision=fp32")
    assert status == 0
    assert "What is 2 + 2? Answer:‹ 4›" in out


def test_of_two_columns_the_second_follows_the_first(diablo, tiny_model, folder):
    write_rows(folder / "products.csv", "the description,product_line", "a red ball,toys", "a net,sports")
    assert diablo("init", "--model", tiny_model, "--data", "products.csv", "--num-blocks", 4)[0] == 0
    status, out, _ = diablo("train", "recipe.yaml", "--dry-run", "precision=fp32")
    assert status == 0
    assert "a red ball Product line: toys</s>" in out.replace("‹", "").replace("›", "")
    assert "run together" not in out


def test_what_is_no_text_is_not_taken_for_a_prompt(diablo, tiny_model, folder):
    write_rows(folder / "talks.jsonl", {"id": 1, "turns": [{"a": "b"}]})
    status, _, error = diablo("init", "--model", tiny_model, "--data", "talks.jsonl", "--num-blocks", 4)
    assert status == 2
    assert "say with data.columns which they are of id, turns" in error


@pytest.mark.parametrize(("count", "held_out"), [(49, 0), (50, 5)])
def test_a_tenth_of_the_rows_is_held_out_where_they_are_enough(diablo, tiny_model, folder, count, held_out):
    write_rows(folder / "rows.jsonl", *({"prompt": f"{n}:", "completion": " x"} for n in range(count)))
    assert diablo("init", "--model", tiny_model, "--data", "rows.jsonl", "--num-blocks", 4)[0] == 0
    assert ("eval: 10%" in (folder / "recipe.yaml").read_text()) == (held_out > 0)
    assert f"held-out rows       {held_out}\n" in diablo("train", "recipe.yaml", "--dry-run", "precision=fp32")[1]


def test_words_that_run_together_are_told(diablo, tiny_model, folder):
    write_rows(folder / "rows.csv", "prompt,completion", "a red ball,toys", "a net,sports", "a table: ,home")
    recipe = f"model: {tiny_model}\ndata: {{train: rows.csv}}\nmethod: {{num_blocks: 4}}\noutput: run\n"
    (folder / "recipe.yaml").write_text(f"{recipe}precision: fp32\ntraining: {{max_steps: 1, warmup_steps: 1}}\n")
    told = "2 of 3 completions follow their prompt without a space, as in 'balltoys'; end the prompt with a cue"
    status, out, _ = diablo("train", "recipe.yaml", "--dry-run")
    assert status == 0
    assert f"run together        {told}" in out
    assert "warm-up             found 1 of 1 steps" in out
    status, _, error = diablo("train", "recipe.yaml")
    assert status == 0
    assert f"data: {told}" in error
    assert "training.warmup_steps: found 1 of 1 steps, so that the learning rate never reaches its value" in error
    assert "without a space" not in diablo("train", "recipe.yaml", "--dry-run", "chat=true")[1]


def test_rows_in_the_place_of_a_recipe_are_told(diablo, folder):
    write_rows(folder / "rows.csv", "prompt,completion", "a,b")
    status, _, error = diablo("train", "rows.csv")
    assert status == 2
    assert "rows.csv is a file of rows, and no recipe; write one that trains on it with: diablo init --data" in error


def test_what_is_written_from_answers_trains(diablo, tiny_model, folder, monkeypatch):
    write_rows(folder / "rows.jsonl", PLAIN)
    answers = [str(tiny_model), "rows.json", "rows.jsonl", "", "none", "4"]
    monkeypatch.setattr("sys.stdin", Terminal("\n".join(answers) + "\n"))
    status, _, error = diablo("init", "mine.yaml")
    assert status == 0
    assert "[builtin:smollm2-135m]" in error
    assert "there is no file 'rows.json', nor a task to train on; tasks: mawps, gsm8k" in error
    assert "[runs/rows]" in error
    assert "found 'none'; give an integer of at least 1" in error
    recipe = load_recipe("mine.yaml")
    assert (recipe.model, recipe.output) == (str(tiny_model), Path("runs/rows"))
    assert diablo("train", "mine.yaml", "--dry-run", "precision=fp32")[0] == 0


def test_what_is_given_is_not_asked_for_and_enter_takes_the_default(diablo, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("\n\n"))
    status, _, error = diablo("init", "--model", "some/model", "--output", "there")
    assert status == 0
    assert "Model" not in error
    assert load_recipe("recipe.yaml").model_dump(include={"model", "task", "output"}) == {
        "model": "some/model",
        "task": ["mawps"],
        "output": Path("there"),
    }


def test_an_end_of_input_at_a_question_writes_nothing(diablo, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal(""))
    status, _, _ = diablo("init")
    assert status == 1
    assert not list(folder.iterdir())


def test_several_tasks_and_the_defaults(diablo):
    assert diablo("init", "two.yml", "--task", "mawps,gsm8k")[0] == 0
    assert load_recipe("two.yml").task == ["mawps", "gsm8k"]
    assert diablo("init", "--yes")[0] == 0
    recipe = load_recipe("recipe.yaml")
    assert (recipe.task, recipe.output) == (["mawps"], Path("runs/mawps"))
    # What is written is what a recipe of the same few keys has, with a rate that suits DiaBlo.
    (Path("short.yaml")).write_text(f"model: {recipe.model}\ntask: mawps\noutput: runs/mawps\n")
    assert recipe == load_recipe("short.yaml", ["training.learning_rate=auto"])


def test_every_line_says_what_its_key_does_and_the_last_where_to_look(diablo):
    assert diablo("init", "--yes")[0] == 0
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    keys, _, end = text.partition("\n\n")
    assert len(keys.splitlines()) == len(yaml.safe_load(keys)) + 6
    assert all("  # " in line for line in keys.splitlines())
    assert "docs/recipes.md" in end
    assert "diablo schema" in end
    # An editor takes such a line for what it says, wherever it stands.
    assert not any(line.startswith("# yaml-language-server") for line in text.splitlines())


def test_malformed_rows_are_told(diablo, folder):
    rows = write_rows(folder / "rows.jsonl", PLAIN, "{", {"prompt": "2 and 3"})
    status, _, error = diablo("init", "--data", rows)
    assert status == 0
    assert "has 2 malformed rows" in error
    assert "not valid JSON" in error
    assert "completion is missing" in error


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--data: missing; give --data FILE or --task NAME, or --yes to train on mawps"),
        (["--model", "m"], "--data: missing"),
        (["--data", "absent.jsonl"], "data.train: there is no file 'absent.jsonl'"),
        (["--task", "gsm"], "Did you mean gsm8k?"),
        (["--task", "mawps", "--data", "rows.jsonl"], "--data: a task brings its own rows"),
        (["--task", "mawps", "--eval", "rows.jsonl"], "--eval: a task brings its own rows"),
        (["--yes", "--eval", "rows.jsonl"], "data: task 'mawps' brings its own rows"),
        (["mine.txt", "--yes"], "FILE: 'mine.txt' is not the name of a YAML file"),
        (["nowhere/mine.yaml", "--yes"], "FILE: 'nowhere/mine.yaml' cannot be written"),
        (["taken.yaml", "--yes"], "FILE: 'taken.yaml' is there already"),
    ],
)
def test_a_refusal_is_one_line_and_writes_nothing(diablo, folder, options, expected):
    write_rows(folder / "rows.jsonl", PLAIN)
    (folder / "taken.yaml").write_text("mine")
    status, _, error = diablo("init", *options)
    assert status == 2
    assert expected in error
    assert error.count("\n") == 1
    assert {path.name for path in folder.iterdir()} == {"rows.jsonl", "taken.yaml"}
    assert (folder / "taken.yaml").read_text() == "mine"


def test_force_overwrites(diablo, folder):
    (folder / "recipe.yaml").write_text("mine")
    assert diablo("init", "--yes", "--force")[0] == 0
    assert load_recipe("recipe.yaml").task == ["mawps"]
