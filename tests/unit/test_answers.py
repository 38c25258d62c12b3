"""How answers are read: dozens of awkward ones, under the strict and the paper's protocol."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diablo.data.rows import Row
from diablo.tasks import Problem, get_task
from diablo.tasks.arithmetic import answers
from diablo.tasks.arithmetic.latex import normalise_latex

CUE = "The final answer is: "


def right(task: str, protocol: str, text: str, answer: str) -> bool:
    return get_task(task, protocol=protocol).score(text, Problem(Row(1), answer))


@pytest.mark.parametrize(
    ("stated", "answer"),
    [
        ("18", "18"),
        ("18.", "18"),
        ("18.0", "18"),
        ("18.00.", "18"),
        ("018", "18"),
        ("1,234", "1234"),
        ("1,234,567.", "1234567"),
        ("1,234.50", "1234.5"),
        ("1{,}234", "1234"),
        ("1,\\!234", "1234"),
        ("$18", "18"),
        ("$ 18.50", "18.5"),
        ("\\$1,234.56.", "1234.56"),
        ("$18$", "18"),
        ("$$18$$", "18"),
        ("\\(18\\)", "18"),
        ("\\[ 18 \\]", "18"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("18 €", "18"),
        ("18 apples", "18"),
        ("18 apples.", "18"),
        ("about 18 apples", "18"),
        ("Tom has 18 apples left", "18"),
        ("18 (eighteen)", "18"),
        ("5kg", "5"),
        ("5 km/h", "5"),
        ("5 m^2", "5"),
        ("5 m²", "5"),
        ("5 cm^{3}", "5"),
        ("5\\text{ cm}", "5"),
        ("5 \\mathrm{cm}", "5"),
        ("**18**", "18"),
        ("18**", "18"),
        ("\\boxed{18}", "18"),
        ("$\\boxed{18}$.", "18"),
        ("\\boxed{18 \\text{ apples}}", "18"),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("1/2", "0.5"),
        ("1 / 2", "0.5"),
        ("3/4 cup", "0.75"),
        ("-3/4", "-0.75"),
        ("3 1/2", "3.5"),
        ("-3 1/2", "-3.5"),
        ("3½ hours", "3.5"),
        ("½", "0.5"),
        ("\\frac{1}{2}", "0.5"),
        ("\\dfrac12", "0.5"),
        ("3\\frac{1}{2}", "3.5"),
        (".5", "0.5"),
        ("0.50", ".5"),
        ("1\\,234", "1234"),
        ("1,234 and no more", "1234"),
        ("A$5", "5"),
        ("5\\ cm", "5"),
        ("5th", "5"),
        ("3 $\\frac{1}{2}$", "3.5"),
        ("50%", "50"),
        ("50%", "0.5"),
        ("50 %", "50"),
        ("50\\%", "50"),
        ("50 percent", "50"),
        ("-5", "-5"),
        ("- 5", "-5"),
        ("+5", "5"),
        ("\u22125", "-5"),
        ("\u20135 degrees", "-5"),
        ("-0", "0"),
        ("1e3", "1000"),
        ("1.5e3", "1500"),
        ("1.5E-3", "0.0015"),
        ("5 million", "5000000"),
        ("2.5 thousand dollars", "2500"),
        ("3 * 6 = 18", "18"),
        ("x = 18", "18"),
        ("$3 \\times 6 = 18$", "18"),
        ("18. So Tom has 3 more than Ann.", "18"),
        ("18\nTom has 3.", "18"),
        ("\n\n18", "18"),
        ("0.333333333", "0.3333333333333333"),
        ("1/3", "0.3333333333333333"),
        ("12345678901234567890", "12345678901234567890"),
    ],
)
def test_strict_number_is_read(stated: str, answer: str) -> None:
    assert right("gsm8k", "strict", f"2 and 3 make 5, and 7 more.\n{CUE}{stated}", answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "18"),
        (" ", "18"),
        ("18", "18"),  # nothing says that this is the answer
        ("9 * 2 = 18 apples.", "18"),
        (CUE, "18"),
        (f"It is 18. {CUE}", "18"),
        (f"{CUE}unknown", "18"),
        (f"{CUE}eighteen", "18"),
        (f"{CUE}17", "18"),
        (f"{CUE}-18", "18"),
        (f"{CUE}18.5", "18"),
        (f"{CUE}1.8", "18"),
        (f"{CUE}180", "18"),
        (f"{CUE}1 8", "18"),
        (f"{CUE}0.33", "0.3333333333333333"),
        (f"{CUE}18 or 19", "18"),
        (f"{CUE}18, 19", "18"),
        (f"{CUE}18, 190", "18190"),
        (f"{CUE}between 17 and 18", "18"),
        (f"{CUE}18 dollars a day, or 126 a week", "18"),
        (f"{CUE}x = 17 or x = 18", "18"),
        (f"{CUE}17-18", "18"),
        (f"{CUE}17:18", "18"),
        (f"{CUE}not 18", "18"),
        (f"{CUE}it isn't 18", "18"),
        (f"{CUE}18 million", "18"),
        (f"{CUE}18.000.000", "18"),
        (f"{CUE}1,8", "18"),
        (f"{CUE}3 * 6", "18"),
        (f"{CUE}9 + 9", "18"),
        (f"{CUE}18 + x", "18"),
        (f"{CUE}18\\sqrt{{2}}", "18"),
        (f"{CUE}18^2", "18"),
        (f"{CUE}18²", "18"),
        (f"{CUE}18 \u00d7 10", "18"),
        (f"{CUE}1.8e1e1", "18"),
        (f"{CUE}18e999999999", "18"),
        (f"{CUE}18/0", "18"),
        (f"{CUE}18/", "19"),
        (f"{CUE}A18", "18"),
        (f"{CUE}\\boxed{{}}", "18"),
        (f"{CUE}18 \\boxed{{17}}", "18"),
        (f"{CUE}18. No, wait. {CUE}17", "18"),  # the last cue counts
        ("#### 17", "18"),
        ("nan", "nan"),
        (f"{CUE}nan", "nan"),
        (f"{CUE}inf", "inf"),
    ],
)
def test_strict_number_is_refused(text: str, answer: str) -> None:
    assert not right("gsm8k", "strict", text, answer)


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 18.",
        "the answer is: 18",
        "THE FINAL ANSWER IS: 18",
        "So the answer is $18.",
        "Answer: 18",
        "**Answer:** 18",
        "**Answer**: 18",
        "#### 18",
        "9 + 9 = 18\n#### 18",
        "Thus we get \\boxed{18}.",
        "\\boxed{17}, no: \\boxed{18}",
        "\\boxed{17}\nThe answer is: 18",
        "The answer is 17. Sorry, the answer is 18.",
        "The final answer is: 17\nThe final answer is: 18",
        "#### 17\nThe final answer is: 18",
        "The answer is \\boxed{18}. It is not 17.",
        "The answer is:\n\n$$18$$",
    ],
)
def test_strict_cues(text: str) -> None:
    assert right("gsm8k", "strict", text, "18")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The final answer is: 18", 18),
        ("The final answer is: 18.", 18),
        ("The final answer is: $1,234.50 a year", 1234.5),
        ("The final answer is: -3", -3),
        ("The final answer is: 18 or 19", 18),  # the first behind the cue
        ("The final answer is: 17\nThe final answer is: 18", 17),
        ("2 and 3. The final answer is: five", 3),  # nothing behind the cue: the last of the text
        ("The final answer is:18", 18),  # no cue without its blank, but then the last number
        ("9 * 2 = 18 apples", 18),
        ("The answer is 18, not 17", 17),
        ("18%", 18),
        ("1/2", 2),
        ("5-3", -3),
        ("1.5e3", 3),
        ("", None),
        ("none", None),
        ("The final answer is: ", None),
    ],
)
def test_paper_number(text: str, number: float | None) -> None:
    assert answers.paper_number(text) == number


@pytest.mark.parametrize(
    ("text", "strict", "paper"),
    [
        ("The answer is (C).", "C", "C"),
        ("The answer is C", "C", "C"),
        ("The answer is: C) 35", "C", "C"),
        ("The answer is option (C)", "C", "C"),
        ("The answer is \\boxed{C}", "C", "C"),
        ("\\boxed{\\text{(C)}}", "C", "C"),
        ("#### C", "C", "C"),
        ("The answer is **C**.", "C", "C"),
        ("Both are equal. The answer is (C).", "C", "B"),  # the paper takes the first capital, as LLM-Adapters does
        ("The answer is A. No: the answer is C.", "C", "A"),
        ("(C)", None, "C"),
        ("The answer is Carol", None, "C"),
        ("The answer is c", None, None),
        ("The answer is C or D", None, "C"),
        ("The answer is (C), (D)", None, "C"),
        ("The answer is C/D", None, "C"),
        ("The answer is F", None, None),
        ("The answer is 35", None, None),
        ("The answer is", None, None),
        ("", None, None),
    ],
)
def test_choice(text: str, strict: str | None, paper: str | None) -> None:
    assert get_task("aqua").parse(text) == strict
    assert get_task("aqua", protocol="paper").parse(text) == paper


@pytest.mark.parametrize(
    ("stated", "answer", "paper_agrees"),
    [
        ("\\frac{1}{2}", "\\frac{1}{2}", True),
        ("\\dfrac{1}{2}", "\\frac12", True),
        ("1/2", "\\frac{1}{2}", True),
        ("0.5", "\\frac{1}{2}", True),
        (".5", "0.5", True),
        ("$\\frac{1}{2}$", "\\frac{1}{2}", True),
        ("x = 5", "5", True),
        ("5", "x=5", True),
        ("90^\\circ", "90", True),
        ("\\$18.90", "18.90", True),
        ("50\\%", "50", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})", True),
        ("\\sqrt2", "\\sqrt{2}", True),
        ("5 \\text{ cm}", "5", True),
        ("\\text{even}", "\\text{even}", True),
        ("-\\frac{1}{2}", "-\\frac12", True),
        ("6 - 5i", "6-5i", True),
        ("11,\\!111", "11,\\!111", True),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
        ("\\sqrt{18}", "3\\sqrt{2}", False),  # equal in value only
        ("0.25", "\\frac{1}{4}", False),
        ("1+x^2", "x^2+1", False),
        ("\\frac{-1}{2}", "-\\frac{1}{2}", False),
        ("11111", "11,\\!111", False),
        ("even", "\\text{even}", False),
        ("\\boxed{7}", "7", False),
    ],
)
def test_expression_is_right(stated: str, answer: str, paper_agrees: bool) -> None:
    text = f"We find x + 2.\nThe answer is: {stated}"
    assert right("math", "strict", text, answer)
    assert right("math", "paper", text, answer) == paper_agrees


@pytest.mark.parametrize("protocol", ["strict", "paper"])
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "5"),
        ("5", "5"),
        ("The answer is: ", "5"),
        ("The answer is: ", ""),
        ("The answer is: 6", "5"),
        ("The answer is: -5", "5"),
        ("The answer is: \\sqrt{2}", "\\sqrt{3}"),
        ("The answer is: (3,4)", "(4,3)"),
        ("The answer is: dayMon", "\\text{Monday}"),  # no product of letters
        ("The answer is: live", "\\text{evil}"),
        ("The answer is: \\frac{1}{0}", "0"),
        ("The answer is: \\frac{", "1"),
        ("The answer is: }", "1"),
        ("The answer is: 5. The answer is: 6", "5"),
    ],
)
def test_expression_is_wrong(protocol: str, text: str, answer: str) -> None:
    assert not right("math", protocol, text, answer)


@pytest.mark.parametrize(
    ("text", "paper", "strict"),
    [
        ("The answer is: 5", "5", "5"),
        ("The answer is: 5.", "5", "5"),
        ("The answer is: 5.\nMore.", "5", "5"),
        ("The answer is: 4\nThe answer is: 5", "5", "5"),
        ("the answer is 5", None, "5"),
        ("so \\boxed{5}", None, "5"),
        ("so \\boxed{\\{5\\}}", None, "\\{5\\}"),
        ("so \\boxed{5", None, None),
        ("The answer is: 2.5", "2.5", "2.5"),
        ("The answer is: \\begin{cases}1\n2\\end{cases}\nx", None, "\\begin{cases}1\n2\\end{cases}"),
    ],
)
def test_where_an_expression_is_read(text: str, paper: str | None, strict: str | None) -> None:
    assert get_task("math").parse(text) == strict
    if paper is not None or "The answer is: " not in text:
        assert get_task("math", protocol="paper").parse(text) == paper


def test_normalised_spelling_is_its_own() -> None:
    for text in ("\\dfrac12", "x=\\left(3\\right)", "\\sqrt3 + .5", "90^{\\circ}", "5 \\text{ cm}", "a/b", "3/4"):
        once = normalise_latex(text)
        assert normalise_latex(once) == once


@pytest.mark.parametrize(
    ("text", "strict", "paper"),
    [
        ("the correct answer is answer2", "answer2", "answer2"),
        ("the correct answer is answer2.", "answer2", "answer2"),
        ("The correct answer is: answer2", "answer2", None),
        ("the correct answer is Answer2", "answer2", None),
        ("the correct answer is 'answer2'", "answer2", "answer2"),
        ("the correct answer is **answer2**", "answer2", "answer2"),
        ("the correct answer is answer2\n\nthe correct answer is answer3", "answer3", "answer2"),
        ("the correct answer is not answer2", None, "answer2"),
        ("the correct answer is answer21", None, "answer2"),
        ("the correct answer is answer1/answer2/answer3", None, "answer1"),
        ("the correct answer is answer2 or answer3", None, "answer2"),
        ("the correct answer is what I call answer2", None, "answer2"),
        ("the correct answer is answer9", None, None),
        ("the correct answer is true", None, None),
        ("the correct answer is", None, None),
        ("answer2", None, None),
        ("answer2 is what the correct answer is", None, None),
        ("", None, None),
    ],
)
def test_commonsense_word(text: str, strict: str | None, paper: str | None) -> None:
    assert get_task("arc_easy").parse(text) == strict
    assert get_task("arc_easy", protocol="paper").parse(text) == paper


@pytest.mark.parametrize("protocol", ["strict", "paper"])
@pytest.mark.parametrize("task", ["gsm8k", "math", "aqua", "math10k", "arc_easy", "boolq", "mawps"])
def test_no_answer_never_equals_no_answer(task: str, protocol: str) -> None:
    reader = get_task(task, protocol=protocol)
    assert reader.parse("nonsense") is None
    assert reader.score("nonsense", Problem(Row(1), None)) is False
    assert reader.score(f"{CUE}18, the correct answer is answer1", Problem(Row(1), None)) is False


@given(
    st.text("0123456789.,-+*/^=%$ \\{}()[]efracboxdt\n", max_size=30) | st.text(max_size=20),
    st.sampled_from(["gsm8k", "math", "aqua", "math10k", "arc_easy"]),
    st.sampled_from(["strict", "paper"]),
)
@settings(max_examples=400, deadline=None)
def test_any_text_is_read_or_refused(text: str, task: str, protocol: str) -> None:
    reader = get_task(task, protocol=protocol)
    for written in (text, f"{CUE}{text}", f"The answer is: {text}", f"\\boxed{{{text}"):
        parsed = reader.parse(written)
        assert parsed is None or parsed or parsed == 0


@given(
    st.integers(-(10**12), 10**12), st.sampled_from(["{}", "${}", "{} apples", "\\boxed{{{}}}", "{}.", "{:,}", "{}.0"])
)
@settings(max_examples=200, deadline=None)
def test_every_integer_is_read_back(number: int, form: str) -> None:
    text = CUE + form.format(number)
    assert right("gsm8k", "strict", text, str(number))
    assert not right("gsm8k", "strict", text, str(number + 1))


def test_a_power_tower_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "SECONDS", 1)
    assert not right("math", "strict", "The answer is: 9^{9^{9^{9}}}", "3")


def test_answers_are_compared_in_another_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(answers.same_value, "\\sqrt{50}", "5\\sqrt{2}").result()
        assert not pool.submit(answers.same_value, "\\sqrt{51}", "5\\sqrt{2}").result()


def test_the_cue_is_a_phrase_of_its_own() -> None:
    assert answers.stated_answer("the answers: 18") is None
    assert re.match("18", answers.stated_answer("my answer: 18") or "")
