"""Checks of the built wheel in a new environment, where no file of the repository is at hand; run by ``make wheel``.

The tests run in the order in which they stand here: the extra ``cli`` is installed after what works without it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from readme_renderer.markdown import render

ROOT = Path(__file__).parents[2]
SMALLEST_RUN = ("task=null", "data.train=rows.jsonl", "training.max_steps=1", "merge=false", "output=run")
A_USER_OF_THE_LIBRARY = """
import torch, diablo
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
model = get_peft_model(LlamaForCausalLM.from_pretrained("base"), diablo.DiabloConfig(num_blocks=4))
tokens = torch.arange(16).reshape(2, 8)
model(input_ids=tokens, labels=tokens).loss.backward()
torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
model.save_pretrained("adapter")
loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter").eval()
torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)
print(diablo.__file__)
"""


class Outside:
    """A new virtual environment and an empty folder, neither of them in the repository.

    Args:
        folder: where both are made.
    """

    def __init__(self, folder: Path) -> None:
        self.bin, self.work = folder / "environment" / "bin", folder / "work"
        self.work.mkdir()
        subprocess.run([sys.executable, "-m", "venv", self.bin.parent], check=True)
        # What these variables name would be taken for a part of the environment.
        foreign = ("PYTHON", "VIRTUAL_ENV")
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}

    def install(self, extra: str = "") -> None:
        """Install the wheel with what it says that it needs."""
        constraints = str(ROOT / "constraints.txt")
        installed = self.run("python", "-m", "pip", "install", "--constraint", constraints, f"{wheel()}{extra}")
        assert installed.returncode == 0, installed.stderr

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in the empty folder."""
        command = [self.bin / program, *arguments]
        return subprocess.run(command, cwd=self.work, env=self.variables, capture_output=True, text=True, check=False)


def wheel() -> Path:
    found = list((ROOT / "dist").glob("*.whl"))
    assert len(found) == 1, "run make wheel, which builds it"
    return found[0]


def metadata() -> Message:
    with zipfile.ZipFile(wheel()) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Outside:
    outside = Outside(tmp_path_factory.mktemp("outside"))
    outside.install()
    return outside


@pytest.fixture(scope="module")
def command_line(library: Outside) -> Outside:
    library.install("[cli]")
    return library


def test_the_wheel_holds_every_file_of_the_package_and_both_licences():
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with zipfile.ZipFile(wheel()) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if ".dist-info/licenses/" in name]
    assert held == {name.removeprefix("src/") for name in listed.split()}
    assert sorted(name.rpartition("/")[2] for name in licences) == ["LICENSE", "LICENSE.txt"]


def test_the_metadata_say_what_somebody_looks_for():
    found = metadata()
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    assert found["License-Expression"] == "Apache-2.0 AND MIT"
    assert "peft" in found["Keywords"]
    urls = dict(url.split(", ") for url in found.get_all("Project-URL", []))
    assert {"Repository", "Documentation", "Changelog", "Issues"} <= urls.keys()


def test_every_link_and_picture_of_the_page_on_pypi_is_absolute():
    page = render(metadata().get_payload())
    assert page is not None
    links = re.findall(r'(?:href|src)="(?!#user-content-)([^"]*)"', page)  # each heading has one of these to itself
    assert len(links) > 20
    assert [link for link in links if not link.startswith("https://")] == []


def test_the_library_works_without_an_extra(library):
    result = library.run("python", "-c", A_USER_OF_THE_LIBRARY)
    assert result.returncode == 0, result.stderr
    assert str(library.bin.parent) in result.stdout


def test_the_command_without_its_extra_says_what_to_install(library):
    for program in (("diablo",), ("python", "-m", "diablo")):
        result = library.run(*program, "train", "quickstart")
        assert result.returncode == 2
        assert re.fullmatch(r"error: .* trl.*: pip install 'diablo-peft\[cli\]'\n", result.stderr), result.stderr


def test_the_command_says_its_version(command_line):
    result = command_line.run("diablo", "--version")
    assert result.stdout.startswith(f"diablo {metadata()['Version']}\n"), result.stderr


@pytest.mark.parametrize(
    ("verb", "shown"),
    [
        (("tasks",), "mawps"),
        (("schema",), '"$schema"'),
        (("plan", "quickstart"), "trained parameters"),
        (("train", "quickstart", "--dry-run"), "4,354,560"),
    ],
    ids=lambda part: part[0] if isinstance(part, tuple) else "",
)
def test_a_verb_reads_nothing_but_the_wheel(command_line, verb, shown):
    result = command_line.run("diablo", *verb)
    assert result.returncode == 0, result.stderr
    assert shown in result.stdout


def test_a_real_model_is_trained(command_line):
    (command_line.work / "rows.jsonl").write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n')
    result = command_line.run("diablo", "train", "quickstart", *SMALLEST_RUN, "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["versions"]["commit"] is None
    assert (command_line.work / "run" / "adapter" / "adapter_model.safetensors").is_file()
