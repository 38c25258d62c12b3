"""What is told of a run while it trains: ``train.jsonl``, and the trackers of a recipe."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_command_line import quickstart_on


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]


def test_every_logged_step_is_a_line_also_in_a_run_that_goes_on(diablo, tiny_model, tmp_path):
    run = tmp_path / "run"
    arguments = quickstart_on(
        tiny_model, run, "training.logging_steps=1", "training.eval_steps=2", "training.save_steps=2"
    )
    assert diablo(*arguments)[0] == 0
    lines = lines_of(run)
    record = json.loads((run / "run.json").read_text())["training"]
    assert [(line["step"], line["loss"]) for line in lines if "loss" in line] == [
        (step, pytest.approx(loss)) for step, loss in record["loss"]
    ]
    assert [[line["step"], line["held_out_loss"]] for line in lines if "held_out_loss" in line] == record[
        "held_out_loss"
    ]
    logged = next(line for line in lines if "loss" in line)
    assert logged["tokens"] > 0 < logged["seconds"]
    assert {"learning_rate", "grad_norm", "epoch"} <= logged.keys()

    # A run that was stopped while it wrote goes on: no step is there twice, and no line is left cut.
    for has_last in (False, True):
        (run / "run.json").unlink()
        if not has_last:
            shutil.rmtree(run / "checkpoints" / "checkpoint-4")
        with (run / "train.jsonl").open("a") as file:
            file.write('{"step": 99, "lo')
        assert diablo(*arguments, "--resume")[0] == 0
        again = lines_of(run)
        for name in ("loss", "held_out_loss"):
            steps = [line["step"] for line in lines if name in line]
            assert [line["step"] for line in again if name in line] == steps


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_is_told_of_the_losses_and_the_recipe(diablo, tiny_model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    arguments = quickstart_on(
        tiny_model, run, "training.logging_steps=1", "training.eval_steps=2", "tracking.report_to=tensorboard"
    )
    assert diablo(*arguments)[0] == 0
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    told = EventAccumulator(str(run / "tensorboard"))
    told.Reload()
    losses = [(event.step, pytest.approx(event.value)) for event in told.Scalars("train/loss")]
    assert losses == [(line["step"], line["loss"]) for line in lines_of(run) if "loss" in line]
    assert [event.step for event in told.Scalars("train/held_out_loss")] == [2, 4]
    (settings,) = told.Tensors("args/text_summary")
    told_of = settings.tensor_proto.string_val[0].decode()
    assert '"recipe.method.num_blocks": 4' in told_of
    assert '"recipe":' not in told_of


def test_a_tracker_that_cannot_be_told_is_refused_before_anything_is_loaded(diablo, tiny_model, tmp_path):
    absent = next(name for name in ("swanlab", "dvclive", "clearml") if find_spec(name) is None)
    for setting, parts in (
        (f"tracking.report_to=[{absent}]", (f"found {absent}, whose packages are not installed", "Installed:")),
        ("tracking.report_to=tensorbord", ("found 'tensorbord'; allowed: tensorboard,", "Did you mean tensorboard?")),
        ("tracking.tags=[a]", ("tags without report_to",)),
    ):
        status, _, error = diablo(*quickstart_on(tiny_model, tmp_path / "run", setting))
        assert status == 2
        assert all(part in " ".join(error.split()) for part in parts), error
    assert not (tmp_path / "run").exists()
