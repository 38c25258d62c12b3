"""lm-evaluation-harness on a task of a local file, held against our own scoring by likelihood."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import diablo_cli
from diablo import DiabloConfig
from diablo.data import Row, RowEncoder
from diablo.errors import UserError
from diablo.models.adapters import load_adapter
from diablo.scoring.harness import load_harness_tasks, run_harness
from diablo.scoring.likelihood import Choice, score_candidates
from diablo.tasks import Problem

pytest.importorskip("lm_eval", reason="the harness is an extra")

WORDS = ["x", "the", "apples apples", "lazy dog sleeps"]


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two harness tasks, one of them unsafe, over a local file of twelve problems."""
    folder = tmp_path_factory.mktemp("harness")
    records = [
        {"question": f"Ann had {n} apples and {m} more", "choices": WORDS, "answer": (n * m) % 4}
        for n in range(4)
        for m in range(1, 4)
    ]
    data = folder / "fruit.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    task: dict[str, Any] = {
        "task": "local_fruit",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "fruit.yaml").write_text(yaml.safe_dump(task))
    (folder / "unsafe.yaml").write_text(yaml.safe_dump(task | {"task": "local_unsafe", "unsafe_code": True}))
    missing = {"dataset_kwargs": {"data_files": {"test": str(folder / "absent.jsonl")}}}
    (folder / "missing.yaml").write_text(yaml.safe_dump(task | {"task": "local_missing"} | missing))
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the tiny model's output."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    config = DiabloConfig(num_blocks=4, target_modules=["q_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def ours(model: Any, encoder: RowEncoder, include: Path, count: int) -> tuple[float, float]:
    """Our two accuracies on the first so many problems."""
    records = [json.loads(line) for line in (include / "fruit.jsonl").read_text().splitlines()][:count]
    problems = [[Row(n, f"{r['question']}:", f" {word}") for word in WORDS] for n, r in enumerate(records)]
    choices = [
        Choice.among(Problem(rows[0], None), candidates, record["answer"])
        for rows, record, candidates in zip(problems, records, score_candidates(model, encoder, problems), strict=True)
    ]
    by_sum = sum(choice.is_right(lambda candidate: candidate.log_likelihood) for choice in choices)
    by_length = sum(choice.is_right(lambda candidate: candidate.per_character) for choice in choices)
    return by_sum / count, by_length / count


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["diablo", *map(str, args)])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        diablo_cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_scores_are_those_of_our_own_likelihoods(adapter: Path, include: Path) -> None:
    model, tokenizer = load_adapter(adapter, dtype=torch.float32)
    encoder = RowEncoder(tokenizer)
    figures = run_harness(model, encoder, load_harness_tasks(["local_fruit"], include), batch_size=7)
    by_metric = {figure.metric: figure for figure in figures}
    assert by_metric.keys() == {"acc", "acc_norm"}
    expected = ours(model, encoder, include, 12)
    assert expected[0] != expected[1]
    assert (by_metric["acc"].value, by_metric["acc_norm"].value) == pytest.approx(expected)


def test_the_command_prints_a_table_and_writes_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], adapter: Path, include: Path, tmp_path: Path
) -> None:
    out = tmp_path / "figures.json"
    settings = ["--limit", 10, "--num-fewshot", 2, "--out", out]
    assert (
        run(monkeypatch, "evaluate", adapter, "--harness", "local_fruit", "--harness-include", include, *settings) == 0
    )
    record = json.loads(out.read_text())
    assert record["versions"]["lm_eval"]
    assert (record["limit"], record["num_fewshot"], record["chat"]) == (10, 2, False)
    printed = capsys.readouterr().out
    for figure in record["figures"]:
        assert (figure["task"], figure["problems"], figure["shots"]) == ("local_fruit", 10, 2)
        assert 0 <= figure["value"] <= 1
        assert 0 <= figure["error"] < 0.5
        assert f"{figure['value']:.4f}" in printed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("local_friut", "there is no task 'local_friut' among .* Did you mean local_fruit?"),
        ("local_unsafe", "local_unsafe runs code that the model writes"),
        ("local_missing", "the data of 'local_missing' cannot be loaded"),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused_before_a_model_is_loaded(
    include: Path, name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_harness_tasks([name], include)


def test_a_missing_extra_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r'pip install "diablo-peft\[harness\]"'):
        load_harness_tasks(["arc_easy"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--harness", "arc_easy", "--task", "mawps"], "--task: --harness has tasks and settings of its own"),
        (["--harness", "arc_easy", "--likelihood"], "--likelihood: --harness has tasks and settings of its own"),
        (["--task", "mawps", "--num-fewshot", 3], "--num-fewshot: these are settings of --harness, which is missing"),
        (["--task", "boolq", "--likelihood", "--samples", 2], "--samples: --likelihood generates nothing"),
        (["--task", "mawps", "--likelihood"], "--likelihood: task 'mawps' has no choices"),
        (["--harness", "arc_easy", "--harness-include", "no/such"], "--harness-include: there is no folder 'no/such'"),
        (["--task", "mawps", "--out", "no/such/file.json"], "--out: 'no/such/file.json' cannot be written"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[object], message: str
) -> None:
    # The folder has no model.
    assert run(monkeypatch, "evaluate", Path(__file__).parent, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
