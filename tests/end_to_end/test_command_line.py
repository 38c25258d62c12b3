"""Every verb of the command line, on a tiny random Llama and real word problems."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from diablo.data import Row
from diablo.models import checkpointing
from diablo.models.ready import load_for_generation

SHORT = [
    "data.limit=48",
    "evaluation.limit=6",
    "training.max_steps=4",
    "training.batch_size=8",
    "training.logging_steps=1",
    "training.warmup_steps=0",
    "precision=fp32",
    "merge=false",
]


RUN_FILES = ("run.json", "train.jsonl", "train.log", "recipe.yaml", "loss.png", "checkpoints")


def quickstart_on(model: Path, output: Path, *overrides: str) -> list[str]:
    return ["train", "quickstart", f"model={model}", f"output={output}", "method.num_blocks=4", *SHORT, *overrides]


def test_every_verb_from_training_to_a_merged_model(diablo, tiny_model, tmp_path):
    run = tmp_path / "run"
    status, out, _ = diablo(*quickstart_on(tiny_model, run, "training.learning_rate=1e-2"))
    assert status == 0
    assert "accuracy before" in out
    assert "accuracy after" in out
    assert (run / "loss.png").stat().st_size > 1000
    record = json.loads((run / "run.json").read_text())
    assert record["training"]["steps"] == 4
    assert len(record["training"]["loss"]) == 4
    held_out = [loss for _, loss in record["training"]["held_out_loss"]]
    assert held_out[-1] < held_out[0]
    assert record["parameters"]["trainable"] == sum(v.numel() for v in blocks_of(run).values())
    # torch itself may also name the build, such as +cu130.
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert record["data"]["rows"] == 48

    status, out, _ = diablo("evaluate", run, "--limit", 6, "--batch-size", 4)
    assert status == 0
    assert f"({record['scores']['after']['mawps']['right']} of 6)" in out

    merged = tmp_path / "merged"
    status, out, _ = diablo("merge", run, merged)
    assert status == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    new = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    changed = {name for name in base if not torch.equal(base[name], new[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}

    lora = tmp_path / "lora"
    status, out, _ = diablo("to-lora", run, lora, "--rank", "1.0")
    assert status == 0
    assert "differs by 0.0%" in out.replace("\n", " ")
    status, _, error = diablo("to-lora", run, tmp_path / "other", "--rank", "many")
    assert status == 2
    assert "--rank: found 'many'" in error

    texts = []
    for model in (run / "adapter", merged):
        status, out, _ = diablo("generate", model, "Problem: 2 and 3 ?\nEquation:", "--max-new-tokens", 8)
        assert status == 0
        texts.append(out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("checkpoint", ["none", "selective"])
@pytest.mark.parametrize(
    "method",
    # 10 does not divide the inputs, as MiSS would rather have it.
    [*(f"{{name: {name}, r: 2}}" for name in ("lora", "rslora", "dora", "pissa")), "{name: miss, r: 10}", "full"],
    ids=["lora", "rslora", "dora", "pissa", "miss", "full fine-tuning"],
)
def test_other_methods_run_in_the_same_harness(diablo, tiny_model, tmp_path, method, checkpoint):
    run = tmp_path / "run"
    arguments = [a for a in quickstart_on(tiny_model, run, "training.learning_rate=1e-2") if "num_blocks" not in a]
    arguments += [f"method={method}", f"training.gradient_checkpointing={checkpoint}"]
    status, _, _ = diablo(*arguments, "evaluation.before=false", "evaluation.after=false")
    assert status == 0
    record = json.loads((run / "run.json").read_text())
    held_out = [loss for _, loss in record["training"]["held_out_loss"]]
    assert held_out[-1] < held_out[0]
    assert (record["parameters"]["share"] == 1) == (method == "full")
    # Nothing else is left, and what is left can be loaded.
    assert {path.name for path in run.iterdir()} <= {*RUN_FILES, "model" if method == "full" else "adapter"}
    assert diablo("generate", run, "Problem: 2 and 3 ?", "--max-new-tokens", 4)[0] == 0


@pytest.mark.parametrize("checkpoint", ["none", "selective"])
def test_a_resumed_run_ends_with_the_same_adapter_to_the_bit(diablo, tiny_model, tmp_path, monkeypatch, checkpoint):
    monkeypatch.setattr(checkpointing, "SHORT_SUM", 8)
    run = tmp_path / "run"
    no_scores = ["evaluation.before=false", "evaluation.after=false", "training.save_steps=2"]
    no_scores.append(f"training.gradient_checkpointing={checkpoint}")
    arguments = quickstart_on(tiny_model, run, *no_scores, "method.dropout=0.1")
    assert diablo(*arguments)[0] == 0
    undisturbed = blocks_of(run)
    # As a run that was killed after its third step leaves the folder.
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    (run / "run.json").unlink()

    status, _, err = diablo(*arguments)
    assert status == 2
    assert "--resume" in err
    assert diablo(*arguments, "--resume")[0] == 0
    resumed = blocks_of(run)
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert any(bool(values.any()) for values in resumed.values())


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(diablo, tiny_model, tmp_path):
    no_scores = ["evaluation.before=false", "evaluation.after=false"]
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        run = tmp_path / str(number)
        assert diablo(*quickstart_on(tiny_model, run, *no_scores, f"seed={seed}"))[0] == 0
        runs.append(blocks_of(run))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_gradient_accumulation_and_checkpointing_change_memory_not_the_result(
    diablo, tiny_model, tmp_path, monkeypatch
):
    # The tiny model's products are of shorter sums than are worth keeping.
    monkeypatch.setattr(checkpointing, "SHORT_SUM", 8)
    no_scores = ["evaluation.before=false", "evaluation.after=false"]
    variants = {
        "plain": [],
        "accumulated": ["training.batch_size=2", "training.gradient_accumulation=4"],
        "selective": ["training.gradient_checkpointing=selective"],
        "full": ["training.gradient_checkpointing=full"],
    }
    blocks = {}
    for name, overrides in variants.items():
        assert diablo(*quickstart_on(tiny_model, tmp_path / name, *no_scores, *overrides))[0] == 0
        blocks[name] = blocks_of(tmp_path / name)
    for name, values in blocks["plain"].items():
        assert torch.equal(blocks["selective"][name], values)
        assert torch.equal(blocks["full"][name], values)
        torch.testing.assert_close(blocks["accumulated"][name], values, rtol=1e-3, atol=1e-5)


def test_validation_rows_and_the_loss_of_general_text_are_recorded(diablo, tiny_model, tmp_path):
    run, text = tmp_path / "run", tmp_path / "general.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n\nAnd the dog sleeps on.")
    settings = ["data.validation_rows=10", "data.held_out=validation", f"evaluation.general={text}"]
    no_scores = ["evaluation.before=false", "evaluation.after=false"]
    status, out, _ = diablo(*quickstart_on(tiny_model, run, *no_scores, *settings, "training.learning_rate=1e-2"))
    assert status == 0
    record = json.loads((run / "run.json").read_text())
    assert (record["data"]["held_out_rows"], record["data"]["validation_rows"]) == (10, 10)
    general = record["general_loss"]
    assert general["before"] != general["after"]
    assert f"forgetting {general['after'] - general['before']:+.3f}" in out
    assert 0 < record["training"]["peak_memory_bytes"] <= record["peak_memory_bytes"]
    status, out, _ = diablo(*quickstart_on(tiny_model, tmp_path / "other", *settings), "--dry-run")
    assert "validation rows     10 kept out of training" in out
    assert "general text        2 rows" in out


def test_a_dry_run_reads_no_weights_and_marks_tokens(diablo, tiny_model, tmp_path):
    without_weights = tmp_path / "model"
    shutil.copytree(tiny_model, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    status, out, _ = diablo(*quickstart_on(without_weights, tmp_path / "run"), "--dry-run")
    assert status == 0
    for expected in ("q_proj", "4 blocks of", "trained parameters", "steps               4", "effective batch     8"):
        assert expected in out
    assert out.count("Problem:") == 2
    assert "‹" in out
    assert not (tmp_path / "run").exists()
    # As diablo plan has it for rows of that length.
    memory, longest = re.search(r"memory {14}about (.*) at the longest batch, 8 x (\d+) tokens", out).groups()
    _, *arguments = quickstart_on(without_weights, tmp_path / "run", f"training.max_length={longest}")
    planned = diablo("plan", *arguments)[1]
    assert re.search(r"│ total +│ (.*?) +│", planned)[1] == memory


def own_data(folder: Path, model: Path, *rows: object, chat: bool) -> list[str]:
    """The arguments of a short run on rows of one's own."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\nchat: {json.dumps(chat)}\noutput: {folder / 'run'}\nmethod: {{num_blocks: 4, name: diablo}}\n"
        f"data: {{train: {path}}}\ntraining: {{max_steps: 1}}\n"
    )
    return ["train", str(recipe)]


def test_a_dry_run_says_each_reason_for_leaving_out_rows_once(diablo, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = model / "chat_template.jinja"
    refusing = "{% if messages[0]['content'] == 'be brief' %}{{ raise_exception('Not so, please') }}{% endif %}"
    template.write_text(refusing + template.read_text())
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "first"}]
    refused = {"messages": [{"role": "system", "content": "be brief"}, *turns]}
    rows = [{"messages": turns}, refused, {"prompt": "p", "completion": 3}, refused]
    arguments = [*own_data(tmp_path, model, *rows, chat=True), "--dry-run"]
    status, _, err = diablo(*arguments)
    assert status == 2
    assert "1 malformed of 4 rows. Row 3: completion is a number, not text; put it in quotes, or name" in err
    assert "Mend them, or" in err
    own_data(tmp_path, model, *rows[:2], rows[3], chat=True)
    status, _, err = diablo(*arguments)
    assert status == 2
    assert "2 of 3 training rows cannot be used. Rows 2 and 3: the chat template refuses it and says 'Not so" in err
    own_data(tmp_path, model, *rows, chat=True)
    status, out, _ = diablo(*arguments, "data.on_malformed=skip")
    assert status == 0
    assert "left out row 3: completion is a number, not text" in out
    assert "left out rows 2 and 4: the chat template refuses it and says 'Not so, please'" in out
    assert "training rows       1:" in out


def test_a_template_of_parts_is_trained_on_the_answer(diablo, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<s>{{ m['role'] }}:{{ '' if m['content'][0]['type'] == 'image' else ' ' }}"
        "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}</s>"
        "{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    status, out, _ = diablo(*own_data(tmp_path, model, {"prompt": "q", "completion": "yes"}, chat=True), "--dry-run")
    assert status == 0
    assert "<s>user: q</s><s>assistant:‹ ›‹y›‹es›‹</s>›" in out


def test_special_tokens_in_own_text_are_counted_and_stay_text_where_that_is_asked_for(diablo, tiny_model, tmp_path):
    rows = [{"prompt": "say <s>", "completion": "a</s>b</s>c"}, {"prompt": "q", "completion": "yes"}]
    arguments = own_data(tmp_path, tiny_model, *rows, chat=False)
    status, out, _ = diablo(*arguments, "--dry-run")
    assert status == 0
    assert "1 row spells special tokens, which become these tokens (data.special_text: keep): 2 x </s>, 1 x <s>" in out
    assert "‹a›‹</s>›‹b›‹</s>›‹c›‹</s>›" in out
    status, out, _ = diablo(*arguments, "--dry-run", "data.special_text=plain")
    assert "which stay ordinary text (data.special_text: plain): 2 x </s>, 1 x <s>" in out
    assert "‹a›‹<›‹/›‹s›‹>›‹b›" in out

    status, _, err = diablo(*arguments, "data.special_text=plain")
    assert status == 0
    assert "which stay ordinary text" in err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"]["data"]["special_text"] == "plain"
    assert record["data"]["special_text"] == {"rows": 1, "tokens": {"</s>": 2, "<s>": 1}}
    # What the trained model is asked is tokenized as its training was.
    _, encoder = load_for_generation(str(tmp_path / "run"))
    assert encoder.tokenizer.bos_token_id not in encoder.prompt(Row(1, "say <s>", "?"))


def test_own_data_as_conversations(diablo, tiny_model, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(24)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\ndata: {{train: {data}, eval: {data}}}\nchat: true\nmethod: {{num_blocks: 4}}\n"
        f"training: {{max_steps: 3, learning_rate: 1e-2, eval_steps: 1}}\nprecision: fp32\noutput: {tmp_path / 'run'}\n"
    )
    status, out, err = diablo("train", recipe)
    assert (status, err.count("error")) == (0, 0)
    losses = json.loads((tmp_path / "run" / "run.json").read_text())["training"]["held_out_loss"]
    assert [step for step, _ in losses] == [0, 1, 2, 3]
    assert losses[-1][1] < losses[0][1]
    assert "held-out loss" in out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.learning_rat=1"], "training.learning_rat: unknown key"),
        (["method.target_modules=[q_proj, qq_proj]"], "method.target_modules: qq_proj"),
        (["method.target_modules=[nothing]"], "method.target_modules: nothing"),
        (["method.num_blocks=4096"], "takes at most"),
        (["model=/no/such/folder"], "/no/such/folder"),
        (["model=builtin:other"], "builtin:smollm2-135m"),
        (["task=mawsp"], "task: found 'mawsp'; allowed: mawps"),
        (["precision=fp16"], "precision"),
        (["training.gradient_checkpointing=true"], "found True; allowed: none, selective or full"),
        (["training.max_length=8", "data.on_long=error"], "training.max_length"),
    ],
)
def test_a_fault_is_one_line_with_status_2_and_leaves_nothing(diablo, tiny_model, tmp_path, overrides, expected):
    status, _, err = diablo(*quickstart_on(tiny_model, tmp_path / "run", *overrides))
    assert status == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_of_others_is_not_written_to(diablo, tiny_model, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    status, _, err = diablo(*quickstart_on(tiny_model, tmp_path))
    assert status == 2
    assert "did not write" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_installed_command_shows_no_traceback_and_help_is_light():
    command = Path(sys.executable).with_name("diablo")
    result = subprocess.run([command, "train", "nowhere.yaml"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: There is no recipe file 'nowhere.yaml'")
    assert "Traceback" not in result.stderr
    light = "import sys, diablo_cli.verbs; sys.exit(any(name in sys.modules for name in ('torch', 'peft', 'diablo')))"
    assert subprocess.run([sys.executable, "-c", light], check=False).returncode == 0


def blocks_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_plan_needs_the_config_alone(diablo, tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    status, out, _ = diablo("plan", tmp_path, "--num-blocks", 4, "--length", 32)
    assert status == 0
    assert "4 blocks of 8 x 8" in out
    assert "trained parameters" in out
    assert "learning rate" not in out
    for method in ("DiaBlo, N = 4", "LoRA, r =", "full fine-tuning"):
        assert method in out
    status, out, _ = diablo("plan", tmp_path, "--budget", "5%", "--length", 32)
    assert status == 0
    status, out, _ = diablo("plan", tmp_path, "--num-blocks", 4, "--gradient-checkpointing", "selective")
    assert status == 0
    assert "gradient checkpointing: selective" in out
    status, _, error = diablo("plan", tmp_path, "--gradient-checkpointing", "true")
    assert status == 2
    assert "--gradient-checkpointing: found 'true'; allowed: none, selective, full" in error
    status, _, error = diablo("plan", tmp_path, "--budget", "much")
    assert status == 2
    assert "--budget: found 'much'" in error


def test_plan_takes_a_recipe_and_shows_its_own_method_at_its_own_batch(diablo, tiny_model, tmp_path):
    own = [f"model={tiny_model}", "training.batch_size=3", "training.max_length=40", "precision=fp32"]
    status, out, _ = diablo("plan", "quickstart", *own, "method.num_blocks=4")
    assert status == 0
    assert "4 blocks of 8 x 8" in out
    assert "at 3 x 40 tokens (training.max_length) in float32" in out
    for method in ("DiaBlo, N = 4", "LoRA, r =", "full fine-tuning"):
        assert method in out
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"task: mawps\nmodel: {tiny_model}\noutput: out\nmethod: {{name: dora, r: 2}}\n")
    status, out, _ = diablo("plan", recipe, "training.max_length=16")
    assert status == 0
    assert "rank 2" in out
    assert "DoRA, r = 2" in out
    assert "DiaBlo" not in out
    status, out, _ = diablo("plan", recipe, "training.max_length=16", "method=full")
    assert status == 0
    assert "full fine-tuning" in out


def test_the_output_layer_is_trained_and_merged(diablo, tiny_model, tmp_path):
    run = tmp_path / "run"
    options = ["method.target_modules=[lm_head]", "merge=true", "evaluation.before=false", "evaluation.after=false"]
    status, _, error = diablo(*quickstart_on(tiny_model, run, *options))
    assert status == 0, error
    assert blocks_of(run)["base_model.model.lm_head.diablo_blocks"].any()
    base = AutoModelForCausalLM.from_pretrained(tiny_model).lm_head.weight
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(run / "merged").lm_head.weight, base)


def test_a_run_that_is_shorter_than_logging_steps_has_its_last_loss(diablo, tiny_model, tmp_path):
    run = tmp_path / "run"
    options = ["training.logging_steps=3", "evaluation.before=false", "evaluation.after=false"]
    assert diablo(*quickstart_on(tiny_model, run, *options))[0] == 0
    assert [step for step, _ in json.loads((run / "run.json").read_text())["training"]["loss"]] == [3, 4]


def test_a_multiple_choice_task_is_scored_by_likelihood(diablo, tiny_model, tmp_path):
    records = [
        {
            "instruction": f"Is {n} odd?\n\nAnswer format: true/false",
            "input": "",
            "output": f"the correct answer is {a}",
        }
        | {"answer": a}
        for n, a in enumerate(["false", "true", "false"])
    ]
    (tmp_path / "boolq.test.json").write_text(json.dumps(records))
    answers = tmp_path / "answers.jsonl"
    settings = ["--data-folder", tmp_path, "--likelihood", "--limit", 2, "--out", answers]
    status, out, _ = diablo("evaluate", tiny_model, "--task", "boolq", *settings)
    assert status == 0
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(line["task"], line["target"], len(line["candidates"])) for line in lines] == [
        ("boolq", 1, 2),
        ("boolq", 0, 2),
    ]
    favoured = [max(range(2), key=lambda n: line["candidates"][n]["log_likelihood"]) for line in lines]
    assert [line["right"] for line in lines] == [
        index == line["target"] for index, line in zip(favoured, lines, strict=True)
    ]
    assert [line["text"] for line in lines] == [
        line["candidates"][index]["text"] for index, line in zip(favoured, lines, strict=True)
    ]
    right = sum(line["right"] for line in lines)
    assert f"boolq: acc {right / 2:.1%}, acc_norm" in out
    assert f"({right} of 2)" in out


@pytest.mark.parametrize(
    ("method", "kind", "file"),
    [
        ("{name: peft, type: gralora, r: 8}", "gralora_A 2 x 16 x 8", "gralora_A"),
        ("{name: peft, type: SHIRA, r: 4}", "shira_weight 256", "shira_weight"),
        ("{name: peft, type: PROMPT_TUNING, num_virtual_tokens: 4}", "4 x 32", "prompt_embeddings"),
    ],
)
def test_a_type_of_peft_from_its_plan_to_an_answer(diablo, tiny_model, tmp_path, method, kind, file):
    run = tmp_path / "run"
    arguments = quickstart_on(tiny_model, run, "training.learning_rate=1e-2", "training.save_steps=2")
    arguments = [*(each for each in arguments if not each.startswith("method.")), f"method={method}"]
    status, out, _ = diablo(*arguments, "--dry-run")
    assert status == 0
    assert kind in out
    assert diablo(*arguments)[0] == 0
    record = json.loads((run / "run.json").read_text())
    losses = [loss for _, loss in record["training"]["held_out_loss"]]
    assert losses[-1] < losses[0]
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any(file in name for name in trained)

    # From the checkpoint of half the steps on, the same adapter comes out.
    (run / "run.json").unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    assert diablo(*arguments, "--resume")[0] == 0
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(trained[name], again[name]) for name in trained)

    status, out, _ = diablo("evaluate", run, "--limit", 6)
    assert status == 0
    assert f"({record['scores']['after']['mawps']['right']} of 6)" in out
    assert diablo("generate", run, "Problem: 2 and 3 ?", "--max-new-tokens", 4)[0] == 0
    status, _, error = diablo("merge", run, tmp_path / "merged")
    if "PROMPT" in method:
        assert status == 2
        assert "PROMPT_TUNING cannot be merged into the model" in error
    else:
        assert status == 0


def test_a_merge_that_a_type_of_peft_has_not_is_refused_before_training(diablo, tiny_model, tmp_path):
    settings = ("merge=true", "training.learning_rate=1e-3", "method={name: peft, type: LILY}")
    arguments = quickstart_on(tiny_model, tmp_path / "run", *settings)
    status, _, error = diablo(*(each for each in arguments if each != "method.num_blocks=4"))
    assert status == 2
    assert "merge: found true: LILY cannot be merged" in error
    assert not (tmp_path / "run").exists()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def base_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A base model as many are: its end of text is not what a chat template ends turns with, and it has no template."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (model / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.resize_token_embeddings(len(tokenizer))
    loaded.save_pretrained(model)
    return model


@pytest.mark.parametrize("method", ["diablo", "full"])
def test_a_template_of_the_recipe_and_its_end_of_turn_go_wherever_the_model_goes(diablo, base_model, tmp_path, method):
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML)
    arguments = own_data(tmp_path, base_model, {"prompt": "q", "completion": "yes"}, chat=True)
    arguments += ["method.num_blocks=4"] if method == "diablo" else ["method=full"]
    status, _, err = diablo(*arguments)
    assert status == 2
    assert "the model's tokenizer has no chat template: give one with chat_template" in err
    status, _, err = diablo(*arguments, f"chat_template={template}", "merge=true")
    assert status == 0
    nothing = f"merge: there is nothing to merge; full fine-tuning writes a whole model, {tmp_path / 'run' / 'model'}."
    assert (nothing in err) == (method == "full")
    template.unlink()  # the run has it, whatever becomes of the file

    run = tmp_path / "run"
    _, encoder = load_for_generation(str(run))
    ends = set(encoder.tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    assert encoder.stop_token_ids == ends
    asked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert encoder.tokenizer.decode(encoder.prompt(Row(1, "q", "?"))) == asked
    written = [run / "merged", tmp_path / "again"] if method == "diablo" else [run / "model"]
    if method == "diablo":
        assert diablo("merge", run, written[1])[0] == 0
    for folder in written:
        assert set(GenerationConfig.from_pretrained(folder).eos_token_id) == ends
        assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_a_run_of_a_gpu_is_asked_on_a_machine_without_one(diablo, tiny_model, tmp_path):
    run = tmp_path / "run"
    no_scores = ["evaluation.before=false", "evaluation.after=false", "training.max_steps=1"]
    assert diablo(*quickstart_on(tiny_model, run, *no_scores))[0] == 0
    record = json.loads((run / "run.json").read_text())
    record["recipe"] |= {"attention": "flash_attention_2", "precision": "fp16"}
    (run / "run.json").write_text(json.dumps(record))
    assert diablo("generate", run, "Problem: 2 and 3 ?", "--max-new-tokens", 2)[0] == 0


def test_a_model_without_a_run_stops_where_its_generation_config_says(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    GenerationConfig(eos_token_id=[1, 7]).save_pretrained(model)
    _, encoder = load_for_generation(str(model))
    assert encoder.stop_token_ids == {1, 7}


def test_the_plan_says_how_many_rows_conversations_became_and_why(diablo, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = model / "chat_template.jinja"
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    marking = template.read_text().replace(
        "{{ message['content'] }}", "{{ message['content'] }}{{ '.' if not loop.last }}"
    )
    template.write_text(refusing + marking)
    question, answer = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "first"}
    system = {"role": "system", "content": "be brief"}
    rows = [{"messages": [question, answer]}, {"messages": [system, question, answer, question, answer]}]
    status, out, _ = diablo(*own_data(tmp_path, model, *rows, chat=True), "--dry-run")
    assert status == 0
    out = " ".join(out.split())
    assert "training rows 3:" in out
    assert "conversations 1 became 2 rows, so that each answer has the context that generation gives it: the" in out
    assert "the chat template rewrites earlier turns" in out
    assert "conversations 1 have the system's text before the first question: the chat template refuses it" in out
