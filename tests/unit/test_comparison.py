"""The parts of a comparison: its plan, the sweep, the rows that choose the rate, the figures, the general text."""

from __future__ import annotations

import io
import json
import math
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from diablo.comparison import Comparison, parse_rates, plan_comparison
from diablo.comparison.differences import paired_difference, read_solved
from diablo.comparison.processes import shares_of, side_by_side
from diablo.comparison.summary import HEADERS, describe_run, markdown, notes, summarize, table_rows
from diablo.comparison.sweep import Sweep, mean_loss, sweep
from diablo.data.encoding import IGNORED, EncodedRow
from diablo.data.general_text import encode_general_text
from diablo.data.rows import Row
from diablo.data.splits import cut_validation, take_turns
from diablo.devices import visible_gpus
from diablo.errors import UserError
from diablo.planning.making import make_plan
from diablo.recipes.applying import apply_method
from diablo.recipes.methods import DiabloMethod
from diablo.recipes.recipe import Recipe
from diablo.scoring.generation import held_out_loss
from diablo_cli.reporting import print_comparison


def recipe_on(model: Path, output: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "model": str(model),
        "task": "mawps",
        "method": {"num_blocks": 4},
        "data": {"limit": 60},
        "training": {"max_steps": 3, "batch_size": 8},
        "precision": "fp32",
        "output": str(output),
    }
    return Recipe.model_validate(settings | changes)


def plan_on(model: Path, folder: Path, **options: Any) -> Comparison:
    return plan_comparison(recipe_on(model, folder / "run"), folder=folder / "comparison", **options)


def prompt_of(row: EncodedRow) -> tuple[int, ...]:
    return tuple(token for token, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORED)


# The plan


def test_every_method_comes_as_close_to_diablos_parameters_as_its_ranks_do(tiny_model, tmp_path):
    comparison = plan_on(tiny_model, tmp_path)
    by_name = {contender.name: contender for contender in comparison.contenders}
    assert list(by_name) == ["diablo", "lora", "rslora", "dora", "pissa", "miss", "full"]
    assert (
        by_name["full"].trained == comparison.total == AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()
    )
    assert by_name["full"].deviation is None
    for name, contender in by_name.items():
        if name not in ("diablo", "full"):
            assert contender.deviation == contender.trained / comparison.budget - 1
            # A rank more or less of the coarsest of them is 700 parameters.
            assert abs(contender.trained - comparison.budget) <= 350
    assert comparison.planned_runs == 7 * (4 + 3)


def test_full_fine_tuning_has_a_grid_of_its_own_unless_grids_are_given(tiny_model, tmp_path):
    def tried(**options: Any) -> dict[str, list[float]]:
        comparison = plan_on(tiny_model, tmp_path, methods=["diablo", "lora", "full"], **options)
        return {contender.name: comparison.grids.of(contender.name) for contender in comparison.contenders}

    common = [2e-4, 5e-4, 1e-3, 2e-3]
    assert tried() == {"diablo": common, "lora": common, "full": [2e-5, 5e-5, 1e-4, 2e-4]}
    assert tried(rates=[2e-3, 1e-3]) == {name: [1e-3, 2e-3] for name in ("diablo", "lora", "full")}
    assert tried(own_rates={"lora": [0.1], "full": [0.2]}) == {"diablo": common, "lora": [0.1], "full": [0.2]}


@pytest.mark.parametrize(
    ("texts", "common", "own"),
    [
        ([], None, {}),
        (["1e-3,2e-3"], [1e-3, 2e-3], {}),
        (["full=1e-4,2e-4", "1e-3"], [1e-3], {"full": [1e-4, 2e-4]}),
        (["peft:GRALORA:r:gralora_k=4=0.01"], None, {"peft:GRALORA:r:gralora_k=4": [0.01]}),
    ],
)
def test_grids_are_read_as_they_are_written_on_the_command_line(texts, common, own):
    assert parse_rates(texts) == (common, own)


@pytest.mark.parametrize(
    ("name", "size", "off"),
    [
        ("peft:GRALORA:r", "r = 4", 256),
        ("peft:GRALORA:r:gralora_k=4:alpha=8", "r = 4, gralora_k 4, alpha 8", 256),
        # It trains less the larger its blocks are, which must divide both dimensions.
        ("peft:C3A:block_size", "block_size = 4", 0),
        ("peft:OFT:oft_block_size", "oft_block_size = 16", 192),
        # Its adapters are made from the values of weights.
        ("peft:SHIRA:r", "r = 4", 256),
        # Its vectors are shared by all layers.
        ("peft:VBLORA:num_vectors:vector_length=16", "num_vectors = 16, vector_length 16", 0),
        ("peft:PREFIX_TUNING:num_virtual_tokens", "num_virtual_tokens = 48", 0),
    ],
)
def test_the_key_that_is_named_is_solved_for(tiny_model, tmp_path, name, size, off):
    comparison = plan_on(tiny_model, tmp_path, methods=["diablo", name])
    contender = comparison.contenders[1]
    assert (contender.name, contender.size) == (name, size)
    assert abs(contender.trained - comparison.budget) == off
    assert contender.deviation == contender.trained / comparison.budget - 1
    run = comparison.run(contender, "test", 1e-3, 0)
    assert make_plan(run.recipe).parameters[0] == contender.trained
    assert run.recipe.output.name == f"{name.replace(':', '-')}-test-lr0.001-seed0"
    assert comparison.settings["methods"] == ["diablo", name]


def test_a_type_of_peft_shares_targets_and_dropout_with_diablo_or_is_refused(tiny_model, tmp_path):
    def contender(method: dict[str, Any], name: str) -> Any:
        recipe = recipe_on(tiny_model, tmp_path / "run", method={"num_blocks": 4, **method})
        return plan_comparison(recipe, methods=[name]).contenders[0].method

    shared = {"target_modules": ["q_proj", "up_proj"], "dropout": 0.1}
    options = contender(shared, "peft:GRALORA:r").options
    assert options == {"r": 4, "target_modules": ["q_proj", "up_proj"], "gralora_dropout": 0.1}
    assert contender(shared, "peft:PREFIX_TUNING:num_virtual_tokens").options.keys() == {"num_virtual_tokens"}
    with pytest.raises(UserError, match="'peft:SHIRA:r' has no shira_dropout"):
        contender(shared, "peft:SHIRA:r")


def test_every_method_is_run_with_every_optimizer_and_the_recipes_own_keeps_what_it_is_told(tiny_model, tmp_path):
    own = {"name": "adamw_torch", "betas": [0.8, 0.95]}
    recipe = recipe_on(tiny_model, tmp_path / "run", training={"max_steps": 3, "optimizer": own})
    comparison = plan_comparison(recipe, methods=["diablo", "lora"], optimizers=["muon", "adamw_torch"], seeds=1)
    titles = ["diablo+muon", "diablo+adamw_torch", "lora+muon", "lora+adamw_torch"]
    assert [contender.title for contender in comparison.contenders] == titles
    assert comparison.planned_runs == 4 * (4 + 1)
    assert (comparison.settings["methods"], comparison.settings["optimizers"]) == (
        ["diablo", "lora"],
        ["muon", "adamw_torch"],
    )
    runs = [comparison.run(contender, "test", 1e-3, 0) for contender in comparison.contenders]
    assert [run.method for run in runs] == titles
    assert [run.recipe.output.name for run in runs] == [f"{title}-test-lr0.001-seed0" for title in titles]
    assert [run.recipe.training.optimizer.name for run in runs] == ["muon", "adamw_torch"] * 2
    assert [run.recipe.training.optimizer.betas for run in runs] == [None, [0.8, 0.95]] * 2


def test_without_names_the_recipes_own_optimizer_is_taken_and_no_name_is_longer(tiny_model, tmp_path):
    recipe = recipe_on(tiny_model, tmp_path / "run", training={"max_steps": 3, "optimizer": "muon"})
    comparison = plan_comparison(recipe, methods=["diablo"])
    assert comparison.contenders[0].title == "diablo"
    assert comparison.settings["optimizers"] is None
    assert comparison.run(comparison.contenders[0], "test", 1e-3, 0).recipe.training.optimizer.name == "muon"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has paged optimizers")
def test_an_optimizer_that_this_machine_lacks_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=r"^--optimizers: found 'paged_adamw_8bit', which .* take 'adamw_8bit'\.$"):
        plan_comparison(recipe_on(Path("no/model"), tmp_path / "run"), optimizers=["muon", "paged_adamw_8bit"])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("peft:GRALORA:alpha", ["alpha does not change how many parameters", "r, hybrid_r"]),
        ("peft:VBLORA:r", ["fits at no r", "`vector_length` 256"]),
    ],
)
def test_a_key_that_cannot_be_solved_for(tiny_model, tmp_path, name, parts):
    with pytest.raises(UserError) as caught:
        plan_on(tiny_model, tmp_path, methods=[name])
    for part in parts:
        assert part in str(caught.value)


def test_both_stages_train_on_the_same_rows_and_on_none_that_they_are_judged_by(tiny_model, tmp_path):
    comparison = plan_on(tiny_model, tmp_path, methods=["diablo"])
    assert comparison.recipe.data.validation_rows == 6
    by_stage = {
        stage: make_plan(comparison.run(comparison.contenders[0], stage, 1e-3, 0).recipe)
        for stage in ("validation", "test")
    }
    assert by_stage["validation"].train == by_stage["test"].train
    assert len(by_stage["validation"].train) == 60
    judged = by_stage["test"].held_out, by_stage["validation"].held_out
    train, test, validation = ({prompt_of(row) for row in rows} for rows in (by_stage["test"].train, *judged))
    assert len(by_stage["validation"].held_out) == 6
    assert train.isdisjoint(validation)
    assert train.isdisjoint(test)
    assert validation.isdisjoint(test)
    assert not by_stage["validation"].recipe.evaluation.after
    assert by_stage["test"].recipe.evaluation.general == "builtin"
    assert not by_stage["validation"].general


@pytest.mark.parametrize(
    ("options", "changes", "parts"),
    [
        (
            {"methods": ["diablo", "lorra"]},
            {},
            ["--methods: found 'lorra'", "allowed: diablo, lora", "mean lora?"],
        ),
        ({"methods": ["lora", "lora"]}, {}, ["--methods: found lora, lora", "once"]),
        ({"methods": ["peft"]}, {}, ["--methods: found 'peft'", "peft:TYPE:KEY, such as peft:GRALORA:r"]),
        ({"methods": ["peft:GRALORA"]}, {}, ["--methods: found 'peft:GRALORA'", "KEY", "can be r,"]),
        ({"methods": ["peft:GRALORA:rr"]}, {}, ["--methods: found 'peft:GRALORA:rr'", "Did you mean r?"]),
        ({"methods": ["peft:IA3:r"]}, {}, ["IA3 has no key that could be solved for"]),
        ({"methods": ["peft:GRALOR:r"]}, {}, ["in 'peft:GRALOR:r'", "Did you mean GRALORA?"]),
        ({"methods": ["peft:XLORA:r"]}, {}, ["XLORA, which no recipe trains"]),
        ({"methods": ["peft:GRALORA:r:gralora=2"]}, {}, ["found 'gralora=2' in", "Did you mean gralora_k?"]),
        ({"methods": ["peft:GRALORA:r:alpha=["]}, {}, ["'alpha=['", "not a valid YAML value"]),
        ({"methods": []}, {}, ["--methods: found none"]),
        ({"optimizers": ["adam"]}, {}, ["--optimizers: found 'adam'; allowed: adamw_torch_fused, ", "Did you mean"]),
        ({"optimizers": ["lomo"]}, {}, ["--optimizers: found 'lomo', which changes the weights within the backward"]),
        ({"optimizers": ["muon", "muon"]}, {}, ["--optimizers: found muon, muon", "once"]),
        ({"optimizers": []}, {}, ["--optimizers: found none"]),
        ({"seeds": 0}, {}, ["--seeds: found 0", "at least 1"]),
        ({"rate_seeds": 0}, {}, ["--rate-seeds: found 0", "at least 1"]),
        ({"rates": [1e-3, 0.0]}, {}, ["--lrs: found 0.001, 0", "above 0"]),
        ({"rates": [math.inf]}, {}, ["--lrs: found inf"]),
        ({"rates": [1e-3, 1e-3]}, {}, ["--lrs: found 0.001, 0.001", "different"]),
        ({"own_rates": {"lora": []}}, {}, ["--lrs: found none"]),
        ({"own_rates": {"lorra": [1e-3]}}, {}, ["--lrs: found a grid of 'lorra'", "not compared", "mean lora?"]),
        ({}, {"method": "lora"}, ["method: found lora", "method=diablo"]),
        ({}, {"training": {"keep": "best", "eval_steps": 1}}, ["training.keep", "by the rows that a run is judged by"]),
        ({}, {"training": {"early_stopping_patience": 1, "eval_steps": 1}}, ["training.early_stopping_patience=null."]),
        (
            {},
            {
                "training": {"keep": "best", "eval_steps": 1, "best_by": "score"},
                "data": {"validation_rows": 4, "held_out": "validation"},
            },
            ["training.keep=last", "and training.best_by=loss."],
        ),
        (
            {},
            {"training": {"schedule": "cosine", "min_learning_rate": 1e-5}},
            ["training.min_learning_rate: it does not move with the learning rates"],
        ),
        (
            {},
            {"training": {"optimizer": {"groups": [{"modules": ["mlp"], "weight_decay": 1}]}}},
            ["training.optimizer.groups: it does not move"],
        ),
        ({}, {"task": "math10k"}, ["nothing to score", "data.eval", "evaluation.tasks"]),
    ],
)
def test_a_fault_is_found_before_anything_is_read(tmp_path, options, changes, parts):
    with pytest.raises(UserError) as caught:
        plan_comparison(recipe_on(Path("no/model"), tmp_path / "run", **changes), **options)
    assert len(str(caught.value).splitlines()) == 1
    for part in parts:
        assert part in str(caught.value)


# The validation rows


@given(
    prompts=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30),
    count=st.integers(1, 10),
    seed=st.integers(0, 5),
)
def test_no_prompt_lies_on_both_sides_of_the_cut(prompts, count, seed):
    rows = [Row(number, prompt, "x") for number, prompt in enumerate(prompts)]
    try:
        train, validation = cut_validation(rows, count, seed)
    except UserError:
        assert len(set(prompts)) <= count
        return
    assert train
    assert len(validation) == min(count, len(rows))
    assert not {row.prompt for row in train} & {row.prompt for row in validation}
    lost = [row for row in rows if row not in train and row not in validation]
    assert {row.prompt for row in lost} <= {row.prompt for row in validation}
    assert (train, validation) == cut_validation(rows, count, seed)


def test_sources_take_turns_until_each_is_used_up():
    sources = [[Row(number, name, "x") for number in range(count)] for name, count in (("a", 3), ("b", 1), ("c", 2))]
    assert "".join(row.prompt for row in take_turns(sources)) == "abcaca"
    assert [row.number for row in take_turns(sources)] == [0, 0, 0, 1, 1, 2]
    assert take_turns(sources[:1]) == sources[0]


def test_conversations_are_told_apart_by_what_precedes_the_answer():
    def conversation(number: int, question: str) -> Row:
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": "yes"})
        return Row(number, messages=turns)

    rows = [conversation(number, f"question {number % 5}") for number in range(10)]
    train, validation = cut_validation(rows, 2, 0)
    asked = [{row.messages[0]["content"] for row in side} for side in (train, validation)]
    assert asked[0].isdisjoint(asked[1])
    assert len(asked[0] | asked[1]) == 5


def test_another_seed_cuts_other_rows():
    rows = [Row(number, str(number), "x") for number in range(100)]
    assert cut_validation(rows, 10, 0)[1] != cut_validation(rows, 10, 1)[1]


def test_a_cut_that_leaves_nothing_to_train_on(tiny_model, tmp_path):
    data = {"validation_rows": 10**6}
    with pytest.raises(UserError, match=r"data.validation_rows: found 1000000; .* Lower it"):
        make_plan(recipe_on(tiny_model, tmp_path / "run", data=data))


# The sweep


@pytest.mark.parametrize(
    ("rates", "optimum", "tried", "best", "edge"),
    [
        ([1e-3, 2e-3, 4e-3], 2e-3, [1e-3, 2e-3, 4e-3], 2e-3, None),
        # One step is enough to see that the edge was the best.
        ([1e-3, 2e-3, 4e-3], 4e-3, [1e-3, 2e-3, 4e-3, 8e-3], 4e-3, None),
        # The steps of an uneven grid are those at the edge.
        ([2e-4, 1e-3, 2e-3], 8e-6, [1.6e-6, 8e-6, 4e-5, 2e-4, 1e-3, 2e-3], 8e-6, None),
        # Six steps at most on each side.
        ([1e-3, 2e-3], 1.0, [0.001 * 2**step for step in range(8)], 0.128, "highest"),
        ([1e-3, 2e-3], 1e-9, [0.002 / 2**step for step in reversed(range(8))], 1e-3 / 2**6, "lowest"),
        ([1e-3], 1e-3, [5e-4, 1e-3, 2e-3], 1e-3, None),
    ],
)
def test_the_grid_is_extended_where_the_best_rate_is_at_its_edge(rates, optimum, tried, best, edge):
    asked: list[float] = []

    def measure(some: Sequence[float]) -> list[float | None]:
        asked.extend(some)
        return [abs(math.log(rate / optimum)) for rate in some]

    found = sweep(rates, measure)
    assert list(found.losses) == pytest.approx(tried)
    assert sorted(asked) == list(found.losses)
    assert sorted(found.extended) == sorted(set(asked) - set(rates))
    assert found.best == pytest.approx(best)
    assert found.edge == edge


def test_a_rate_that_diverges_or_fails_is_never_the_best_and_bounds_the_grid():
    losses: dict[float, float | None] = {1e-3: 2.0, 2e-3: 1.0, 4e-3: math.nan, 8e-3: None}
    found = sweep(list(losses), lambda rates: [losses[rate] for rate in rates])
    assert (found.best, found.edge, found.extended) == (2e-3, None, [])
    assert sweep([1e-3], lambda rates: [None]) == Sweep({1e-3: None}, [], None, None)
    assert sweep([1e-3], lambda rates: [math.inf]) == Sweep({1e-3: math.inf}, [], None, None)


# Runs at once


def test_runs_at_once_share_cores_and_are_dealt_out_to_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    for gpus, expected in (([], [None] * 3), (["1"], [None] * 3), (["1", "GPU-7"], ["1", "GPU-7", "1"])):
        monkeypatch.setattr("diablo.devices.visible_gpus", lambda found=gpus: found)
        shares = shares_of(3)
        assert [share.get("CUDA_VISIBLE_DEVICES") for share in shares] == expected
        assert [share["OMP_NUM_THREADS"] for share in shares] == ["4"] * 3
        assert shares_of(1) == [{}]
    assert shares_of(24)[0]["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "OMP_NUM_THREADS" not in shares_of(3)[0]


def test_the_names_of_gpus_are_those_that_this_process_may_see(monkeypatch):
    monkeypatch.setattr("diablo.devices.choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    # A number that no GPU has ends the list, as CUDA has it.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7,99")
    assert visible_gpus() == ["3", "GPU-7"]
    monkeypatch.setattr("diablo.devices.choose_device", lambda: torch.device("cpu"))
    assert visible_gpus() == []


def test_work_side_by_side_keeps_the_order_and_begins_nothing_after_a_fault():
    assert side_by_side(lambda item: item * item, range(9), jobs=3) == [item * item for item in range(9)]
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            raise ValueError(item)

    with pytest.raises(ValueError, match="1"):
        side_by_side(work, range(9), jobs=1)
    assert begun == [0, 1]


# The figures


def figures_of(score: float, loss: float, seconds: float = 10.0) -> dict[str, Any]:
    """What `run.json` holds of a run on the test rows, as far as a comparison reads it."""
    return {
        "machine": {"processor": "one"},
        "versions": {"diablo": "1"},
        "parameters": {"trainable": 3072},
        "scores": {"after": {"mawps": {"headline": "accuracy", "accuracy": score, "right": 1, "total": 2}}},
        "training": {
            "loss": [[1, 8.0], [3, loss]],
            "held_out_loss": [[0, 9.0], [3, loss]],
            "kept_step": 3,
            "tokens_per_second": 100.0,
            "peak_memory_bytes": 5_000_000,
        },
        "timings": {"train_seconds": seconds},
        "adapter_bytes": 1_500_000,
        "general_loss": {"before": 3.0, "after": 3.25},
    }


@pytest.fixture
def summary(tiny_model, tmp_path) -> dict[str, Any]:
    comparison = plan_on(tiny_model, tmp_path, methods=["diablo", "lora", "full"])
    diablo, lora, _ = comparison.contenders
    runs = [
        describe_run(comparison.run(contender, "test", 1e-3, seed), figures, failure)
        for contender, seed, figures, failure in (
            (diablo, 0, figures_of(0.50, 1.0, 10), None),
            (diablo, 1, figures_of(0.60, 1.5, 20), None),
            (lora, 0, figures_of(0.70, 0.9), None),
            (lora, 1, {}, "out of memory"),
        )
    ]
    sweeps = {
        "diablo": Sweep({1e-3: 1.0, 2e-3: math.inf}, [2e-3], 1e-3, "lowest"),
        "lora": Sweep({1e-3: 1.0}, [], 1e-3, None),
        "full": Sweep({1e-3: None}, [], None, None),
    }
    return summarize(comparison, sweeps, runs, [figures_of(0, 0)] * 2, jobs=1)


def test_means_and_deviations_are_those_over_the_seeds(summary):
    assert [method["method"] for method in summary["methods"]] == ["lora", "diablo", "full"]
    lora, diablo, full = summary["methods"]
    assert diablo["score"]["mean"] == pytest.approx(0.55)
    assert diablo["score"]["deviation"] == pytest.approx(math.sqrt(0.005))
    assert diablo["test_loss"]["deviation"] == pytest.approx(statistics.stdev([1.0, 1.5]))
    assert diablo["forgetting"]["mean"] == 0.25
    assert diablo["training_seconds"]["mean"] == 15
    assert (lora["seeds"], lora["score"]) == (1, {"mean": 0.7, "deviation": None, "values": [0.7]})
    assert (full["seeds"], full["score"], full["learning_rate"]) == (0, None, None)
    assert summary["machines"] == [{"processor": "one"}]


def test_the_table_says_what_the_figures_say(summary):
    rows = [dict(zip(HEADERS, cells, strict=True)) for cells in table_rows(summary)]
    assert rows[1]["test score"] == "55.0% ± 7.1%"
    assert rows[1]["test loss"] == "1.2500 ± 0.3536"
    assert rows[1]["learning rate"] == "0.001*"
    assert rows[1]["forgetting"] == "+0.2500 ± 0.0000"
    assert rows[1]["peak memory, MB"] == "5"
    assert rows[1]["file, MB"] == "1.5"
    assert rows[0]["test score"] == "70.0%"
    assert rows[0]["size"] == "r = 4, alpha 8"
    assert rows[0]["trained parameters"] == "2,816 (-8.3%)"
    assert rows[2]["test score"] == rows[2]["learning rate"] == "-"
    lines = markdown(summary).splitlines()
    assert lines[0] == f"| {' | '.join(HEADERS)} |"
    assert lines[3].startswith("| diablo | N = 4 | 3,072 | 0.001* | 55.0% ± 7.1% | 1.2500 ± 0.3536 |")


@pytest.mark.parametrize(("width", "whole"), [(80, False), (200, True)])
def test_a_narrow_terminal_gets_the_columns_that_matter_unbroken(summary, width, whole):
    out = Console(width=width, record=True, file=io.StringIO())
    print_comparison(out, summary, Path("runs/some"))
    said = out.export_text()
    for cell in ("learning rate", "1.2500 ± 0.3536", "+0.2500 ± 0.0000"):
        assert cell in said
    assert ("are left out; comparison.md has them" in " ".join(said.split())) is not whole
    assert ("2,816 (-8.3%)" in said) is whole


def test_the_notes_name_edges_extensions_and_failures(summary):
    said = "\n".join(notes(summary))
    assert "diablo: the best rate was at the edge of the grid, so the grid was extended by 0.002." in said
    assert "* diablo: the best rate is the lowest that was tried" in said
    assert "full: no run of the sweep gave a finite loss." in said
    assert "Failed: lora, test, learning rate 0.001, seed 1: out of memory" in said
    assert "6 validation rows" in said
    assert "with seed 0. The rate with the lowest loss on" in said
    assert "at once" not in said
    assert "by chance" not in said


@pytest.mark.parametrize(
    ("rate_seeds", "losses", "told"),
    [
        # The test losses deviate by 0.3536.
        (
            1,
            {1e-3: [1.0], 2e-3: [1.3], 4e-3: [9.0]},
            "0.001 and 0.002 differ by 0.3000 in loss. That is less than .*0.3536",
        ),
        (1, {1e-3: [1.4], 2e-3: [1.0], 4e-3: [math.inf]}, None),
        (1, {1e-3: [1.0]}, None),
        (
            2,
            {1e-3: [1.5, 1.7], 2e-3: [1.0, 1.8]},
            "0.002 and 0.001 differ by 0.2000 in loss. That is less than .*0.5657",
        ),
        (2, {1e-3: [1.5, 1.7], 2e-3: [1.3, 1.4]}, None),
        (2, {1e-3: [1.5, 1.7], 2e-3: [1.3, None]}, None),
    ],
)
def test_rates_that_the_seeds_do_not_tell_apart_are_told(tiny_model, tmp_path, rate_seeds, losses, told):
    comparison = plan_on(tiny_model, tmp_path, methods=["diablo"], rate_seeds=rate_seeds, rates=list(losses))
    (diablo,) = comparison.contenders
    runs = [
        describe_run(
            comparison.run(diablo, "validation", rate, seed), figures_of(0, loss or 0), None if loss else "cut"
        )
        for rate, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    runs += [
        describe_run(comparison.run(diablo, "test", 1e-3, s), figures_of(0, loss), None)
        for s, loss in ((0, 1.0), (1, 1.5))
    ]
    found = sweep(list(losses), lambda rates: [mean_loss(losses.get(rate, [math.inf])) for rate in rates])
    record = summarize(comparison, {"diablo": found}, runs, [], jobs=1)
    swept = {each["learning_rate"]: each["validation_losses"] for each in record["methods"][0]["sweep"]}
    assert {rate: swept[rate] for rate in losses} == losses
    said = " ".join(note for note in notes(record) if "by chance" in note)
    assert re.search(told, said) if told else not said
    assert ("--rate-seeds 3" in said) == (bool(told) and rate_seeds == 1)


def test_the_figure_and_the_notes_say_how_many_seeds_chose_the_rate(tiny_model, tmp_path):
    comparison = plan_on(tiny_model, tmp_path, methods=["diablo"], rate_seeds=2)
    assert comparison.planned_runs == 4 * 2 + 3
    record = summarize(comparison, {}, [], [], jobs=1)
    assert "with seeds 0, 1. The rate with the lowest mean loss on" in "\n".join(notes(record))


@given(
    st.integers(2, 6).flatmap(
        lambda problems: st.lists(
            st.lists(st.text("01", min_size=problems, max_size=problems), min_size=1, max_size=3),
            min_size=2,
            max_size=2,
        )
    )
)
def test_a_difference_is_that_of_the_scores_and_its_error_that_of_a_mean_over_problems(runs):
    one, other = runs
    difference, error = paired_difference([{"t": each} for each in one], [{"t": each} for each in other])
    solved = [torch.tensor([[float(digit) for digit in run] for run in each]).double() for each in runs]
    assert difference == pytest.approx(solved[0].mean().item() - solved[1].mean().item(), abs=1e-9)
    by_problem = solved[0].mean(0) - solved[1].mean(0)
    assert error == pytest.approx(by_problem.std().item() / len(by_problem) ** 0.5, abs=1e-9)


def test_of_several_tasks_the_mean_is_taken():
    one, other = {"a": "1100", "b": "11"}, {"a": "0000", "b": "10"}
    difference, error = paired_difference([one], [other])
    assert difference == pytest.approx((0.5 + 0.5) / 2)
    # The variances of 1, 1, 0, 0 and of 0, 1.
    assert error == pytest.approx(math.sqrt((1 / 3) / 4 + (1 / 2) / 2) / 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([], [{"a": "11"}]),
        ([{"a": "11"}], []),
        ([{"a": "11"}], [{"a": "111"}]),
        ([{"a": "11"}], [{"a": "11"}, {}]),
        ([{}], [{}]),
        ([{"a": "1"}], [{"a": "0"}]),
    ],
)
def test_a_difference_that_is_not_known(one, other):
    assert paired_difference(one, other) is None


def test_what_a_run_has_solved_is_read_where_its_score_is_the_share_of_that(tmp_path):
    def written(*answers: tuple[str, int, bool]) -> Path:
        lines = [json.dumps(dict(zip(("task", "sample", "right"), answer, strict=True))) for answer in answers]
        (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n")
        return tmp_path / "answers.jsonl"

    two = written(("a", 0, True), ("a", 0, False), ("b", 0, True))
    assert read_solved(two, {"a": 0.5, "b": 1.0}) == {"a": "10", "b": "1"}
    # The headline figure is another one.
    assert read_solved(two, {"a": 0.4, "b": 1.0}) == {}
    assert read_solved(written(("a", 0, True), ("a", 1, False)), {"a": 0.5}) == {}
    assert read_solved(tmp_path / "none.jsonl", {}) == {}


def test_the_note_on_differences_names_the_best_method(tiny_model, tmp_path):
    comparison = plan_on(tiny_model, tmp_path, methods=["diablo", "lora", "full"])
    runs = []
    for contender, solved in zip(comparison.contenders, ("1110", "0110", ""), strict=True):
        run = comparison.run(contender, "test", 1e-3, 0)
        run.recipe.output.mkdir(parents=True)
        lines = [json.dumps({"task": "mawps", "sample": 0, "right": digit == "1"}) for digit in solved]
        (run.recipe.output / "answers-after.jsonl").write_text("\n".join(lines))
        runs.append(describe_run(run, figures_of(solved.count("1") / 4, 1.0), None))
    sweeps = {contender.name: Sweep({1e-3: 1.0}, [], 1e-3, None) for contender in comparison.contenders}
    record = summarize(comparison, sweeps, runs, [], jobs=1)
    assert [run["solved"] for run in record["runs"]] == [{"mawps": "1110"}, {"mawps": "0110"}, {}]
    below = {method["method"]: method["below_best"] for method in record["methods"]}
    assert below == {"diablo": None, "lora": {"difference": 0.25, "standard_error": 0.25}, "full": None}
    assert "Points below diablo on the same test problems: lora 25.0 ± 25.0." in "\n".join(notes(record))


def test_pairs_of_a_method_and_an_optimizer_have_figures_of_their_own(tiny_model, tmp_path):
    comparison = plan_on(tiny_model, tmp_path, methods=["diablo"], optimizers=["muon", "sgd"])
    muon, sgd = comparison.contenders
    runs = [
        describe_run(comparison.run(contender, "test", rate, 0), figures_of(score, 1.0), None)
        for contender, rate, score in ((muon, 1e-3, 0.5), (sgd, 1e-2, 0.6))
    ]
    sweeps = {"diablo+muon": Sweep({1e-3: 1.0}, [], 1e-3, None), "diablo+sgd": Sweep({1e-2: 1.0}, [], 1e-2, None)}
    record = summarize(comparison, sweeps, runs, [], jobs=2)
    found = [(method["method"], method["optimizer"], method["learning_rate"]) for method in record["methods"]]
    assert found == [("diablo+sgd", "sgd", 1e-2), ("diablo+muon", "muon", 1e-3)]
    said = "\n".join(notes(record))
    assert "Every method, with each of the optimizers, was run at the learning rates" in said
    assert "Up to 2 runs went on at once, which disturb each other's training times." in said
    assert "PiSSA" not in said
    assert "| diablo+sgd | N = 4 | 3,072 | 0.01 | 60.0% |" in markdown(record)


# The general text


def test_forgetting_of_an_adapter_that_was_not_trained_is_zero(tiny_model):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    rows = encode_general_text("builtin", tokenizer, 128)
    before = held_out_loss(model, rows, tokenizer.pad_token_id)
    adapted = apply_method(model, DiabloMethod(num_blocks=4))
    assert held_out_loss(adapted, rows, tokenizer.pad_token_id) == before


def test_general_text_is_prose_whose_every_token_but_the_first_carries_loss(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = encode_general_text("builtin", tokenizer, 100)
    assert len(rows) == 40
    for row in rows:
        assert row.supervised == len(row.input_ids) - 1 <= 99
        assert tokenizer.eos_token_id not in row.input_ids


def test_own_general_text(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text, lines = tmp_path / "own.txt", tmp_path / "own.jsonl"
    text.write_text("One paragraph\nof two lines.\n\n\n\nAnother one.\n")
    lines.write_text("\n".join(json.dumps({"text": each}) for each in ("One paragraph of two lines.", "Another one.")))
    from_text, from_lines = (encode_general_text(str(path), tokenizer, 100) for path in (text, lines))
    assert from_text == from_lines
    assert [tokenizer.decode(row.input_ids) for row in from_text] == ["One paragraph of two lines.", "Another one."]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("own.txt", "\n\n", "holds no text"),
        ("own.txt", "\xe8".encode("latin-1"), "not a text file in UTF-8"),
        ("own.jsonl", '{"texts": "a"}', "row 1 is no object with a text"),
        ("own.jsonl", '{"text": "a b c"}\n{', "row 2 is no object with a text"),
    ],
)
def test_general_text_that_cannot_be_used(tiny_model, tmp_path, name, content, part):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=part):
        encode_general_text(str(path), AutoTokenizer.from_pretrained(tiny_model), 100)
