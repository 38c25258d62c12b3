"""Equations in one unknown: which are solved, which are refused, and that the data's own answers score right."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diablo.tasks import Problem, without_tested
from diablo.tasks.arithmetic import Mawps
from diablo.tasks.arithmetic.equations import solve_equation


@pytest.mark.parametrize(
    ("equation", "value"),
    [
        ("x = 3 + 4", 7),
        ("x=3+4", 7),
        ("  x  =  3 ", 3),
        ("3 + 4 = x", 7),
        ("7 = 3 + x", 4),
        ("x + 3 = 7", 4),
        ("2 * x = 7", 3.5),
        ("x / 4 = 2", 8),
        ("x = -3", -3),
        ("x = +3", 3),
        ("-x = 3", -3),
        ("x = -(-3)", 3),
        ("x = 2 * (3 + 4)", 14),
        ("x = (3 + 4) / 2", 3.5),
        ("x = 2 + 3 * 4", 14),
        ("x = 10 - 4 - 3", 3),
        ("x = 8 / 4 / 2", 1),
        ("2 * (x + 1) = 3 * x - 4", 6),
        ("x + x = 10", 5),
        ("x = x / 2 + 3", 6),
        ("y = 5", 5),
        ("apples = 5", 5),
        ("x = 0", 0),
        ("5 * x = 0", 0),
        ("x = 0.1 + 0.2", 0.3),
        ("x = 1e3", 1000),
        ("x = 1000000000 * 1000000000", 1e18),
        ("(x - 3) * 2 = 8", 7),
        ("x * (1 / 3) = 1", 3),
    ],
)
def test_solved(equation: str, value: float) -> None:
    solution = solve_equation(equation)
    assert solution is not None
    assert math.isclose(solution, value, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize(
    "equation",
    [
        "",
        " ",
        "=",
        "x =",
        "= 3",
        "x",
        "7",
        "3 = 3",
        "3 + 4 = 8",
        "x = y",
        "x + y = 3",
        "x = x",
        "x = x + 1",
        "0 * x = 3",
        "x = 3 = 3",
        "x == 3",
        "x = 1 / 0",
        "x = 3 / (2 - 2)",
        "12 / x = 4",  # not linear
        "x * x = 9",
        "x * x = 1",  # two solutions, one of which a straight line through 0 and 1 meets as well
        "(x - 1) * (x - 5) = 0",
        "x * x = x",
        "x ** 2 = 4",
        "x = 2 ** 10",
        "x = 7 // 2",
        "x = 7 % 2",
        "x = 2 ** 99999999",
        "x = 3j",
        "x = True",
        "x = None",
        "x = '3'",
        "x = [3]",
        "x = f(3)",
        "x = a.b",
        "x = 3 if 1 else 2",
        "x = 3 +",
        "x = (3",
        "x = 3)",
        "x = 3 4",
        "x = three apples",
        "x = 3; y = 4",
        "x = $3",
        "x = 3\0",
        "x = __import__('os')",
        "x = __import__('os').getcwd()",
        "x = 1e400",
        "x = 1e200 * 1e200",
        "x = 1" + "0" * 400,
        "x = 1" + "0" * 5000,
        "x = " + "(" * 5000 + "3" + ")" * 5000,
        "x = " + "-" * 5000 + "3",
        "x = " + "1+" * 50_000 + "1",
    ],
    ids=lambda equation: equation[:24].replace("\0", "NUL"),
)
def test_refused(equation: str) -> None:
    assert solve_equation(equation) is None


@given(st.text("x=+-*/(). 0123456789ye_", max_size=30) | st.text(max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_a_finite_number_or_nothing(text: str) -> None:
    solution = solve_equation(text)
    assert solution is None or math.isfinite(solution)


@given(st.integers(-99, 99).filter(bool), st.integers(-99, 99), st.integers(-99, 99))
@settings(max_examples=100, deadline=None)
def test_linear_equations(a: int, b: int, c: int) -> None:
    solution = solve_equation(f"{a} * x + {b} = {c}")
    assert solution is not None
    assert math.isclose(solution, (c - b) / a, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize(("split", "count"), [("train", 1898), ("test", 238)])
def test_rows_of_mawps(split: str, count: int) -> None:
    problems = Mawps().problems(split)
    assert len(problems) == count
    for problem in problems:
        assert problem.row.prompt.startswith("Problem: ")
        assert problem.row.prompt.endswith("\nEquation:")
        assert problem.row.completion.strip()
        assert "\n" not in problem.row.completion  # an answer is one line, at whose end generation stops


def test_no_test_question_is_trained_on() -> None:
    tested = Mawps().problems("test")
    train, left_out = without_tested([problem.row for problem in Mawps().problems("train")], tested)
    assert left_out == 25
    assert not {row.prompt for row in train} & {problem.row.prompt for problem in tested}


def test_gold_equations_score_right() -> None:
    task = Mawps()
    problems = task.problems("test")
    right = sum(task.score(problem.row.completion, problem) for problem in problems)
    assert right >= 0.98 * len(problems)  # the rest are quadratic


@pytest.fixture
def problem() -> Problem:
    return Mawps().problems("test")[0]  # 3 - 1.1666666666666667


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("x = 3 - 1.1666666666666667", True),
        (" x=1.83333", True),
        ("\n x = 1.83333\nProblem: more", True),  # only the first line is read
        ("x = 1.82", False),
        ("x = -1.83333", False),
        ("1.83333", False),
        ("no idea\nx = 1.83333", False),
        ("", False),
    ],
)
def test_score(problem: Problem, text: str, right: bool) -> None:
    assert Mawps().score(text, problem) is right


def test_no_answer_is_never_right(problem: Problem) -> None:
    # Where neither the completion nor the reference can be read, equality of the two would count as solved.
    assert Mawps().parse("nonsense") is None
    assert Mawps().score("nonsense", Problem(problem.row, None)) is False
