"""Code generation: instructions to train on, and functions to complete, which unit tests check."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diablo.data.rows import Row
from diablo.execution import Program, run_programs
from diablo.tasks.base import Problem, RecordTask
from diablo.tasks.instructions import InstructionTask, alpaca_source
from diablo.tasks.sources import Source

_CODE_ALPACA = "https://github.com/sahil280114/codealpaca"
_INDENT = "    "
# A function ends before the next of these that is not indented.
_STOP = re.compile(r"\n(?=(?:def|class|if|print)\b|[#@]|```)")
_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class CodeAlpaca(InstructionTask):
    """CodeAlpaca (Chaudhary, 2023): 20,000 instructions about code with their responses, to train on."""

    name = "code_alpaca"
    sizes = (20_022,)
    licence = "CC BY-NC 4.0"
    source = alpaca_source(
        "code/code_alpaca_20k.json",
        "codealpaca/data/code_alpaca_20k.json",
        "CodeAlpaca-20k/code_alpaca_20k.json",
        origin=_CODE_ALPACA,
        hub="sahil2801/CodeAlpaca-20k",
    )


class CodeAlpaca2k(InstructionTask):
    """The part of CodeAlpaca that its authors publish as a file of 2,000 instructions, to train on."""

    name = "code_alpaca_2k"
    sizes = (2_017,)
    licence = "CC BY-NC 4.0"
    source = alpaca_source("code/code_alpaca_2k.json", "codealpaca/data/code_alpaca_2k.json", origin=_CODE_ALPACA)


@dataclass(frozen=True)
class FunctionTest:
    """The test of a function that a model completes.

    Attributes:
        prompt: the program up to the function's body.
        entry_point: the function's name.
        test: a program that defines ``check``, to be called with the function.
    """

    prompt: str
    entry_point: str
    test: str

    def program(self, completion: str) -> Program:
        """The program that the prompt and a completion make, and its test.

        A completion is the function's body or the whole function once more. Either may stand in a Markdown fence. A
        body, and code without a fence, ends at the next top-level ``def``, ``class``, ``if``, ``print``, decorator,
        comment or fence. The indentation of a body's first line is restored, because some tokenizers lose a leading
        blank.
        """
        definition = re.compile(rf"^(?:async )?def {re.escape(self.entry_point)}\b", re.MULTILINE)
        fenced = [textwrap.dedent(block) for block in _FENCED.findall(completion)]
        whole = next((block for block in fenced if definition.search(block)), None)
        if whole is None and (found := _leading_definition(completion, definition)):
            whole = completion[: found.end()] + _until_stop(completion[found.end() :])
        if whole is not None:
            # The prompt's imports and helpers are kept. Its own beginning of the function is replaced.
            begun = definition.search(self.prompt)
            source = (self.prompt[: begun.start()] if begun else self.prompt) + whole
        else:
            body = _FENCED.search(completion) if completion.lstrip().startswith("```") else None
            source = self.prompt + _until_stop(_indented(body[1] if body else completion))
        return Program(source, f"{self.test}\ncheck({self.entry_point})\n")


class HumanEval(RecordTask):
    """HumanEval (Chen et al., 2021): 164 Python functions to complete, checked by unit tests, which run the code.

    Ten completions are sampled for each, at temperature 0.2. Ten are the fewest that give pass@10.
    """

    name = "humaneval"
    splits = ("test",)
    sizes = (164,)
    licence = "MIT"
    max_new_tokens = 512
    samples = 10
    temperature = 0.2
    runs_code = True
    measure = "pass@1, pass@5 and pass@10"
    readings = ("the function's body, or the whole function, in a fence or not; it passes its unit tests",) * 2
    source = Source(
        places=(
            "code/HumanEval.jsonl.gz",
            "human-eval/data/HumanEval.jsonl.gz",
            "openai_humaneval/openai_humaneval/{split}-*-of-*.parquet",
        ),
        fields={"prompt": str, "canonical_solution": str, "test": str, "entry_point": str},
        origin="https://github.com/openai/human-eval",
        hub="openai/openai_humaneval",
    )

    def problem(self, number: int, record: dict[str, Any]) -> Problem:
        """The function's signature and docstring as the prompt, its body as the completion."""
        prompt = record["prompt"]
        row = Row(number, prompt, record["canonical_solution"], user=_request(prompt))
        return Problem(row, FunctionTest(prompt, record["entry_point"], record["test"]))

    def parse(self, text: str) -> str | None:
        """The text itself. Which part of it is code depends on the problem."""
        return text if text.strip() else None

    def is_right(self, parsed: str, answer: FunctionTest) -> bool:
        """Whether the completed function passes its test, in a process of its own."""
        return run_programs([answer.program(parsed)])[0].passed

    def score_all(self, texts: Sequence[str], problems: Sequence[Problem]) -> list[bool]:
        """Whether each completion solves its problem. Several programs run at once."""
        programs = [problem.answer.program(text) for text, problem in zip(texts, problems, strict=True)]
        return [outcome.passed for outcome in run_programs(programs)]

    def metrics(self, problems: Sequence[Problem], rights: Sequence[Sequence[bool]]) -> dict[str, float]:
        """pass@1, pass@5 and pass@10, as means over the problems, where there are enough samples."""
        fewest = min(map(len, rights))
        return {
            f"pass@{k}": sum(pass_at_k(len(samples), sum(samples), k) for samples in rights) / len(rights)
            for k in (1, 5, 10)
            if k <= fewest
        }


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the probability that at least one of k samples is right (Chen et al., 2021, equation 1).

    The estimate is ``1 - C(n - c, k) / C(n, k)``. It is computed as one minus the product of ``1 - k / i`` for i from
    ``n - c + 1`` to ``n``. This makes no large numbers on the way. Where fewer than k samples are wrong, one factor is
    zero.

    Args:
        n: how many samples there are.
        c: how many of them are right.
        k: how many may be tried, at most n.
    """
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def _request(prompt: str) -> str:
    """The request that a user of a chat model would make."""
    return f"Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{prompt}```"


def _leading_definition(completion: str, definition: re.Pattern[str]) -> re.Match[str] | None:
    """The function's definition, if the completion begins with top-level code; otherwise None."""
    begins_with_code = re.match(r"\s*^(?:(?:async def|def|from|import|class|@)\b|\w+ = )", completion, re.MULTILINE)
    return definition.search(completion) if begins_with_code else None


def _until_stop(code: str) -> str:
    return _STOP.split(code, maxsplit=1)[0] + "\n"


def _indented(body: str) -> str:
    """The body, with its first line indented at least by one level."""
    body = re.sub(r"\A(?:[ \t]*\n)+", "", body)
    is_short = not body.startswith((_INDENT, "\t"))
    return _INDENT + body.lstrip(" ") if is_short else body
