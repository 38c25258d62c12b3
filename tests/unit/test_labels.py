"""Heads: labelled rows, the figures of labels, and the tokens of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from tiny import make_tiny_encoder, make_tiny_model
from transformers import AutoTokenizer, LlamaConfig

from diablo.data.faults import NoRowError
from diablo.data.labelled import encode_labelled
from diablo.data.reading.formats import to_row
from diablo.data.rows import Row
from diablo.data.special_text import TextTokenizer
from diablo.errors import UserError
from diablo.models.heads import Head, has_head, labels_of
from diablo.scoring.labels import macro_f1, pearson, summed_label_loss


@pytest.mark.parametrize(
    ("given", "label"),
    [("good", "good"), (" good ", "good"), (1, "1"), (1.0, "1"), (True, "true"), (["a", 2], ("a", "2")), ([], ())],
)
def test_a_label_is_text_whatever_it_is_written_as(given: Any, label: Any) -> None:
    row, form = to_row(1, {"text": "the fox", "label": given}, "labelled")
    assert (row.prompt, row.label, form) == ("the fox", label, "labelled")


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        ("labelled", {"text": "the fox", "label": 1.5}, "label is 1.5"),
        ("labelled", {"text": "the fox", "label": {"a": 1}}, "label is {'a': 1}"),
        ("labelled", {"text": "  ", "label": "a"}, "text is empty"),
        ("labelled", {"text": "a", "text_pair": 1, "label": "a"}, "text_pair is a number, not text"),
        ("numbered", {"text": "a", "label": True}, "no finite number"),
        ("numbered", {"text": "a", "label": float("nan")}, "no finite number"),
        ("tagged", {"tokens": ["a", "b"], "labels": ["x"]}, "not equally many"),
        ("tagged", {"tokens": [], "labels": []}, "tokens is []"),
        ("tagged", {"tokens": ["a", " "], "labels": ["x", "y"]}, "what is no word"),
        ("tagged", {"text": "a", "label": "b"}, "has text, label"),
    ],
)
def test_what_is_not_labelled_is_a_fault_with_its_reason(kind: Any, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoRowError) as raised:
        to_row(1, record, kind)
    assert reason in raised.value.reason


def test_a_record_of_another_objective_names_that_one() -> None:
    for record, kind, objective in (
        ({"text": "a", "label": "b"}, "pairs", "classification"),
        ({"tokens": ["a"], "labels": ["b"]}, "labelled", "token_classification"),
        ({"prompt": "a", "completion": "b"}, "labelled", "sft"),
    ):
        with pytest.raises(NoRowError) as raised:
            to_row(1, record, kind)
        assert f"it has what objective: {objective} needs" in raised.value.mend


def test_macro_f1_is_sklearns_over_the_labels_that_occur() -> None:
    generator = torch.Generator().manual_seed(0)
    guesses, truths = (torch.randint(0, 4, (50,), generator=generator) for _ in range(2))
    hot = [torch.nn.functional.one_hot(each, 6).bool() for each in (guesses, truths)]
    assert macro_f1(*hot) == pytest.approx(f1_score(truths, guesses, average="macro"))


def test_pearson_is_numpys_and_0_where_nothing_varies() -> None:
    one, other = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 1.0, 7.0])
    assert pearson(one, other) == pytest.approx(float(torch.corrcoef(torch.stack([one, other]))[0, 1]))
    assert pearson(one, torch.ones(3)) == 0.0


def test_losses_are_those_of_transformers() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 2, 1, 1, 0])
    summed, count = summed_label_loss(logits, classes, Head("classification", ("a", "b", "c")))
    assert summed / count == pytest.approx(torch.nn.functional.cross_entropy(logits, classes))
    hot = torch.nn.functional.one_hot(classes).float()
    summed, count = summed_label_loss(logits, hot, Head("classification", ("a", "b", "c"), several=True))
    assert summed / count == pytest.approx(torch.nn.functional.binary_cross_entropy_with_logits(logits, hot))
    numbers = torch.tensor([0.5, 1.0, -1.0, 2.0, 0.0])
    summed, count = summed_label_loss(logits[:, :1], numbers, Head("regression"))
    assert summed / count == pytest.approx(torch.nn.functional.mse_loss(logits[:, 0], numbers))


@pytest.mark.parametrize("make", [make_tiny_model, make_tiny_encoder])
def test_the_first_token_of_each_word_has_its_label(make: Any, tmp_path: Path) -> None:
    texts = TextTokenizer(AutoTokenizer.from_pretrained(make(tmp_path / "model")))
    words = ("Bob", "sleeps", "unheard-of", "Ann")
    row = Row(1, words=words, label=("P", "O", "O", "P"))
    encoded = encode_labelled(row, texts, ("O", "P"), None)
    labelled = [(place, label) for place, label in enumerate(encoded.labels) if label >= 0]
    assert [label for _, label in labelled] == [1, 0, 0, 1]
    starts = [texts.tokenizer.decode([encoded.input_ids[place]]).strip() for place, _ in labelled]
    assert all(word.startswith(start) or start == "[UNK]" for word, start in zip(words, starts, strict=True))
    cut = encode_labelled(row, texts, ("O", "P"), 4)
    assert cut.is_cut
    assert len(cut.input_ids) == 4


def test_two_texts_have_token_types_or_a_line_break_between_them(tmp_path: Path) -> None:
    row = Row(1, "the fox", text_pair="the dog", label="a")
    encoder = TextTokenizer(AutoTokenizer.from_pretrained(make_tiny_encoder(tmp_path / "encoder")))
    encoded = encode_labelled(row, encoder, ("a", "b"), None)
    assert encoded.token_types == [0, 0, 0, 0, 1, 1, 1]
    assert encoder.tokenizer.decode(encoded.input_ids) == "[CLS] the fox [SEP] the dog [SEP]"
    decoder = TextTokenizer(AutoTokenizer.from_pretrained(make_tiny_model(tmp_path / "decoder")))
    encoded = encode_labelled(row, decoder, ("a", "b"), None)
    assert decoder.tokenizer.decode(encoded.input_ids) == "the fox\nthe dog"
    assert encoded.target == 0


def test_text_that_spells_a_special_token_stays_text_where_the_recipe_says_so(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path / "model"))
    row = Row(1, "the fox </s>", label="a")
    kept = encode_labelled(row, TextTokenizer(tokenizer, "keep"), ("a",), None)
    plain = encode_labelled(row, TextTokenizer(tokenizer, "plain"), ("a",), None)
    assert tokenizer.eos_token_id in kept.input_ids
    assert tokenizer.eos_token_id not in plain.input_ids
    assert plain.special_text == ("</s>",)


@pytest.mark.parametrize(
    "head",
    [
        Head("classification", ("a", "b")),
        Head("classification", ("a", "b"), several=True),
        Head("regression"),
        Head("reward"),
        Head("token_classification", ("O", "P")),
    ],
)
def test_a_config_says_which_head_a_model_has(head: Head, tmp_path: Path) -> None:
    config = LlamaConfig()
    assert Head.of(config) is None
    head.put_into(config, 3)
    config.save_pretrained(tmp_path)
    saved = LlamaConfig.from_pretrained(tmp_path)
    assert Head.of(saved) == head
    assert saved.pad_token_id == 3


def test_a_model_without_such_a_head_is_refused() -> None:
    config = LlamaConfig()
    config.model_type = "mamba"
    with pytest.raises(UserError, match="no 'mamba' model that labels words"):
        Head("token_classification", ("O", "P")).put_into(config, 0)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "7", '{"architectures": 3}', '{"architectures": [7]}', "\xff"])
def test_a_config_that_is_damaged_is_of_no_head(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert not has_head(tmp_path)
    assert labels_of(tmp_path) == ()


@pytest.mark.parametrize("names", ["3", "[]", '{"a": "b"}', "null"])
def test_labels_that_are_damaged_are_none(tmp_path, names):
    (tmp_path / "config.json").write_text(f'{{"id2label": {names}}}')
    assert labels_of(tmp_path) == ()
