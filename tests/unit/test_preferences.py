"""Rows that say which completion is better: read, encoded, put into batches, and their losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from diablo.data.encoding import IGNORED, RowEncoder
from diablo.data.faults import NoRowError, RowError
from diablo.data.reading.columns import Columns
from diablo.data.reading.formats import to_row
from diablo.data.rows import Row
from diablo.errors import UserError
from diablo.recipes.objectives import JudgedObjective
from diablo.records.progress import TokenMeter
from diablo.tasks import get_task, without_tested
from diablo.training.trainers.preferences import Collator, JudgedTrainer, OddsRatioTrainer, PairTrainer

ASKED = {"role": "user", "content": "How many?"}
GOOD = {"role": "assistant", "content": "x = 3"}
BAD = {"role": "assistant", "content": "a dog"}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "How many?", "chosen": " x = 3", "rejected": " a dog"}, "How many?"),
        ({"chosen": "How many? x = 3", "rejected": "How many? x = 4"}, "How many? x ="),
        ({"chosen": "How many? Three", "rejected": "How many? Thirty"}, "How many?"),
    ],
)
def test_pairs_of_texts(record, prompt):
    row, form = to_row(3, record, "pairs")
    assert form == "pairs"
    assert row.rejected is not None
    assert row.number == 3
    assert row.prompt == row.rejected.prompt == prompt
    before = "" if "prompt" in record else prompt
    assert (before + row.completion, before + row.rejected.completion) == (record["chosen"], record["rejected"])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "How many?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "How many?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": json.dumps([ASKED, GOOD]), "rejected": json.dumps([ASKED, BAD])},
        {"prompt": json.dumps([ASKED]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    ],
)
def test_pairs_of_turns(record):
    row, _ = to_row(1, record, "pairs")
    assert row.rejected is not None
    assert (row.messages, row.rejected.messages) == ((ASKED, GOOD), (ASKED, BAD))


def test_answers_that_both_completions_go_on_from_are_not_trained_on():
    row, _ = to_row(1, {"chosen": [ASKED, GOOD, ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]}, "pairs")
    assert row.messages == (ASKED, GOOD | {"train": False}, ASKED, GOOD)


@given(st.text(min_size=1), st.text(), st.text())
def test_what_two_texts_share_is_never_lost(start, better, worse):
    record = {"chosen": start + better, "rejected": start + worse}
    try:
        row, _ = to_row(1, record, "pairs")
    except NoRowError:
        return
    assert row.rejected is not None
    assert row.prompt + row.completion == record["chosen"]
    assert row.prompt + row.rejected.completion == record["rejected"]
    assert row.completion.strip()
    assert row.rejected.completion.strip()


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "1"])
def test_a_judgement_is_true_or_false_in_any_spelling(label):
    row, form = to_row(1, {"prompt": "a", "completion": " b", "label": label}, "judged")
    assert (row.desired, form) == (True, "judged")
    assert to_row(1, {"messages": [ASKED, GOOD], "label": label}, "judged")[0].messages == (ASKED, GOOD)


@pytest.mark.parametrize(
    ("record", "kind", "says"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "pairs", "chosen and rejected are the same"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]}, "pairs", "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "pairs", "rejected is empty"),
        ({"prompt": "a", "chosen": "b"}, "pairs", "rejected is missing, not text"),
        ({"chosen": "b", "rejected": "c"}, "pairs", "has no prompt, and chosen and rejected do not begin alike"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": " b"}, "pairs", "chosen is a list, not text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{}]}, "pairs", "has tools and completions"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "pairs", "begins with the assistant's turn"),
        ({"chosen": [ASKED], "rejected": [ASKED, BAD]}, "pairs", "does not end with an assistant's turn"),
        ({"prompt": "a", "completion": "b"}, "pairs", "has prompt, completion"),
        ({"prompt": "a", "completion": "b"}, "judged", "has prompt, completion"),
        ({"prompt": "a", "completion": "b", "label": None}, "judged", "label is None"),
        ({"prompt": "a", "completion": "b", "label": 0.5}, "judged", "label is 0.5"),
        ({"prompt": "a", "completion": "b", "label": [True]}, "judged", "label is [True]"),
        ({"messages": [ASKED, GOOD]}, "judged", "label is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "completions", "has prompt, chosen, rejected"),
    ],
)
def test_what_is_no_such_row_is_refused(record, kind, says):
    with pytest.raises(NoRowError) as refused:
        to_row(1, record, kind)
    assert refused.value.reason.startswith(says)


@pytest.mark.parametrize(
    ("record", "kind", "mend"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "completions", "it has what objective: dpo needs"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "judged", "it has what objective: dpo needs"),
        ({"prompt": "a", "completion": "b", "label": True}, "pairs", "it has what objective: kto needs"),
        ({"messages": [ASKED, GOOD]}, "pairs", "it has what objective: sft needs"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "pairs", ""),
        (
            {"question": "a", "better": "b", "worse": "c"},
            "pairs",
            "{prompt: question, chosen: better, rejected: worse}",
        ),
        ({"question": "a", "answer": "b", "good": 1}, "judged", "{prompt: question, completion: answer, label: good}"),
    ],
)
def test_rows_for_another_objective_say_which(record, kind, mend):
    with pytest.raises(NoRowError) as refused:
        to_row(1, record, kind)
    assert refused.value.mend.endswith(mend)


def test_columns_are_those_of_the_objectives_formats():
    made = Columns({"prompt": "q", "chosen": "a", "rejected": "{{ b }}."}, "pairs")({"q": "1", "a": "2", "b": "3"})
    assert to_row(1, made, "pairs")[0].rejected == Row(1, "1", "3.")
    judged = Columns({"prompt": "q", "completion": "a", "label": "good"}, "judged")({"q": "1", "a": "2", "good": False})
    assert to_row(1, judged, "judged")[0].desired is False
    with pytest.raises(UserError, match="found 'completion' as a column of a format; allowed: chosen, prompt, rej"):
        Columns({"prompt": "q", "completion": "a"}, "pairs")


def test_problems_that_are_tested_on_are_left_out_of_pairs_too():
    problem = get_task("mawps").problems("test")[0]
    turn = {"role": "user", "content": problem.row.as_messages()[0]["content"]}
    rows = [
        to_row(1, {"prompt": problem.row.prompt, "chosen": " x", "rejected": " y"}, "pairs")[0],
        to_row(2, {"prompt": [turn], "chosen": [GOOD], "rejected": [BAD]}, "pairs")[0],
        to_row(3, {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, "pairs")[0],
    ]
    assert [row.number for row in without_tested(rows, [problem])[0]] == [3]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("chat", [False, True])
def test_both_completions_stand_in_the_context_of_generation_and_end_with_a_stop(tokenizer, chat):
    record: dict[str, Any] = (
        {"prompt": [ASKED, GOOD, ASKED], "chosen": [GOOD], "rejected": [BAD]}
        if chat
        else {"prompt": "How many?", "chosen": " x = 3", "rejected": " a dog"}
    )
    row, _ = to_row(1, record, "pairs")
    encoder = RowEncoder(tokenizer, chat=chat)
    [encoded] = encoder.encode_all(row)
    assert encoded.rejected is not None
    prompt = encoder.prompt(row)
    for each in (encoded, encoded.rejected):
        assert each.input_ids[: len(prompt)] == prompt
        assert each.labels[: len(prompt)] == [IGNORED] * len(prompt)
        supervised = [label for label in each.labels if label != IGNORED]
        assert supervised[-1] in encoder.stop_token_ids
    assert encoded.length == max(len(encoded.input_ids), len(encoded.rejected.input_ids))
    assert encoded.tokens == len(encoded.input_ids) + len(encoded.rejected.input_ids)
    assert encoded.supervised == sum(
        label != IGNORED for each in (encoded, encoded.rejected) for label in each.labels[1:]
    )


def test_a_completion_whose_answers_cannot_stand_together_is_refused(tokenizer):
    rewriting = (
        "{% for m in messages %}<s>{{ m['role'] }}\n"
        "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = rewriting
    row, _ = to_row(4, {"chosen": [ASKED, GOOD, ASKED, GOOD], "rejected": [ASKED, BAD, ASKED, BAD]}, "pairs")
    with pytest.raises(RowError, match="Row 4: its answers cannot be put together: the chat template rewrites"):
        RowEncoder(other, chat=True).encode_all(row)


PAIRS = [
    {"prompt": f"How many are {n}?", "chosen": f" x = {n} + {n % 7}", "rejected": " a dog" * (n % 3 + 1)}
    for n in range(5)
]


def test_a_batch_of_pairs_is_trls(tokenizer):
    rows = [RowEncoder(tokenizer).encode_all(to_row(n, record, "pairs")[0])[0] for n, record in enumerate(PAIRS)]
    meter = TokenMeter()
    plan: Any = SimpleNamespace(encoder=SimpleNamespace(tokenizer=tokenizer), train=rows)
    batch = PairTrainer.collator(plan, meter)(PairTrainer.columns(plan))
    theirs = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(
        [
            {
                "prompt_ids": (prompt := tokenizer(record["prompt"])["input_ids"]),
                "chosen_ids": row.input_ids[len(prompt) :],
                "rejected_ids": row.rejected.input_ids[len(prompt) :],
            }
            for row, record in zip(rows, PAIRS, strict=True)
        ]
    )
    assert batch.pop("numbers") == ["0", "1", "2", "3", "4"]
    assert batch.keys() == theirs.keys()
    assert all(torch.equal(batch[name], theirs[name]) for name in batch)
    assert meter.tokens == sum(row.tokens for row in rows)
    assert meter.padded == batch["input_ids"].numel()


def test_a_batch_of_judged_completions_is_trls(tokenizer):
    records = [{"prompt": p["prompt"], "completion": p["chosen"], "label": n % 2 == 0} for n, p in enumerate(PAIRS)]
    rows = [RowEncoder(tokenizer).encode_all(to_row(n, record, "judged")[0])[0] for n, record in enumerate(records)]
    recipe = SimpleNamespace(objective=JudgedObjective(name="kto"))
    plan: Any = SimpleNamespace(encoder=SimpleNamespace(tokenizer=tokenizer), train=rows, recipe=recipe)
    batch = JudgedTrainer.collator(plan, TokenMeter())(JudgedTrainer.columns(plan))
    prompts = [tokenizer(record["prompt"])["input_ids"] for record in records]
    answers = [row.input_ids[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    theirs = DataCollatorForUnpairedPreference(pad_token_id=tokenizer.pad_token_id)(
        [
            {
                "prompt_ids": prompt,
                "completion_ids": answer,
                # Theirs of a batch are the completions of the rows before, too.
                "KL_completion_ids": answers[index - 1],
                "label": record["label"],
            }
            for index, (prompt, answer, record) in enumerate(zip(prompts, answers, records, strict=True))
        ]
    )
    del batch["numbers"]
    assert batch.keys() == theirs.keys()
    assert all(torch.equal(batch[name], theirs[name]) for name in batch)


def test_a_loss_without_an_estimate_reads_each_completion_behind_its_own_prompt_alone(tokenizer):
    record = {"prompt": "How many?", "completion": " x = 3", "label": True}
    rows = [RowEncoder(tokenizer).encode_all(to_row(n, record, "judged")[0])[0] for n in range(3)]
    recipe = SimpleNamespace(objective=JudgedObjective(name="kto", loss="apo_zero_unpaired"))
    plan: Any = SimpleNamespace(encoder=SimpleNamespace(tokenizer=tokenizer), train=rows, recipe=recipe)
    meter = TokenMeter()
    batch = JudgedTrainer.collator(plan, meter)(JudgedTrainer.columns(plan))
    assert not [name for name in batch if name.startswith("KL_")]
    assert meter.tokens == sum(row.tokens for row in rows)


def test_numbers_of_the_reference_are_tensors():
    columns = [{"input_ids": [1, 2], "labels": [IGNORED, 2], "numbers": ["1"], "ref_logps": -2.5}]
    batch = Collator(0, TokenMeter(), [("",)], ("label", "ref_logps"))(columns)
    assert batch["ref_logps"].tolist() == [-2.5]
    assert "label" not in batch


def test_the_odds_ratio_loss_is_that_of_the_paper():
    """Against its formulas, written down in float64 from the likelihoods of the tokens."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    log_probs = -torch.rand(4, 3, generator=generator, dtype=torch.float64) * mask[:, 1:]

    def model(**given: Any) -> Any:
        assert given["fused_lm_head"]
        assert torch.equal(given["labels"] == IGNORED, mask == 0)
        return SimpleNamespace(log_probs=log_probs)

    model.training = True
    metrics: Any = {"train": {name: [] for name in ("nll_loss", "rewards/accuracies", "rewards/margins")}}
    trainer: Any = SimpleNamespace(beta=0.3, _metrics=metrics)
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask, "completion_mask": mask}
    loss = OddsRatioTrainer._compute_loss(trainer, model, inputs)
    means = [(row[of == 1]).mean() for row, of in zip(log_probs, mask[:, 1:], strict=True)]
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in means]
    learned = -(log_probs[0].sum() + log_probs[1].sum()) / 4
    # Minus the log of the sigmoid of the log of a ratio is the log of one plus the inverse of the ratio.
    preference = sum(math.log(1 + odds[n + 2] / odds[n]) for n in range(2)) / 2
    assert float(loss) == pytest.approx(float(learned) + 0.3 * preference, rel=1e-12)
    assert metrics["train"]["nll_loss"] == [pytest.approx(float(learned))]
