"""What is told of a run while it trains: ``train.jsonl``, and the trackers of a recipe."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_command_line import quickstart_on

from diablo.recipes.reading import load_recipe
from diablo.training.trackers import Trackers


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
    # Also those of steps that have a held-out loss beside theirs.
    assert [step for step, _ in record["loss"]] == [1, 2, 3, 4]
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

    # Another run into the same folder does not have its figures drawn over those of this one.
    assert diablo(*arguments, "training.max_steps=1")[0] == 0
    told = EventAccumulator(str(run / "tensorboard"))
    told.Reload()
    assert [event.step for event in told.Scalars("train/loss")] == [1]


def interrupt(run: Path, after: int) -> None:
    """Leave a run of four steps, with a checkpoint every two, as a kill after its third or fourth step does."""
    (run / "run.json").unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    lines = lines_of(run)
    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= after]
    (run / "train.jsonl").write_text("".join(kept))


TRACKED = ["training.logging_steps=1", "training.eval_steps=2", "training.save_steps=2"]
NAMED = "name: mawps-4, project: equations, tags: [smollm2, short]"


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_is_told_of_a_run_and_a_resumed_run_goes_on_in_it(diablo, tiny_model, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    store = f"file:{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    # Its store in plain files, which needs no database, has to be asked for.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = tmp_path / "run"
    arguments = quickstart_on(tiny_model, run, *TRACKED, f"tracking={{report_to: mlflow, {NAMED}}}")
    assert diablo(*arguments)[0] == 0
    assert not {"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"} & os.environ.keys()
    lines = lines_of(run)
    # What is changed here may change in a resumed run, and MLflow takes no other value for a parameter.
    interrupt(run, after=4)
    assert diablo(*arguments, "evaluation.batch_size=3", "--resume")[0] == 0
    assert lines_of(run)[-1]["loss"] == lines[-1]["loss"]

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("equations")
    (told,) = client.search_runs([experiment.experiment_id])
    assert told.info.run_name == "mawps-4"
    assert told.info.status == "FINISHED"
    assert {"smollm2", "short"} <= told.data.tags.keys()
    assert told.data.params["recipe.method.num_blocks"] == "4"
    for kind in ("loss", "held_out_loss"):
        figures = [(each.step, each.value) for each in client.get_metric_history(told.info.run_id, kind)]
        expected = [(line["step"], line[kind]) for line in lines if kind in line and line["step"] > 0]
        assert figures == expected


@pytest.mark.skipif(
    find_spec("mlflow") is None or find_spec("sqlalchemy") is not None, reason="mlflow-skinny is not installed alone"
)
def test_a_store_that_mlflow_cannot_open_is_refused_before_the_model_is_loaded(
    diablo, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    status, _, error = diablo(*quickstart_on(tiny_model, tmp_path / "run", "tracking.report_to=mlflow"))
    assert status == 2
    assert "tracking.report_to: mlflow cannot open its store" in error
    assert "MLFLOW_TRACKING_URI" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_is_told_of_a_run_and_a_resumed_run_tells_what_is_new(diablo, tiny_model, tmp_path, monkeypatch):
    from wandb_files import read_run

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = tmp_path / "run"
    arguments = quickstart_on(tiny_model, run, *TRACKED, f"tracking={{report_to: wandb, {NAMED}}}")
    assert diablo(*arguments)[0] == 0
    assert not {"WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_TAGS", "WANDB_RESUME"} & os.environ.keys()
    lines = lines_of(run)
    interrupt(run, after=3)
    assert diablo(*arguments, "--resume")[0] == 0

    # Offline, each part of a run is a file of its own, with the run's id.
    paths = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    first, resumed = map(read_run, paths)
    assert first["id"] == resumed["id"] == json.loads((run / "trackers.json").read_text())["runs"]["wandb"]
    for told, after in ((first, 0), (resumed, 3)):
        assert (told["project"], told["name"], sorted(told["tags"])) == ("equations", "mawps-4", ["short", "smollm2"])
        assert told["config"]["recipe.method.num_blocks"] == 4
        assert told["exit"] == 0
        for kind in ("loss", "held_out_loss"):
            figures = [
                (row["train/global_step"], pytest.approx(row[f"train/{kind}"]))
                for row in told["history"]
                if f"train/{kind}" in row
            ]
            assert figures == [(line["step"], line[kind]) for line in lines if kind in line and line["step"] > after]


def test_trackers_are_told_by_the_environment_and_what_the_user_has_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    settings = {"report_to": ["wandb", "comet_ml"], "project": "equations"}
    recipe = load_recipe("quickstart", [f"output={tmp_path}", f"tracking={json.dumps(settings)}"])
    before = dict(os.environ)
    with Trackers(recipe, resume=False).environment():
        told = {name: value for name, value in os.environ.items() if before.get(name) != value}
        assert os.environ["WANDB_PROJECT"] == "mine"
    assert dict(os.environ) == before
    assert told["COMET_PROJECT_NAME"] == "equations"
    # Comet takes keys of 32 to 50 letters and digits.
    assert told["COMET_EXPERIMENT_KEY"].isalnum()
    assert 32 <= len(told["COMET_EXPERIMENT_KEY"]) <= 50


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


def test_the_log_has_what_happened_with_times_and_a_resumed_run_appends_to_it(
    diablo, tiny_model, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    arguments = quickstart_on(tiny_model, run, *TRACKED)
    # What no check foresees: a library that fails with a secret in its message, after a warning.
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")

    def fail(*_: object, **__: object) -> None:
        warnings.warn("the disk is nearly full", stacklevel=1)
        logging.getLogger("a.library").warning("retrying")
        raise RuntimeError("GET https://me:word@host/?token=hf_secret_of_mine")

    with monkeypatch.context() as broken:
        broken.setattr("diablo.training.run.save_adapter", fail)
        # As in a program that has set up no logging: pytest has.
        broken.setattr(logging.root, "handlers", [])
        with pytest.warns(UserWarning, match="nearly full"), pytest.raises(RuntimeError):
            diablo(*arguments)
    log = (run / "train.log").read_text()
    (run / "checkpoints" / "checkpoint-4").rename(tmp_path / "later")
    status, _, errors = diablo(*arguments, "--resume", "training.batch_size=7")
    assert status == 2
    assert "7" in errors
    assert diablo(*arguments, "--resume")[0] == 0
    whole = (run / "train.log").read_text()
    assert whole.startswith(log)

    for text in (
        "diablo on ",
        "training rows       48: ",
        "mawps accuracy before 0.0% (0 of 6)",
        "step 1 of 4: loss ",
        "step 2 of 4: held-out loss ",
        "checkpoint of step 4 saved",
        "UserWarning: the disk is nearly full",
        "retrying",
        "Traceback (most recent call last):",
        "RuntimeError: GET https://***@host/?token=***",
    ):
        assert text in log
    assert "secret" not in log
    assert "done" not in log
    rest = whole.removeprefix(log)
    assert "goes on from checkpoint-2" in rest
    assert "step 2 of 4" not in rest
    assert "done: " in rest
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in rest.splitlines())
    # Nothing of the log stays behind in the process.
    assert logging.getLogger("diablo").handlers == []


def test_a_log_that_cannot_be_written_is_said_and_ends_no_run(diablo, tiny_model, tmp_path):
    run = tmp_path / "run"
    arguments = quickstart_on(tiny_model, run, "evaluation.before=false", "evaluation.after=false")
    assert diablo(*arguments)[0] == 0
    (run / "train.log").unlink()
    (run / "train.log").mkdir()
    status, out, errors = diablo(*arguments)
    assert status == 0
    assert "The log cannot be written (Is a directory); it ends here." in errors
    assert "trained" in out
