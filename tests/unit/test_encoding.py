"""Rows to tokens: what is supervised, what generation starts from, and how rows are put into batches."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from diablo.data.batching import LengthGroupedSampler, collate
from diablo.data.encoding import IGNORED, RowEncoder, words_at_joint
from diablo.data.rows import Row
from diablo.errors import UserError

PLAIN = Row(7, "Problem: Ann had 3 apples.\nEquation:", " x = 3 + 4")
TALK = Row(
    4,
    messages=(
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "second"},
    ),
)


@pytest.fixture(scope="module")
def shared_tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def tokenizer(shared_tokenizer: Any) -> Any:
    """A tokenizer that a test may change."""
    return copy.deepcopy(shared_tokenizer)


def parts(tokenizer: Any, encoded: Any) -> list[tuple[bool, str]]:
    """Runs of supervised and other tokens, as text."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (token, IGNORED)
        supervised = label != IGNORED
        if not runs or runs[-1][0] != supervised:
            runs.append((supervised, []))
        runs[-1][1].append(token)
    return [(supervised, tokenizer.decode(tokens)) for supervised, tokens in runs]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("a desk", "office", "deskoffice"),
        ("it is 4", "more words", "4more"),
        ("a desk ", "office", ""),
        ("a desk", " office", ""),
        ("a desk:", "office", ""),
        ("a desk", "!", ""),
        ("", "office", ""),
        ("a desk", "", ""),
        ("桌子", "办公室", ""),
    ],
)
def test_words_that_nothing_parts_are_told(prompt: str, completion: str, expected: str) -> None:
    assert words_at_joint(prompt, completion) == expected


def test_prompt_is_not_supervised_and_the_completion_is_with_its_stop(tokenizer: Any) -> None:
    encoded = RowEncoder(tokenizer).encode(PLAIN)
    assert encoded.number == 7
    assert parts(tokenizer, encoded) == [(False, PLAIN.prompt), (True, f"{PLAIN.completion}</s>")]
    assert encoded.supervised == sum(label != IGNORED for label in encoded.labels)
    assert encoded.features == {"input_ids": encoded.input_ids, "labels": encoded.labels}


def test_completion_that_brings_its_stop_gets_no_second_one(tokenizer: Any) -> None:
    encoded = RowEncoder(tokenizer).encode(Row(1, "a", "b</s>"))
    assert parts(tokenizer, encoded) == [(False, "a"), (True, "b</s>")]


def test_first_token_of_a_row_carries_no_loss(tokenizer: Any) -> None:
    encoded = RowEncoder(tokenizer).encode(Row(1, "", "b"))
    assert encoded.labels == encoded.input_ids
    assert encoded.supervised == len(encoded.input_ids) - 1


def test_end_of_text_that_the_tokenizer_appends_does_not_end_the_prompt(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    specials = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id  # or else the test would show nothing
    assert parts(tokenizer, RowEncoder(tokenizer).encode(Row(1, "a", "b"))) == [(False, "<s>a"), (True, "b</s>")]


def test_chat_template_supervises_the_answer_up_to_the_stop(tokenizer: Any) -> None:
    encoded = RowEncoder(tokenizer, chat=True).encode(Row(1, " one? ", " first "))
    assert parts(tokenizer, encoded) == [
        (False, "<s>user\none?</s>\n<s>assistant\n"),
        (True, "first</s>"),  # the template writes a line break after it; the model has stopped by then
    ]


def test_every_assistant_turn_of_a_conversation_is_supervised(tokenizer: Any) -> None:
    encoded = RowEncoder(tokenizer, chat=True).encode(TALK)
    assert parts(tokenizer, encoded) == [
        (False, "<s>system\nbe brief</s>\n<s>user\none?</s>\n<s>assistant\n"),
        (True, "first</s>"),
        (False, "\n<s>user\ntwo?</s>\n<s>assistant\n"),
        (True, "second</s>"),
    ]
    # Training must see the text of the template, token by token as the model meets it in a chat.
    whole = tokenizer.apply_chat_template(list(TALK.messages), tokenize=False)
    assert tokenizer.decode(encoded.input_ids) + "\n" == whole


def test_template_that_writes_no_stop_gets_one_after_each_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    first, second = RowEncoder(tokenizer, chat=True).encode_all(TALK)
    assert parts(tokenizer, first)[-1] == (True, "first\n</s>")
    # What follows an answer in the conversation does not follow its stop token, which generation leaves out of it.
    assert parts(tokenizer, second) == [
        (False, "system: be brief\nuser: one?\nassistant: first\nuser: two?\nassistant: "),
        (True, "second\n</s>"),
    ]
    assert first.apart == second.apart == "the chat template ends an answer with no token that stops generation"


def test_further_stop_tokens_end_a_turn(tokenizer: Any) -> None:
    # Models name an end-of-turn token beside the end of text; the end of text must not be put after it.
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>\n", "<pad>\n")
    encoder = RowEncoder(tokenizer, chat=True, stop_token_ids=[tokenizer.pad_token_id])
    assert encoder.stop_token_ids == {tokenizer.pad_token_id, tokenizer.eos_token_id}
    assert parts(tokenizer, encoder.encode(Row(1, "one?", "first")))[1:] == [(True, "first<pad>")]


@pytest.mark.parametrize(("row", "chat"), [(PLAIN, False), (PLAIN, True), (TALK, True)])
def test_generation_starts_from_what_training_has_before_the_last_completion(
    tokenizer: Any, row: Row, chat: bool
) -> None:
    encoder = RowEncoder(tokenizer, chat=chat)
    prompt, encoded = encoder.prompt(row), encoder.encode(row)
    assert encoded.input_ids[: len(prompt)] == prompt
    rest = encoded.labels[len(prompt) :]
    assert rest[0] != IGNORED
    answer = tokenizer.decode([label for label in rest if label != IGNORED])
    assert answer.strip() == ("second</s>" if row is TALK else "x = 3 + 4</s>")


@given(st.text(max_size=30), st.text(min_size=1, max_size=30).filter(str.strip))
@settings(max_examples=60, deadline=None)
def test_any_text_round_trips_and_ends_with_one_stop(shared_tokenizer: Any, prompt: str, completion: str) -> None:
    encoder = RowEncoder(shared_tokenizer)
    encoded = encoder.encode(Row(1, prompt, completion))
    assert encoder.prompt(Row(1, prompt, completion)) == encoded.input_ids[: encoded.labels.count(IGNORED)]
    assert encoded.labels[-1] == shared_tokenizer.eos_token_id
    assert encoded.labels.count(shared_tokenizer.eos_token_id) == 1
    decode = shared_tokenizer.decode
    assert decode([label for label in encoded.labels if label != IGNORED]) == f"{completion}</s>"


def test_conversation_without_chat_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="Row 4 is a conversation; set chat to true"):
        RowEncoder(tokenizer).encode(TALK)


def test_chat_without_template_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(
        UserError, match=r"chat: found true; .* no chat template: give one with chat_template .*, or set chat to false"
    ):
        RowEncoder(tokenizer, chat=True)


def test_tokenizer_without_end_of_text_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        RowEncoder(tokenizer)


def test_each_answer_is_a_row_where_the_template_rewrites_earlier_turns(tokenizer: Any) -> None:
    # Templates of reasoning models drop what was thought in earlier turns; others keep the last question only.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}</s>{% endif %}"
        "{% endfor %}"
    )
    encoder = RowEncoder(tokenizer, chat=True)
    encoded = encoder.encode_all(TALK)
    assert [parts(tokenizer, row) for row in encoded] == [
        [(False, "be brief</s>one?</s>"), (True, "first</s>")],
        [(False, "be brief</s>one?</s>two?</s>"), (True, "second</s>")],
    ]
    assert {row.number for row in encoded} == {4}
    assert {row.apart for row in encoded} == {"the chat template rewrites earlier turns"}
    assert encoder.encode(TALK) == encoded[-1]
    (whole,) = encoder.encode_all(Row(1, "one?", "first"))  # one question and one answer are not touched by it
    assert whole.apart == ""


def test_answers_that_are_not_to_be_trained_are_context(tokenizer: Any) -> None:
    encoder = RowEncoder(tokenizer, chat=True)
    first, untrained = TALK.messages[:3], TALK.messages[3:]
    row = Row(4, messages=(*first[:2], first[2] | {"train": False}, *untrained))
    assert parts(tokenizer, encoder.encode(row)) == [
        (
            False,
            "<s>system\nbe brief</s>\n<s>user\none?</s>\n<s>assistant\nfirst</s>\n<s>user\ntwo?</s>\n<s>assistant\n",
        ),
        (True, "second</s>"),
    ]
    none = Row(4, messages=tuple(m | {"train": False} for m in TALK.messages))
    with pytest.raises(UserError, match="Row 4: has no answer that is trained on; take train: false off a turn"):
        encoder.encode(none)


def test_a_system_text_that_the_template_refuses_is_put_before_the_first_question(tokenizer: Any) -> None:
    # Gemma's template raises for a system turn.
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    encoder = RowEncoder(tokenizer, chat=True)
    encoded = encoder.encode(TALK)
    assert parts(tokenizer, encoded)[0] == (False, "<s>user\nbe brief\n\none?</s>\n<s>assistant\n")
    assert encoded.joined_system
    assert encoder.prompt(TALK) == encoded.input_ids[: len(encoder.prompt(TALK))]
    assert not encoder.encode(Row(1, "one?", "first")).joined_system


def test_template_that_refuses_a_conversation_names_the_row(tokenizer: Any) -> None:
    # Mistral's templates raise for roles that do not alternate.
    tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('Too long') }}{% endif %}" + tokenizer.chat_template
    )
    with pytest.raises(UserError, match=r"Row 4: .*Too long"):
        RowEncoder(tokenizer, chat=True).encode(TALK)


def test_conversation_that_the_assistant_opens(tokenizer: Any) -> None:
    # There is nothing that the answer could be told from.
    with pytest.raises(UserError, match="Row 3: begins with the assistant's turn; put a turn of the user before it"):
        RowEncoder(tokenizer, chat=True).encode(Row(3, messages=({"role": "assistant", "content": "hello"},)))


def test_collate_pads_by_position_also_where_padding_is_the_stop_token() -> None:
    stop = 2
    features = [
        {"input_ids": [5, stop, 6, stop], "labels": [IGNORED, IGNORED, 6, stop]},
        {"input_ids": [7, stop], "labels": [IGNORED, stop]},
    ]
    batch = {name: values.tolist() for name, values in collate(features, stop).items()}
    assert batch == {
        "input_ids": [[5, 2, 6, 2], [7, 2, 2, 2]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[IGNORED, IGNORED, 6, 2], [IGNORED, 2, IGNORED, IGNORED]],
        # Through the rows one after the other, four positions each.
        "predicting": [1, 2, 4],
    }


lengths_of_rows = st.lists(st.integers(1, 200), min_size=1, max_size=300)


@given(lengths_of_rows, st.integers(1, 20), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_order_is_a_permutation_that_only_seed_and_epoch_decide(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    import random

    def order() -> list[int]:
        sampler = LengthGroupedSampler(lengths, size, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order()
    random.seed(random.random())
    assert order() == first
    assert sorted(first) == list(range(len(lengths)))
    sampler = LengthGroupedSampler(lengths, size, seed)
    list(sampler)  # an earlier epoch that was drawn, or not, must not matter to a resumed run
    sampler.set_epoch(epoch)
    assert list(sampler) == first
    assert len(sampler) == len(lengths)


@given(lengths_of_rows, st.integers(1, 20), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_whole_batches_hold_neighbours_in_length(lengths: list[int], size: int, seed: int) -> None:
    batches = LengthGroupedSampler(lengths, size, seed).batches()
    whole = [batch for batch in batches if len(batch) == size]
    assert all(len(batch) == size for batch in batches[:-1])
    # Within a group of 50 batches, sorting makes the batches' ranges of length follow one another.
    if len(whole) <= 50:
        ranges = sorted((min(lengths[i] for i in batch), max(lengths[i] for i in batch)) for batch in whole)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))


def test_seeds_and_epochs_give_other_orders() -> None:
    lengths = list(range(1, 101))
    orders = set()
    for seed in (0, 1):
        for epoch in (0, 1):
            sampler = LengthGroupedSampler(lengths, 4, seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 4


def test_little_padding_and_no_drift_of_length() -> None:
    import random

    generator = random.Random(3)
    lengths = [int(generator.lognormvariate(4, 0.6)) + 1 for _ in range(2000)]
    sampler = LengthGroupedSampler(lengths, 16, 0)
    in_file_order = [lengths[i : i + 16] for i in range(0, 2000, 16)]
    padding_in_file_order = 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in in_file_order)
    assert padding_in_file_order > 0.4
    assert sampler.padding_share() < 0.1
    assert sampler.padding_share(micro_batch_size=4) <= sampler.padding_share()
    assert sampler.padding_share(micro_batch_size=1) == 0
    # The batches come in random order: the halves of a group of 50 have about the same mean length.
    batches = sampler.batches()[:50]
    halves = [sum(lengths[i] for batch in half for i in batch) for half in (batches[:25], batches[25:])]
    assert 0.5 < halves[0] / halves[1] < 2


def sentence_pieces(tokenizer: Any, scheme: str) -> Any:
    """A tokenizer that marks spaces and puts one before a text, as those made by SentencePiece do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bpe.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme=scheme), decoders.Fuse()])
    alphabet = [*map(chr, range(32, 127)), "\n", "▁"]
    words = ["one? two? first second user assistant system be brief"] * 3
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    bpe.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=160, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = tokenizer.chat_template
    return made


@pytest.mark.parametrize("scheme", ["always", "first"])
@pytest.mark.parametrize("colon", ["\n", ":", ": "])
def test_no_space_gets_before_an_answer_that_the_template_does_not_write(
    tokenizer: Any, scheme: str, colon: str
) -> None:
    template = tokenizer.chat_template.replace("\n{{ message['content'] }}", f"{colon}{{{{ message['content'] }}}}")
    tokenizer = sentence_pieces(tokenizer, scheme)
    tokenizer.chat_template = template.replace("assistant\n", f"assistant{colon}")
    pieces = tokenizer.convert_ids_to_tokens
    assert pieces(tokenizer("first", add_special_tokens=False).input_ids)[0].startswith("▁")  # this is what it does
    rows = RowEncoder(tokenizer, chat=True).encode_all(TALK)
    answers = "".join(pieces([label for row in rows for label in row.labels if label != IGNORED]))
    assert answers == "first</s>second</s>"
    whole = tokenizer.apply_chat_template(list(TALK.messages), tokenize=False)
    if colon != ": ":  # there the answer's first token would have the space of the prompt in it
        assert rows[0].input_ids == tokenizer(whole, add_special_tokens=False).input_ids[: len(rows[0].input_ids)]
    prompt = tokenizer.apply_chat_template(list(TALK.messages[:-1]), tokenize=False, add_generation_prompt=True)
    asked = tokenizer(prompt, add_special_tokens=False).input_ids
    assert rows[-1].input_ids[: len(asked)] == asked
