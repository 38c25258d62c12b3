"""Embedding models: trained on texts that belong together, merged for sentence-transformers, and asked for vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_encoder

sentence_transformers = pytest.importorskip("sentence_transformers")

WORDS = ("fox", "dog", "Ann", "Bob", "apples", "cat", "mouse", "Rome")


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random BERT; not to be written to."""
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture
def model(request: pytest.FixtureRequest, tiny_model: Path, tiny_encoder: Path) -> Path:
    return {"decoder": tiny_model, "encoder": tiny_encoder}[getattr(request, "param", "encoder")]


BOTH = pytest.mark.parametrize("model", ["decoder", "encoder"], indirect=True)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int = 96) -> list[dict[str, Any]]:
    """A text and another with the same word and number."""
    return [
        {"anchor": f"the {WORDS[n % 8]} {n // 8}", "positive": f"{n // 8} {WORDS[n % 8]} it jumps"}
        for n in range(count)
    ]


def triplets(count: int = 32) -> list[dict[str, Any]]:
    return [{**row, "negative": f"{n} {WORDS[(n + 1) % 8]} sleeps"} for n, row in enumerate(pairs(count))]


def scored(count: int = 64, key: str = "score") -> list[dict[str, Any]]:
    """Two texts, which are near where they have the same word."""
    return [
        {
            "sentence1": f"the {WORDS[n % 8]} {n}",
            "sentence2": f"it jumps {WORDS[(n + n % 2) % 8]} {n}",
            key: 1 - n % 2,
        }
        for n in range(count)
    ]


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    """A recipe without an output, on pairs."""
    write(tmp_path / "rows.jsonl", pairs())
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {model}\ndata: {{train: {tmp_path / 'rows.jsonl'}, eval: 25%}}\nobjective: embedding\n"
        "training: {learning_rate: 0.02, batch_size: 8, epochs: 4, logging_steps: 1}\nprecision: fp32\n"
        "method: {num_blocks: 4}\n"
    )
    return path


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def figures(run: Path, name: str) -> tuple[float, float]:
    """A figure of held-out rows before and after training."""
    values = record_of(run)["training"]["held_out_figures"][name]
    return values[0][1], values[-1][1]


def asked(diablo: Any, run: Path, *texts: str) -> torch.Tensor:
    status, out, err = diablo("embed", run, *texts, "--json")
    assert status == 0, err
    return torch.tensor([each["embedding"] for each in json.loads(out)["vectors"]])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@BOTH
@pytest.mark.parametrize("method", ["{num_blocks: 4}", "{name: lora, r: 4}", "{name: full}"])
def test_texts_that_belong_together_are_found_after_training_with_each_method(diablo, recipe, tmp_path, method):
    run = tmp_path / "run"
    rate = 5e-3 if "full" in method else 0.02
    status, out, err = diablo(
        "train", recipe, f"method={method}", f"output={run}", f"training.learning_rate={rate}", "training.epochs=8"
    )
    assert status == 0, err
    assert "held-out accuracy at 1" in out
    assert f'diablo embed {run} "..."' in out
    for name in ("accuracy_at_1", "mrr_at_10", "ndcg_at_10"):
        before, after = figures(run, name)
        assert after > before + 0.3, name
    near, far = (
        torch.cosine_similarity(*asked(diablo, run, "the fox 3", text).split(1)).item()
        for text in ("3 fox it jumps", "7 Rome it jumps")
    )
    assert near > far
    assert record_of(run)["training"]["head"]["kind"] == "embedding"


@BOTH
def test_the_merged_model_is_one_of_sentence_transformers_and_gives_the_vectors_of_the_adapter(
    diablo, recipe, tmp_path
):
    run, texts = tmp_path / "run", ["the fox 3", "Ann it jumps", "dog " * 200]
    objective = "objective={name: embedding, query_prompt: 'find the ', document_prompt: 'it is '}"
    status, _, err = diablo("train", recipe, objective, f"output={run}", "merge=true", "training.max_length=24")
    assert status == 0, err
    merged = sentence_transformers.SentenceTransformer(str(run / "merged"), device="cpu")
    assert merged.max_seq_length == 24
    assert merged.prompts == {"query": "find the ", "document": "it is "}
    torch.testing.assert_close(asked(diablo, run, *texts), torch.tensor(merged.encode(texts)), rtol=1e-4, atol=1e-4)
    status, out, err = diablo("embed", run, "fox", "--prompt", "query")
    assert status == 0, err
    [vector] = torch.tensor(merged.encode_query(["fox"]))
    torch.testing.assert_close(torch.tensor(json.loads(out)["embedding"]), vector, rtol=1e-4, atol=1e-4)
    card = (run / "adapter" / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card
    assert "diablo embed ." in card
    assert "SentenceTransformer" in (run / "merged" / "README.md").read_text()


@pytest.mark.parametrize(
    ("rows", "objective", "loss"),
    [
        (pairs, "{name: embedding, scale: 10}", lambda m: m.losses.MultipleNegativesRankingLoss),
        (triplets, "{name: embedding, loss: triplet, margin: 1}", lambda m: m.losses.TripletLoss),
        (scored, "{name: embedding}", lambda m: m.losses.CoSENTLoss),
        (scored, "{name: embedding, loss: cosine}", lambda m: m.losses.CosineSimilarityLoss),
        (scored, "{name: embedding, loss: contrastive}", lambda m: m.losses.ContrastiveLoss),
    ],
)
@BOTH
def test_the_loss_is_that_of_sentence_transformers_on_the_same_rows(
    request, diablo, recipe, tmp_path, rows, objective, loss
):
    run, kept = tmp_path / "run", write(tmp_path / "kept.jsonl", rows(8))
    write(tmp_path / "rows.jsonl", rows(8))
    nothing = ["training.learning_rate=1e-30", "training.max_steps=1", "merge=true"]
    settings = [f"data.eval={kept}", f"objective={objective}", f"output={run}", *nothing]
    status, _, err = diablo("train", recipe, *settings)
    assert status == 0, err
    merged = sentence_transformers.SentenceTransformer(str(run / "merged"), device="cpu")
    options = {"scale": 10} if "scale" in objective else {"triplet_margin": 1} if "margin" in objective else {}
    *columns, last = zip(*(row.values() for row in rows(8)), strict=True)
    labels = torch.tensor(last) if "score" in rows(1)[0] else None
    texts = columns if labels is not None else [*columns, last]
    theirs = loss(sentence_transformers.sentence_transformer)(merged, **options)
    with torch.no_grad():
        value = theirs([merged.preprocess(list(column)) for column in texts], labels).item()
    training = record_of(run)["training"]
    assert training["held_out_loss"][0][1] == pytest.approx(value, rel=1e-4)
    if "decoder" in request.node.callspec.id:
        # The one step is of the same rows. An encoder drops some of its values in training.
        assert training["loss"][0][1] == pytest.approx(value, rel=1e-3)


def test_nested_vectors_have_the_matryoshka_loss_of_sentence_transformers():
    from diablo.scoring.vectors import make_loss

    class Model(torch.nn.Module):
        def forward(self, features):
            return {"sentence_embedding": features["input"]}

        def get_embedding_dimension(self):
            return 16

    losses = sentence_transformers.sentence_transformer.losses
    columns = [torch.randn(6, 16, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    theirs = losses.MatryoshkaLoss(Model(), losses.MultipleNegativesRankingLoss(Model()), [16, 8, 4])
    theirs.loss.model = theirs.model
    ours = make_loss("multiple_negatives", scale=None, margin=None, sizes=[16, 8, 4])(columns, None)
    assert ours.item() == pytest.approx(theirs([{"input": each} for each in columns], None).item(), rel=1e-5)


def test_the_figures_are_those_of_the_evaluators_of_sentence_transformers(diablo, recipe, tmp_path):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    run = tmp_path / "run"
    # An anchor has two right answers, and a text stands in two rows.
    rows = [*pairs(40), {"anchor": "the fox 0", "positive": "Rome it sleeps"}, {**pairs(1)[0], "anchor": "a mouse"}]
    kept = write(tmp_path / "kept.jsonl", rows)
    assert diablo("train", recipe, f"data.eval={kept}", f"output={run}", "merge=true", "training.epochs=1")[0] == 0
    merged = sentence_transformers.SentenceTransformer(str(run / "merged"), device="cpu")
    right: dict[str, set[str]] = {}
    for row in rows:
        right.setdefault(row["anchor"], set()).add(row["positive"])
    evaluator = InformationRetrievalEvaluator(
        {text: text for text in right}, {row["positive"]: row["positive"] for row in rows}, right, write_csv=False
    )
    theirs = evaluator(merged)
    assert figures(run, "accuracy_at_1")[1] == pytest.approx(theirs["cosine_accuracy@1"], abs=1e-6)
    assert figures(run, "mrr_at_10")[1] == pytest.approx(theirs["cosine_mrr@10"], abs=1e-5)
    assert figures(run, "ndcg_at_10")[1] == pytest.approx(theirs["cosine_ndcg@10"], abs=1e-5)


@BOTH
def test_scores_of_pairs_are_learned(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    write(tmp_path / "rows.jsonl", scored(128, key="label"))
    status, out, err = diablo("train", recipe, f"output={run}", "training.epochs=16")
    assert status == 0, err
    assert "held-out spearman" in out
    before, after = figures(run, "spearman")
    assert after > max(before, 0.5)


@BOTH
def test_a_resumed_run_has_the_adapter_of_an_undisturbed_one_to_the_bit(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    settings = [f"output={run}", "training.save_steps=12", "training.eval_steps=12", "training.gradient_accumulation=2"]
    assert diablo("train", recipe, *settings, "training.epochs=8")[0] == 0
    undisturbed, record = weights(run), record_of(run)["training"]
    (run / "run.json").unlink()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-40")
    status, _, err = diablo("train", run / "recipe.yaml", "--resume")
    assert status == 0, err
    assert all(torch.equal(values, undisturbed[name]) for name, values in weights(run).items())
    assert record_of(run)["training"]["held_out_figures"] == record["held_out_figures"]


def test_training_goes_on_from_an_adapter_and_from_a_model_of_sentence_transformers(diablo, recipe, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    objective = "objective={name: embedding, query_prompt: 'find '}"
    assert diablo("train", recipe, objective, f"output={first}", "merge=true")[0] == 0
    ended = record_of(first)["training"]["held_out_loss"][-1][1]
    recipe.write_text(recipe.read_text().replace("method: {num_blocks: 4}\n", ""))
    status, out, err = diablo("train", recipe, f"adapter={first}", f"output={second}", "--dry-run")
    assert status == 0, err
    assert "prompts of texts    query 'find '" in out
    assert diablo("train", recipe, f"adapter={first}", f"output={second}")[0] == 0
    assert record_of(second)["training"]["held_out_loss"][0][1] == pytest.approx(ended, abs=1e-5)
    own = sentence_transformers.SentenceTransformer(str(first / "merged"), device="cpu")
    own = sentence_transformers.SentenceTransformer(modules=[own[0], Pooling(32, "cls"), Normalize()], device="cpu")
    own.max_seq_length = 20
    own.save_pretrained(str(tmp_path / "own"))
    settings = [f"model={tmp_path / 'own'}", "method={num_blocks: 4}", f"output={third}", "merge=true"]
    status, out, err = diablo("train", recipe, *settings, "--dry-run")
    assert status == 0, err
    assert "the first token, of length 1 (as the model says): 32 numbers, of up to 20 tokens of a text" in out
    assert diablo("train", recipe, *settings)[0] == 0
    [vector] = asked(diablo, third, "the fox 3")
    assert vector.norm().item() == pytest.approx(1, abs=1e-5)
    merged = sentence_transformers.SentenceTransformer(str(third / "merged"), device="cpu")
    torch.testing.assert_close(torch.tensor(merged.encode("the fox 3")), vector, rtol=1e-4, atol=1e-4)


def test_long_texts_are_cut_and_counted_unless_the_recipe_says_otherwise(diablo, recipe, tmp_path):
    write(tmp_path / "rows.jsonl", [*pairs(24), {"anchor": "Ann", "positive": "the dog " * 60}])
    common = ["train", recipe, "data.eval=null", f"output={tmp_path / 'run'}", "--dry-run"]
    # The model itself reads no more than 64 tokens.
    assert "too long, cut       1 rows" in diablo(*common)[1]
    assert "too long, left out  row 25" in diablo(*common, "data.on_long=drop")[1]
    assert "and the model reads 64 tokens; 1 of 25 rows" in diablo(*common, "data.on_long=error")[2]


def test_vectors_are_written_to_a_file_and_texts_compared(diablo, recipe, tmp_path):
    run, out_file = tmp_path / "run", tmp_path / "vectors.jsonl"
    assert diablo("train", recipe, f"output={run}", "training.max_steps=1")[0] == 0
    write(tmp_path / "texts.jsonl", [{"text": "the fox"}, {"text": "the dog"}])
    status, out, err = diablo("embed", run, "--file", tmp_path / "texts.jsonl", "--out", out_file)
    assert status == 0, err
    lines = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert [line["text"] for line in lines] == ["the fox", "the dog"]
    vectors = torch.tensor([line["embedding"] for line in lines])
    near = torch.cosine_similarity(*vectors.split(1)).item()
    status, out, _ = diablo("embed", run, "the fox", "the dog", "--similarity")
    assert out == f"{near:.4f}  the dog\n"
    for arguments, told in (
        (["x", "--out", out_file], "--out: found"),
        (["x", "--similarity"], "--similarity: found 1 text"),
        (["x", "--prompt", "query"], "--prompt: found 'query'; the model has none"),
        ([" "], "TEXT: number 1 is ''"),
    ):
        status, _, err = diablo("embed", run, *arguments)
        assert (status, told in err) == (2, True), err


@pytest.mark.parametrize(
    ("rows", "settings", "told"),
    [
        ([{"anchor": "a"}], [], "Row 1: positive is missing"),
        ([{"query": "a", "answer": "b"}], [], "data.columns: {anchor: query, positive: answer}"),
        ([{"anchor": "a", "positive": " "}], [], "Row 1: positive is empty"),
        ([{"anchor": "a", "positive": "a"}], [], "anchor and positive are the same text"),
        ([{"sentence1": "a", "sentence2": "b", "score": "near"}], [], "score is 'near', no finite number"),
        ([*pairs(8), *triplets(2)], [], "2 rows have anchor, positive and 1 negative"),
        (pairs(8), ["objective={name: embedding, loss: cosent}"], "found cosent, which takes rows of sentence1"),
        (pairs(8), ["objective={name: embedding, loss: triplet}"], "found triplet, which takes one negative"),
        (scored(8), ["objective={name: embedding, loss: triplet}"], "found triplet, which takes rows of anchor"),
        (
            [{**row, "score": 4} for row in scored(8)],
            ["objective={name: embedding, loss: cosine}"],
            "8 rows have a score outside of -1 to 1",
        ),
        (
            [{**row, "score": 0.5} for row in scored(8)],
            ["objective={name: embedding, loss: contrastive}"],
            "8 rows have a label that is neither 1 nor 0",
        ),
        (scored(8), ["objective={name: embedding, query_prompt: x}"], "objective.query_prompt: found 'x'"),
        (pairs(8), ["objective={name: embedding, loss: triplet, scale: 3}"], "objective.scale: found 3, which is of"),
        (pairs(8), ["objective={name: embedding, margin: 3}"], "objective.margin: found 3, which is of loss triplet"),
        (pairs(8), ["objective={name: embedding, matryoshka_dims: [8, 8]}"], "name each size once"),
        (pairs(8), ["training.batch_size=1"], "training.batch_size: found 1, and multiple_negatives compares"),
        (pairs(8), ["chat=true"], "chat: found True, which objective embedding has no use for"),
        (pairs(8), ["training.packing=true"], "training.packing: found true, which is for objective: sft"),
        (pairs(8), ["task=mawps", "data.train=null"], "objective embedding needs others"),
        (pairs(8), ["objective=sft"], "it has what objective: embedding needs"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_model_is_read(diablo, recipe, tmp_path, rows, settings, told):
    write(tmp_path / "rows.jsonl", rows)
    common = [f"output={tmp_path / 'run'}", "data.eval=null", *settings]
    status, _, err = diablo("train", recipe, *common, "model=no/such-model")
    assert status == 2
    assert told in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "settings", "told"),
    [
        (pairs(16), ["objective={name: embedding, matryoshka_dims: [8, 4]}"], "let the largest be 32"),
        (
            [{"anchor": "the fox", "positive": f"it jumps {n}"} for n in range(16)],
            [],
            "training.batch_size: found 8, and multiple_negatives takes the other rows of a batch for wrong answers",
        ),
    ],
)
def test_what_the_plan_cannot_do_is_refused_before_the_weights_are_read(diablo, recipe, tmp_path, rows, settings, told):
    write(tmp_path / "rows.jsonl", rows)
    status, _, err = diablo("train", recipe, "data.eval=null", f"output={tmp_path / 'run'}", *settings)
    assert status == 2
    assert told in err


def test_several_processes_are_refused(diablo, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = diablo("train", recipe, f"output={tmp_path / 'run'}", "--dry-run")
    assert status == 2
    assert "objective: found embedding in 2 processes" in err


def test_models_with_modules_that_are_not_known_are_refused(diablo, recipe, tmp_path, tiny_encoder):
    own = shutil.copytree(tiny_encoder, tmp_path / "own")
    kinds = [("", "sentence_transformers.models.Transformer"), ("1_CNN", "sentence_transformers.models.CNN")]
    listed = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(kinds)]
    (own / "modules.json").write_text(json.dumps(listed))
    status, _, err = diablo("train", recipe, f"model={own}", f"output={tmp_path / 'run'}")
    assert status == 2
    assert "is made of Transformer, CNN, and objective embedding takes" in err


def test_other_verbs_refuse_a_model_of_vectors_and_embed_refuses_other_runs(diablo, recipe, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    assert diablo("train", recipe, f"output={run}", "training.max_steps=1")[0] == 0
    for verb, *rest in (
        ("generate", run, "x"),
        ("chat", run),
        ("evaluate", run, "--task", "mawps"),
        ("export ollama", run, tmp_path / "ollama"),
    ):
        status, _, err = diablo(*verb.split(), *rest)
        assert status == 2
        assert f"so that diablo {verb} has no use for it; ask it with: diablo embed {run} TEXT" in err
    assert f"ask it with: diablo embed {run} TEXT" in diablo("classify", run, "x")[2]
    write(tmp_path / "rows.jsonl", [{"text": f"the fox {n}", "label": n % 2} for n in range(8)])
    settings = ["objective=classification", "data.eval=null", f"output={other}", "training.max_steps=1"]
    assert diablo("train", recipe, *settings)[0] == 0
    status, _, err = diablo("embed", other, "x")
    assert status == 2
    assert "was trained with objective classification, and gives no vectors of texts" in err


def test_the_step_of_the_best_figure_is_kept_where_the_score_says_which_is_best(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    settings = ["training.best_by=score", "training.keep=best", "training.eval_steps=3", f"output={run}"]
    assert diablo("train", recipe, *settings, "training.learning_rate=0.2")[0] == 0
    training = record_of(run)["training"]
    measured = {step: value for step, value in training["held_out_figures"]["ndcg_at_10"] if step > 0}
    assert measured[training["kept_step"]] == max(measured.values())
    assert dict(training["validation_score"]) == measured


def test_the_plan_of_memory_is_made_for_texts_as_long_as_the_model_reads(diablo, recipe, tmp_path):
    status, out, err = diablo("plan", recipe, f"output={tmp_path / 'run'}", "--json")
    assert status == 0, err
    assert json.loads(out)["length"] == 64
