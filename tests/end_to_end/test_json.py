"""``--json``: one record on standard output from every verb, also where a verb fails, and nothing else there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import jsonschema
import pytest
import torch
import typer
import yaml
from launching import forked_python
from test_command_line import quickstart_on

from diablo_cli.verbs import app

OF_A_RUN = {"train", "evaluate", "generate", "merge", "to-lora", "inspect"}
OF_NO_RUN = {"plan", "import", "quantize", "init", "schema", "tasks", "compare"}
# Their records are tested beside what they write.
OF_WRITING = {"push", "gguf", "ollama", "pairs"}
OF_A_HEAD = {"classify", "embed"}
WITHOUT_A_RECORD = {"chat", "serve"}

# A verb in a process of its own: whatever writes to standard output, it has the record alone.
LOUD = """
import atexit, logging, math, os, subprocess, sys
from pathlib import Path
logging.basicConfig(stream=sys.stdout)
from diablo_cli import main
from diablo_cli.output import answer, out
from diablo_cli.verbs import app

@app.command()
def loud():
    print("by print")
    logging.warning("by a log")
    os.write(1, b"by a library in C\\n")
    subprocess.run(["echo", "by a child"], check=True)
    atexit.register(print, "at exit")
    out.print("text for people")
    answer({"loss": math.nan, "losses": (1.5, math.inf), "path": Path("runs")})

sys.argv = ["diablo", "loud", *sys.argv[1:]]
main()
"""


@pytest.fixture
def record(diablo):
    """Runs a verb with ``--json`` and gives its record: the one line of its output."""

    def run(*arguments: object, status: int = 0) -> dict:
        run.verbs.add(arguments[0])
        ended, out, errors = diablo(*arguments, "--json")
        assert ended == status, errors
        assert out.count("\n") == 1
        assert out.endswith("\n")
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    run.verbs = set()
    return run


def test_the_verbs_of_a_run_print_their_records(record, tiny_model, tmp_path):
    run = tmp_path / "run"
    arguments = quickstart_on(tiny_model, run, "training.learning_rate=1e-2")
    planned = record(*arguments, "--dry-run")
    trained = record(*arguments)
    saved = json.loads((run / "run.json").read_text())
    assert trained == {"folder": str(run), "adapter": str(run / "adapter"), "merged": None, **saved}
    assert planned["training"].items() <= saved["training"].items()
    assert planned["parameters"] == saved["parameters"]
    assert planned["memory"]["trained"] == saved["parameters"]["trainable"]
    assert planned["memory"]["total"] > planned["memory"]["weights"]
    assert planned["data"]["supervised_tokens"] == saved["data"]["supervised_tokens"]
    assert {token["supervised"] for token in planned["examples"][0]} == {True, False}

    scored = record("evaluate", run, "--limit", 6, "--batch-size", 4, "--out", tmp_path / "answers.jsonl")
    for figure in ("accuracy", "right", "total"):
        assert scored["scores"]["mawps"][figure] == saved["scores"]["after"]["mawps"][figure]
    assert len(Path(scored["answers"]).read_text().splitlines()) == 6
    assert record("generate", run, "2 and 3?", "--max-new-tokens", 2).keys() == {"model", "prompt", "text"}

    merged = record("merge", run, tmp_path / "merged")
    assert merged["is_same_base"] is True
    assert merged["verified_tensors"] > 0
    assert merged["logits"]["largest_difference"] < merged["logits"]["largest"]
    lora = record("to-lora", run, tmp_path / "lora", "--rank", "1.0")
    assert lora["relative_error"] == pytest.approx(0, abs=1e-3)
    inspected = record("inspect", run, "--out", tmp_path / "figures.json")
    assert inspected == json.loads((tmp_path / "figures.json").read_text())
    assert record.verbs == OF_A_RUN


def test_the_verbs_of_no_run_print_their_records(record, tiny_model, tmp_path):
    assert record("plan", "quickstart", f"model={tiny_model}", "method.num_blocks=4")["batch_size"] == 16
    sizes = record("plan", tiny_model, "--num-blocks", 4)
    assert sizes["parameters"]["trainable"] == sizes["memory"][0]["trained"]
    assert sizes["memory"][0]["total"] > sizes["memory"][0]["weights"] > 0

    chkpt = tmp_path / "adapter.chkpt"
    torch.save({"model.layers.0.self_attn.q_proj.block_A": torch.ones(4, 8, 8)}, chkpt)
    imported = record("import", chkpt, tmp_path / "imported", "--base", tiny_model)
    assert imported == {"folder": str(tmp_path / "imported"), "modules": 1, "parameters": 256, "num_blocks": 4}

    # The compiled kernels of gptqmodel are its own.
    with torch.compiler.set_stance("force_eager"):
        command = ["quantize", tiny_model, tmp_path / "quantized", "--length", 16, "--rows", 4, "--group-size", 16]
        quantized = record(*command)
    assert quantized["bytes_after"] < quantized["bytes_before"]
    assert len(quantized["errors"]) == 14

    recipe = tmp_path / "recipe.yaml"
    settings = ["--model", tiny_model, "--task", "mawps", "--num-blocks", 4]
    assert record("init", recipe, *settings)["recipe"] == yaml.safe_load(recipe.read_text())
    jsonschema.Draft7Validator(record("schema")).validate(yaml.safe_load(recipe.read_text()))
    assert record("schema", "--out", tmp_path / "schema.json") == {"file": str(tmp_path / "schema.json")}
    one = record("tasks", "mawps")
    assert one in record("tasks")["tasks"]
    assert one["splits"] == {"train": 1898, "test": 238}

    fields = ["--methods", "diablo,lora", "--lrs", "1e-3", "--seeds", 1, "--out", tmp_path / "compared"]
    compared = record("compare", recipe, "data.limit=48", *fields, "--dry-run")
    assert [each["method"] for each in compared["methods"]] == ["diablo", "lora"]
    assert compared["methods"][0]["trained_parameters"] == compared["budget"]
    assert record.verbs == OF_NO_RUN


def test_every_verb_has_the_option():
    verbs = dict(typer.main.get_command(app).commands)
    verbs |= verbs.pop("export").commands
    assert verbs.keys() == OF_A_RUN | OF_NO_RUN | OF_WRITING | OF_A_HEAD | WITHOUT_A_RECORD
    for name, verb in verbs.items():
        assert [option.hidden for option in verb.params if option.name == "as_json"] == [name in WITHOUT_A_RECORD]


def test_a_fault_is_a_record_too_and_the_message_stays_on_standard_error(diablo, record, tiny_model, tmp_path):
    for arguments, message in (
        (["train", "quickstart", "task=mawp"], "Did you mean mawps?"),
        (["generate", "./none", "Hello"], "there is no folder './none'"),
        (["chat", tiny_model], "--json: a conversation is no one record"),
        # Errors of usage are found before the verb begins.
        (["plan", tiny_model, "--num-block", 4], "No such option: --num-block"),
        (["plan", tiny_model, "--num-blocks", "x"], "--num-blocks"),
        (["generate", tiny_model], "Missing argument"),
    ):
        given = record(*arguments, status=2)
        assert given.keys() == {"error"}
        assert message in given["error"]
        _, out, errors = diablo(*arguments, *["--json"] * (arguments[0] == "chat"))
        assert message in " ".join(errors.replace("│", "").split())
        assert out == "" or arguments[0] == "chat"
    # After the fault of one call, the next call of this process has its text again.
    assert diablo("tasks", "mawps")[1].startswith("task")


def test_what_libraries_write_to_standard_output_does_not_spoil_the_record():
    command = [forked_python(), "-c", LOUD]
    with_record = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert with_record.stdout == '{"loss": null, "losses": [1.5, null], "path": "runs"}\n'
    for text in ("by print", "by a log", "by a library in C", "by a child", "at exit"):
        assert text in with_record.stderr
    assert "text for people" not in with_record.stderr
    without = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "text for people\n" in without.stdout
    assert "loss" not in without.stdout


def test_a_verb_that_is_stopped_at_once_says_so_in_a_record():
    # A shell that starts a job in the background has the signal ignored.
    ask = "__import__('signal').signal(2, __import__('signal').default_int_handler); os.kill(os.getpid(), 2)"
    stopped = LOUD.replace('print("by print")', ask)
    run = subprocess.run([forked_python(), "-c", stopped, "--json"], capture_output=True, text=True, check=False)
    assert run.returncode == 130
    assert json.loads(run.stdout) == {"error": "Stopped at once by SIGINT."}


def test_an_error_that_nobody_expects_is_a_record_with_its_traceback_on_standard_error():
    broken = LOUD.replace('print("by print")', '1 / 0  # {"')
    run = subprocess.run([forked_python(), "-c", broken, "--json"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert json.loads(run.stdout) == {"error": "ZeroDivisionError: division by zero"}
    assert "Traceback" in run.stderr
