"""The settings that PEFT's own comparison of methods is given for DiaBlo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import forked_python
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig

from benchmarks.peft_board import BOARDS, command, write_experiment
from diablo import DiabloConfig
from diablo.errors import UserError
from diablo.models.loading import count_parameters, meta_model


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """As much of a clone of PEFT as is read: defaults, and a script that loads what it is given as PEFT's does."""
    for board in BOARDS.values():
        folder = tmp_path / board.folder
        folder.mkdir(parents=True)
        defaults = {"batch_size": 4, "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1, "eps": 1e-8}}
        (folder / "default_training_params.json").write_text(json.dumps(defaults))
        (folder / "run.py").write_text(
            "import sys\nfrom peft import PeftConfig\n"
            "assert __name__ == '__main__' and sys.argv[:2] == ['run.py', '-v']\n"
            "print(type(PeftConfig.from_pretrained(sys.argv[2])).__name__)\n"
        )
    return tmp_path


def test_peft_reads_the_settings_and_trains_as_many_parameters_as_lora_does_there(clone: Path) -> None:
    board = BOARDS["MetaMathQA"]
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    trained = {}
    for number in (64, 128, 256):
        own = write_experiment(board, clone, number, 1e-3)
        settings = PeftConfig.from_pretrained(str(clone / board.folder / own))
        assert isinstance(settings, DiabloConfig)
        trained[number] = count_parameters(get_peft_model(meta_model(config), settings))[0]
    # LoRA of rank 32 on q and v, the board's first experiment, trains 9.2 million.
    assert trained == {64: 28_901_376, 128: 14_450_688, 256: 7_225_344}
    training = json.loads((clone / board.folder / own / "training_params.json").read_text())
    assert training == {"optimizer_kwargs": {"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-8}}
    # PEFT's script wants three parts.
    assert own.parts == ("experiments", "diablo", "llama-3.2-3B-blocks256-lr0.001")


@pytest.mark.parametrize("name", BOARDS)
def test_the_printed_command_runs_pefts_script_with_diablo_imported(clone: Path, name: str) -> None:
    board = BOARDS[name]
    line = command(board, clone, write_experiment(board, clone, 64, 5e-4))
    # That diablo is imported is shown by one process of its own; the lines differ in the folder and the script.
    python = sys.executable if name == "MetaMathQA" else forked_python()
    line = line.replace("&& python", f"&& {python}")
    done = subprocess.run(["bash", "-c", line], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["DiabloConfig"]


def test_a_folder_that_is_no_clone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the folder of a clone of huggingface/peft"):
        write_experiment(BOARDS["image-gen"], tmp_path, 64, 1e-3)
