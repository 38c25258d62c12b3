"""Uploads to a hub that runs on this machine, by the real client; and the model cards that arrive there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import TOKEN, Hub, running_hub
from huggingface_hub import ModelCard, constants

from diablo.errors import UserError
from diablo.models.builtin import cache_folder
from diablo.publishing.card import run_part
from diablo.publishing.hub import Repository, base_on_hub, check_writable
from diablo.recipes.reading import check_settings, load_recipe
from diablo.training import train

ROOT = Path(__file__).parents[2]
# One process for all command lines, since the client reads where the hub is when it is imported.
SCRIPT = """
import contextlib, io, json, os, sys, traceback
import diablo_cli
for line in sys.stdin:
    arguments, environment = json.loads(line)
    before = dict(os.environ)
    os.environ.update(environment)
    sys.argv = ["diablo", *arguments]
    status, out, error = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        from diablo_cli import output
        output.out.file = out
        try:
            diablo_cli.main()
        except SystemExit as end:
            status = end.code or 0
        except Exception:
            status = "traceback"
            traceback.print_exc()
    os.environ.clear()
    os.environ.update(before)
    sys.__stdout__.write(json.dumps([status, out.getvalue(), error.getvalue()]) + "\\n")
    sys.__stdout__.flush()
"""
SECRET = "the vault opens at nine"

Distant = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Hub, Distant]]:
    with running_hub() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
            "HF_TOKEN": TOKEN,
        }
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
            stdin.write(json.dumps([list(map(str, arguments)), environment]) + "\n")
            stdin.flush()
            status, out, error = json.loads(stdout.readline())
            return status, out, error

        yield hub, run
        stdin.close()
        process.wait(timeout=60)


@pytest.fixture
def hub(served) -> Iterator[Hub]:
    """The hub, empty, and as it was before where a test has changed what it answers."""
    hub, fresh = served[0], Hub()
    for name in ("who", "refuses", "repositories", "private", "commits", "objects"):
        setattr(hub, name, getattr(fresh, name))
    return hub


@pytest.fixture
def distant(served) -> Distant:
    return served[1]


def write_recipe(folder: Path, model: Path, **settings: object) -> Path:
    rows = folder / "private rows" / "rows.jsonl"
    rows.parent.mkdir(exist_ok=True)
    rows.write_text("".join(json.dumps({"prompt": f"{SECRET} {n}?", "completion": f" {n}"}) + "\n" for n in range(20)))
    recipe = folder / "recipe.yaml"
    told = {
        "model": str(model),
        "data": {"train": str(rows), "eval": 4},
        "method": {"name": "diablo", "num_blocks": 4},
        "training": {"max_steps": 2, "batch_size": 4, "logging_steps": 1},
        "precision": "fp32",
        "output": str(folder / "run"),
        **settings,
    }
    recipe.write_text(yaml.safe_dump({key: value for key, value in told.items() if value is not None}))
    return recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    """A run on rows of our own, with a merged model."""
    folder = tmp_path_factory.mktemp("published")
    return train(load_recipe(write_recipe(folder, tiny_model, merge=True))).folder


def test_an_adapter_arrives_with_a_card_and_nothing_of_this_machine_or_its_rows(hub, distant, run, tiny_model):
    status, out, error = distant("push", run, "ann/apples", "--base", "org/tiny", "--message", "First")
    assert (status, error) == (0, "")
    assert f"{hub.url}/ann/apples" in out
    files = hub.repositories["ann/apples"]["main"]
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/tiny"
    assert hub.commits == ["First"]

    text = files["README.md"].decode()
    for secret in (str(run.parent), str(tiny_model), tiny_model.parent.name, str(Path.home()), "private rows", SECRET):
        assert secret not in text + files["adapter_config.json"].decode(), secret
    told = ModelCard(text).data.to_dict()
    assert told["base_model"] == "org/tiny"
    assert told["base_model_relation"] == "adapter"
    assert told["library_name"] == "peft"
    assert told["pipeline_tag"] == "text-generation"
    assert {"diablo", "diablo-peft"} <= set(told["tags"])
    record = json.loads((run / "run.json").read_text())
    assert f"{record['data']['rows']} rows with {record['data']['tokens']:,} tokens" in text
    assert "| rows.jsonl | prompt/completion | 20 |" in text
    before, after = (f"{loss:.4f}" for _, loss in record["training"]["held_out_loss"])
    assert f"| loss on held-out rows, nats a token | {before} | {after} |" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("ann/apples")' in text
    assert "import diablo" in text
    assert record["versions"]["torch"] in text
    # What is here has not changed.
    assert str(tiny_model) in (run / "adapter" / "adapter_config.json").read_text()
    status, out, _ = distant("push", run, "ann/apples", "--base", "org/tiny", "--json")
    assert status == 0
    pushed = json.loads(out)
    assert pushed["folder"] == str(run / "adapter")
    assert pushed["url"].startswith(f"{hub.url}/ann/apples")
    assert set(pushed["files"]) == files.keys()


def test_the_recipe_in_a_card_is_one(run, tmp_path, monkeypatch, tiny_model):
    text = (run / "adapter" / "README.md").read_text()
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / tiny_model.name).symlink_to(tiny_model)
    told, made = check_settings({**settings, "output": "there"}), load_recipe(run / "recipe.yaml")
    assert (told.method, told.training, told.data.eval) == (made.method, made.training, made.data.eval)


def test_the_card_of_a_further_stage_says_so_and_names_no_folder(run, tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    Path("secret").symlink_to(run)
    second = train(load_recipe(write_recipe(tmp_path, tiny_model, adapter="secret/adapter", method=None)))
    text = (second.adapter / "README.md").read_text()
    assert "Training went on from an adapter that had been trained before." in text
    assert "secret" not in text
    assert "The parameters are those of step" not in text
    best = {"kept_step": 1, "held_out_loss": [(0, 3.0), (1, 1.0), (2, 2.0)]}
    earlier = {**second.record, "training": second.record["training"] | best}
    assert "in 2 steps. The parameters are those of step 1, the best one." in run_part(earlier, "adapter")
    written = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert "adapter" not in written
    assert written["method"]["num_blocks"] == 4
    assert "went on from" not in (run / "adapter" / "README.md").read_text()


def test_a_merged_model_goes_to_a_private_repository_and_a_branch(hub, distant, run):
    options = ("--merged", "--private", "--revision", "first")
    status, out, _ = distant("push", run, "apples/whole", *options, "--base", "org/tiny")
    assert status == 0
    assert "/apples/whole/tree/first" in out
    assert hub.private == {"apples/whole": True}
    assert not hub.repositories["apples/whole"]["main"]
    files = hub.repositories["apples/whole"]["first"]
    assert files["model.safetensors"] == (run / "merged" / "model.safetensors").read_bytes()
    told = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (told["library_name"], told["base_model_relation"]) == ("transformers", "finetune")
    texts = "".join(files[name].decode() for name in files if name.endswith((".md", ".json", ".jinja")))
    assert str(run.parent) not in texts
    # The same folder by its own name, and a run without one.
    assert distant("push", run / "merged", "ann/whole")[0] == 0
    status, _, error = distant("push", run / "adapter", "ann/none", "--merged")
    assert status == 2
    assert "make one with: diablo merge" in error


def test_what_is_no_part_of_a_model_is_not_uploaded(hub, distant, run, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in (run / "adapter").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "notes.jsonl").write_text(SECRET)
    (folder / ".env").write_text(SECRET)
    (folder / "README.md").unlink()
    status, out, _ = distant("push", folder, "ann/apples", "--base", "org/tiny")
    assert status == 0
    assert "Left out, since they are no part of a model: notes.jsonl." in out
    files = hub.repositories["ann/apples"]["main"]
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "| method | DIABLO |" in files["README.md"].decode(), "an adapter without a card gets a short one"


def test_a_card_that_was_edited_on_the_hub_stays_until_it_is_to_be_overwritten(hub, distant, run):
    push = ("push", run, "ann/apples", "--base", "org/tiny")
    assert distant(*push)[0] == 0
    files = hub.repositories["ann/apples"]["main"]
    first = files["README.md"]
    # A licence that is set in the web page's form is kept, and so is the rest renewed.
    files["README.md"] = first.replace(b"---\n", b"---\nlicense: mit\n", 1)
    status, out, _ = distant(*push)
    assert (status, "edited" in out) == (0, False)
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    assert ModelCard(files["README.md"].decode()).text == ModelCard(first.decode()).text

    mine = files["README.md"].replace(b"## Use", b"It counts apples.\n\n## Use")
    files["README.md"] = mine
    status, out, _ = distant(*push)
    assert status == 0
    assert "stays as it is; --overwrite-card replaces it" in out
    assert files["README.md"] == mine
    assert distant(*push, "--overwrite-card")[0] == 0
    assert b"It counts apples." not in files["README.md"]


def test_a_run_is_uploaded_where_its_recipe_asks_for_it_and_a_failed_upload_loses_nothing(
    hub, distant, tiny_model, tmp_path
):
    recipe = write_recipe(tmp_path, tiny_model, push_to_hub={"repo": "ann/apples", "base": "org/tiny", "private": True})
    status, out, _ = distant("train", recipe)
    assert status == 0
    assert f"uploaded to      {hub.url}/ann/apples" in out
    assert hub.private == {"ann/apples": True}
    assert "adapter_model.safetensors" in hub.repositories["ann/apples"]["main"]

    hub.refuses = "/commit/"
    status, out, error = distant("train", recipe, "push_to_hub.repo=ann/pears")
    assert status == 1
    assert "held-out loss" in out, "the run reports as any"
    assert "may not write to 'ann/pears'" in error
    assert json.loads((tmp_path / "run" / "run.json").read_text())["training"]["steps"] == 2
    line = error.partition("Upload it with: diablo ")[2].strip()
    hub.refuses = Hub.refuses
    assert distant(*shlex.split(line))[0] == 0
    assert "adapter_model.safetensors" in hub.repositories["ann/pears"]["main"]
    assert hub.private["ann/pears"]


def test_what_cannot_be_uploaded_is_refused_before_training(hub, distant, tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model, push_to_hub={"repo": "ann/apples", "base": "org/tiny"})
    tokens = {
        "read": {"displayName": "old", "role": "read"},
        "other": {
            "displayName": "old",
            "role": "fineGrained",
            "fineGrained": {"scoped": [{"entity": {"name": "apples"}, "permissions": ["repo.write"]}]},
        },
    }
    cases: list[tuple[str, dict[str, str], str | None, str]] = [
        ("x=1", {"HF_TOKEN": ""}, None, "push_to_hub: there is no token with which to write to 'ann/apples'; log in"),
        ("x=1", {"HF_TOKEN": "hf_wrong"}, None, "push_to_hub: the hub does not take the token; log in with: hf auth"),
        ("x=1", {}, "read", "push_to_hub: the token 'old' of 'ann' may read, but not write to 'ann/apples'; make one"),
        ("x=1", {}, "other", "push_to_hub: the token 'old' of 'ann' may read, but not write to 'ann/apples'"),
        ("push_to_hub.repo=bob/apples", {}, None, "who is not in an organisation 'bob'; give a repository of ann, or"),
        ("push_to_hub.repo=apples", {}, None, "push_to_hub: found 'apples', which is no repository's name (the owner"),
        ("push_to_hub.repo=a/b/c", {}, None, "push_to_hub: found 'a/b/c', which is no repository's name"),
        ("push_to_hub.base=null", {}, None, "push_to_hub.base: missing; model is the folder"),
        ("push_to_hub.base=./tiny", {}, None, "push_to_hub.base: found './tiny'; give the id of a model on the hub"),
        ("push_to_hub={private: true}", {}, None, "push_to_hub.repo: missing; give OWNER/NAME"),
        (
            "push_to_hub.private=true",
            {},
            "public",
            "push_to_hub: 'ann/apples' exists and is public, and was to be priv",
        ),
    ]
    for override, environment, state, expected in cases:
        hub.who = Hub().who
        hub.repositories, hub.private = {}, {}
        if state == "public":
            hub.repositories, hub.private = {"ann/apples": {"main": {}}}, {"ann/apples": False}
        elif state is not None:
            hub.who["auth"]["accessToken"] = tokens[state]
        given = [] if override == "x=1" else [override]
        for dry_run in ([], ["--dry-run"]):
            status, _, error = distant("train", recipe, *given, *dry_run, **environment)
            assert (status, expected in error) == (2, True), error
            assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()
        assert not any(hub.repositories.get("ann/apples", {"main": {}})["main"])


def test_pushing_says_what_is_missing(hub, distant, run, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text("{}")
    for arguments, expected in (
        ((tmp_path / "none", "ann/x"), "holds neither an adapter (adapter_config.json) nor a model"),
        ((tmp_path / "half", "ann/x"), "has no adapter_model.safetensors"),
        ((run, "x"), "REPO: found 'x', which is no repository's name"),
        ((run, "ann/x"), "--base: the adapter's base model is a folder on this machine"),
        ((run, "ann/x", "--base", "a b"), "--base: found 'a b'; give the id of the base model on the hub"),
        ((run, "bob/x", "--base", "org/tiny"), "who is not in an organisation 'bob'"),
    ):
        status, _, error = distant("push", *arguments)
        assert (status, expected in error) == (2, True), error
    assert not hub.repositories


@pytest.mark.parametrize("name", ["builtin:smollm2-135m", str(cache_folder() / "smollm2-135m-0123abcd")])
def test_an_adapter_of_a_builtin_model_names_the_model_that_it_was_made_of(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    assert base_on_hub(tmp_path, None, "--base") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_nothing_is_asked_offline_and_a_hub_that_is_not_there_is_not_waited_for(monkeypatch, distant, run):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be reached while HF_HUB_OFFLINE is set; unset it"):
        check_writable(Repository("ann/apples"), "REPO")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the hub \(http://127.0.0.1:9\) did not answer when asked about 'ann/apples'"):
        check_writable(Repository("ann/apples"), "REPO")
