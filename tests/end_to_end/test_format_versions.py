"""Adapters and runs of an older diablo are read, and those of a newer one are refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from test_command_line import quickstart_on
from transformers import AutoModelForCausalLM

from diablo import DiabloConfig
from diablo.records.formats import ADAPTER_FORMAT, RUN_FORMAT

UPGRADE = "upgrade it with: pip install --upgrade diablo-peft"


@pytest.fixture
def run(diablo, tiny_model, tmp_path) -> Path:
    """A finished run with checkpoints."""
    assert diablo(*quickstart_on(tiny_model, tmp_path / "run", "training.save_steps=2", "merge=false"))[0] == 0
    return tmp_path / "run"


def change(path: Path, into: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Rewrite a file of JSON, and give what was in it."""
    content = json.loads(path.read_text())
    before = dict(content)
    into(content)
    path.write_text(json.dumps(content))
    return before


def make_newer(content: dict[str, Any]) -> None:
    content.update(format_version=content["format_version"] + 1)


def files_of(run: Path) -> tuple[Path, Path, Path]:
    (manifest, *_) = sorted(run.glob("checkpoints/*/manifest.json"), reverse=True)
    return run / "adapter" / "adapter_config.json", run / "run.json", manifest


def test_what_was_written_before_there_were_versions_is_read(diablo, run, tiny_model):
    config, record, manifest = files_of(run)
    written = [change(path, lambda content: content.pop("format_version")) for path in (config, record, manifest)]
    assert [each["format_version"] for each in written] == [ADAPTER_FORMAT, RUN_FORMAT, RUN_FORMAT]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert any("diablo" in name for name, _ in PeftModel.from_pretrained(base, run / "adapter").named_parameters())
    assert diablo("inspect", run)[0] == 0
    assert diablo("generate", run, "How many?", "--max-new-tokens", 2)[0] == 0
    record.unlink()
    options = ("training.save_steps=2", "merge=false", "--resume")
    assert diablo(*quickstart_on(tiny_model, run, *options))[0] == 0
    assert json.loads(record.read_text())["format_version"] == RUN_FORMAT


def test_an_adapter_of_a_newer_format_is_refused_by_peft_and_by_every_verb(diablo, run, tiny_model):
    change(files_of(run)[0], lambda content: content.update(format_version=ADAPTER_FORMAT + 1, num_blocks="many"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=f"format_version=2 is newer than diablo .* reads.*{UPGRADE}"):
        PeftModel.from_pretrained(base, run / "adapter")
    for verb in (("inspect", run), ("merge", run, run / "merged"), ("generate", run, "hi"), ("push", run, "org/name")):
        status, _, err = diablo(*verb)
        assert status == 2, verb
        assert "adapter_config.json cannot be read: format_version=2 is newer" in err
        assert UPGRADE in err


def test_a_run_of_a_newer_format_is_refused(diablo, run):
    change(files_of(run)[1], make_newer)
    for verb in (("generate", run, "hi"), ("merge", run, run / "merged"), ("evaluate", run)):
        status, _, err = diablo(*verb)
        assert (status, "run.json cannot be read: format_version=2 is newer" in err) == (2, True), verb
        assert UPGRADE in err


def test_a_checkpoint_of_a_newer_format_is_refused_and_kept(diablo, run, tiny_model):
    _, record, manifest = files_of(run)
    record.unlink()
    change(manifest, make_newer)
    status, _, err = diablo(*quickstart_on(tiny_model, run, "training.save_steps=2", "merge=false", "--resume"))
    assert status == 2
    assert "manifest.json cannot be read: format_version=2 is newer" in err
    assert manifest.is_file()


@pytest.mark.parametrize("value", [0, -1, True, "2", 1.5], ids=repr)
def test_a_version_is_a_whole_number(value):
    with pytest.raises(ValueError, match=r"format_version=.* must be a whole number from 1 on"):
        DiabloConfig(format_version=value)


def test_settings_that_were_read_are_written_in_todays_format():
    assert DiabloConfig.from_peft_type(**DiabloConfig().to_dict()).to_dict()["format_version"] == ADAPTER_FORMAT
