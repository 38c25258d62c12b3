"""Data as people have it, from the command line: a CSV, conversations of ShareGPT, text, and a mixture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml


def recipe_of(folder: Path, model: Path, data: dict[str, Any], **settings: Any) -> list[str]:
    path = folder / "recipe.yaml"
    short = {"max_steps": 2, "batch_size": 4, "max_length": 64, "learning_rate": 1e-2}
    recipe = {"model": str(model), "output": str(folder / "run"), "method": {"num_blocks": 4}, "precision": "fp32"}
    path.write_text(yaml.safe_dump(recipe | {"training": short, "data": data} | settings))
    return ["train", str(path)]


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    path = tmp_path / "sums.csv"
    path.write_text("question,answer,why\n" + "".join(f"{n}+1?,{n + 1},count on\n" for n in range(20)))
    return path


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    path = tmp_path / "talks.json"
    turns = [{"from": "human", "value": "the fox?"}, {"from": "gpt", "value": "the dog"}]
    path.write_text(json.dumps([{"conversations": turns}] * 5))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n\n" * 12)
    return path


def trained_on(diablo: Any, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """What a run says of its data."""
    status, _, err = diablo(*arguments)
    assert (status, "error" in err) == (0, False)
    return json.loads((folder / "run" / "run.json").read_text())["data"]


COLUMNS = {"prompt": "question", "completion": "{{ why }}\n#### {{ answer }}"}


def test_a_csv_with_columns(diablo, tiny_model, tmp_path, csv_file):
    arguments = recipe_of(tmp_path, tiny_model, {"train": str(csv_file), "columns": COLUMNS, "eval": 4})
    status, out, _ = diablo(*arguments, "--dry-run")
    assert status == 0
    assert f"source              {csv_file}: prompt/completion, 20 rows" in out
    assert "held-out rows       4" in out
    assert "+1?‹" in out
    assert "‹⏎›‹#›‹#›‹#›‹#›‹ ›" in out
    data = trained_on(diablo, tmp_path, arguments)
    assert (data["rows"], data["held_out_rows"]) == (16, 4)
    assert data["train"] == [{"path": str(csv_file), "format": {"prompt/completion": 20}, "rows": 20, "weight": 1.0}]


def test_conversations_of_sharegpt(diablo, tiny_model, tmp_path, talks):
    arguments = recipe_of(tmp_path, tiny_model, {"train": str(talks)}, chat=True)
    status, out, _ = diablo(*arguments, "--dry-run")
    assert status == 0
    assert f"source              {talks}: ShareGPT, 5 rows" in out
    assert "<s>user⏎\nthe fox?</s>⏎\n<s>assistant⏎\n‹the›" in out
    assert trained_on(diablo, tmp_path, arguments)["rows"] == 5


def test_text_is_cut_to_rows_that_are_trained_on_whole(diablo, tiny_model, tmp_path, text):
    # Each row of a batch may end in the midst of a document, without a token that stops.
    arguments = recipe_of(tmp_path, tiny_model, {"train": str(text), "eval": str(text)})
    status, out, _ = diablo(*arguments, "training.max_length=16", "--dry-run")
    assert status == 0
    assert f"source              {text}: text, 1 row" in out
    assert f"held-out source     {text}: text, 1 row" in out
    data = trained_on(diablo, tmp_path, [*arguments, "training.max_length=16"])
    assert data["supervised_tokens"] == data["tokens"] - data["rows"]
    assert data["rows"] > 8


def test_a_mixture_with_a_share_held_out(diablo, tiny_model, tmp_path, csv_file, talks, text):
    sources = [{"path": str(csv_file), "columns": COLUMNS, "weight": 2, "limit": 15}, str(talks), str(text)]
    # Turns that are the same in several rows would all be held out with one of them.
    talks.write_text(
        json.dumps(
            [{"conversations": [{"from": "user", "value": f"{n}?"}, {"from": "bing", "value": "x"}]} for n in range(20)]
        )
    )
    arguments = recipe_of(tmp_path, tiny_model, {"train": sources, "eval": "5%"}, chat=True)
    status, out, _ = diablo(*arguments, "--dry-run")
    assert status == 0
    assert f"{csv_file}: prompt/completion, 15 rows, weight 2" in out
    assert "held-out rows       2" in out
    data = trained_on(diablo, tmp_path, arguments)
    assert [source["rows"] for source in data["train"]] == [15, 20, 1]
    assert [source["weight"] for source in data["train"]] == [2, 1, 1]
    assert data["held_out_rows"] == 2


def test_faults_name_the_file_of_the_row(diablo, tiny_model, tmp_path):
    good = {"prompt": "a", "completion": "b"}
    for name, rows in (("train", [good, {"prompt": "a"}]), ("held", [good, good, 3, good | {"prompt": "x" * 99}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "held.jsonl")}
    arguments = [*recipe_of(tmp_path, tiny_model, data), "--dry-run"]
    status, _, err = diablo(*arguments)
    assert status == 2
    assert "train.jsonl has 1 malformed of 2 rows. Row 2: completion is missing" in err
    assert "held.jsonl has 1 malformed of 4 rows. Row 3: a number, not an object" in err
    status, out, _ = diablo(*arguments, "data.on_malformed=skip", "chat=true")
    assert status == 0
    assert "malformed, left out train.jsonl: row 2: completion is missing" in out
    assert "malformed, left out held.jsonl: row 3: a number" in out
    status, _, err = diablo(*arguments, "data.on_malformed=skip", "data.on_long=error", "training.max_length=32")
    assert status == 2
    assert "the first is held.jsonl: row 4" in err


def test_rows_that_are_too_long_are_left_out_and_named(diablo, tiny_model, tmp_path):
    rows = [{"prompt": "a", "completion": "b" * (99 if n in (1, 3) else 1)} for n in range(5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = recipe_of(tmp_path, tiny_model, {"train": str(tmp_path / "train.jsonl")}, training={"max_length": 32})
    status, out, _ = diablo(*arguments, "--dry-run")
    assert status == 0
    assert "training rows       3:" in out
    assert "too long, left out  rows 2 and 4" in out


def test_a_question_and_an_answer_are_proposed_as_columns(diablo, tiny_model, tmp_path, csv_file):
    status, _, err = diablo(*recipe_of(tmp_path, tiny_model, {"train": str(csv_file)}), "--dry-run")
    assert status == 2
    assert "has question, answer, why; needs prompt and completion" in err
    assert "data.columns: {prompt: question, completion: answer}" in err


def test_tools_reasoning_and_turns_that_are_not_trained_reach_the_model(diablo, tiny_model, tmp_path):
    trl = pytest.importorskip("trl")
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    weather = {"name": "weather", "description": "w", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    asked = [
        {"role": "user", "content": "cold?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "4 C"},
        {"role": "assistant", "content": "yes", "reasoning_content": "four"},
    ]
    greeted = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "begone", "train": False},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "hello"},
    ]
    tools = [{"type": "function", "function": weather}]
    settings = {"chat": True, "chat_template": str(template), "training": {"max_length": 2048, "max_steps": 2}}
    for row, trained, context in (
        ({"messages": asked, "tools": tools}, ("weather", "four", "yes"), ("4 C", "cold?")),
        ({"messages": greeted}, ("hello",), ("begone", "again")),
    ):
        data = tmp_path / "talks.jsonl"
        data.write_text(json.dumps(row))
        arguments = recipe_of(tmp_path, tiny_model, {"train": str(data)}, **settings)
        status, out, _ = diablo(*arguments, "--dry-run")
        assert status == 0
        shown = out.partition("Two rows as the model sees them")[2]
        # Each trained token stands in marks, which parts of words may be.
        marked = "".join(re.findall("‹([^›]*)›", shown))
        assert all(word in marked for word in trained)
        assert all(word in shown and word not in marked for word in context)
    assert diablo(*arguments)[0] == 0
