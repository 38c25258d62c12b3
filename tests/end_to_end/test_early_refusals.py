"""What can be refused is, before the libraries are imported that only training and the rest of the work need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("trl", "datasets", "transformers.trainer", "matplotlib", "lm_eval", "gptqmodel", "deepspeed")

# Each line of its output is what a command line came to: the exit status, the message and what was imported by then.
SCRIPT = """
import contextlib, io, json, sys
import diablo_cli
given = [json.loads(argument) for argument in sys.argv[1:]]
for arguments in given[0]:
    sys.argv = ["diablo", *arguments]
    status, error = 0, io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            diablo_cli.main()
        except SystemExit as end:
            status = end.code
    heavy = [name for name in given[1] if name in sys.modules]
    print(json.dumps([status, error.getvalue(), heavy]), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "t.csv").write_text("a,b\n")
    (folder / "t.xlsx").write_text("")
    (folder / "t.jsonl").write_text("{}\n")
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "r.yaml").write_text(f"model: {tiny_model}\noutput: out\ndata: {{train: t.xlsx}}\n")
    (folder / "rows.yaml").write_text(f"model: {tiny_model}\noutput: out\ndata: {{train: t.jsonl}}\n")
    return folder


def test_every_verb_refuses_before_it_imports_what_is_heavy(folder, tiny_model):
    tiny = str(tiny_model)
    refused = [
        (["train", "r.yaml"], "data.train: t.xlsx is not a dataset that diablo reads; allowed: .jsonl, .json, .csv"),
        (["train", "r.yaml", "data.train=none.jsonl"], "data.train: there is no file 'none.jsonl'"),
        (["train", "quickstart", "model=./none"], "model: there is no folder './none'"),
        (["train", "rows.yaml"], "1 malformed of 1 rows"),
        (["compare", "r.yaml"], "data.train: t.xlsx is not a dataset"),
        (["compare", "quickstart", "--lrs", "x"], "--lrs: found 'x'"),
        (["evaluate", "./none", "--task", "mawps"], "model: there is no folder './none'"),
        (["evaluate", tiny, "--task", "gsm8k", "--data-folder", "none"], "--data-folder: there is no folder 'none'"),
        (["evaluate", tiny, "--task", "mawps", "--out", "no/such"], "--out: 'no/such' cannot be written"),
        (["evaluate", "adapter", "--task", "mawps", "--base", "./none"], "--base: there is no folder './none'"),
        (["plan", "./none"], "model: there is no folder './none'"),
        (["plan", "quikstart"], "Did you mean quickstart?"),
        (["plan", "quickstart", "--length", "8"], "--length: a recipe has settings of its own"),
        (["plan", tiny, "method=lora"], "method=lora: overrides are of a recipe"),
        (["generate", "quickstart", "Hello"], "'quickstart' is a recipe, not a model"),
        (["chat", "./none"], "model: there is no folder './none'"),
        (["merge", "none", "out"], "'none' is no adapter"),
        (["merge", "adapter", "full"], "'full' exists and is not empty"),
        (["merge", "adapter", "out", "--calibration", "t.csv"], "--calibration: found 't.csv'"),
        (["merge", "adapter", "out", "--data-folder", "full"], "--data-folder: it is read by --calibration"),
        (["inspect", "none"], "'none' is no adapter"),
        (["inspect", "adapter", "--base", "./none"], "--base: there is no folder './none'"),
        (["to-lora", "none", "out", "--rank", "4"], "'none' is no adapter"),
        (["to-lora", "adapter", "full", "--rank", "4"], "'full' exists and is not empty"),
        (["push", "none", "org/name"], "'none' holds neither an adapter"),
        (["push", "adapter", "name"], "REPO: found 'name', which is no repository's name"),
        (["export", "gguf", tiny, "out", "--outtype", "q4"], "--outtype: found 'q4'"),
        (["export", "ollama", tiny, "full"], "'full' exists and is not empty"),
        (["import", "none.chkpt", "out", "--base", tiny], "There is no file 'none.chkpt'"),
        (["import", "t.csv", "full", "--base", tiny], "'full' exists and is not empty"),
        (["quantize", "./none", "out"], "model: there is no folder './none'"),
        (["quantize", tiny, "full"], "'full' exists and is not empty"),
        (["quantize", tiny, "out", "--calibration", "t.csv"], "--calibration: found 't.csv'"),
        (["quantize", tiny, "out", "--data-folder", "full"], "from which builtin reads nothing"),
    ]
    command = [sys.executable, "-c", SCRIPT, json.dumps([arguments for arguments, _ in refused]), json.dumps(HEAVY)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert run.returncode == 0, run.stderr
    for (arguments, expected), line in zip(refused, run.stdout.splitlines(), strict=True):
        status, error, heavy = json.loads(line)
        assert status == 2, arguments
        assert expected in error, arguments
        assert not heavy, arguments
    assert not (folder / "out").exists()
