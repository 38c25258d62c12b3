"""Rows whose own text spells a special token: found, counted, and made tokens as the recipe says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from diablo.data import Row, RowEncoder
from diablo.data.encoding import IGNORED
from diablo.data.general_text import encode_general_text
from diablo.data.special_text import TextTokenizer
from diablo.errors import UserError

SPELLED = Row(3, "say <s> now", "a</s>b<pad>")
TALK = Row(
    4,
    messages=(
        {"role": "system", "content": "be <s>"},
        {"role": "user", "content": "one</s>?"},
        {"role": "assistant", "content": "first </s> and </s>"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "second"},
    ),
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def special(tokenizer: Any, ids: list[int]) -> list[str]:
    return [token for token in tokenizer.convert_ids_to_tokens(ids) if token in tokenizer.all_special_tokens]


def test_kept_text_becomes_the_token_and_is_counted(tokenizer: Any) -> None:
    encoded = RowEncoder(tokenizer).encode(SPELLED)
    assert special(tokenizer, encoded.input_ids) == ["<s>", "</s>", "<pad>", "</s>"]
    assert encoded.special_text == ("<s>", "</s>", "<pad>")
    assert RowEncoder(tokenizer).encode(Row(1, "<think> a < s>", "b")).special_text == ()


def test_characters_that_mark_text_inside_are_kept_as_any_other(tokenizer: Any) -> None:
    marks = Row(1, "\ufdd0</s>\ufdd1", "\ufdd1 b")
    assert tokenizer.decode(RowEncoder(tokenizer).encode(marks).input_ids) == "\ufdd0</s>\ufdd1\ufdd1 b</s>"
    plain = RowEncoder(tokenizer, special_text="plain").encode(marks)
    assert special(tokenizer, plain.input_ids) == ["</s>"]


def test_an_answer_that_spells_the_stop_is_supervised_to_its_end(tokenizer: Any) -> None:
    for chat in (False, True):
        encoder = RowEncoder(tokenizer, chat=chat)
        labels = encoder.encode(Row(1, "p", "a</s>b")).labels
        assert tokenizer.decode([label for label in labels if label != IGNORED]) == "a</s>b</s>"
    # It has its stop where nothing but white space follows.
    assert RowEncoder(tokenizer).encode(Row(1, "p", "a</s>\n")).labels.count(tokenizer.eos_token_id) == 1


def test_plain_text_is_tokenized_as_if_there_were_no_special_tokens(tokenizer: Any) -> None:
    encoded = RowEncoder(tokenizer, special_text="plain").encode(SPELLED)
    as_text = [
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in (SPELLED.prompt, SPELLED.completion)
    ]
    assert encoded.input_ids == [*as_text[0], *as_text[1], tokenizer.eos_token_id]
    assert encoded.labels == [*[IGNORED] * len(as_text[0]), *as_text[1], tokenizer.eos_token_id]
    assert encoded.special_text == ("<s>", "</s>", "<pad>")
    # What the tokenizer sets is as it was for those who use it next.
    assert tokenizer("</s>")["input_ids"] == [tokenizer.eos_token_id]


def test_special_tokens_of_the_template_stay_tokens(tokenizer: Any) -> None:
    rows = {mode: RowEncoder(tokenizer, chat=True, special_text=mode).encode(TALK) for mode in ("keep", "plain")}
    assert rows["keep"].special_text == rows["plain"].special_text == ("<s>", "</s>", "</s>", "</s>")
    assert special(tokenizer, rows["plain"].input_ids) == ["<s>", "</s>"] * 5
    assert len(special(tokenizer, rows["keep"].input_ids)) == 14
    assert tokenizer.decode(rows["keep"].input_ids) == tokenizer.decode(rows["plain"].input_ids)
    # The stop of the template is what is learned, and the text before it, whatever it spells.
    supervised = [label for label in rows["plain"].labels if label != IGNORED]
    assert tokenizer.decode(supervised) == "first </s> and </s></s>second</s>"
    assert special(tokenizer, supervised) == ["</s>", "</s>"]
    untouched = Row(5, messages=TALK.messages[3:])
    assert RowEncoder(tokenizer, chat=True, special_text="plain").encode(untouched) == RowEncoder(
        tokenizer, chat=True
    ).encode(untouched)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("mode", ["keep", "plain"])
def test_generation_starts_from_the_tokens_of_training(tokenizer: Any, chat: bool, mode: Any) -> None:
    encoder = RowEncoder(tokenizer, chat=chat, special_text=mode)
    for row in [SPELLED, TALK] if chat else [SPELLED]:
        prompt, encoded = encoder.prompt(row), encoder.encode(row)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt)] != IGNORED
        assert (len(special(tokenizer, prompt)) > 0) == (chat or mode == "keep")


def test_a_template_of_parts_and_one_that_trims_keep_plain_text_plain(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{% for part in m['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] | trim }}{% endif %}{% endfor %}</s>{% endfor %}"
    )
    encoded = RowEncoder(tokenizer, chat=True, special_text="plain").encode(Row(1, "</s> one ", "</s> first <s>"))
    assert tokenizer.decode(encoded.input_ids) == "<s></s> one</s><s></s> first <s></s>"
    assert special(tokenizer, encoded.input_ids) == ["<s>", "</s>", "<s>", "</s>"]


def test_words_that_a_tokenizer_adds_without_calling_them_special_are_no_matter(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<think>"])
    thought = tokenizer.convert_tokens_to_ids("<think>")
    encoded = RowEncoder(tokenizer, special_text="plain").encode(Row(1, "</s>", "<think> </s>"))
    assert thought in encoded.input_ids
    assert encoded.special_text == ("</s>", "</s>")


def test_general_text_follows_the_recipe(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "general.txt"
    path.write_text("The quick </s> brown <s> fox.\n\nThe dog.")
    kept, plain = (encode_general_text(str(path), tokenizer, 99, mode) for mode in ("keep", "plain"))
    assert [row.special_text for row in kept] == [row.special_text for row in plain] == [("</s>", "<s>"), ()]
    assert kept[1] == plain[1]
    assert tokenizer.decode(plain[0].input_ids) == "The quick </s> brown <s> fox."
    assert special(tokenizer, plain[0].input_ids) == []


def spaced(scheme: str) -> Any:
    """A tokenizer that writes spaces as part of a word, and one before a text: the first word or each after a token."""
    words = ["<unk>", "<s>", "</s>", "\n", *"▁<s>/ab"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False),
            pre_tokenizers.Split("", behavior="isolated"),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_plain_text_has_no_space_that_the_tokenizer_would_not_put_after_a_special_token(scheme: str) -> None:
    tokenizer = spaced(scheme)
    # The same text but for one character: what stands before it is to have the same tokens.
    native = tokenizer("<s>a b</s>", add_special_tokens=False).tokens()
    text = TextTokenizer(tokenizer, "plain")
    tokens = tokenizer.convert_ids_to_tokens(text.ids(f"<s>{text.guard('a b</s>')}</s>"))
    assert tokens[: len(native) - 1] == native[:-1]
    assert tokens[len(native) - 1 :] == ["<", "/", "s", ">", "</s>"]


def test_white_space_that_a_special_token_swallows_is_swallowed_beside_plain_text(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|in|>", rstrip=True), AddedToken("<|out|>", lstrip=True)]}
    )
    text = TextTokenizer(tokenizer, "plain")
    ids = text.ids(f"<|in|>\n{text.guard('a<s>')}\n<|out|>\n")
    assert tokenizer.decode(ids) == "<|in|>a<s><|out|>\n"


def test_a_tokenizer_in_python_keeps_text_plain_too() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    encoded = RowEncoder(tokenizer, special_text="plain").encode(Row(1, "a</s>b", "c<pad>"))
    assert encoded.special_text == ("</s>", "<pad>")
    assert special(tokenizer, encoded.input_ids) == ["</s>"]
    assert tokenizer.decode(encoded.input_ids) == "a</s>bc<pad></s>"


def test_a_vocabulary_that_has_the_special_token_as_a_word_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(UserError, match=r"data\.special_text: found plain, but the tokenizer has '</s>' as a word"):
        RowEncoder(tokenizer, special_text="plain").encode(Row(1, "a", "a </s> a"))
    RowEncoder(tokenizer, special_text="plain").encode(Row(1, "a", "b <unk> a"))


def test_text_that_is_no_unicode_is_an_error_of_the_user(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="is not valid Unicode"):
        RowEncoder(tokenizer).prompt(Row(1, "a\udcff", "b"))
