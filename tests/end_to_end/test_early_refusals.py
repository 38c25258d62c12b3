"""What can be refused is, before the libraries are imported that only training and the rest of the work need."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "datasets",
    "pyarrow",
    "numpy",
    "matplotlib",
    "lm_eval",
    "sentence_transformers",
)

# Each line of its output is what a command line came to: the exit status, the message and what was imported by then.
SCRIPT = """
import contextlib, io, json, sys
import diablo_cli
given = [json.loads(argument) for argument in sys.argv[1:]]
for arguments in given[0]:
    sys.argv = ["diablo", *arguments]
    status, error = 0, io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
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
    (folder / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "sub").mkdir()
    (folder / "sub" / "train.jsonl").write_text("not JSON\n")
    (folder / "sub.yaml").write_text(f"model: {tiny_model}\noutput: out\ndata: {{train: sub}}\n")
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "good").mkdir()
    (folder / "good" / "adapter_config.json").write_text('{"peft_type": "DIABLO"}')
    (folder / "r.yaml").write_text(f"model: {tiny_model}\noutput: out\ndata: {{train: t.xlsx}}\n")
    (folder / "full.yaml").write_text(f"model: {tiny_model}\noutput: full\ntask: mawps\n")
    (folder / "rows.yaml").write_text(f"model: {tiny_model}\noutput: out\ndata: {{train: t.jsonl}}\n")
    return folder


def run(folder: Path, lines: list[list[str]]) -> list[tuple[int, str, list[str]]]:
    """What each command line comes to, one after the other in one process of their own."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(lines), json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_every_verb_refuses_before_it_imports_what_is_heavy(folder, tiny_model):
    tiny = str(tiny_model)
    refused = [
        (["train", "r.yaml"], "data.train: t.xlsx is not a dataset that diablo reads; allowed: .jsonl, .json, .csv"),
        (["train", "r.yaml", "data.train=none.jsonl"], "data.train: there is no file 'none.jsonl'"),
        (["train", "quickstart", "model=./none"], "model: there is no folder './none'"),
        (["train", "rows.yaml"], "1 malformed of 1 rows"),
        (["train", "rows.yaml", "--dry-run"], "1 malformed of 1 rows"),
        (["train", "sub.yaml"], "Row 1: not valid JSON"),
        (["train", "rows.yaml", "data.train=t.csv"], "t.csv has no usable row"),
        (["train", "full.yaml"], "'full' has files that diablo did not write"),
        (["train", "full.yaml", "output=new", "--resume"], "output: there is no checkpoint in 'new' to resume from"),
        (["train", "quikstart"], "There is no recipe file 'quikstart'"),
        (["train", "quickstart", "trainin.epochs=1"], "trainin: unknown key"),
        (["train", "quickstart", "training.epochs=x"], "training.epochs: found 'x'; allowed: a number above 0"),
        (["train", "quickstart", "task=mawpz"], "task: found 'mawpz'; allowed: mawps"),
        (["train", "quickstart", "training.optimizer=adamv"], "training.optimizer: found 'adamv'; allowed: adamw"),
        (["train", "quickstart", "training.optimizer=lomo"], "training.optimizer: found 'lomo', which changes"),
        (["train", "quickstart", "training.schedule=cosin"], "training.schedule: found 'cosin'; allowed: linear"),
        (["train", "quickstart", "tracking.report_to=wandv"], "tracking.report_to: found 'wandv'; allowed"),
        (["train", "quickstart", "method=lorra"], "method: found "),
        (["train", "quickstart", "evaluation.likelihood=true"], "evaluation.likelihood: task 'mawps' has no choices"),
        (["train", "quickstart", "output=t.csv"], "output: 't.csv' is a file"),
        (["train", "quickstart", "--overwrit"], "No such option"),
        (["train", "quickstart", "--training.epochs=3"], "write training.epochs=3, without dashes"),
        (["compare", "quickstart", "--seed", "3"], "write seed=VALUE, without dashes"),
        (["plan", "quickstart", "--model", "somewhere"], "write model=VALUE, without dashes"),
        (["trian", "quickstart"], "No such command"),
        (["train", "rows.yaml", "objective=dpo"], "needs prompt, chosen and rejected"),
        (["train", "quickstart", "objective=dpo"], "task: found mawps, whose rows have one completion each"),
        (["train", "quickstart", "objective=dpoo"], "objective: found "),
        (["train", "rows.yaml", "objective=embedding"], "needs anchor and positive"),
        (["train", "rows.yaml", "objective={name: embedding, loss: cosin}"], "objective.loss: found 'cosin'"),
        (["train", "rows.yaml", "objective={name: embedding, margin: 1}"], "objective.margin: found 1, which is of"),
        (["compare", "r.yaml"], "data.train: t.xlsx is not a dataset"),
        (["compare", "rows.yaml"], "There is nothing to score the methods by"),
        (["compare", "rows.yaml", "data.eval=1"], "1 malformed of 1 rows"),
        (["compare", "quickstart", "--lrs", "x"], "--lrs: found 'x'"),
        (["compare", "quickstart", "--seeds", "0"], "--seeds: found 0"),
        (["compare", "quickstart", "--methods", "diablo,lorra"], "--methods: found 'lorra'"),
        (["evaluate", "./none", "--task", "mawps"], "model: there is no folder './none'"),
        (["evaluate", tiny, "--task", "mawpz"], "--task: found 'mawpz'"),
        (["evaluate", tiny, "--task", "mawps", "--likelihood"], "--likelihood: task 'mawps' has no choices"),
        (["evaluate", tiny, "--task", "mawps", "--samples", "2"], "2 samples at temperature 0"),
        (["evaluate", tiny, "--task", "gsm8k", "--data-folder", "none"], "--data-folder: there is no folder 'none'"),
        (["evaluate", tiny, "--task", "mawps", "--out", "no/such"], "--out: 'no/such' cannot be written"),
        (["evaluate", "adapter", "--task", "mawps", "--base", "./none"], "--base: there is no folder './none'"),
        (["pairs", "./none", "out.jsonl", "--task", "mawps"], "model: there is no folder './none'"),
        (["pairs", tiny, "out.json", "--task", "mawps"], "OUT: found 'out.json'; rows are written as lines of JSON"),
        (["pairs", tiny, "no/out.jsonl", "--task", "mawps"], "OUT: 'no/out.jsonl' cannot be written"),
        (["pairs", tiny, "t.jsonl", "--task", "mawps"], "OUT: 't.jsonl' is there already; give another name, or"),
        (["pairs", tiny, "out.jsonl"], "--task: missing; allowed: mawps, gsm8k"),
        (["pairs", tiny, "out.jsonl", "--task", "humaneval"], "which has no train split; allowed: mawps"),
        (["pairs", tiny, "out.jsonl", "--task", "code_alpaca"], "'code_alpaca', which has no right answers to judge"),
        (["pairs", tiny, "out.jsonl", "--task", "mawps", "--format", "label"], "Did you mean labels?"),
        (["pairs", tiny, "out.jsonl", "--task", "mawps", "--samples", "1"], "--samples: found 1, of which no pair"),
        (["pairs", tiny, "out.jsonl", "--task", "mawps", "--temperature", "0"], "8 samples at temperature 0"),
        (
            ["pairs", tiny, "out.jsonl", "--task", "mawps", "--format", "labels", "--pairs-per-problem", "2"],
            "--pairs-per-problem: it is of --format pairs; leave out the one or the other",
        ),
        (["plan", "./none"], "model: there is no folder './none'"),
        (["plan", "quikstart"], "Did you mean quickstart?"),
        (["plan", "quickstart", "--length", "8"], "--length: a recipe has settings of its own"),
        (["plan", tiny, "--dtype", "bf17"], "--dtype: found 'bf17'"),
        (["plan", tiny, "--gradient-checkpointing", "all"], "--gradient-checkpointing: found 'all'"),
        (["plan", tiny, "method=lora"], "method=lora: overrides are of a recipe"),
        (["generate", "quickstart", "Hello"], "'quickstart' is a recipe, not a model"),
        (["embed", "./none", "x"], "model: there is no folder './none'"),
        (["embed", tiny, "x", "--out", "t.csv"], "--out: found 't.csv', and it is there already"),
        (["embed", tiny, "x", "--similarity"], "--similarity: found 1 text"),
        (["embed", tiny, "--file", "none.txt"], "--file: there is no file 'none.txt'"),
        (["chat", "./none"], "model: there is no folder './none'"),
        (["serve", "./none"], "model: there is no folder './none'"),
        (["serve", tiny, "--adapter", "a"], "--adapter: found 'a'; give NAME=FOLDER"),
        (["serve", tiny, "--adapter", "a=none"], "'none' is no adapter"),
        (["serve", tiny, "--adapter", "a=adapter"], "--adapter: 'adapter' is an adapter of None, and diablo serve"),
        (["serve", tiny, "--adapter", "a=good", "--adapter", "a=good"], "--adapter: 'a' is given twice"),
        (["serve", tiny, "--adapter", "good=good", "--name", "good"], "'good' is what the base model is called"),
        (["serve", tiny, "--adapters", "none"], "--adapters: there is no folder 'none'"),
        (["serve", tiny, "--precision", "fp8"], "--precision: found 'fp8'; allowed: auto, fp32"),
        (["serve", tiny, "--api-key", ""], "--api-key: found an empty one"),
        (["serve", tiny, "--api-key", "k", "--api-key", "k"], "--api-key: found one twice"),
        (["serve", tiny, "--tokens-per-minute", "100"], "where one answer may have 1024 tokens"),
        (["serve", tiny, "--mixed", "sometimes"], "--mixed: found 'sometimes'; allowed: auto, never, always"),
        (["serve", tiny, "--host", "192.0.2.1"], "--host, --port: 192.0.2.1:8000 cannot be had"),
        (["serve", tiny, "--port", "70000"], "--port"),
        (["merge", "none", "out"], "'none' is no adapter"),
        (["merge", "adapter", "full"], "'full' exists and is not empty"),
        (["merge", "adapter", "out", "--dtype", "bf17"], "--dtype: found 'bf17'"),
        (["merge", "adapter", "out", "--calibration", "t.csv"], "--calibration: found 't.csv'"),
        (["merge", "adapter", "out", "--data-folder", "full"], "--data-folder: it is read by --calibration"),
        (["inspect", "none"], "'none' is no adapter"),
        (["inspect", "adapter", "--base", "./none"], "--base: there is no folder './none'"),
        (["to-lora", "none", "out", "--rank", "4"], "'none' is no adapter"),
        (["to-lora", "adapter", "full", "--rank", "4"], "'full' exists and is not empty"),
        (["tasks", "gsm9k"], "There is no task 'gsm9k'"),
        (["init", "out.yaml", "--yes", "--task", "mawpz"], "task: found 'mawpz'"),
        (["init", "out.yaml", "--yes", "--data", "sub/train.jsonl"], "not valid JSON"),
        (["push", "none", "org/name"], "'none' holds neither an adapter"),
        (["push", "adapter", "name"], "REPO: found 'name', which is no repository's name"),
        (["export", "gguf", tiny, "out", "--outtype", "q4"], "--outtype: found 'q4'"),
        (["export", "ollama", tiny, "full"], "'full' exists and is not empty"),
        (["import", "none.chkpt", "out", "--base", tiny], "There is no file 'none.chkpt'"),
        (["import", "t.csv", "full", "--base", tiny], "'full' exists and is not empty"),
        (["quantize", "./none", "out"], "model: there is no folder './none'"),
        (["quantize", tiny, "full"], "'full' exists and is not empty"),
        (["quantize", tiny, "out", "--bits", "5"], "--bits: found 5"),
        (["quantize", tiny, "out", "--calibration", "t.csv"], "--calibration: found 't.csv'"),
        (["quantize", tiny, "out", "--data-folder", "full"], "from which builtin reads nothing"),
    ]
    outcomes = run(folder, [arguments for arguments, _ in refused])
    for (arguments, expected), (status, error, heavy) in zip(refused, outcomes, strict=True):
        assert status == 2, arguments
        assert expected in error, arguments
        assert not heavy, arguments
    assert not (folder / "out").exists()


def test_verbs_that_need_no_model_import_nothing_heavy(folder):
    lines = [
        ["--help"],
        *([verb, "--help"] for verb in ("train", "compare", "plan", "evaluate", "merge", "init")),
        ["tasks"],
        ["tasks", "gsm8k"],
        ["schema"],
        ["init", "new.yaml", "--yes"],
        ["init", "own.yaml", "--yes", "--data", "good.jsonl"],
    ]
    for arguments, (status, error, heavy) in zip(lines, run(folder, lines), strict=True):
        assert status == 0, (arguments, error)
        assert not heavy, arguments


@pytest.mark.parametrize("statement", ["import diablo", "from diablo.recipes.reading import load_recipe"])
def test_a_script_that_imports_the_package_imports_nothing_heavy_before_it_asks_for_it(statement):
    script = f"{statement}; import json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    # Warnings are errors here, of which an import may have none.
    command = [sys.executable, "-W", "error", "-c", script]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == []


@pytest.mark.skipif(find_spec("logbar") is None, reason="gptqmodel's log is not installed")
def test_what_a_library_prints_when_it_is_imported_is_no_part_of_the_output():
    script = "from diablo_cli.shell import quiet; quiet(); import transformers; import logbar"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == ""
