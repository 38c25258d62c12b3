"""Completions of functions: what of a text is code, which of it passes, and the estimate of pass@k."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diablo.errors import UserError
from diablo.tasks.base import Problem
from diablo.tasks.code import CodeAlpaca, CodeAlpaca2k, FunctionTest, HumanEval, pass_at_k

DOUBLE = {
    "task_id": "Own/0",
    "prompt": 'def double(x: int) -> int:\n    """Twice x.\n\n    >>> double(2)\n    4\n    """\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}
LONGEST = {
    "task_id": "Own/1",
    "prompt": "from typing import List\n\n\ndef longest(words: List[str]) -> str:\n"
    '    """The longest word, the empty one of none."""\n',
    "canonical_solution": "    best = ''\n    for word in words:\n        if len(word) > len(best):\n"
    "            best = word\n    return best\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(['a', 'bcd', 'ef']) == 'bcd'\n"
    "    assert candidate([]) == ''\n",
    "entry_point": "longest",
}
HELPED = {
    "task_id": "Own/2",
    "prompt": "LIMIT = 10\n\n\ndef half(x):\n    return x // 2\n\n\ndef halves(x):\n"
    '    """How often x can be halved while above 10."""\n',
    "canonical_solution": "    count = 0\n\n    while x > LIMIT:\n        x = half(x)\n        count += 1\n"
    "    return count\n",
    "test": "def check(candidate):\n    assert candidate(80) == 3\n    assert candidate(10) == 0\n",
    "entry_point": "halves",
}
RECORDS = [DOUBLE, LONGEST, HELPED]


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    (folder / "code").mkdir()
    with gzip.open(folder / "code" / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return folder


@pytest.fixture
def task(tmp_path: Path) -> HumanEval:
    return HumanEval(folder=write(tmp_path, RECORDS))


def test_rows(task: HumanEval) -> None:
    problems = task.problems("test")
    assert [problem.row.number for problem in problems] == [1, 2, 3]
    assert problems[0].row.prompt == DOUBLE["prompt"]
    assert problems[0].row.completion == DOUBLE["canonical_solution"]
    asked = problems[0].row.as_messages()[0]["content"]
    assert f"```python\n{DOUBLE['prompt']}```" in asked


def test_canonical_solutions_pass_however_they_are_given(task: HumanEval) -> None:
    problems = task.problems("test")
    bodies = [problem.row.completion for problem in problems]
    wholes = [problem.row.prompt + problem.row.completion for problem in problems]
    for texts in (
        bodies,
        [body[1:] for body in bodies],
        [body.lstrip() for body in bodies],
        ["\n" + body + "\n\ndef other(:\n" for body in bodies],
        [body + "```\nThat is it." for body in bodies],
        [f"```python\n{body}```" for body in bodies],
        wholes,
        [f"{whole}\n\nprint(undefined)" for whole in wholes],
        [f"Sure:\n\n```python\n{whole}```\n\nIt works." for whole in wholes],
        [f"```\n{whole}" for whole in wholes],
        [f"1. As so:\n   ```py\n{''.join(f'   {line}' for line in whole.splitlines(True))}   ```" for whole in wholes],
    ):
        assert task.score_all(texts, problems) == [True] * 3, texts


def test_wrong_ones_fail_and_each_is_held_against_its_own_problem(task: HumanEval) -> None:
    problems = task.problems("test")
    texts = [
        "    return 2 * x\n",
        "    return 2 * x\n",
        "",
        "    return 3 * x\n",
        "    return [",
        "    import os; os._exit(0)",
    ]
    chosen = [problems[0], problems[1], problems[0], problems[0], problems[0], problems[0]]
    assert task.score_all(texts, chosen) == [True, False, False, False, False, False]
    assert [task.score(text, problem) for text, problem in zip(texts, chosen, strict=True)] == [True, *[False] * 5]


BODY = "    y = x\n    return y"


@pytest.mark.parametrize(
    ("completion", "rest"),
    [
        (BODY, BODY),
        (f"{BODY}\n\n\ndef g():\n    pass", f"{BODY}\n\n"),
        (f"{BODY}\nclass A:", BODY),
        (f"{BODY}\nif __name__ == '__main__':\n    f()", BODY),
        (f"{BODY}\nprint(f(1))", BODY),
        (f"{BODY}\n# An example", BODY),
        (f"{BODY}\n@cache", BODY),
        (f"{BODY}\n```\nThis returns x.", BODY),
        ("    if x:\n        return 1\n    # no\n    return 0", "    if x:\n        return 1\n    # no\n    return 0"),
        ("    define = 1\n    def g(): pass", "    define = 1\n    def g(): pass"),
        ("    s = '''\ndefinitely\n'''", "    s = '''\ndefinitely\n'''"),  # a word that begins like a stop
        ("   y = x\n    return y", BODY),
        ("y = x\n    return y", BODY),
        (" \n\n    y = x\n    return y", BODY),
        ("\ty = x\n\treturn y", "\ty = x\n\treturn y"),
        ("        y = 1", "        y = 1"),
        ("```python\n    y = x\n    return y\n```\nSo.", BODY),
        ("```\ny = x\n    return y", BODY),
        (f"{BODY}\n\ndef f(x):\n    return 0", f"{BODY}\n"),  # a second attempt is none
    ],
)
def test_bodies(completion: str, rest: str) -> None:
    prompt = "def f(x):\n"
    source = FunctionTest(prompt, "f", "").program(completion).source
    assert source.rstrip("\n") == (prompt + rest).rstrip("\n")


@pytest.mark.parametrize(
    ("completion", "source"),
    [
        ("def f(x):\n    return 1", "import os\ndef f(x):\n    return 1\n"),
        ("def f(x):\n    return 1\ndef g():", "import os\ndef f(x):\n    return 1\n"),
        (
            "def g():\n    pass\ndef f(x):\n    return 1\nprint(1)",
            "import os\ndef g():\n    pass\ndef f(x):\n    return 1\n",
        ),
        ("import re\n\ndef f(x):\n    return 1", "import os\nimport re\n\ndef f(x):\n    return 1\n"),
        ("So:\n```python\ndef f(x): return 1\ndef g(): pass\n```\n", "import os\ndef f(x): return 1\ndef g(): pass\n"),
        ("```\nnot it\n```\n```\ndef f(x): pass\n```", "import os\ndef f(x): pass\n"),
        ("```python\nasync def f(x): pass\n", "import os\nasync def f(x): pass\n"),
        (
            "def ff(x):\n    return 1",
            "import os\ndef f(x):\n    def ff(x):\n    return 1\n",
        ),  # another function: no answer
    ],
)
def test_whole_functions(completion: str, source: str) -> None:
    assert FunctionTest("import os\ndef f(x):\n", "f", "").program(completion).source == source


def test_the_test_is_called_with_the_function() -> None:
    assert FunctionTest("", "f", "def check(g): ...").program("").test == "def check(g): ...\ncheck(f)\n"


@given(st.text(alphabet="`\n dief:#@python", max_size=60), st.text(alphabet="`\n dief:#@python", max_size=60))
def test_any_text_makes_a_program(prompt: str, completion: str) -> None:
    assert FunctionTest(prompt, "f", "").program(completion).test == "\ncheck(f)\n"


@given(st.data())
def test_pass_at_k_is_the_exact_combinatorial_share(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 300))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert math.isclose(pass_at_k(n, c, k), exact, rel_tol=1e-9, abs_tol=1e-12)


def test_pass_at_k_of_many_samples_is_a_probability() -> None:
    for c in (0, 1, 50_000, 99_999, 100_000):
        assert 0.0 <= pass_at_k(100_000, c, 1000) <= 1.0
    assert pass_at_k(100_000, 0, 1000) == 0.0
    assert pass_at_k(100_000, 99_001, 1000) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(10, 3, 1), (10, 3, 5), (20, 1, 10)])
def test_pass_at_k_is_unbiased(n: int, c: int, k: int) -> None:
    # Of n samples that are right with the probability c / n each, the estimate's mean is that of k such samples.
    draw = random.Random(0)
    trials = 20_000
    mean = sum(pass_at_k(n, sum(draw.random() < c / n for _ in range(n)), k) for _ in range(trials)) / trials
    true = 1 - (1 - c / n) ** k
    assert abs(mean - true) < 4 * 0.5 / math.sqrt(trials)


@pytest.mark.parametrize(
    ("samples", "names"), [(1, [1]), (4, [1]), (5, [1, 5]), (9, [1, 5]), (10, [1, 5, 10]), (20, [1, 5, 10])]
)
def test_metrics_are_those_that_the_samples_allow(task: HumanEval, samples: int, names: list[int]) -> None:
    problems = task.problems("test")[:2]
    rights = [[True] + [False] * (samples - 1), [False] * samples]
    metrics = task.metrics(problems, rights)
    assert list(metrics) == [f"pass@{k}" for k in names]
    assert metrics["pass@1"] == pytest.approx(0.5 / samples)


def test_metrics_average_problems_not_samples(task: HumanEval) -> None:
    rights = [[True] * 10, [True] + [False] * 9]
    metrics = task.metrics(task.problems("test")[:2], rights)
    assert metrics == pytest.approx({"pass@1": 0.55, "pass@5": (1 + 0.5) / 2, "pass@10": 1.0})


def test_samples_allow_every_k() -> None:
    assert HumanEval.runs_code
    assert HumanEval.samples >= 10
    assert HumanEval.temperature > 0


def test_a_malformed_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="record 2 is malformed: entry_point is missing"):
        HumanEval(folder=write(tmp_path, [DOUBLE, {k: v for k, v in LONGEST.items() if k != "entry_point"}])).problems(
            "test"
        )


ALPACA = [
    {"instruction": "Add two numbers in C.", "input": "", "output": "int add(int a, int b) { return a + b; }"},
    {"instruction": "Sort this list.", "input": "[2, 1]", "output": "[1, 2]"},
    {"instruction": "Say nothing.", "input": "", "output": "  "},
]


@pytest.mark.parametrize(
    ("kind", "file"), [(CodeAlpaca, "code_alpaca_20k.json"), (CodeAlpaca2k, "code_alpaca_2k.json")]
)
def test_code_alpaca(kind: type[CodeAlpaca], file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps(ALPACA), encoding="utf-8")
    task = kind(folder=tmp_path)
    problems: list[Problem] = task.problems("train")
    assert [problem.row.number for problem in problems] == [1, 2]
    assert "### Input:" not in problems[0].row.prompt
    assert "### Input:\n[2, 1]\n" in problems[1].row.prompt
    assert problems[1].row.prompt.endswith("### Response:\n")
    assert all(task.score(problem.row.completion, problem) for problem in problems)
    assert not task.score("x", problems[0])
