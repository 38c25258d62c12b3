"""`diablo compare` on a tiny random Llama and real word problems."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import forked_python
from rich.console import Console

from diablo.comparison import Comparison, compare, plan_comparison
from diablo.comparison.processes import Processes
from diablo.comparison.runner import finished_record
from diablo.errors import UserError
from diablo.recipes.recipe import Recipe
from diablo.records.results import write_json
from diablo.training import train

QUIET = Console(quiet=True)
RATES = (0.1, 0.3)


@pytest.fixture(autouse=True)
def runs_begin_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a comparison starts is a fork, of which there is one process for each run all the same."""
    monkeypatch.setattr(sys, "executable", forked_python())


def recipe_on(model: Path, output: Path, **changes: Any) -> Recipe:
    settings = {
        "model": str(model),
        "task": "mawps",
        "method": {"num_blocks": 4},
        "data": {"limit": 32, "validation_rows": 12},
        "training": {"max_steps": 3, "batch_size": 8},
        "evaluation": {"limit": 4},
        "precision": "fp32",
        "output": str(output),
    }
    return Recipe.model_validate(settings | changes)


def plan_in(
    folder: Path,
    model: Path,
    methods: tuple[str, ...] = ("diablo", "lora"),
    optimizers: tuple[str, ...] | None = None,
    seeds: int = 2,
    rate_seeds: int = 1,
    rates: tuple[float, ...] = RATES,
    own_rates: dict[str, tuple[float, ...]] | None = None,
    **changes: Any,
) -> Comparison:
    return plan_comparison(
        recipe_on(model, folder / "run", **changes),
        methods=methods,
        optimizers=optimizers,
        seeds=seeds,
        rate_seeds=rate_seeds,
        rates=rates,
        own_rates=own_rates,
        folder=folder / "comparison",
    )


class InThisProcess:
    """Trains as `diablo train` does, without the seconds that a process of its own takes to start.

    Args:
        stop_after: raise as an interrupted process would, instead of one run more.
        fail: say of the runs of this method that they failed.
    """

    def __init__(self, *, stop_after: int | None = None, fail: str | None = None) -> None:
        self.stop_after, self.fail = stop_after, fail
        self.done: list[str] = []

    def __call__(self, recipe: Recipe) -> str | None:
        if len(self.done) == self.stop_after:
            raise KeyboardInterrupt
        if recipe.method.name == self.fail:
            return "out of memory"
        train(recipe, console=QUIET)
        self.done.append(recipe.output.name)
        return None


@pytest.fixture(scope="module")
def compared(tiny_model, tmp_path_factory) -> tuple[Path, dict[str, Any], list[str]]:
    """A comparison: its folder, its record and the runs that were carried out."""
    comparison = plan_in(tmp_path_factory.mktemp("compared"), tiny_model)
    carry_out = InThisProcess()
    return comparison.folder, compare(comparison, console=QUIET, runner=carry_out), carry_out.done


def without_timings(record: dict[str, Any]) -> dict[str, Any]:
    """The figures of each run that do not depend on the machine's mood."""
    kept = ("failure", "trained_parameters", "validation_loss", "test_loss", "scores", "adapter_bytes", "forgetting")
    return {run["folder"]: {name: run[name] for name in kept if name in run} for run in record["runs"]}


def test_each_method_is_swept_and_then_run_with_each_seed_at_its_best_rate(compared):
    _, record, done = compared
    assert len(record["runs"]) == len(done) == len(set(done))
    for method in record["methods"]:
        runs = [run for run in record["runs"] if run["method"] == method["method"]]
        swept = {run["learning_rate"]: run["validation_loss"] for run in runs if run["stage"] == "validation"}
        tested = [run for run in runs if run["stage"] == "test"]
        assert set(swept) >= set(RATES)
        assert method["learning_rate"] == min(swept, key=swept.__getitem__)
        assert [(run["learning_rate"], run["seed"]) for run in tested] == [(method["learning_rate"], s) for s in (0, 1)]
        assert tested[0]["test_loss"] != tested[1]["test_loss"]
        assert {run["trained_parameters"] for run in runs} == {method["trained_parameters"]}
        assert [run["solved"]["mawps"].count("1") for run in tested] == [4 * run["score"] for run in tested]
        assert method["test_loss"]["values"] == [run["test_loss"] for run in tested]
        assert all(run["forgetting"] != 0 for run in tested)
        # What the curves are drawn from: the loss over the steps.
        assert all(run["training_losses"][-1][0] == record["steps"] for run in tested)
        assert all(run["peak_memory_bytes"] > 10**7 and run["tokens_per_second"] > 0 for run in tested)


def test_the_folder_holds_the_figures_and_the_adapters_of_the_last_runs_alone(compared):
    folder, record, _ = compared
    assert json.loads((folder / "comparison.json").read_text()) == json.loads(json.dumps(record))
    assert "| diablo | N = 4 | 3,072 |" in (folder / "comparison.md").read_text()
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for run in record["runs"]:
        has_adapter = (folder / run["folder"] / "adapter" / "adapter_config.json").is_file()
        assert has_adapter == (run["stage"] == "test")
        assert not (folder / run["folder"] / "checkpoints").exists(), "nothing was saved on the way"


def test_a_finished_comparison_is_not_run_again(compared, tiny_model, tmp_path):
    folder, record, _ = compared
    shutil.copytree(folder, tmp_path / "comparison")
    carry_out = InThisProcess()
    again = compare(plan_in(tmp_path, tiny_model), console=QUIET, runner=carry_out)
    assert carry_out.done == []
    assert again["methods"] == record["methods"]


def test_an_interrupted_comparison_goes_on_where_it_stopped_and_ends_the_same(compared, tiny_model, tmp_path):
    _, undisturbed, done = compared
    first, second = InThisProcess(stop_after=2), InThisProcess()
    with pytest.raises(KeyboardInterrupt):
        compare(plan_in(tmp_path, tiny_model), console=QUIET, runner=first)
    # As a run that was killed half way leaves its folder.
    (tmp_path / "comparison" / "runs" / first.done[1] / "run.json").unlink()
    record = compare(plan_in(tmp_path, tiny_model), console=QUIET, runner=second)
    assert [first.done[0], *second.done] == done
    assert without_timings(record) == without_timings(undisturbed)


def test_methods_seeds_and_rates_are_added_and_nothing_is_run_again(compared, tiny_model, tmp_path):
    folder, record, _ = compared
    shutil.copytree(folder, tmp_path / "comparison")
    carry_out = InThisProcess()
    extended = plan_in(
        tmp_path, tiny_model, methods=("miss", "diablo", "lora"), seeds=3, own_rates={"lora": (*RATES, 1e-4)}
    )
    again = compare(extended, console=QUIET, runner=carry_out)
    best = {method["method"]: method["learning_rate"] for method in record["methods"]}
    added = {name for name in carry_out.done if not name.startswith("miss-")}
    assert added >= {f"{name}-test-lr{rate:g}-seed2" for name, rate in best.items()}
    assert "lora-validation-lr0.0001-seed0" in added
    assert not added & {run["folder"].removeprefix("runs/") for run in record["runs"]}
    assert any(name.startswith("miss-test-") for name in carry_out.done)
    figures, before = without_timings(again), without_timings(record)
    assert {name: figures.get(name) for name in before if "-test-" in name} == {
        name: value for name, value in before.items() if "-test-" in name
    }
    assert {method["method"]: method["seeds"] for method in again["methods"]} == {"diablo": 3, "lora": 3, "miss": 3}


def test_a_rate_is_chosen_by_the_mean_of_its_seeds_and_these_can_be_added(compared, tiny_model, tmp_path):
    folder, record, _ = compared
    shutil.copytree(folder, tmp_path / "comparison")
    carry_out = InThisProcess()
    again = compare(plan_in(tmp_path, tiny_model, rate_seeds=2), console=QUIET, runner=carry_out)
    swept = [run for run in record["runs"] if run["stage"] == "validation"]
    added = [run["folder"].removeprefix("runs/").replace("-seed0", "-seed1") for run in swept]
    assert set(carry_out.done) >= set(added)
    for method in again["methods"]:
        runs = [run for run in again["runs"] if run["method"] == method["method"] and run["stage"] == "validation"]
        for tried in method["sweep"]:
            losses = [run["validation_loss"] for run in runs if run["learning_rate"] == tried["learning_rate"]]
            assert tried["validation_losses"] == losses
            assert len(set(losses)) == 2
            assert tried["validation_loss"] == statistics.fmean(losses)
        assert (
            method["learning_rate"] == min(method["sweep"], key=lambda tried: tried["validation_loss"])["learning_rate"]
        )


def test_another_setting_is_an_error_that_names_it(compared, tiny_model, tmp_path):
    folder, *_ = compared
    shutil.copytree(folder, tmp_path / "comparison")
    for comparison, name in (
        (plan_in(tmp_path, tiny_model, training={"max_steps": 4, "batch_size": 8}), "training.max_steps"),
        (plan_in(tmp_path, tiny_model, optimizers=("muon",)), "optimizers"),
        (plan_in(tmp_path, tiny_model, seed=5), "seed"),
    ):
        with pytest.raises(UserError, match=rf"^{name}: changed since the comparison in .*--out"):
            compare(comparison, console=QUIET, runner=InThisProcess(stop_after=0))


def test_a_comparison_is_not_cut(compared, tiny_model, tmp_path):
    folder, *_ = compared
    shutil.copytree(folder, tmp_path / "comparison")
    before = (tmp_path / "comparison" / "settings.json").read_bytes()
    for comparison, option, left_out in (
        (plan_in(tmp_path, tiny_model, methods=("diablo", "miss")), "--methods", "lora"),
        (plan_in(tmp_path, tiny_model, seeds=1), "--seeds", "seed 1"),
        (plan_in(tmp_path, tiny_model, rates=(0.1, 0.2)), "--lrs", "0.3 for diablo"),
        (plan_in(tmp_path, tiny_model, own_rates={"lora": (0.3, 0.6)}), "--lrs", "0.1 for lora"),
    ):
        with pytest.raises(UserError, match=rf"^{option}: the comparison in .* also has {left_out}; .*--out"):
            compare(comparison, console=QUIET, runner=InThisProcess(stop_after=0))
    assert (tmp_path / "comparison" / "settings.json").read_bytes() == before


def test_a_folder_of_others_is_not_written_to(tiny_model, tmp_path):
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out: .* has files of something else"):
        compare(plan_in(tmp_path, tiny_model), console=QUIET, runner=InThisProcess(stop_after=0))
    assert [path.name for path in (tmp_path / "comparison").iterdir()] == ["thesis.txt"]


def command(model: Path, output: Path, *arguments: object) -> list[object]:
    overrides = ["method.num_blocks=4", "data.limit=16", "evaluation.limit=2", "training.max_steps=2", "precision=fp32"]
    return ["compare", "quickstart", f"model={model}", f"output={output}", *overrides, *arguments]


def run_with(monkeypatch: pytest.MonkeyPatch, carry_out: InThisProcess) -> None:
    """Has the command line train in this process."""
    monkeypatch.setattr("diablo.comparison.compare", partial(compare, runner=carry_out))


def test_a_failing_run_is_reported_and_ends_nothing_else(diablo, tiny_model, tmp_path, monkeypatch):
    run_with(monkeypatch, InThisProcess(fail="lora"))
    arguments = command(tiny_model, tmp_path / "run", "--methods", "lora,diablo", "--lrs", "0.3", "--seeds", 1)
    status, out, _ = diablo(*arguments)
    assert status == 1
    assert "Failed: lora, validation, learning rate 0.3, seed 0: out of memory" in out
    record = json.loads((tmp_path / "run-comparison" / "comparison.json").read_text())
    assert [(method["method"], method["seeds"]) for method in record["methods"]] == [("diablo", 1), ("lora", 0)]
    # What has failed is tried again, and what has not is not.
    second = InThisProcess()
    run_with(monkeypatch, second)
    status, out, _ = diablo(*arguments)
    assert status == 0
    assert "Failed" not in out
    assert {name.partition("-")[0] for name in second.done} == {"lora"}


def test_optimizers_are_compared_each_at_its_best_rate(diablo, tiny_model, tmp_path, monkeypatch):
    run_with(monkeypatch, InThisProcess())
    arguments = ["--methods", "diablo", "--optimizers", "muon,sgd", "--lrs", "3,30,300", "--seeds", 1]
    status, out, _ = diablo(*command(tiny_model, tmp_path / "run", *arguments))
    assert status == 0
    assert "diablo+muon" in out
    record = json.loads((tmp_path / "run-comparison" / "comparison.json").read_text())
    assert {(method["method"], method["optimizer"]) for method in record["methods"]} == {
        ("diablo+muon", "muon"),
        ("diablo+sgd", "sgd"),
    }
    for run in record["runs"]:
        saved = json.loads((tmp_path / "run-comparison" / run["folder"] / "run.json").read_text())
        assert f"diablo+{saved['training']['optimizer']['name']}" == run["method"]
        assert saved["training"]["optimizer"]["lr"] == run["learning_rate"]


def test_a_dry_run_shows_the_runs_and_writes_nothing(diablo, tiny_model, tmp_path):
    arguments = command(tiny_model, tmp_path / "run", "--lrs", "1e-3,1e-2", "--lrs", "full=1e-4", "--seeds", 2)
    status, out, _ = diablo(*arguments, "--dry-run")
    assert status == 0
    for expected in (
        "r = 4, alpha 8",
        "-8.33%",
        "all weights",
        "27 of 2 steps, 54 steps in all",
        "0.001, 0.01; full: 0.0001",
    ):
        assert expected in out
    assert not (tmp_path / "run-comparison").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods", "diablo,lorra"], "--methods: found 'lorra'"),
        (["--lrs", "1e-3,fast"], "--lrs: found '1e-3,fast'"),
        (["--lrs", "-1"], "--lrs: found -1"),
        (["--lrs", "lora=1e-3", "--lrs", "lora=2e-3"], "--lrs: found a second grid of 'lora', '2e-3'"),
        (["--optimizers", "muon,mion"], "--optimizers: found 'mion'; allowed: adamw_torch_fused"),
        (["--seeds", "0"], "--seeds: found 0"),
        (["--general", "none.txt"], "evaluation.general: there is no file 'none.txt'"),
        (
            ["training.packing=true", "--methods", "diablo,peft:PROMPT_TUNING:num_virtual_tokens"],
            "training.packing: found true with PROMPT_TUNING",
        ),
    ],
)
def test_a_fault_is_one_line_with_status_2_and_leaves_nothing(diablo, tiny_model, tmp_path, arguments, expected):
    status, _, err = diablo(*command(tiny_model, tmp_path / "run", *arguments))
    assert status == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_run_in_a_process_of_its_own(tiny_model, tmp_path):
    comparison = plan_in(tmp_path, tiny_model)
    run = comparison.run(comparison.contenders[0], "validation", 1e-2, 0)
    assert Processes()(run.recipe) is None
    assert finished_record(run)["training"]["steps"] == 3


def test_the_reason_of_a_run_that_fails_in_its_process_is_its_message(tiny_model, tmp_path):
    without_weights = tmp_path / "model"
    shutil.copytree(tiny_model, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    comparison = plan_in(tmp_path, without_weights)
    run = comparison.run(comparison.contenders[0], "validation", 1e-2, 0)
    reason = Processes()(run.recipe)
    assert reason is not None
    assert reason.startswith("model: the weights in the folder")
    assert "exit status 2" in reason
    assert finished_record(run) == {}


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_runs_of_a_comparison_that_is_ended_end_too(tiny_model, tmp_path, jobs):
    overrides = ["training.epochs=500", "training.max_steps=null", "--methods", "diablo", "--jobs", jobs]
    arguments = map(str, command(tiny_model, tmp_path / "run", *overrides))
    process = subprocess.Popen([sys.executable, "-m", "diablo_cli", *arguments])
    try:
        runs, deadline = tmp_path / "run-comparison" / "runs", time.monotonic() + 120
        while len(list(runs.glob("*/train.log"))) < jobs and time.monotonic() < deadline:
            time.sleep(0.05)
        # The program that was started is not itself the process which starts the runs.
        children = [other for other in psutil.process_iter() if str(runs) in " ".join(other.cmdline())]
        assert len(children) == jobs
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert not any(child.is_running() for child in children)
        # None of the runs that waited was begun.
        assert len(list(runs.glob("*.log"))) == jobs
    finally:
        process.kill()


class Together:
    """Gives every run the record of another, once as many runs as there are jobs have come together.

    Args:
        record: the content of a ``run.json``.
        jobs: how many runs have to be there at once, or each waits for nothing and fails.
        meetings: for how many runs that holds.
    """

    def __init__(self, record: dict[str, Any], jobs: int, meetings: int) -> None:
        self.record, self.meetings = record, meetings
        self.barrier = threading.Barrier(jobs)
        self.lock, self.here, self.most = threading.Lock(), 0, 0

    def __call__(self, recipe: Recipe) -> str | None:
        with self.lock:
            self.here += 1
            self.most = max(self.most, self.here)
            self.meetings -= 1
            meets = self.meetings >= 0
        if meets:
            self.barrier.wait(60)
        recipe.output.mkdir(parents=True)
        write_json(recipe.output / "run.json", self.record | {"recipe": recipe.model_dump(mode="json")})
        with self.lock:
            self.here -= 1
        return None


def test_so_many_runs_go_on_at_once_as_there_are_jobs_and_the_record_is_in_order(compared, tiny_model, tmp_path):
    folder, record, _ = compared
    one = json.loads((folder / record["runs"][-1]["folder"] / "run.json").read_text())
    # The rates of both grids: four runs, of which three come together, then the last with some of what follows.
    carry_out = Together(one, jobs=3, meetings=3)
    found = compare(plan_in(tmp_path, tiny_model), console=QUIET, runner=carry_out, jobs=3)
    assert carry_out.most == 3
    assert [run["folder"] for run in found["runs"]] == sorted(
        (run["folder"] for run in found["runs"]),
        key=lambda name: (["diablo", "lora"].index(name.split("/")[1].split("-")[0]), "test" in name),
    )
    assert {run["method"] for run in found["runs"]} == {"diablo", "lora"}
    assert found["jobs"] == 3
    # It is known afterwards that times were disturbed, whoever finished it.
    again = compare(plan_in(tmp_path, tiny_model), console=QUIET, runner=InThisProcess(stop_after=0))
    assert (again["jobs"], again["methods"]) == (3, found["methods"])
