"""Scoring by likelihood against the plain way: one candidate at a time, the log-softmax of every logit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from diablo import DiabloConfig
from diablo.data import Row, RowEncoder
from diablo.errors import UserError
from diablo.models.loading import load_tokenizer
from diablo.scoring.asking import as_multiple_choice
from diablo.scoring.likelihood import Candidate, Choice, evaluate_choices, score_candidates
from diablo.tasks import MultipleChoice, Problem, get_task

PROBLEMS = [
    [Row(1, "Problem: Ann had 3 apples.", text) for text in (" x", " x = 3 + 4", " the quick brown fox jumps")],
    [Row(2, "user asks", text) for text in (" a", " question and the assistant answers it")],
    [
        Row(3, "The dog sleeps on, and on, and on, and the lazy fox had apples. " * 2, text)
        for text in ("ä€", "b c", "d")
    ],
]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    """The tiny model with an adapter that changes its output, in training mode and with dropout."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = DiabloConfig(num_blocks=4, target_modules=["q_proj", "up_proj"], init_weights=False, diablo_dropout=0.5)
    return get_peft_model(base, config).train()


def encoder(tiny_model: Path, *, chat: bool = False) -> RowEncoder:
    return RowEncoder(load_tokenizer(str(tiny_model)), chat=chat)


def plain_log_likelihood(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> float:
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    log_probabilities = logits.log_softmax(-1)
    return sum(float(log_probabilities[len(prompt) + i - 1, token]) for i, token in enumerate(completion))


@pytest.mark.parametrize("batch_size", [1, 3, 48])
def test_likelihoods_are_those_of_one_candidate_at_a_time(model: Any, tiny_model: Path, batch_size: int) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    scored = score_candidates(model.train(), encoder(tiny_model), PROBLEMS, batch_size=batch_size)
    assert model.training  # as it was found
    assert [len(candidates) for candidates in scored] == [3, 2, 3]
    token_counts = set()
    for rows, candidates in zip(PROBLEMS, scored, strict=True):
        for row, candidate in zip(rows, candidates, strict=True):
            prompt, completion = tokenizer(row.prompt).input_ids, tokenizer(row.completion).input_ids
            expected = plain_log_likelihood(model, prompt, completion)
            assert expected < -1
            assert candidate.log_likelihood == pytest.approx(expected, abs=1e-5, rel=1e-5)
            assert candidate.text == row.completion
            assert candidate.tokens == len(completion)
            assert candidate.per_token == pytest.approx(expected / len(completion), rel=1e-5)
            assert candidate.per_character == pytest.approx(expected / len(row.completion.strip()), rel=1e-5)
            token_counts.add(len(completion))
    assert len(token_counts) > 3


def test_candidates_that_differ_in_their_last_token_share_a_forward(model: Any, tiny_model: Path) -> None:
    words = [" the quick x", " the quick y", " the quick", " the lazy fox"]
    problems = [[Row(n, prompt, word) for word in words] for n, prompt in enumerate(["the fox", "over the dog"])]
    shapes = []
    handle = model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    scored = score_candidates(model, encoder(tiny_model), problems)
    handle.remove()
    tokenizer = load_tokenizer(str(tiny_model))
    tokens = [[tokenizer(text).input_ids for text in (row.prompt, row.completion)] for rows in problems for row in rows]
    sequences = {(len(completion), *prompt, *completion[:-1]) for prompt, completion in tokens}
    assert len(sequences) == 6
    assert shapes == [(6, max(map(len, sequences)))]
    for (prompt, completion), candidate in zip(tokens, (each for several in scored for each in several), strict=True):
        expected = plain_log_likelihood(model, prompt, completion)
        assert candidate.log_likelihood == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_in_a_conversation_the_last_turn_is_scored_without_its_end(model: Any, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    earlier = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "the dog"})
    asked = (*earlier, {"role": "user", "content": "and?"})
    row = Row(1, messages=(*asked, {"role": "assistant", "content": "the lazy fox"}))
    [[candidate]] = score_candidates(model, encoder(tiny_model, chat=True), [[row]])
    rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    # Each turn is tokenized by itself, as in training.
    prompt = [
        token for part in ("<s>user\nhi</s>\n<s>assistant\n", "the dog</s>\n") for token in tokenizer(part).input_ids
    ]
    prompt += tokenizer("<s>user\nand?</s>\n<s>assistant\n").input_ids
    assert tokenizer.decode(prompt) == rendered
    expected = plain_log_likelihood(model, prompt, tokenizer("the lazy fox").input_ids)
    assert candidate.log_likelihood == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert candidate.text == "the lazy fox"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row(7, "Problem:", ""), "Row 7: the candidate '' has no text"),
        (Row(7, "Problem:", " \n"), "has no text"),
        (Row(7, "", "x"), "Row 7: the prompt has no tokens"),
    ],
)
def test_what_cannot_be_scored_is_an_error(model: Any, tiny_model: Path, row: Row, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_candidates(model, encoder(tiny_model), [[Row(1, "a", "b"), row]])


def test_the_measures_may_prefer_different_candidates() -> None:
    problem = Problem(Row(1, "?", "long answer"), None)
    short, long = Candidate(" no", -3.0, 1), Candidate(" long answer", -6.0, 3)
    choice = Choice.among(problem, [short, long], 1)
    assert (choice.text, choice.right) == (" no", False)
    assert not choice.is_right(lambda candidate: candidate.log_likelihood)
    assert choice.is_right(lambda candidate: candidate.per_character)  # -1.5 against -0.55
    # Of equals the first counts, as numpy's argmax has it.
    assert not Choice.among(problem, [short, short], 1).is_right(lambda candidate: candidate.per_token)


class Colours(MultipleChoice):
    name = "colours"
    max_new_tokens = 4
    words = ("x", "the", "apples apples")
    # Each word is right a different number of times: two measures with different favourites score differently.
    answers = (*words, *words[1:], words[2], *words)

    def problems(self, split: str) -> list[Problem]:
        return [Problem(Row(n, f"Pick one of {n}:", f" {word}"), word) for n, word in enumerate(self.answers)]

    def choices(self, problem: Problem) -> list[Row]:
        return [Row(problem.row.number, problem.row.prompt, f" {word}") for word in self.words]

    def parse(self, text: str) -> str:
        return text.strip()

    def is_right(self, parsed: str, answer: str) -> bool:
        return parsed == answer


def test_a_task_is_scored_by_sum_and_by_length(model: Any, tiny_model: Path) -> None:
    task, done = Colours(), []
    score = evaluate_choices(
        model, encoder(tiny_model), task, batch_size=5, limit=6, progress=lambda *counts: done.append(counts)
    )
    expected_acc, expected_norm = 0, 0
    tokenizer = load_tokenizer(str(tiny_model))
    for problem in task.problems("test")[:6]:
        sums = [
            plain_log_likelihood(model, tokenizer(problem.row.prompt).input_ids, tokenizer(f" {word}").input_ids)
            for word in task.words
        ]
        norms = [value / len(word) for value, word in zip(sums, task.words, strict=True)]
        right = task.words.index(problem.answer)
        expected_acc += sums.index(max(sums)) == right
        expected_norm += norms.index(max(norms)) == right
    assert score.metrics == {"acc": expected_acc / 6, "acc_norm": expected_norm / 6}
    assert expected_acc != expected_norm
    assert score.right == expected_acc
    assert [choice.target for choice in score.answers] == [0, 1, 2, 1, 2, 2]
    assert done == [(5, 18), (10, 18), (15, 18), (18, 18)]


def test_a_problem_without_one_right_choice_is_an_error(model: Any, tiny_model: Path) -> None:
    class Broken(Colours):
        def choices(self, problem: Problem) -> list[Row]:
            return super().choices(problem)[1:]

    with pytest.raises(ValueError, match="colours: row 0 has 0 right candidates"):
        evaluate_choices(model, encoder(tiny_model), Broken(), limit=1)


def commonsense_file(folder: Path, *formats: tuple[str, str]) -> Path:
    """A file of ARC in the format of LLM-Adapters, one record for each answer format and answer."""
    records = [
        {
            "instruction": f"Please choose the correct answer: why?\n\nAnswer1: a Answer2: b\n\n{ending}",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        for ending, answer in formats
    ]
    (folder / "ARC-Easy.test.json").write_text(json.dumps(records))
    return folder


def test_a_commonsense_problems_choices_are_those_of_its_answer_format(
    model: Any, tiny_model: Path, tmp_path: Path
) -> None:
    formats = [("Answer format: answer1/answer2/answer3", "answer2"), ("Answer format: answer1/answer2", "answer1")]
    task = as_multiple_choice(get_task("arc_easy", folder=commonsense_file(tmp_path, *formats)))
    for problem, count in zip(task.problems("test"), (3, 2), strict=True):
        choices = task.choices(problem)
        assert [row.completion for row in choices] == [f"the correct answer is answer{n + 1}" for n in range(count)]
        assert choices.count(problem.row) == 1
    score = evaluate_choices(model, encoder(tiny_model), task)
    assert [(len(choice.candidates), choice.target) for choice in score.answers] == [(3, 1), (2, 0)]


@pytest.mark.parametrize(
    "ending", ["Choose.", "Answer format: answer1/answer2", "Answer format: answer1/answer3 or so"]
)
def test_a_commonsense_problem_without_its_choices_is_an_error(tmp_path: Path, ending: str) -> None:
    task = get_task("arc_easy", folder=commonsense_file(tmp_path, (ending, "answer3")))
    with pytest.raises(UserError, match=r"task arc_easy: row 1 must end with 'Answer format:'.*'answer3' among them"):
        as_multiple_choice(task)


def test_a_task_with_free_answers_has_no_choices() -> None:
    with pytest.raises(UserError, match="--likelihood: task 'mawps' has no choices; allowed:"):
        as_multiple_choice(get_task("mawps"))
    task = Colours()
    assert as_multiple_choice(task) is task
