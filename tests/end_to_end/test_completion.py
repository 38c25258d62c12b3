"""Completion, invoked as the shells invoke it: each Tab is a process, which has no time to import torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("diablo")
HEAVY = {"torch", "transformers", "peft", "diablo"}


def run(arguments: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False
    )


def imported(log: str) -> set[str]:
    """The packages in what ``-X importtime`` writes."""
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in log.splitlines() if "|" in line}


def in_bash(line: str, folder: Path) -> list[str]:
    """What Bash is offered at the end of a line."""
    words = line.split(" ")
    result = run(
        [sys.executable, "-X", "importtime", str(COMMAND)],
        folder,
        COMP_WORDS="\n".join(words),
        COMP_CWORD=str(len(words) - 1),
        _DIABLO_COMPLETE="complete_bash",
    )
    assert result.returncode == 0
    names = imported(result.stderr)
    assert "typer" in names
    assert not names & HEAVY
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("diablo ", {"train", "init", "to-lora", "import"}, {"quickstart"}),
        ("diablo to", {"to-lora"}, {"train"}),
        ("diablo train --", {"--dry-run", "--resume"}, {"--methods"}),
        ("diablo train ", {"quickstart", "paper/gsm8k-llama2-7b", "mine.yaml", "folder/"}, {"rows.jsonl", ".hidden/"}),
        ("diablo train paper/gsm", {"paper/gsm8k-llama2-7b", "paper/gsm8k-llama3-8b"}, {"quickstart"}),
        ("diablo train folder/", {"folder/inner.yml"}, {"folder/rows.jsonl"}),
        # Left to the shell, as are all other files.
        ("diablo train fol", set(), {"folder/"}),
        ("diablo compare qui", {"quickstart"}, {"mine.yaml"}),
        ("diablo compare quickstart --methods diablo,d", {"diablo,dora"}, {"diablo,diablo", "diablo,lora"}),
        ("diablo compare quickstart --optimizers muon,li", {"muon,lion_8bit"}, {"muon,muon", "muon,sgd"}),
        ("diablo evaluate run --task gsm8k,", {"gsm8k,boolq", "gsm8k,aqua"}, {"gsm8k,gsm8k", "gsm8k,math10k"}),
        ("diablo tasks mat", {"math", "math10k"}, {"gsm8k"}),
        ("diablo init --task m", {"mawps", "math10k"}, {"math"}),
    ],
)
def test_what_is_offered(tmp_path, line, some, none):
    for name in ("mine.yaml", "rows.jsonl", "folder/inner.yml", "folder/rows.jsonl", ".hidden/other.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    offered = set(in_bash(line, tmp_path))
    assert some <= offered
    assert not none & offered
    assert bool(some) == bool(offered)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_offered_the_same(tmp_path, shell):
    result = run(
        [str(COMMAND)],
        tmp_path,
        _DIABLO_COMPLETE=f"complete_{shell}",
        _TYPER_COMPLETE_ARGS="diablo train qui",
        _TYPER_COMPLETE_FISH_ACTION="get-args",
    )
    assert "quickstart" in result.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_script_for_bash_completes(tmp_path):
    script = (
        'eval "$(_DIABLO_COMPLETE=source_bash diablo)"; COMP_WORDS=(diablo train qui); COMP_CWORD=2; '
        "_diablo_completion diablo; echo ${COMPREPLY[@]}; complete -p diablo"
    )
    path = f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"
    result = run(["bash", "--norc", "-c", script], tmp_path, PATH=path)
    assert result.stdout.startswith("quickstart\ncomplete ")


def test_the_schema_is_printed_without_torch(tmp_path):
    result = run([sys.executable, "-X", "importtime", str(COMMAND), "schema"], tmp_path)
    assert result.returncode == 0
    assert not imported(result.stderr) & HEAVY
