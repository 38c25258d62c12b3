"""Rows, losses, likelihoods and answers of encoder-decoders, against transformers' own way and one row at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import make_tiny_t5
from tokenizers import processors
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
)

from diablo import DiabloConfig
from diablo.data import Row, RowEncoder
from diablo.data.batching import LengthGroupedSampler, collate
from diablo.data.encoding import IGNORED
from diablo.models.forms import CAUSAL, ENCODER_DECODER, form_of
from diablo.models.loading import load_tokenizer
from diablo.scoring.generation import complete, held_out_loss
from diablo.scoring.likelihood import score_candidates
from diablo.scoring.losses import summed_completion_loss

ROWS = [
    Row(1, "Ann had 3 apples and Bob gave her 4 more.", "x = 3 + 4"),
    Row(2, "the dog", "the lazy fox"),
    Row(3, "", "x"),
    Row(4, "How many apples does she have now? " * 3, "x = 5"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("t5") / "model", gated=True, chat_template=True)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module", params=["t5", "bart"])
def model(request: pytest.FixtureRequest, folder: Path, tokenizer: Any) -> Any:
    """A model with an adapter that changes its output. BART has learned positions, and looks at padding unless told."""
    torch.manual_seed(0)
    if request.param == "t5":
        base = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
        # Random weights of some versions of transformers make every token the one of padding.
        torch.nn.init.normal_(base.lm_head.weight, std=0.3)
    else:
        sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        base = BartForConditionalGeneration(
            BartConfig(
                vocab_size=len(tokenizer),
                max_position_embeddings=128,
                d_model=32,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                init_std=0.2,
                dropout=0.0,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=1,
                decoder_start_token_id=1,
                forced_eos_token_id=None,
                **sizes,
            )
        )
    config = DiabloConfig(num_blocks=4, task_type="SEQ_2_SEQ_LM", init_weights=False)
    return get_peft_model(base, config).eval()


@pytest.fixture
def encoder(tokenizer: Any) -> RowEncoder:
    return RowEncoder(tokenizer, encoder_decoder=True)


def test_a_prompt_is_read_and_a_completion_written_each_as_the_tokenizer_makes_it(encoder, tokenizer):
    for row in ROWS:
        encoded = encoder.encode(row)
        prompt, completion = tokenizer(row.prompt).input_ids, tokenizer(text_target=row.completion).input_ids
        assert prompt[-1] == completion[-1] == tokenizer.eos_token_id
        assert encoded.features == {"input_ids": prompt, "written": completion}
        assert encoded.parts == [len(prompt), len(completion)]
        assert encoded.supervised == len(completion)
        assert encoder.prompt(row) == prompt


def test_texts_end_also_where_the_tokenizer_ends_none_and_a_language_stands_behind(folder):
    bare, named = load_tokenizer(str(folder)), load_tokenizer(str(folder))
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    encoded = RowEncoder(bare, encoder_decoder=True).encode(ROWS[0])
    assert [encoded.features[name][-2:].count(1) for name in ("input_ids", "written")] == [1, 1]
    named.add_special_tokens({"additional_special_tokens": ["<en>"]})
    language = named.convert_tokens_to_ids("<en>")
    named.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s> <en>", special_tokens=[("</s>", 1), ("<en>", language)]
    )
    encoded = RowEncoder(named, encoder_decoder=True).encode(ROWS[0])
    assert encoded.features["input_ids"][-2:] == [1, language]
    assert encoded.features["written"][-2:] == [1, IGNORED]


def test_every_answer_of_a_conversation_is_a_row_that_reads_what_comes_before(tokenizer):
    turns = [("user", "the fox?"), ("assistant", "the dog"), ("user", "and?"), ("assistant", "apples")]
    row = Row(1, messages=tuple({"role": role, "content": text} for role, text in turns))
    encoder = RowEncoder(tokenizer, chat=True, encoder_decoder=True)
    first, second = encoder.encode_all(row)
    assert [tokenizer.decode(each.features["written"]) for each in (first, second)] == ["the dog</s>", "apples</s>"]
    assert second.features["input_ids"] == encoder.prompt(row)
    assert "the dog" in tokenizer.decode(second.features["input_ids"])
    assert first.apart == "an encoder-decoder writes one answer to all that it reads"


def test_the_loss_of_a_batch_is_that_of_transformers_own_trainer_and_collator(model, tokenizer, encoder, tmp_path):
    rows = [encoder.encode(row) for row in ROWS]
    batch = collate([row.features for row in rows], tokenizer.pad_token_id)
    ours = summed_completion_loss(model, batch) / len(batch["predicting"])
    theirs = DataCollatorForSeq2Seq(tokenizer, model=model.get_base_model())(
        [{**tokenizer(row.prompt), "labels": tokenizer(text_target=row.completion).input_ids} for row in ROWS]
    )
    assert torch.equal(batch["labels"], theirs["labels"])
    assert torch.equal(batch["attention_mask"], theirs["attention_mask"])
    settings = Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Seq2SeqTrainer(model=model, args=settings, processing_class=tokenizer)
    torch.testing.assert_close(ours, trainer.compute_loss(model, {**theirs}), rtol=1e-5, atol=1e-5)
    assert held_out_loss(model, rows, tokenizer.pad_token_id, batch_size=3) == pytest.approx(ours.item(), rel=1e-5)


def test_likelihoods_are_those_of_one_candidate_at_a_time(model, tokenizer, encoder):
    problems = [[Row(n, row.prompt, text) for text in ("x", "x = 3", "x = 4", "the dog")] for n, row in enumerate(ROWS)]
    for rows, candidates in zip(problems, score_candidates(model, encoder, problems, batch_size=5), strict=True):
        for row, candidate in zip(rows, candidates, strict=True):
            labels = torch.tensor([tokenizer(text_target=row.completion).input_ids[:-1]])
            with torch.no_grad():
                loss = model(**tokenizer(row.prompt, return_tensors="pt"), labels=labels).loss
            assert candidate.tokens == labels.shape[1]
            assert candidate.log_likelihood == pytest.approx(-loss.item() * labels.shape[1], rel=1e-4)


def test_answers_in_a_batch_are_those_that_transformers_generates_one_by_one(model, tokenizer, encoder):
    answers = complete(model, encoder, [encoder.prompt(row) for row in ROWS], max_new_tokens=8, batch_size=4)
    for row, answer in zip(ROWS, answers, strict=True):
        alone = model.generate(**tokenizer(row.prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)[0, 1:]
        assert answer.text == tokenizer.decode(alone, skip_special_tokens=True)
        assert answer.finished == (tokenizer.eos_token_id in alone)
    assert len({answer.text for answer in answers}) > 1


def test_padding_is_counted_in_each_part_by_itself():
    sampler = LengthGroupedSampler([6, 6], batch_size=2, seed=0)
    assert sampler.padding_share() == 0
    # Read are 5 and 1 tokens, written are 1 and 5.
    assert sampler.padding_share(parts=[[5, 1], [1, 5]]) == pytest.approx(1 - 12 / 20)


def test_checkpoints_that_name_the_body_are_encoder_decoders_and_a_lone_encoder_is_none(folder):
    named = json.loads((folder / "config.json").read_text())["architectures"]
    for name in (*named, "T5Model", "T5WithLMHeadModel"):
        assert form_of(T5Config(architectures=[name])) == ENCODER_DECODER
    assert form_of(BartConfig(architectures=["BartModel"])) == ENCODER_DECODER
    assert form_of(BartConfig(architectures=["BartForCausalLM"], is_encoder_decoder=False)) == CAUSAL
    assert form_of(T5Config(architectures=["T5EncoderModel"])) == CAUSAL
