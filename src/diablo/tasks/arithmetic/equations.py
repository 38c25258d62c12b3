"""MAWPS: word problems to the equation that solves them."""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from importlib import resources
from typing import Any

from diablo.data.rows import Row
from diablo.tasks.base import Problem, RecordTask
from diablo.tasks.sources import Split


class Mawps(RecordTask):
    """MAWPS (Koncel-Kedziorski et al., NAACL 2016): a word problem to the equation that solves it.

    1,898 problems to train on and 238 to test, in the package. Under either protocol, a completion is right if its
    first line is an equation in one unknown whose solution equals the problem's answer.
    """

    name = "mawps"
    sizes = (1_898, 238)
    licence = "MIT"
    max_new_tokens = 48
    stops_at_newline = True
    measure = "share of equations with the right solution"
    readings = ("the first line, an equation in one unknown; its solution is right to a relative 1e-4",) * 2

    def records(self, split: Split) -> list[tuple[int, dict[str, Any]]]:
        """The records in the package."""
        return read_packaged(split)

    def problem(self, number: int, record: dict[str, Any]) -> Problem:
        """``Problem: ...`` and ``Equation:`` as the prompt, the equation as the completion."""
        row = Row(number, f"Problem: {record['question']}\nEquation:", f" {record['equation']}")
        return Problem(row, float(record["answer"]))

    def parse(self, text: str) -> float | None:
        """The value of the unknown in the completion's first line."""
        first_line = text.strip().partition("\n")[0]
        return solve_equation(first_line)

    def is_right(self, parsed: float, answer: float) -> bool:
        """Whether the two are equal to a relative 1e-4: answers such as 1/3 are rounded in the data."""
        return math.isclose(parsed, answer, rel_tol=1e-4, abs_tol=1e-6)


def read_packaged(split: Split) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a split's file, each with its number from 1."""
    text = (resources.files("diablo") / "data" / "mawps" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [(number, json.loads(line)) for number, line in enumerate(text.splitlines(), start=1)]


_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def solve_equation(equation: str) -> float | None:
    """The value of the unknown in an equation that is linear in it, such as ``x = 3 * 4`` or ``7 = 3 + x``.

    It understands only numbers, one unknown, the four operations, signs and parentheses. Nothing is executed.

    Returns:
        The value, or None if there is no equation in one unknown, or no single finite solution.
    """
    sides = equation.split("=")
    try:
        left, right = (_parse(side) for side in sides)
        unknowns = {node.id for side in (left, right) for node in ast.walk(side) if isinstance(node, ast.Name)}
        if len(unknowns) != 1:
            return None
        at = [_value(left, x) - _value(right, x) for x in map(Fraction, range(3))]
        solution = -at[0] / (at[1] - at[0])
        residual = _value(left, solution) - _value(right, solution)
        # Fractions are exact. A third point tells a parabola, of which 0 or 1 may be but one of two roots.
        is_linear = at[2] - at[1] == at[1] - at[0]
        return float(solution) if is_linear and residual == 0 else None
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _parse(side: str) -> ast.expr:
    return ast.parse(side.strip(), mode="eval").body


def _value(node: ast.expr, unknown: Fraction) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(number)
        case ast.Name():
            return unknown
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _value(operand, unknown)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, unknown), _value(right, unknown))
    raise SyntaxError("not arithmetic")
