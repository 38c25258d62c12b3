"""What the benchmarks measure is what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import host, long_comparisons, serving
from benchmarks.gpu import steps
from benchmarks.gpu.recorder import NotThereError, Recorder, row_name
from benchmarks.methods import IN_PLACE
from diablo.data import RowEncoder
from diablo.models.adapters import load_adapter
from diablo.models.loading import load_model, load_tokenizer
from diablo.recipes.reading import load_recipe
from diablo.scoring.generation import complete


def test_the_floor_has_the_output_and_the_gradients_of_diablo():
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    found = []
    for name in (host.BARE, IN_PLACE):
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        model = host.adapted(name, base, 4)
        y = model(x)
        y.square().sum().backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        found.append([y, x.grad, *grads])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_hosts_time_is_measured_for_every_method():
    rows = host.measure(16, 2, 2, 4, torch.float32, torch.device("cpu"), rounds=2, at_least=0.0)
    assert {row["method"] for row in rows} == set(host.METHODS)
    measured = {row["method"]: row for row in rows if "note" not in row}
    assert measured["frozen"]["added_microseconds"] == 0
    assert measured["LoRA"]["added_over_loras"] == 1


def test_the_long_comparisons_are_planned_without_a_run(tmp_path, capsys):
    long_comparisons.main(["mawps"], methods="diablo,lora", jobs=2, out=tmp_path / "long", dry_run=True)
    assert "10 of 216 steps, 2,160 steps in all" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "long").exists()
    for task in long_comparisons.TASKS:
        recipe = load_recipe(long_comparisons.QUALITY / f"long-{task}.yaml")
        assert recipe.data.validation_rows
        assert (recipe.evaluation.after is False) == (task == "gsm8k")


def test_a_row_that_fails_is_recorded_and_the_next_is_measured(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    recorder = Recorder(path, float("inf"), {row_name("part", {"method": "done"})}, torch.device("cpu"))

    def fail(error: Exception) -> dict:
        raise error

    def part() -> None:
        recorder.row(lambda: fail(AssertionError("measured again")), method="done")
        recorder.row(lambda: fail(torch.OutOfMemoryError("no memory\nand more")), method="large")
        recorder.row(lambda: fail(NotThereError("not installed")), method="missing")
        recorder.row(lambda: {"seconds": 1.0}, method="small")
        recorder.deadline = 0
        recorder.row(lambda: {"seconds": 1.0}, method="late")
        raise ValueError("outside of a row")

    recorder.run_part("part", part)
    *lines, end = [json.loads(line) for line in path.read_text().splitlines()]
    rows = {line["keys"]["method"]: line for line in lines if line["event"] == "row"}
    assert list(rows) == ["large", "missing", "small", "late"]
    assert rows["large"]["error"] == "OutOfMemoryError: no memory"
    assert rows["missing"]["note"] == "not installed"
    assert rows["small"]["seconds"] == 1.0
    assert rows["late"]["left_out"] == "the time was up"
    assert end["event"] == "part"
    assert end["error"] == "ValueError: outside of a row"


def test_steps_that_do_not_repeat_themselves_are_seen():
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    assert steps.equal(values, steps.copies(values))
    assert not steps.equal(values, [values[0], torch.tensor([3.0000002])])
    assert steps.distance(values, values) == 0
    assert steps.distance([values[0], torch.tensor([5.0])], values) == pytest.approx((4 / 14) ** 0.5)
    with steps.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_measurement_of_serving_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path):
    recorder = serving.Recorder(tmp_path / "record.json", {"clients": 2}, [])

    def fail() -> dict:
        raise RuntimeError("the server did not start")

    recorder.measure("one", 0, fail)
    recorder.measure("other", 0, lambda: {"tokens_per_second": 3.0})
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["results"] == [
        {"method": "one", "round": 0, "note": "RuntimeError: the server did not start"},
        {"method": "other", "round": 0, "tokens_per_second": 3.0},
    ]


def test_answers_of_served_adapters_are_compared_with_the_adapter_alone(tmp_path: Path, tiny_model: Path):
    model, tokenizer = load_model(str(tiny_model), torch.float32), load_tokenizer(str(tiny_model))
    names, _ = serving.make_adapters(model.eval(), tmp_path, 2, 4, 0.3)
    asked = [serving.Asked(name, "Ann had 3 apples.") for name in names]
    alone = [
        complete(load_adapter(tmp_path / name, dtype=torch.float32)[0], encoder, [ids], max_new_tokens=6)[0].text
        for encoder in [RowEncoder(tokenizer)]
        for ids in [encoder.tokenizer(asked[0].prompt, add_special_tokens=False).input_ids]
        for name in names
    ]
    assert len(set(alone)) == 2
    answers = [{index: serving.Answered(text, 6, 0.1, 0.2) for index, text in enumerate(alone)}]
    arguments = (model, tokenizer, str(tiny_model), tmp_path, asked)
    assert serving.check(*arguments, answers, 6, 60.0) == (2, [])
    compared, wrong = serving.check(*arguments, [{0: answers[0][1]}], 6, 60.0)
    assert (compared, len(wrong)) == (1, 1)
