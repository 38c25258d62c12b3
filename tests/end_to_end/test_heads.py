"""Models with a head: classifiers of texts and words, regression and reward models, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_tiny_encoder
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

GOOD, BAD = "jumps over", "sleeps on"


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random BERT; not to be written to."""
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture
def model(request: pytest.FixtureRequest, tiny_model: Path, tiny_encoder: Path) -> Path:
    return {"decoder": tiny_model, "encoder": tiny_encoder}[getattr(request, "param", "decoder")]


BOTH = pytest.mark.parametrize("model", ["decoder", "encoder"], indirect=True)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(count: int = 64, **more: Any) -> list[dict[str, Any]]:
    """Texts of which every other one is good."""
    return [
        {"text": f"the fox {BAD if n % 2 else GOOD} the dog {n // 2}", "label": "bad" if n % 2 else "good", **more}
        for n in range(count)
    ]


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    """A recipe without an output that classifies."""
    write(tmp_path / "rows.jsonl", labelled())
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {model}\ndata: {{train: {tmp_path / 'rows.jsonl'}, eval: 25%}}\nobjective: classification\n"
        "training: {learning_rate: 0.02, batch_size: 8, epochs: 4, logging_steps: 1}\nprecision: fp32\n"
        "method: {num_blocks: 4}\n"
    )
    return path


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def last(run: Path, figure: str) -> float:
    return record_of(run)["training"]["held_out_figures"][figure][-1][1]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def asked(diablo: Any, run: Path, *texts: str) -> list[dict[str, Any]]:
    status, out, err = diablo("classify", run, *texts, "--json")
    assert status == 0, err
    return json.loads(out)["answers"]


def logits(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(text, return_tensors="pt")).logits


@BOTH
@pytest.mark.parametrize(
    "method",
    [
        "{num_blocks: 4}",
        "{name: lora, r: 4}",
        "{name: miss, r: 4}",
        "{name: full}",
        "{name: peft, type: IA3, feedforward_modules: []}",
    ],
)
def test_a_classifier_learns_with_each_method_and_labels_texts(diablo, recipe, tmp_path, method):
    run = tmp_path / "run"
    rate = {"full": 2e-3, "IA3": 0.1}.get(next((name for name in ("full", "IA3") if name in method), ""), 0.02)
    settings = [f"method={method}", f"output={run}", f"training.learning_rate={rate}", "training.epochs=12"]
    status, out, err = diablo("train", recipe, *settings)
    assert status == 0, err
    assert "held-out accuracy" in out
    assert f'diablo classify {run} "..."' in out
    # Of the 16 held-out rows the weakest learners miss two.
    assert last(run, "accuracy") > 0.8
    assert last(run, "macro_f1") > 0.8
    answers = asked(diablo, run, f"the dog {GOOD} the fox 3", f"the fox {BAD} the dog 70")
    assert [answer["label"] for answer in answers] == ["good", "bad"]
    assert answers[0]["probability"] > 0.5
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1)


@BOTH
def test_the_head_is_saved_with_the_adapter_and_merged_and_peft_loads_it(diablo, model, recipe, tmp_path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert diablo("train", recipe, f"output={run}")[0] == 0
    status, out, err = diablo("merge", run, merged)
    assert status == 0, err
    assert "Its logits differ" in out
    config = AutoConfig.from_pretrained(run / "adapter")
    assert config.id2label == {0: "bad", 1: "good"}
    base = AutoModelForSequenceClassification.from_pretrained(model, config=config, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, run / "adapter")
    whole = AutoModelForSequenceClassification.from_pretrained(merged)
    assert whole.config.id2label == config.id2label
    assert whole.config.pad_token_id == AutoTokenizer.from_pretrained(model).pad_token_id
    tokenizer = AutoTokenizer.from_pretrained(merged)
    for text in (f"the fox {GOOD} Ann", f"the dog {BAD} Bob"):
        torch.testing.assert_close(logits(whole, tokenizer, text), logits(adapted, tokenizer, text))
    texts = [f"the fox {GOOD} the dog 5", f"the fox {BAD} the dog"]
    assert [each["label"] for each in asked(diablo, merged, *texts)] == ["good", "bad"]
    card = (run / "adapter" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification" in card
    assert "diablo classify ." in card


@BOTH
def test_a_resumed_classifier_is_that_of_an_undisturbed_run_to_the_bit(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    settings = [f"output={run}", "training.save_steps=8", "training.eval_steps=8"]
    assert diablo("train", recipe, *settings)[0] == 0
    undisturbed, record = weights(run), record_of(run)["training"]
    (run / "run.json").unlink()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-24")
    status, _, err = diablo("train", run / "recipe.yaml", "--resume")
    assert status == 0, err
    assert all(torch.equal(values, undisturbed[name]) for name, values in weights(run).items())
    assert record_of(run)["training"]["held_out_figures"] == record["held_out_figures"]


def test_the_first_values_of_a_head_depend_on_the_seed_alone(diablo, recipe, tmp_path):
    heads = {}
    nothing = ["training.learning_rate=1e-30", "training.max_steps=1"]
    for name, settings in {
        "blocks": ["method={num_blocks: 4}"],
        "lora": ["method={name: lora, r: 2}", "precision=bf16", "training.batch_size=4"],
        "other": ["seed=1"],
    }.items():
        assert diablo("train", recipe, *settings, *nothing, f"output={tmp_path / name}")[0] == 0
        [heads[name]] = [values for key, values in weights(tmp_path / name).items() if "score" in key]
        assert heads[name].dtype == torch.float32
    # The base weights of the second run are bf16, and its head begins as they are.
    assert torch.equal(heads["blocks"].bfloat16().float(), heads["lora"])
    assert not torch.equal(heads["blocks"], heads["other"])


def test_training_goes_on_from_a_classifier_and_from_a_merged_one_with_its_head(diablo, recipe, tmp_path):
    first, second, third, merged = (tmp_path / name for name in ("first", "second", "third", "merged"))
    assert diablo("train", recipe, f"output={first}")[0] == 0
    ended = record_of(first)["training"]["held_out_loss"][-1][1]
    text = recipe.read_text().replace("method: {num_blocks: 4}\n", "")
    recipe.write_text(text)
    status, _, err = diablo("train", recipe, f"adapter={first}", f"output={second}")
    assert status == 0, err
    assert record_of(second)["recipe"]["method"]["name"] == "diablo"
    assert record_of(second)["training"]["held_out_loss"][0][1] == pytest.approx(ended, abs=1e-5)
    assert diablo("merge", first, merged)[0] == 0
    own = [f"model={merged}", "method={num_blocks: 4}", f"output={third}"]
    status, out, _ = diablo("train", recipe, *own, "--dry-run")
    assert status == 0
    assert "head                the model's own, gone on with: score, trained whole" in out
    assert diablo("train", recipe, *own)[0] == 0
    assert record_of(third)["training"]["held_out_loss"][0][1] == pytest.approx(ended, abs=1e-5)
    assert not record_of(third)["training"]["head"]["was_new"]


def test_a_head_of_other_labels_is_replaced_by_a_new_one(diablo, recipe, tmp_path):
    first, second, merged = (tmp_path / name for name in ("first", "second", "merged"))
    assert diablo("train", recipe, f"output={first}")[0] == 0
    assert diablo("merge", first, merged)[0] == 0
    rows = [{**row, "label": row["label"] == "good"} for row in labelled()]
    write(tmp_path / "rows.jsonl", rows)
    status, out, _ = diablo("train", recipe, f"model={merged}", f"output={second}", "--dry-run")
    assert status == 0
    assert "head                new: score" in out
    assert "labels              false" in out
    assert diablo("train", recipe, f"model={merged}", f"output={second}", "training.epochs=6")[0] == 0
    assert record_of(second)["training"]["held_out_loss"][0][1] > 0.5
    assert last(second, "accuracy") == 1.0


@BOTH
def test_pairs_of_texts_are_classified(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    rows = [
        {"text": f"the fox {n // 2}", "text_pair": f"it {BAD if n % 2 else GOOD} Ann", "label": n % 2}
        for n in range(64)
    ]
    write(tmp_path / "rows.jsonl", rows)
    assert diablo("train", recipe, f"output={run}", "training.epochs=6")[0] == 0
    assert last(run, "accuracy") == 1.0
    pair = json.dumps({"text": "the fox 80", "text_pair": f"it {BAD} Ann"})
    assert asked(diablo, run, pair)[0]["label"] == "1"


def test_a_text_may_have_several_labels(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    rows = [
        {
            "text": f"the {'fox' if n % 2 else 'quick brown'} {'dog' if n % 3 else 'apples'} {n // 6}",
            "label": ["fox"] * (n % 2) + ["dog"] * (n % 3 > 0),
        }
        for n in range(96)
    ]
    write(tmp_path / "rows.jsonl", rows)
    objective = "objective={name: classification, multi_label: true}"
    assert diablo("train", recipe, objective, f"output={run}", "training.epochs=10")[0] == 0
    assert last(run, "accuracy") > 0.9
    both, neither = asked(diablo, run, "the fox dog 4", "the quick brown apples 4")
    assert (sorted(both["labels"]), neither["labels"]) == (["dog", "fox"], [])
    assert "none of the labels" in diablo("classify", run, "the quick brown apples 4")[1]


@BOTH
def test_a_regression_gives_numbers(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    rows = [{"text": row["text"], "label": 3.5 if row["label"] == "good" else -1} for row in labelled(96)]
    write(tmp_path / "rows.jsonl", rows)
    status, out, err = diablo("train", recipe, "objective=regression", f"output={run}", "training.epochs=16")
    assert status == 0, err
    assert "held-out pearson" in out
    assert last(run, "pearson") > 0.95
    high, low = asked(diablo, run, f"the fox {GOOD} the dog 5", f"the fox {BAD} the dog 6")
    assert high["score"] == pytest.approx(3.5, abs=1)
    assert low["score"] == pytest.approx(-1, abs=1)
    assert diablo("merge", run, tmp_path / "merged")[0] == 0
    [again] = asked(diablo, tmp_path / "merged", f"the fox {GOOD} the dog 5")
    # A merged model is of no run, and is read in what the machine is best at.
    assert again["score"] == pytest.approx(high["score"], abs=0.05)


@pytest.mark.parametrize("chat", ["true", "false"])
def test_a_reward_model_scores_the_better_completion_higher(diablo, recipe, tmp_path, chat):
    run = tmp_path / "run"
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"the fox {GOOD} {n}", "rejected": f"the fox {BAD} {n}"}
        for n in range(64)
    ]
    write(tmp_path / "rows.jsonl", rows)
    settings = ["objective=reward", f"chat={chat}", f"output={run}", "method={num_blocks: 4, dropout: 0.1}"]
    status, out, err = diablo("train", recipe, *settings)
    assert status == 0, err
    assert "held-out margin" in out
    assert last(run, "accuracy") == 1.0
    assert last(run, "margin") > 0
    completions = [json.dumps({"prompt": "What is 70?", "completion": f"the fox {what} 70"}) for what in (GOOD, BAD)]
    better, worse = asked(diablo, run, *completions)
    assert better["score"] > worse["score"]
    assert diablo("merge", run, tmp_path / "merged")[0] == 0
    assert "trl" not in (run / "adapter" / "config.json").read_text().lower()


TAGS = {"Ann": "PERSON", "Bob": "PERSON", "fox": "ANIMAL", "dog": "ANIMAL"}


@BOTH
def test_words_are_labelled(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    names = list(TAGS)
    rows = []
    for n in range(64):
        words = [str(n), names[n % 4], "gave", names[(n // 4 + n) % 4], "apples"]
        rows.append({"tokens": words, "ner_tags": [TAGS.get(word, "O") for word in words]})
    write(tmp_path / "rows.jsonl", rows)
    status, _, err = diablo("train", recipe, "objective=token_classification", f"output={run}", "training.epochs=8")
    assert status == 0, err
    assert last(run, "accuracy") > 0.95
    [answer] = asked(diablo, run, "7 Ann gave fox apples")
    labels = {each["word"]: each["label"] for each in answer["words"]}
    assert labels["Ann"] == "PERSON"
    assert labels["fox"] == "ANIMAL"
    assert "Ann/PERSON" in diablo("classify", run, "7 Ann gave fox apples")[1]
    assert diablo("merge", run, tmp_path / "merged")[0] == 0
    assert asked(diablo, tmp_path / "merged", "7 Ann gave fox apples")[0]["words"][1]["label"] == "PERSON"


def test_texts_to_classify_come_from_files_and_standard_input_too(diablo, recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert diablo("train", recipe, f"output={run}")[0] == 0
    texts = [f"the fox {GOOD} the dog 5", f"the fox {BAD} the dog 6"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n\n")
    write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    for file in ("texts.txt", "texts.jsonl"):
        status, out, err = diablo("classify", run, "--file", tmp_path / file)
        assert status == 0, err
        assert [line.split()[0] for line in out.splitlines()] == ["good", "bad"]
    with (tmp_path / "texts.txt").open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert [line.split()[0] for line in diablo("classify", run)[1].splitlines()] == ["good", "bad"]
    assert "give the one or the other" in diablo("classify", run, "x", "--file", tmp_path / "texts.txt")[2]
    assert "text is empty" in diablo("classify", run, " ", "x")[2]


@pytest.mark.parametrize("model", ["encoder"], indirect=True)
def test_long_texts_are_left_out_or_cut_as_the_recipe_says(diablo, recipe, tmp_path):
    rows = [*labelled(24), {"text": "the dog " * 40, "label": "bad"}, {"text": "the fox " * 10, "label": "good"}]
    write(tmp_path / "rows.jsonl", rows)
    common = ["train", recipe, "data.eval=null", f"output={tmp_path / 'run'}"]
    # The model itself reads no more than 64 tokens.
    assert "too long, left out  row 25" in diablo(*common, "--dry-run")[1]
    cut = diablo(*common, "--dry-run", "data.on_long=truncate", "training.max_length=16")[1]
    assert "too long, cut       2 rows" in cut
    assert "training rows       26" in cut
    assert "and the model reads 64 tokens; 1 of 26 rows" in diablo(*common, "data.on_long=error")[2]
    assert diablo(*common, "data.on_long=truncate", "training.max_length=16")[0] == 0
    assert asked(diablo, tmp_path / "run", "the dog " * 40)[0]["label"] in ("good", "bad")
    assert record_of(tmp_path / "run")["data"]["long_rows_cut"] == 2


@pytest.mark.parametrize(
    ("rows", "settings", "told"),
    [
        ([{"text": f"the fox {n}", "label": "good"} for n in range(8)], [], "all have the label 'good'"),
        (
            labelled(8),
            ["objective={name: classification, labels: [good, fine]}"],
            "have 'bad' as a label",
        ),
        ([{"text": 3, "label": "good"}, *labelled(3)], [], "Row 1: text is a number, not text"),
        ([{"text": "the fox"}, *labelled(3)], [], "needs text and label"),
        ([{"text": "the fox", "label": None}, *labelled(3)], [], "Row 1: label is None"),
        (
            [{"text": "the fox", "label": ["a"]}, *labelled(3)],
            [],
            "multi_label: found false, and 1 rows have",
        ),
        (labelled(8), ["objective={name: classification, multi_label: true}"], "have a label that is no list"),
        (labelled(8), ["objective=regression"], "label is 'good', no finite number"),
        (labelled(8), ["objective=reward"], "it has what objective: classification needs"),
        (labelled(8), ["training.packing=true"], "training.packing: found true, which is for objective: sft"),
        (labelled(8), ["training.label_smoothing=0.1"], "training.label_smoothing: found 0.1, which is for"),
        (labelled(8), ["chat=true"], "chat: found True, which objective classification has no use for"),
        (labelled(8), ["evaluation.tasks=[mawps]"], "evaluation.tasks: found ['mawps'], which objective"),
        (labelled(8), ["evaluation.general=builtin"], "evaluation.general: found 'builtin', which objective"),
        (labelled(8), ["task=mawps", "data.train=null", "data.eval=null"], "whose rows have one completion each"),
        (labelled(8), ["objective={name: classification, labels: [a, a]}"], "name each label once"),
        (
            labelled(8),
            ["objective=sft", "data.on_long=truncate"],
            "found truncate, and with objective sft",
        ),
        (labelled(8), ["method={name: peft, type: PROMPT_TUNING, num_virtual_tokens: 4}"], "trains no module whole"),
    ],
)
def test_what_cannot_be_classified_is_refused_before_the_model_is_read(diablo, recipe, tmp_path, rows, settings, told):
    write(tmp_path / "rows.jsonl", rows)
    common = [f"output={tmp_path / 'run'}", "data.eval=null", *settings]
    status, _, err = diablo("train", recipe, *common, "model=no/such-model")
    assert status == 2
    assert told in err
    assert not (tmp_path / "run").exists()


def test_held_out_labels_that_training_does_not_have_are_refused(diablo, recipe, tmp_path):
    write(tmp_path / "held-out.jsonl", [{"text": "the fox", "label": "fine"}, *labelled(2)])
    status, _, err = diablo("train", recipe, f"data.eval={tmp_path / 'held-out.jsonl'}", f"output={tmp_path / 'run'}")
    assert status == 2
    assert "1 held-out rows have 'fine' as a label (held-out.jsonl: row 1)" in err
    assert "the training rows have 'bad', 'good'; give training rows of them" in err


def test_verbs_that_write_refuse_a_classifier_and_name_the_one_that_asks_it(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    assert diablo("train", recipe, f"output={run}", "training.max_steps=1")[0] == 0
    for verb, *rest in (
        ("generate", run, "x"),
        ("chat", run),
        ("evaluate", run, "--task", "mawps"),
        ("export gguf", run, tmp_path / "model.gguf"),
        ("export ollama", run, tmp_path / "ollama"),
        ("to-lora", run, tmp_path / "lora", "--rank", 2),
    ):
        status, _, err = diablo(*verb.split(), *rest)
        assert status == 2
        assert f"so that diablo {verb} has no use for it; ask it with: diablo classify {run} TEXT" in err


def test_a_language_model_is_no_classifier_and_a_classifier_no_language_model(diablo, recipe, tmp_path, tiny_model):
    status, _, err = diablo("classify", tiny_model, "x")
    assert status == 2
    assert "has no head that labels or scores it; ask it with diablo generate" in err
    run = tmp_path / "run"
    assert diablo("train", recipe, f"output={run}", "training.max_steps=1")[0] == 0
    assert diablo("merge", run, tmp_path / "merged")[0] == 0
    write(tmp_path / "rows.jsonl", [{"prompt": f"{n}?", "completion": " yes"} for n in range(8)])
    status, _, err = diablo(
        "train", recipe, f"model={tmp_path / 'merged'}", "objective=sft", f"output={tmp_path / 'sft'}"
    )
    assert status == 2
    assert "has a head that labels or scores texts and none that writes; set objective to classification" in err


def test_the_step_of_the_best_accuracy_is_kept_where_the_score_says_which_is_best(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    settings = ["training.best_by=score", "training.keep=best", "training.eval_steps=2", f"output={run}"]
    # So high a rate makes the accuracy go up and down.
    status, out, err = diablo("train", recipe, *settings, "training.learning_rate=0.3")
    assert status == 0, err
    training = record_of(run)["training"]
    accuracies = dict(training["held_out_figures"]["accuracy"][1:])
    assert dict(training["validation_score"]) == accuracies
    assert accuracies[training["kept_step"]] == max(accuracies.values())
    assert "validation" not in out
    said = diablo("train", recipe, *settings, "--dry-run")[1]
    assert "kept                the step of the best accuracy on the held-out rows" in said


def test_a_classifier_in_bf16_is_trained_in_fp32_and_read_in_bf16(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    assert diablo("train", recipe, "precision=bf16", f"output={run}")[0] == 0
    assert {values.dtype for values in weights(run).values()} == {torch.float32}
    assert last(run, "accuracy") == 1.0
    assert [each["label"] for each in asked(diablo, run, f"the fox {GOOD} the dog 5")] == ["good"]


def test_the_size_of_a_classifier_is_told_from_its_config(diablo, recipe, tmp_path, tiny_model):
    status, out, err = diablo("plan", recipe, f"output={tmp_path / 'run'}", "--json")
    assert status == 0, err
    # The head of two labels takes the place of the output layer.
    kinds = [target["kind"] for target in json.loads(out)["targets"]]
    assert "score" in kinds


@BOTH
def test_the_head_of_a_quantized_model_is_trained_unquantized(diablo, recipe, tmp_path):
    pytest.importorskip("bitsandbytes")
    run = tmp_path / "run"
    status, out, err = diablo("train", recipe, "quantization=nf4", "training.max_steps=2", f"output={run}")
    assert status == 0, err
    assert f"diablo merge {run} {run}-merged --into stored\n" in out
    # Packed weights hold fewer tensors' entries than the model has parameters.
    plain = json.loads(diablo("train", recipe, f"output={tmp_path / 'plain'}", "--dry-run", "--json")[1])
    assert json.loads((run / "run.json").read_text())["parameters"] == plain["parameters"]
    heads = {key: values for key, values in weights(run).items() if any(part in key for part in ("score", "pooler"))}
    assert {values.dtype for values in heads.values()} == {torch.float32}
    assert asked(diablo, run, f"the fox {GOOD} the dog 5")[0]["label"] in ("good", "bad")
    assert diablo("merge", run, tmp_path / "merged", "--into", "stored")[0] == 0
    status, _, err = diablo("merge", run, tmp_path / "other", "--into", "dequantized")
    assert (status, "the adapter has a head in place of the output layer" in err) == (2, True)
