"""Rows for preference objectives, chosen from judged answers; and which training problems are answered."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_encoding import sentence_pieces

from diablo.data import Row, RowEncoder
from diablo.errors import UserError
from diablo.models.loading import load_tokenizer
from diablo.planning.rows import choose_rows as rows_of_recipe
from diablo.planning.rows import training_problems
from diablo.recipes.recipe import Recipe
from diablo.records.results import recipes_behind
from diablo.scoring.generation import Answer, complete
from diablo.scoring.pairs import Choice, Tally, choose_pairs, choose_rows
from diablo.tasks import TASKS, Problem, chosen_tasks, get_task

MAWPS = get_task("mawps")
PROBLEM = Problem(Row(7, "Problem: 3 and 4 ?\nEquation:", " x = 3 + 4", user=" 3 and 4 ? "), 7.0)


def answered(*texts: str, cut: tuple[str, ...] = ()) -> list[Answer]:
    """Answers to the problem, judged; those in ``cut`` did not end by themselves."""
    return [
        Answer(PROBLEM, text, MAWPS.score(text, PROBLEM), sample, text not in cut) for sample, text in enumerate(texts)
    ]


def rows(answers: list[Answer], form: Any = "pairs", *, chat: bool = False, **settings: Any) -> tuple[list, Tally]:
    return choose_rows(MAWPS, PROBLEM, answers, Choice(form, **settings), chat=chat)


@given(st.integers(0, 6), st.integers(0, 6), st.integers(1, 40), st.integers(0, 9))
def test_no_pair_is_chosen_twice_and_every_answer_is_about_as_often_in_one(
    right: int, wrong: int, most: int, seed: int
) -> None:
    rights, wrongs = [f"right {n}" for n in range(right)], [f"wrong {n}" for n in range(wrong)]
    pairs = choose_pairs(rights, wrongs, most, random.Random(seed))
    assert pairs == choose_pairs(rights, wrongs, most, random.Random(seed))
    assert len(pairs) == len(set(pairs)) == min(most, right * wrong)
    for side, texts in enumerate((rights, wrongs)):
        counts = Counter(pair[side] for pair in pairs)
        assert counts.keys() <= set(texts)
        if pairs:
            often = [counts[text] for text in texts]
            assert max(often) - min(often) <= 1


def test_the_seed_chooses_among_all_pairs() -> None:
    found = {choose_pairs("ab", "cde", 1, random.Random(seed))[0] for seed in range(200)}
    assert found == {(right, wrong) for right in "ab" for wrong in "cde"}


texts = st.sampled_from([" x = 3 + 4", "x = 3 + 4 ", " x = 7", " x = 4 + 3", " x = 3 * 4", " 3 + 4", "", " ", " x = x"])
judged = st.lists(st.tuples(texts, st.booleans()), min_size=1, max_size=10)


@given(judged, st.sampled_from(["pairs", "labels", "completions"]), st.integers(1, 5), st.booleans(), st.booleans())
def test_rows_hold_ended_answers_on_the_side_of_their_verdict_each_once(
    given_answers: list[tuple[str, bool]], form: Any, most: int, gold: bool, chat: bool
) -> None:
    answers = [Answer(PROBLEM, text, MAWPS.score(text, PROBLEM), 0, ended) for text, ended in given_answers]
    made, tally = rows(answers, form, chat=chat, gold=gold, pairs_per_problem=most)
    assert tally.right + tally.wrong + tally.left_out == tally.answers == len(answers)
    assert tally.all_right + tally.none_right + tally.some_right == tally.problems == 1
    assert tally.rows == len(made)
    ended = {text.strip() for text, is_ended in given_answers if is_ended and text.strip()}
    own = {PROBLEM.row.completion.strip()} if tally.gold else set()

    def text_of(value: Any) -> str:
        return value[0]["content"] if chat else value.strip()

    for row in made:
        sides = {key: text_of(row[key]) for key in ("chosen", "rejected", "completion") if key in row}
        for key, text in sides.items():
            is_right = row.get("label", key != "rejected")
            assert text in ended | (own if is_right else set())
            assert MAWPS.score(text, PROBLEM) == is_right
    keys = [json.dumps(row) for row in made]
    assert len(set(keys)) == len(keys)
    if form == "pairs":
        assert len(made) <= most
        assert bool(made) == bool(tally.some_right or tally.gold)
        assert tally.gold <= gold * tally.none_right
    if form == "labels":
        assert len(made) == len(ended | own)
    if form == "completions":
        assert len(made) == len({text for text in ended | own if MAWPS.score(text, PROBLEM)})


def test_rows_are_those_of_trl_as_text_and_as_messages() -> None:
    answers = answered(" x = 4 + 3", " x = 3 * 4", " x = 3 * 4")
    prompt = "Problem: 3 and 4 ?\nEquation:"
    assert rows(answers)[0] == [{"prompt": prompt, "chosen": " x = 4 + 3", "rejected": " x = 3 * 4"}]
    assert rows(answers, "labels")[0] == [
        {"prompt": prompt, "completion": " x = 4 + 3", "label": True},
        {"prompt": prompt, "completion": " x = 3 * 4", "label": False},
    ]
    assert rows(answers, "completions")[0] == [{"prompt": prompt, "completion": " x = 4 + 3"}]
    [row], tally = rows(answers, chat=True)
    assert row == {
        "prompt": [{"role": "user", "content": "3 and 4 ?"}],
        "chosen": [{"role": "assistant", "content": "x = 4 + 3"}],
        "rejected": [{"role": "assistant", "content": "x = 3 * 4"}],
    }
    assert tally == Tally(problems=1, answers=3, right=1, wrong=2, some_right=1, rows=1)
    assert rows(answers, "labels", chat=True)[0][1]["label"] is False


def test_the_tasks_own_completion_stands_in_only_where_no_answer_is_right_and_only_if_it_is_right_itself() -> None:
    wrong, mixed = answered(" x = 1", " x = 2"), answered(" x = 1", " x = 7")
    assert rows(wrong)[0] == []
    assert rows(wrong, gold=True)[0][0]["chosen"] == " x = 3 + 4"
    assert rows(mixed, gold=True)[0][0]["chosen"] == " x = 7"
    assert rows(answered(" x = 7"), gold=True)[0] == []
    two, tally = rows(wrong, gold=True, pairs_per_problem=3)
    assert {row["rejected"] for row in two} == {" x = 1", " x = 2"}
    assert tally.gold == 1
    misread = Problem(PROBLEM.row, 8.0)
    assert choose_rows(MAWPS, misread, wrong, Choice(gold=True), chat=False)[0] == []


def test_an_answer_that_was_cut_off_is_in_no_row() -> None:
    answers = answered(" x = 7", " x = 1", " x = 2", cut=(" x = 7", " x = 2"))
    made, tally = rows(answers, gold=True)
    assert [(row["chosen"], row["rejected"]) for row in made] == [(" x = 3 + 4", " x = 1")]
    assert (tally.right, tally.wrong, tally.left_out, tally.none_right) == (0, 1, 2, 1)


@pytest.mark.parametrize(
    ("tally", "choice", "expected"),
    [
        (Tally(9, 18, left_out=10, none_right=9), Choice(), "train the model on the task first"),
        (Tally(9, 18, right=18, all_right=9), Choice(), "every answer to them is right; raise --temperature (2 "),
        (Tally(9, 18, right=2, wrong=16, none_right=8, all_right=1), Choice(), "and 1 have no wrong one; raise"),
        (Tally(9, 18, wrong=18, none_right=9), Choice(), "right ones with --gold"),
        (Tally(9, 18, wrong=18, none_right=9), Choice("completions"), "No row came of 9 problems: 9 have no right"),
    ],
)
def test_where_no_row_came_the_error_says_what_to_change(tally: Tally, choice: Choice, expected: str) -> None:
    message = tally.why_no_rows(choice, 2)
    assert expected in message
    assert message.count(".") == 1


def test_one_sample_makes_pairs_with_the_tasks_own_answer_alone() -> None:
    with pytest.raises(UserError, match="--samples: found 1, of which no pair"):
        Choice().check(1)
    Choice(gold=True).check(1)
    Choice("completions").check(1)


def test_only_tasks_with_training_problems_and_a_verdict_are_answered() -> None:
    def asked(names: str | None) -> list[str]:
        return [task.name for task in chosen_tasks({}, names, None, None, allow=False, split="train")]

    judged_names = {name for name, task in TASKS.items() if "train" in task.splits and task.is_judged()}
    assert {"mawps", "gsm8k", "metamathqa", "boolq", "commonsense170k"} <= judged_names
    assert not judged_names & {"code_alpaca", "saferpaca", "humaneval", "math"}
    assert asked("mawps,boolq") == ["mawps", "boolq"]
    for names, message in (
        ("humaneval", "which has no train split"),
        ("code_alpaca", "--task: found 'code_alpaca', which has no right answers to judge by; allowed: mawps, gsm8k"),
        (None, "--task: missing; allowed: mawps, gsm8k, metamathqa"),
    ):
        with pytest.raises(UserError, match=message):
            asked(names)


@pytest.mark.parametrize("limit", [None, 100])
def test_tested_and_validated_problems_are_not_answered(tmp_path: Path, limit: int | None) -> None:
    recipe = Recipe.model_validate(
        {
            "model": "builtin:smollm2-135m",
            "task": "mawps",
            "data": {"validation_rows": 40, "validation_seed": 3, "limit": limit, "held_out": "validation"},
            "output": tmp_path / "run",
        }
    )
    of_run = rows_of_recipe(recipe, [MAWPS])
    recorded = json.loads(recipe.model_dump_json())
    [without] = training_problems([MAWPS], []).values()
    [answered_now] = training_problems([MAWPS], [recorded]).values()
    tested = {problem.row.prompt for problem in MAWPS.problems("test")}
    kept = {problem.row.prompt for problem in of_run.validation_problems["mawps"]}
    assert len(kept) == 40
    assert {problem.row.prompt for problem in without} >= kept
    assert not {problem.row.prompt for problem in without} & tested
    assert {problem.row.prompt for problem in answered_now} == {problem.row.prompt for problem in without} - kept
    # Whatever the run was trained on is among them.
    assert {row.prompt for row in of_run.train} <= {problem.row.prompt for problem in answered_now}


def test_the_runs_before_a_run_are_found_by_their_adapters(tmp_path: Path) -> None:
    def made(name: str, **recipe: Any) -> Path:
        folder = tmp_path / name
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text("")
        (folder / "run.json").write_text(json.dumps({"recipe": {"output": name, **recipe}}))
        return folder

    first = made("first", adapter=None)
    made("second", adapter=str(first / "checkpoints" / "checkpoint-4"))
    third = made("third", adapter=str(tmp_path / "second" / "adapter"))
    assert [recipe["output"] for recipe in recipes_behind(third)] == ["third", "second", "first"]
    assert recipes_behind(tmp_path) == []
    # A folder that was written to again ends the list.
    made("first", adapter=str(third))
    assert len(recipes_behind(third)) == 3


class Scripted:
    """A model that goes on from any prompt with given tokens."""

    training, device = False, torch.device("cpu")

    def __init__(self, written: list[int]) -> None:
        self.written = written

    def eval(self) -> None:
        """It has no other mode."""

    def train(self, mode: bool) -> None:
        """It has no other mode."""

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([self.written] * len(input_ids))], dim=1)


@pytest.mark.parametrize("pieces", [False, True], ids=["bytes", "sentence pieces"])
@pytest.mark.parametrize("completion", [" x = 3 + 4", "x = 7", "\nx = 7"])
def test_what_a_model_wrote_is_trained_on_as_the_tokens_that_it_wrote(
    tiny_model: Path, pieces: bool, completion: str
) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    encoder = RowEncoder(sentence_pieces(tokenizer, "first") if pieces else tokenizer)
    row = Row(1, "Problem: one? two?\nEquation:", completion)
    prompt, encoded = encoder.prompt(row), encoder.encode(row)
    written = encoded.input_ids[len(prompt) :]
    assert written[-1] == encoder.tokenizer.eos_token_id
    for tokens, finished in ((written, True), (written[:-1], False)):
        [found] = complete(Scripted(tokens), encoder, [prompt], max_new_tokens=len(tokens))
        assert found.finished == finished
        assert encoder.encode(replace(row, completion=found.text)).input_ids == encoded.input_ids
