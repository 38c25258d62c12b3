"""Models that see images: rows with pictures from a file to a merged model, from the command line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import make_tiny_seeing_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from diablo.data.batching import collate_rows
from diablo.data.encoding import IGNORED
from diablo.errors import UserError
from diablo.models.adapters import load_adapter
from diablo.planning.making import make_plan
from diablo.recipes.reading import load_recipe
from diablo.scoring.losses import summed_completion_loss
from diablo.training import train

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
QUESTION = "Which colour?"


@pytest.fixture(scope="module", params=["idefics3", "llava"])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model that sees images; not to be written to."""
    return make_tiny_seeing_model(tmp_path_factory.mktemp("seeing") / request.param, request.param)


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which images of several sizes have several numbers of tokens; not to be written to."""
    return make_tiny_seeing_model(tmp_path_factory.mktemp("seeing") / "idefics3")


def asked(image: Any, answer: str) -> dict[str, Any]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}


def recipe_of(folder: Path, model: Path, rows: list[dict[str, Any]]) -> Path:
    """A recipe of rows in a folder of its own, away from the current one."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    data = folder / "data" / "rows.jsonl"
    path.write_text(
        f"model: {model}\nchat: true\ndata: {{train: {data}, eval: {data}}}\nmethod: {{num_blocks: 4}}\n"
        "training: {learning_rate: 0.02, batch_size: 4, epochs: 10, max_length: 128, logging_steps: 1}\n"
        f"precision: fp32\noutput: {folder / 'run'}\n"
    )
    return path


@pytest.fixture
def squares(tmp_path: Path) -> list[dict[str, Any]]:
    """Twelve squares in files of several sizes, and two rows without any."""
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    rows = []
    for number, (name, colour) in enumerate([*COLOURS.items()] * 3):
        place = f"pictures/{number}.png"
        Image.new("RGB", (8 + 8 * (number % 3), 8), colour).save(tmp_path / "data" / place)
        rows.append(asked(place, name))
    plain = {"messages": [{"role": "user", "content": "the fox?"}, {"role": "assistant", "content": "the dog"}]}
    return [*rows, plain, plain]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_colours_are_learned_and_the_merged_model_answers_as_the_adapter_does(diablo, seeing, squares, tmp_path):
    recipe, run = recipe_of(tmp_path, seeing, squares), tmp_path / "run"
    assert diablo("train", recipe, "merge=true", "training.save_steps=10")[0] == 0
    record = json.loads((run / "run.json").read_text())
    (_, before), (_, after) = record["training"]["held_out_loss"]
    assert after < before - 0.3
    assert record["data"]["images"] == 12
    assert all(".text_model." in name or ".language_model." in name for name in weights(run / "adapter"))
    # Only weights of the text part differ.
    base, merged = (load_file(folder / "model.safetensors") for folder in (seeing, run / "merged"))
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert changed
    assert not any("vision" in name or "connector" in name or "projector" in name for name in changed)
    answers = {}
    for number, colour in enumerate(COLOURS):
        picture = tmp_path / "data" / "pictures" / f"{number}.png"
        for model in ((run,), (run / "merged", "--chat")):
            status, out, _ = diablo("generate", *model, QUESTION, "--image", picture, "--max-new-tokens", 8)
            assert status == 0
            answers.setdefault(colour, []).append(out.strip())
    assert answers == {colour: [colour, colour] for colour in COLOURS}
    # The folder is one that transformers loads by itself.
    processor = AutoProcessor.from_pretrained(run / "merged")
    assert processor.image_processor is not None
    AutoModelForImageTextToText.from_pretrained(run / "merged")
    card = (run / "merged" / "README.md").read_text()
    assert "model = AutoModelForImageTextToText.from_pretrained" in card
    assert "processor = AutoProcessor.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card
    assert "model = AutoModelForImageTextToText.from_pretrained(base)" in (run / "adapter" / "README.md").read_text()
    # Resumed after an interruption, it is the same adapter.
    undisturbed = weights(run / "adapter")
    (run / "run.json").unlink()
    shutil.rmtree(run / "adapter")
    last = max(run.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    shutil.rmtree(last)
    assert diablo("train", recipe, "training.save_steps=10", "--resume")[0] == 0
    resumed = weights(run / "adapter")
    assert all(torch.equal(values, resumed[name]) for name, values in undisturbed.items())


def test_the_loss_is_that_of_trls_collator_with_the_answers_as_labels(seeing, squares, tmp_path):
    plan = make_plan(load_recipe(recipe_of(tmp_path, seeing, squares), []))
    rows = [plan.train[number] for number in (0, 1, 2, 12)]
    assert plan.encoder.images is not None
    batch = collate_rows(rows, plan.encoder.tokenizer.pad_token_id, plan.encoder.images)
    # What carries loss is each answer with its stop token.
    decode = plan.encoder.tokenizer.decode
    told = [decode([label for label in row.labels if label != IGNORED]) for row in rows]
    assert told == ["red</s>", "green</s>", "blue</s>", "the dog</s>"]
    collator = DataCollatorForVisionLanguageModeling(AutoProcessor.from_pretrained(seeing))
    examples = []
    for number in (0, 1, 2, 12):
        first, answer = squares[number]["messages"]
        parts = first["content"] if isinstance(first["content"], list) else [{"type": "text", "text": first["content"]}]
        places = [part["image"] for part in parts if part["type"] == "image"]
        parts = [{"type": "image"} if part["type"] == "image" else part for part in parts]
        turns = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer["content"]}]},
        ]
        pictures = [Image.open(tmp_path / "data" / place) for place in places]
        examples.append({"messages": turns, "images": pictures})
    theirs = dict(collator(examples))
    length = batch["input_ids"].shape[1]
    for row, ids in zip(rows, theirs["input_ids"], strict=True):
        assert ids[: len(row.input_ids)].tolist() == row.input_ids
    # Where no row of a batch lacks images, the tensors are the same too.
    assert {name for name in batch if name not in ("labels", "predicting")} == theirs.keys() - {"labels"}
    labels = torch.full_like(theirs["input_ids"], IGNORED)
    labels[:, :length] = batch["labels"]
    model = AutoModelForImageTextToText.from_pretrained(seeing)
    with torch.no_grad():
        ours = summed_completion_loss(model, batch) / len(batch["predicting"])
        expected = model(**theirs | {"labels": labels}).loss
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    # An image has a part in it.
    other = batch | {"pixel_values": -batch["pixel_values"]}
    with torch.no_grad():
        assert abs((summed_completion_loss(model, other) / len(batch["predicting"])).item() - ours.item()) > 1e-5


def test_a_row_whose_images_do_not_fit_is_left_out_whole(diablo, idefics3, squares, tmp_path):
    # A picture that is cut into tiles has more tokens than one that is not.
    recipe = recipe_of(tmp_path, idefics3, squares)
    lengths = {len(row.input_ids) for row in make_plan(load_recipe(recipe, [])).train}
    longest = max(lengths)
    status, out, _ = diablo("train", recipe, f"training.max_length={longest - 1}", "--dry-run")
    assert status == 0
    assert "too long, left out  rows" in out
    plan = make_plan(load_recipe(recipe, [f"training.max_length={longest - 1}"]))
    assert 0 < len(plan.train) == len(squares) - len(plan.too_long)
    assert {len(row.input_ids) for row in plan.train} == {length for length in lengths if length < longest}


def test_pixels_are_read_when_a_batch_is_made_and_a_changed_file_is_named(idefics3, squares, tmp_path):
    recipe = recipe_of(tmp_path, idefics3, squares)
    plan = make_plan(load_recipe(recipe, []))
    Image.new("RGB", (40, 8)).save(tmp_path / "data" / "pictures" / "0.png")
    assert plan.encoder.images is not None
    with pytest.raises(UserError, match=r"the image .*0\.png has changed since the run began"):
        collate_rows(plan.train[:1], 0, plan.encoder.images)
    (tmp_path / "data" / "pictures" / "1.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match=r"the image .*1\.png cannot be read"):
        collate_rows(plan.train[1:2], 0, plan.encoder.images)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_gradient_checkpointing_changes_nothing_of_what_is_learned(seeing, squares, tmp_path, checkpointing):
    recipe = recipe_of(tmp_path, seeing, squares)
    short = ["training.max_steps=3", "evaluation.before=false"]
    plain = train(load_recipe(recipe, short))
    again = train(
        load_recipe(recipe, [*short, f"training.gradient_checkpointing={checkpointing}", f"output={tmp_path / 'two'}"])
    )
    first, second = weights(plain.adapter), weights(again.adapter)
    assert all(torch.allclose(values, second[name], atol=1e-6) for name, values in first.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["chat=false"], "chat: found false, and 12 of 28 rows have images (row 1), whose places a chat template"),
        (["training.packing=true"], "training.packing: found true, and 12 of 28 rows have images"),
        (["speed.compile=true"], "speed.compile: found true"),
        (["method={name: peft, type: PROMPT_TUNING, num_virtual_tokens: 4}"], "method.type: found PROMPT_TUNING"),
    ],
)
def test_what_cannot_be_done_with_images_is_refused(diablo, idefics3, squares, tmp_path, settings, message):
    recipe = recipe_of(tmp_path, idefics3, squares)
    data = tmp_path / "data" / "rows.jsonl"
    # Held-out rows that are the training rows count twice.
    status, _, err = diablo("train", recipe, f"data.eval={data}", *settings, "--dry-run")
    assert status == 2
    assert message.replace("12 of 28", "24 of 28") in err


def test_an_adapter_that_was_trained_over_nf4_is_merged_with_its_processor(diablo, idefics3, squares, tmp_path):
    pytest.importorskip("bitsandbytes")
    recipe = recipe_of(tmp_path, idefics3, squares)
    assert diablo("train", recipe, "quantization=nf4", "training.max_steps=2")[0] == 0
    status, _, err = diablo("merge", tmp_path / "run", tmp_path / "merged", "--into", "dequantized")
    assert (status, "error" in err) == (0, False)
    AutoProcessor.from_pretrained(tmp_path / "merged")
    picture = tmp_path / "data" / "pictures" / "0.png"
    merged = (tmp_path / "merged", QUESTION, "--image", picture, "--max-new-tokens", 2)
    assert diablo("generate", *merged)[0] == 0
    status, _, err = diablo("quantize", idefics3, tmp_path / "quantized")
    assert status == 2
    assert "sees images" in err or "gptqmodel" in err


def test_a_model_that_sees_none_is_refused(diablo, tiny_model, squares, tmp_path):
    status, _, err = diablo("train", recipe_of(tmp_path, tiny_model, squares), "--dry-run")
    assert status == 2
    assert f"model: found '{tiny_model}', which sees none, and 24 of 28 rows have images (row 1)" in err
    status, _, err = diablo("generate", tiny_model, QUESTION, "--image", tmp_path / "data" / "pictures" / "0.png")
    assert status == 2
    assert "sees no images; leave --image out" in err


def test_an_image_that_is_not_there_is_refused_before_the_model_is_loaded(diablo, tmp_path):
    status, _, err = diablo("generate", "no/model", QUESTION, "--image", tmp_path / "none.png")
    assert status == 2
    assert "--image: there is no image" in err


def test_text_alone_trains_and_generates_with_such_a_model_as_before(diablo, seeing, tmp_path):
    rows = [{"prompt": f"{number}?", "completion": f" {number + 1}"} for number in range(8)]
    recipe = recipe_of(tmp_path, seeing, rows)
    settings = ["chat=false", "training.max_steps=2", "training.packing=true"]
    assert diablo("train", recipe, *settings)[0] == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert all(math.isfinite(loss) for _, loss in record["training"]["held_out_loss"])
    assert diablo("generate", tmp_path / "run", "1?", "--max-new-tokens", 2)[0] == 0


def test_all_weights_are_trained_and_the_processor_is_saved_with_them(diablo, idefics3, squares, tmp_path):
    recipe = recipe_of(tmp_path, idefics3, squares)
    assert diablo("train", recipe, "method=full", "training.max_steps=2", "training.learning_rate=1e-3")[0] == 0
    folder = tmp_path / "run" / "model"
    AutoProcessor.from_pretrained(folder)
    before, after = load_file(idefics3 / "model.safetensors"), load_file(folder / "model.safetensors")
    assert any("vision" in name and not torch.equal(before[name], after[name]) for name in before)
    picture = tmp_path / "data" / "pictures" / "0.png"
    assert diablo("generate", tmp_path / "run", QUESTION, "--image", picture, "--max-new-tokens", 2)[0] == 0


def test_a_lora_adapter_loads_with_images_too(idefics3, squares, tmp_path):
    recipe = recipe_of(tmp_path, idefics3, squares)
    result = train(load_recipe(recipe, ["method={name: lora, r: 4}", "training.max_steps=2"]))
    model, _ = load_adapter(result.adapter)
    assert all("text_model" in name for name, _ in model.named_modules() if name.endswith("lora_A"))
