"""Rewards of completions: those of tasks, of a length, and functions of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diablo.data.rows import Row
from diablo.errors import UserError
from diablo.execution import describe_isolation
from diablo.scoring.own_functions import OwnFunction, file_and_function
from diablo.scoring.rewards import Asked, Own, Rewards, Written, check_reward_name, make_reward
from diablo.tasks import get_task
from diablo.tasks.base import Problem
from diablo.tasks.code import FunctionTest, HumanEval


def written(asked: Asked, text: str, count: int = 1) -> Written:
    return Written(asked, text, [0] * count)


def own(tmp_path: Path, text: str, name: str = "f") -> Any:
    path = tmp_path / "mine.py"
    path.write_text(text)
    return make_reward(f"{path}:{name}", 1.0, None, 16)


def test_the_tasks_own_judge_says_which_completions_are_right_and_which_can_be_read():
    task = get_task("mawps")
    problems = task.problems("train")[:2]
    rewards = Rewards(
        [make_reward("right_answer", 1.0, None, 16), make_reward("format", 0.5, None, 16)],
        {id(problem.row): Asked(problem.row, task, problem) for problem in problems},
    )
    first, second = (problem.row for problem in problems)
    texts = [first.completion, " x = 1 + 99999", "no equation", f"{first.completion}\nx = 1 + 99999"]
    answers = [rewards.written(first, text, [1]) for text in texts] + [rewards.written(second, second.completion, [1])]
    right, readable = rewards.each
    # As where the task is scored, an answer ends with its line.
    assert right(answers) == [1, 0, 0, 1, 1]
    assert readable(answers) == [1, 1, 0, 1, 1]
    assert rewards.total(answers) == {
        "reward": pytest.approx(0.6 + 0.5 * 0.8),
        "reward_right_answer": 0.6,
        "reward_format": 0.8,
    }


def test_code_is_judged_by_its_tests_in_the_sandbox():
    try:
        describe_isolation()
    except UserError:
        pytest.skip("this system cannot isolate code")
    test = FunctionTest("def double(n):\n", "double", "def check(f):\n    assert f(2) == 4\n")
    row = Row(1, test.prompt)
    asked = Asked(row, HumanEval(), Problem(row, test))
    reward = make_reward("right_answer", 1.0, None, 16)
    assert reward([written(asked, "    return 2 * n\n"), written(asked, "    return n + 1\n")]) == [1, 0]


def test_length_costs_nothing_up_to_a_number_of_tokens_and_then_ever_more():
    reward = make_reward("length", 1.0, 4, 12)
    counts = [0, 4, 6, 12, 20]
    assert reward([written(Asked(Row(1, "a")), "", count) for count in counts]) == [0, 0, -0.25, -1, -1]


def test_a_function_is_called_as_trl_calls_it(tmp_path):
    text = (
        "def f(prompts, completions, completion_ids, level, **others):\n"
        "    global SEEN\n    SEEN = locals()\n    return [1, True]\n"
    )
    reward = own(tmp_path, text)
    rows = [Row(1, "a", columns={"level": 3}), Row(2, "b", columns={"level": 4, "more": [1]})]
    given = [written(Asked(row), text, 2) for row, text in zip(rows, ("x", "y"), strict=True)]
    assert reward(given) == [1.0, 1.0]
    seen = reward.function.function.__globals__["SEEN"]
    assert (seen["prompts"], seen["completions"], seen["level"]) == (["a", "b"], ["x", "y"], [3, 4])
    assert seen["completion_ids"] == [[0, 0], [0, 0]]
    assert seen["others"] == {"more": [None, [1]]}


def test_a_function_of_a_task_is_told_of_the_answer(tmp_path):
    reward = own(
        tmp_path,
        "def f(completions, answer, task):\n    return [a if t == 'mawps' else -1 for a, t in zip(answer, task)]\n",
    )
    task = get_task("mawps")
    problem = task.problems("train")[0]
    assert reward([written(Asked(problem.row, task, problem), "x")]) == [problem.answer]


def test_a_file_imports_what_lies_beside_it_and_is_imported_anew_where_it_has_changed(tmp_path):
    (tmp_path / "beside_rewards.py").write_text("VALUE = 2.5\n")
    text = (
        "from dataclasses import dataclass\nfrom beside_rewards import VALUE\n\n\n"
        "@dataclass\nclass Kept:\n    x: int\n\n\n"
        "def f(completions):\n    return [VALUE] * len(completions)\n"
    )
    row = [written(Asked(Row(1, "a")), "x")]
    first = own(tmp_path, text)
    assert first(row) == [2.5]
    second = own(tmp_path, text.replace("[VALUE]", "[VALUE + 1]"))
    assert second(row) == [3.5]
    assert first.record()["sha256"] != second.record()["sha256"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", "gave 1 values for 2 completions; give one for each"),
        ("return 1.0", "gave 1.0; give a list with a number for each completion"),
        ("return [1.0, None]", "gave None for a completion of row 2"),
        ("return [1.0, float('nan')]", "gave nan for a completion of row 2"),
        ("return [1.0, float('inf')]", "gave inf for a completion of row 2"),
        ("return [1.0, 'good']", "gave 'good' for a completion of row 2"),
        (
            "return [1 / len(text) for text in completions]",
            "fails on row 2: line 2: ZeroDivisionError: division",
        ),
        ("raise KeyError('x')", "fails on row 1: line 2: KeyError: 'x'"),
        ("return [1 / (2 - len(completions))]", "fails on row 1, row 2: line 2: ZeroDivisionError"),
    ],
)
def test_what_a_function_does_wrong_is_said_with_its_file_its_name_and_the_row(tmp_path, body, said):
    reward = own(tmp_path, f"def f(completions):\n    {body}\n")
    rows = [written(Asked(Row(1, "a")), "x"), written(Asked(Row(2, "b")), "")]
    with pytest.raises(UserError) as error:
        reward(rows)
    assert f"objective.rewards: {tmp_path / 'mine.py'}:f {said}" in str(error.value)


def test_a_function_is_tried_out_on_a_completion_that_is_empty(tmp_path):
    reward = own(tmp_path, "def f(completions):\n    return [1 / len(text) for text in completions]\n")
    assert isinstance(reward, Own)
    with pytest.raises(UserError, match="fails on row 7: line 2: ZeroDivisionError"):
        reward.try_out(Asked(Row(7, "a")))


def test_names_are_of_rewards_or_of_functions_of_files():
    assert file_and_function("a/b.py:f") == ("a/b.py", "f")
    assert file_and_function("C:/x.py:f") == ("C:/x.py", "f")
    for name in ("right_answer", "format", "length", "mine.py:f"):
        check_reward_name(name)
    for name in ("mine.py", "mine:f", "mine.py:f()", "formt", ""):
        with pytest.raises(UserError, match="allowed: right_answer, format, length, and a function"):
            check_reward_name(name)
    with pytest.raises(UserError, match="cannot be read"):
        OwnFunction(Path("none.py"), "f")
