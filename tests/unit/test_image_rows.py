"""Rows with images: the forms in which data has them, what is refused, and the tokens that stand for them."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from launching import forked_python
from PIL import Image
from pyarrow import parquet
from tiny import SEEING_TEMPLATE, make_tiny_seeing_model, make_tokenizer
from transformers import AutoProcessor, Gemma3Processor, Idefics2Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from versions import PROCESSORS_SAY_WHAT_THEY_PUT

from diablo.data import RowEncoder
from diablo.data.encoding import IGNORED
from diablo.data.faults import RowError
from diablo.data.images import PLACE, inspect_image
from diablo.data.reading.hub import HubDataset, read_hub
from diablo.data.reading.sources import Source, read_rows, read_sources
from diablo.data.rows import Row
from diablo.data.splits import cut_validation
from diablo.data.vision import ImageProcessor
from diablo.errors import UserError

ANSWER = {"role": "assistant", "content": "red"}
TEXT = {"type": "text", "text": "Which?"}


def png(size: tuple[int, int] = (6, 4), colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(png())
    (tmp_path / "wide.png").write_bytes(png((9, 4)))
    (tmp_path / "notes.png").write_text("no image")
    return tmp_path


def read(folder: Path, *records: dict[str, Any]) -> list[Row]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_rows(path)[0]


def of_parts(*parts: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, TEXT]}, ANSWER], **columns}


URI = f"data:image/png;base64,{base64.b64encode(png()).decode()}"


@pytest.mark.parametrize(
    "record",
    [
        of_parts({"type": "image", "image": "red.png"}),
        of_parts({"type": "image", "path": "red.png"}),
        of_parts({"type": "image", "url": URI}),
        of_parts({"type": "image", "base64": URI.partition(",")[2]}),
        of_parts({"type": "image_url", "image_url": {"url": URI}}),
        of_parts({"type": "image"}, images=["red.png"]),
        of_parts({"type": "image", "image": None}, image="red.png"),
        of_parts({"type": "image"}, image={"path": "red.png", "bytes": None}),
        {"messages": [{"role": "user", "content": "<image>Which?"}, ANSWER], "images": ["red.png"]},
        {"messages": [{"role": "user", "content": "Which?"}, ANSWER], "images": ["red.png"]},
        {"conversations": [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "red"}], "image": URI},
        {"prompt": "Which?", "completion": "red", "image": "red.png"},
        {"prompt": [{"role": "user", "content": "Which?"}], "completion": [ANSWER], "images": [URI]},
    ],
)
def test_all_forms_make_the_same_row(folder, record):
    (row,) = read(folder, record)
    asked, answered = row.messages
    assert (asked["content"], answered) == (f"{PLACE}Which?", ANSWER)
    (image,) = row.images
    assert image.size == (6, 4)
    assert image.pixels().getpixel((0, 0)) == (255, 0, 0)


def test_several_images_stand_in_the_order_of_their_places(folder):
    turns = [
        {"role": "user", "content": "<image> or <image>?"},
        ANSWER,
        {"role": "user", "content": "and <image>?"},
        ANSWER,
    ]
    (row,) = read(folder, {"messages": turns, "images": ["red.png", "wide.png", "red.png"]})
    assert [image.size[0] for image in row.images] == [6, 9, 6]
    assert row.messages[2]["content"] == f"and {PLACE}?"


def test_images_in_a_table_are_their_bytes(folder):
    turns = [{"role": "user", "content": [{"type": "image"}, TEXT]}, {"role": "assistant", "content": [TEXT]}]
    path = folder / "rows.parquet"
    column = [[{"bytes": png((5, 3)), "path": "x.png"}]]
    parquet.write_table(pyarrow.table({"messages": [turns], "images": column}), path)
    (row,) = read_rows(path)[0]
    assert row.images[0].size == (5, 3)
    assert row.images[0].path is None


def test_a_dataset_of_the_library_datasets_is_not_decoded(folder):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "completion": datasets.Value("string"), "image": datasets.Image()}
    )
    rows = {"prompt": ["Which?"], "completion": ["red"], "image": [{"bytes": png(), "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "hub" / "train.parquet")
    ((_, record),) = read_hub(HubDataset(str(folder / "hub"), "train"))
    assert isinstance(record["image"], dict)
    assert record["image"]["bytes"] == png()


def test_columns_can_name_the_images(folder):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"question": "Which?", "answer": 3, "picture": "red.png"}))
    columns = {"prompt": "question", "completion": "answer", "image": "picture"}
    (found,) = read_sources([Source(path, columns)])
    assert len(found.rows[0].images) == 1


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (
            of_parts({"type": "image", "image": "none.png"}),
            r"there is no image '.*none\.png'; paths in rows count from",
        ),
        (of_parts({"type": "image", "image": "notes.png"}), r"notes\.png' is no image that can be read; give a whole"),
        (of_parts({"type": "image", "image": "https://a.b/c.png"}), "is a URL, which is not fetched; download it"),
        (of_parts({"type": "image", "image": "data:image/png,red"}), "the data URI of an image is not base64"),
        (of_parts({"type": "image", "image": 3}), "an image is a number; give a path"),
        (of_parts({"type": "image"}), "has 1 places for images that are in a column, and 0 there; give as many"),
        (of_parts({"type": "image"}, images=["red.png"] * 2), "has 1 places .* and 2 there"),
        (of_parts({"type": "image", "image": "red.png"}, images=["red.png"]), "has 0 places .* and 1 there"),
        (of_parts({"type": "image"}, images=["red.png"], image="red.png"), "has images in both columns"),
        (of_parts({"type": "video"}), "a turn has a part of the type 'video'"),
        (
            {"messages": [{"role": "user", "content": "?"}, ANSWER | {"content": [{"type": "image", "image": URI}]}]},
            "a turn of the assistant has an image; put it into a turn of the user",
        ),
        ({"instruction": "?", "output": "red", "image": "red.png"}, "images, which rows of the format Alpaca have no"),
        (of_parts({"type": "image", "image": "red.png"}, {"type": "text", "text": PLACE}), r"the character U\+FDD2"),
    ],
)
def test_an_image_that_cannot_be_used_is_a_fault_of_its_row(folder, record, fault):
    with pytest.raises(UserError, match=rf"rows\.jsonl has 1 malformed of 2 rows. Row 2: .*{fault}"):
        read(folder, {"prompt": "a", "completion": "b"}, record)


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "image": "red.png"}),
        ("prompts", {"prompt": [{"role": "user", "content": [{"type": "image", "image": "red.png"}, TEXT]}]}),
        ("labelled", {"text": "a", "label": "b", "image": "red.png"}),
    ],
)
def test_other_objectives_refuse_images(folder, kind, record):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="has images, which objective: sft alone is trained with"):
        read_sources([Source(path)], kind=kind)


def test_the_size_of_a_picture_is_that_the_right_way_up(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    image = inspect_image("turned", tmp_path / "turned.jpg")
    assert image.size == image.pixels().size == (4, 8)


def test_the_same_question_about_another_picture_is_another_prompt(folder):
    records = [of_parts({"type": "image", "image": name}) for name in ("red.png", "wide.png", "red.png")]
    train, held_out = cut_validation(read(folder, *records), 1, seed=0)
    assert {image.key for row in train for image in row.images}.isdisjoint(
        image.key for row in held_out for image in row.images
    )
    assert train


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> RowEncoder:
    processor = AutoProcessor.from_pretrained(make_tiny_seeing_model(tmp_path_factory.mktemp("seeing") / "model"))
    return RowEncoder(processor.tokenizer, chat=True, images=ImageProcessor(processor))


def test_a_processor_that_needs_torchvision_says_so_where_it_is_not_installed(folder):
    model = make_tiny_seeing_model(folder / "model")
    settings = model / "processor_config.json"
    settings.write_text(settings.read_text().replace("Idefics3Processor", "Qwen2VLProcessor"))
    read(folder, of_parts({"type": "image", "image": "red.png"}))
    # What is None among the modules is not found, even where it is installed.
    program = "import sys; sys.modules['torchvision'] = None; import diablo_cli; diablo_cli.main()"
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"model: {model}\nchat: true\ndata: {{train: {folder}/rows.jsonl}}\noutput: {folder}/run\n")
    # Where it is installed, the process that is forked has imported it.
    python = forked_python() if find_spec("torchvision") is None else sys.executable
    ended = subprocess.run(
        [python, "-c", program, "train", recipe, "--dry-run"], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "error: model: the processor in the folder" in ended.stderr
    assert "torchvision, which many processors need, is not installed" in " ".join(ended.stderr.split())
    assert "pip install 'diablo-peft[images]'" in ended.stderr


def test_each_answer_of_a_conversation_has_the_images_that_come_before_it(folder, encoder):
    turns = [
        {"role": "user", "content": "<image>a"},
        ANSWER,
        {"role": "user", "content": "<image>b"},
        ANSWER,
    ]
    (row,) = read(folder, {"messages": turns, "images": ["red.png", "wide.png"]})
    (encoded,) = encoder.encode_all(row)
    assert encoded.images == row.images
    image = encoder.images.repeated
    assert encoded.input_ids.count(image) % 4 == 0
    labelled = [label for label in encoded.labels if label != IGNORED]
    assert image not in labelled
    assert encoder.tokenizer.decode(labelled) == "red</s>red</s>"
    prompt = encoder.encode_prompt(row)
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    # The last turn is not trained on: what comes after the answer before it is not read.
    turns[3] = ANSWER | {"train": False}
    (row,) = read(folder, {"messages": turns, "images": ["red.png", "wide.png"]})
    (encoded,) = encoder.encode_all(row)
    assert encoded.images == row.images[:1]


def test_a_text_that_spells_the_token_of_an_image_is_refused_or_stays_text(folder, encoder):
    turns = [{"role": "user", "content": "an <image>?"}, ANSWER]
    (row,) = read(folder, {"messages": turns})
    with pytest.raises(RowError, match=r"its text spells <image>, which stands for an image; set data\.special_text"):
        encoder.encode(row)
    plain = RowEncoder(encoder.tokenizer, chat=True, special_text="plain", images=encoder.images)
    assert plain.encode(row).input_ids.count(encoder.images.repeated) == 0
    (row,) = read(folder, of_parts({"type": "image", "image": "red.png"}, {"type": "text", "text": "<image>"}))
    assert plain.encode(row).input_ids == encoder_without_spelling(plain, row)
    (row,) = read(folder, {"messages": [turns[0] | {"content": "?"}, ANSWER | {"content": "<image>"}]})
    with pytest.raises(RowError, match="its text spells <image>"):
        encoder.encode(row)


def encoder_without_spelling(encoder: RowEncoder, row: Row) -> list[int]:
    """The tokens of a row with the text ``<image>`` in it, put together by hand."""
    ids = encoder.tokenizer
    asked = f"<s>user\n{encoder.images.replacements(row.images)[0]}"
    spelled = ids("<image>Which?", split_special_tokens=True)["input_ids"]
    rest = "</s>\n<s>assistant\nred</s>"
    return [*ids(asked)["input_ids"], *spelled, *ids(rest)["input_ids"]]


def test_a_template_that_leaves_out_an_image_is_a_fault(folder, encoder):
    (row,) = read(folder, of_parts({"type": "image", "image": "red.png"}))
    template, encoder.tokenizer.chat_template = encoder.tokenizer.chat_template, SEEING_TEMPLATE.replace("<image>", "")
    try:
        blind = RowEncoder(encoder.tokenizer, chat=True, images=encoder.images)
        with pytest.raises(RowError, match="the chat template leaves out an image"):
            blind.encode(row)
    finally:
        encoder.tokenizer.chat_template = template


def of_idefics2() -> Idefics2Processor:
    tokenizer = make_tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>")
    return Idefics2Processor(Idefics2ImageProcessorPil(), tokenizer, image_seq_len=4)


def of_gemma3() -> Gemma3Processor:
    tokenizer = make_tokenizer("<start>", "<end>", "<soft>")
    for name, token in (("boi", "<start>"), ("eoi", "<end>"), ("image", "<soft>")):
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.chat_template = SEEING_TEMPLATE.replace("<image>", "<start>")
    images = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    return Gemma3Processor(images, tokenizer, image_seq_length=3)


older = pytest.mark.skipif(PROCESSORS_SAY_WHAT_THEY_PUT, reason="this transformers says it")


@pytest.mark.parametrize("make", [of_idefics2, pytest.param(of_gemma3, marks=older)])
def test_a_processor_that_does_not_say_what_it_puts_is_refused_with_the_version_that_it_needs(make):
    processor = make()
    upgrade = "" if PROCESSORS_SAY_WHAT_THEY_PUT else r"upgrade to transformers 5\.23, or "
    with pytest.raises(UserError, match=rf"does not say which tokens stand for an image; {upgrade}take a model whose"):
        ImageProcessor(processor)


@pytest.mark.skipif(not PROCESSORS_SAY_WHAT_THEY_PUT, reason="its processor is refused")
def test_a_model_that_is_told_which_tokens_are_images_is_told_so(folder):
    processor = ImageProcessor(of_gemma3())
    tokenizer = processor.processor.tokenizer
    encoder = RowEncoder(tokenizer, chat=True, images=processor)
    seeing, plain = read(folder, of_parts({"type": "image", "image": "red.png"}), {"prompt": "a", "completion": "b"})
    row = encoder.encode(seeing)
    # The line breaks around an image are tokens together with what stands beside them.
    whole = processor.processor(
        images=[[seeing.images[0].pixels()]], text=["<s>user\n<start>Which?</s>\n<s>assistant\n"]
    )
    assert row.input_ids[: len(whole["input_ids"][0])] == whole["input_ids"][0]
    ids = torch.tensor([row.input_ids])
    given = processor.tensors([row.images], ids)
    assert given["token_type_ids"][0, : len(whole["token_type_ids"][0])].tolist() == whole["token_type_ids"][0]
    assert given["token_type_ids"].sum() == 3
    # Without any image in a batch the model is told that, too.
    given = processor.tensors([()], torch.tensor([encoder.encode(plain).input_ids]))
    assert given.keys() == {"token_type_ids"}
    assert not given["token_type_ids"].any()
