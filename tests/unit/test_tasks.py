"""Tasks: where their records come from, what is wrong with them, how they become rows, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from diablo.data.rows import Row
from diablo.errors import UserError
from diablo.tasks import PROTOCOLS, TASKS, MultipleChoice, Problem, Task, get_task, near_copies, without_tested
from diablo.tasks.arithmetic.word_problems import Gsm8k
from diablo.tasks.sources import read_records

GSM8K = [
    {
        "question": "Weng earns $12 an hour. Yesterday, she worked 50 minutes. How much did she earn?",
        "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nSo 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10",
    },
    {"question": "A house costs 80,000 and 50,000 more. The sum?", "answer": "It is <<8+5=13>>130,000.\n#### 130,000"},
    {"question": "How cold is it?", "answer": "It is 3-5=<<3-5=-2>>-2 degrees.\n#### -2"},
]
WORDS = [{"instruction": "7 crayons, 3 taken. How many?", "input": "", "output": "\nThe answer is 4.", "answer": "4"}]
AQUA = [{"instruction": "1+1? (A) 1 (B) 2", "input": "", "output": "\nIt is 2.The answer is (B).", "answer": "B"}]
MATH = [{"problem": "Half?", "level": "1", "type": "x", "solution": "As $\\frac{2}{4}=\\boxed{\\frac{1}{2}}$, done."}]
METAMATH = [
    {
        "query": "Half of 1?",
        "response": "It is 1/2.\n#### 0.5\nThe answer is: 0.5",
        "type": "GSM",
        "original_question": "",
    }
]


def commonsense(word: str) -> list[dict[str, str]]:
    question = f"Please choose: which one?\n\nAnswer format: {word}"
    return [{"instruction": question, "input": "", "output": f"the correct answer is {word}", "answer": word}]


# Each task's records in the format that its files have, and a record for each split.
RECORDS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": GSM8K,
    "math": MATH,
    "metamathqa": METAMATH,
    "math10k": [*WORDS, *AQUA],
    "svamp": WORDS,
    "aqua": AQUA,
    "addsub": WORDS,
    "singleeq": [WORDS[0] | {"answer": "4.0"}],
    "multiarith": [WORDS[0] | {"answer": 4}],
    "commonsense170k": [*commonsense("true"), *commonsense("ending4"), *commonsense("option1")],
    "boolq": commonsense("false"),
    "piqa": commonsense("solution2"),
    "social_i_qa": commonsense("answer3"),
    "hellaswag": commonsense("ending4"),
    "winogrande": commonsense("option2"),
    "arc_easy": commonsense("answer1"),
    "arc_challenge": commonsense("answer5"),
    "openbookqa": commonsense("answer4"),
}


def write(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
        return
    text = json.dumps(records) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in records)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", RECORDS)
def test_a_training_completion_is_itself_right(tmp_path: Path, name: str, protocol: Any) -> None:
    source = TASKS[name].source
    assert source is not None
    task = get_task(name, folder=tmp_path, protocol=protocol)
    for split in task.splits:
        write(tmp_path / source.own_place(split), RECORDS[name])
        problems = task.problems(split)
        assert len(problems) == len(RECORDS[name])
        for problem in problems:
            assert problem.row.prompt.endswith("### Response:\n")
            # AQuA's rule under the paper's protocol takes the first capital letter, here that of "It".
            assert task.score(problem.row.completion, problem) or (name, protocol) == ("math10k", "paper")
            assert not task.score(problem.row.completion.replace("4", "5"), problem) or "4" not in problem.answer


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_packaged_word_problems_put_for_a_number(protocol: Any) -> None:
    task = get_task("mawps_cot", protocol=protocol)
    problems = task.problems("test")
    assert len(problems) == 238
    assert all(task.score(problem.row.completion, problem) for problem in problems)


def test_a_worked_answer_has_no_calculator_and_ends_with_the_cue(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "train.jsonl", GSM8K)
    first, second, _ = get_task("gsm8k", folder=tmp_path).problems("train")
    assert first.row.completion == ("Weng earns 12/60 = $0.2 per minute.\nSo 0.2 x 50 = $10.\nThe final answer is: 10")
    assert first.row.as_messages()[0]["content"] == GSM8K[0]["question"]
    assert second.row.completion.endswith("\nThe final answer is: 130,000")
    assert second.answer == "130000"


def test_the_file_itself_goes_before_the_familys_folder(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "train.jsonl", GSM8K)
    assert len(read_records(Gsm8k.source, "train", tmp_path)) == 3
    write(tmp_path / "train.jsonl", GSM8K[:1])
    assert len(read_records(Gsm8k.source, "train", tmp_path)) == 1


# Where tasks are published, from the folder that a clone or a copy of the hub's makes; each may also be left out.
PUBLISHED = {
    ("gsm8k", "train"): ["grade-school-math/grade_school_math/data/train.jsonl"],
    ("gsm8k", "test"): [
        "grade-school-math/grade_school_math/data/test.jsonl",
        "gsm8k/main/test-00000-of-00001.parquet",
    ],
    ("math", "test"): ["MATH-lighteval/data/test-00000-of-00001.parquet"],
    ("metamathqa", "train"): ["MetaMathQA/MetaMathQA-395K.json"],
    ("math10k", "train"): ["LLM-Adapters/ft-training_set/math_10k.json"],
    ("svamp", "test"): ["LLM-Adapters/dataset/SVAMP/test.json"],
    ("aqua", "test"): ["LLM-Adapters/dataset/AQuA/test.json"],
    ("addsub", "test"): ["LLM-Adapters/dataset/AddSub/test.json"],
    ("singleeq", "test"): ["LLM-Adapters/dataset/SingleEq/test.json"],
    ("multiarith", "test"): ["LLM-Adapters/dataset/MultiArith/test.json"],
    ("commonsense170k", "train"): [
        "LLM-Adapters/ft-training_set/commonsense_170k.json",
        "commonsense_170k/data/train-00000-of-00001.parquet",
    ],
    ("boolq", "train"): ["LLM-Adapters/dataset/boolq/train.json"],
    ("piqa", "test"): ["LLM-Adapters/dataset/piqa/test.json"],
    ("social_i_qa", "test"): ["LLM-Adapters/dataset/social_i_qa/test.json"],
    ("hellaswag", "test"): ["LLM-Adapters/dataset/hellaswag/test.json"],
    ("winogrande", "train"): ["LLM-Adapters/dataset/winogrande/train.json"],
    ("arc_easy", "test"): ["LLM-Adapters/dataset/ARC-Easy/test.json"],
    ("arc_challenge", "test"): ["LLM-Adapters/dataset/ARC-Challenge/test.json"],
    ("openbookqa", "test"): ["LLM-Adapters/dataset/openbookqa/test.json"],
    ("code_alpaca", "train"): ["codealpaca/data/code_alpaca_20k.json", "CodeAlpaca-20k/code_alpaca_20k.json"],
    ("code_alpaca_2k", "train"): ["codealpaca/data/code_alpaca_2k.json"],
    ("humaneval", "test"): ["openai_humaneval/openai_humaneval/test-00000-of-00001.parquet"],
    ("saferpaca", "train"): ["safety-tuned-llamas/data/training/saferpaca_Instructions_2000.json"],
    ("saferpaca_safety_only", "train"): ["safety-tuned-llamas/data/training/safety_only_data_Instructions.json"],
}
LAYOUTS = [(name, split, path) for (name, split), paths in PUBLISHED.items() for path in paths]


@pytest.mark.parametrize(("name", "split", "path"), LAYOUTS)
def test_data_is_read_as_it_is_published(tmp_path: Path, name: str, split: Any, path: str) -> None:
    alpaca = [{"instruction": "Name it.", "input": "", "output": "It."}]
    function = [{"prompt": "def f():\n", "canonical_solution": "    pass\n", "test": "", "entry_point": "f"}]
    records = RECORDS.get(name) or (function if name == "humaneval" else alpaca)
    write(tmp_path / path, records)
    clone, _, inside = path.partition("/")
    for folder in (tmp_path, tmp_path / clone):
        assert len(get_task(name, folder=folder, protocol="paper").problems(split)) == len(records), inside
    if inside.startswith("dataset/"):
        assert get_task(name, folder=tmp_path / clone / "dataset", protocol="paper").problems(split)


def test_a_name_that_many_datasets_share_is_not_enough(tmp_path: Path) -> None:
    write(tmp_path / "SVAMP" / "test.json", WORDS)
    assert get_task("svamp", folder=tmp_path).problems("test")
    for name in ("svamp", "addsub"):
        with pytest.raises(UserError, match="has none of"):
            get_task(name, folder=tmp_path / "SVAMP").problems("test")
    write(tmp_path / "main" / "test.parquet", GSM8K)
    with pytest.raises(UserError, match="has none of"):
        get_task("gsm8k", folder=tmp_path).problems("test")


def test_no_path_is_that_of_two_tasks() -> None:
    found = [
        path
        for task in TASKS.values()
        for split in task.splits
        if task.source and task.name != "safety"  # it takes any file that has instructions
        for path in dict.fromkeys(task.source.paths(split))
    ]
    assert len(found) == len(set(found))
    assert not [path for path in found if path.startswith("*")]


def test_a_record_in_each_file_is_read_by_the_files_numbers(tmp_path: Path) -> None:
    answers = {"algebra/2": "2", "algebra/10": "10", "geometry/1": "1"}
    for name, answer in answers.items():
        write(tmp_path / "MATH" / "test" / f"{name}.json", MATH[0] | {"solution": rf"\boxed{{{answer}}}"})
    problems = get_task("math", folder=tmp_path).problems("test")
    assert [problem.answer for problem in problems] == list(answers.values())
    assert [problem.row.number for problem in problems] == [1, 2, 3]
    write(tmp_path / "MATH" / "test" / "algebra" / "10.json", {"problem": "Half?"})
    with pytest.raises(UserError, match=r"10\.json: record 1 is malformed: solution is missing"):
        get_task("math", folder=tmp_path).problems("test")


def test_a_split_in_parts_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    for part in range(2):
        write(tmp_path / "main" / f"test-0000{part}-of-00002.parquet", GSM8K[part : part + 2])
    problems = get_task("gsm8k", folder=tmp_path).problems("test")
    assert [(problem.row.number, problem.answer) for problem in problems] == [
        (1, "10"),
        (2, "130000"),
        (3, "130000"),
        (4, "-2"),
    ]
    write(tmp_path / "main" / "test-00000-of-00001.parquet", GSM8K)
    with pytest.raises(UserError, match="not all the parts of one dataset, each once"):
        get_task("gsm8k", folder=tmp_path).problems("test")
    for name in ("test-00000-of-00001", "test-00001-of-00002"):
        (tmp_path / "main" / f"{name}.parquet").unlink()
    with pytest.raises(UserError, match=r"found test-00000-of-00002\.parquet in .* not all the parts"):
        get_task("gsm8k", folder=tmp_path).problems("test")


def test_own_names_go_before_published_ones_and_a_clone_before_the_hubs(tmp_path: Path) -> None:
    for count, path in enumerate(("main/test-00000-of-00001.parquet", "data/test.jsonl", "gsm8k/test.jsonl"), start=1):
        write(tmp_path / path, GSM8K[:count])
        assert len(get_task("gsm8k", folder=tmp_path).problems("test")) == count


def test_a_folder_without_the_file_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        get_task("gsm8k", folder=tmp_path).problems("test")
    looked_at = [
        "test.jsonl",
        "gsm8k/test.jsonl",
        "data/test.jsonl",
        "grade_school_math/data/test.jsonl",
        "grade-school-math/grade_school_math/data/test.jsonl",
        "main/test-*-of-*.parquet",
        "gsm8k/main/test-*-of-*.parquet",
    ]
    assert f"{str(tmp_path)!r} has none of {', '.join(looked_at)}; get the data from https://" in str(caught.value)
    assert "put it there as gsm8k/test.jsonl, or as it is published" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match="there is no folder"):
        get_task("gsm8k", folder=tmp_path / "absent").problems("test")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"question": "q"}', "record 1 is malformed: answer is missing, not a str"),
        ('{"question": "q", "answer": null}', "record 1 is malformed: answer is null"),
        ('{"question": 3, "answer": "#### 1"}', "question is a number, not a str"),
        ('{"question": "q", "answer": "#### 1"}\n\n{"question": "q", "answer": 1}', "record 3"),  # the line
        ('{"question": "q", "answer": "\\ud800"}', "answer is not valid Unicode"),
        ('{"question": "q", "answer": "no number"}', "record 1 of the test split is malformed: answer does not end in"),
        ('{"question": "q", "answer": "#### many"}', "answer does not end in"),
        ('{"question": "q", "answer": "#### nan"}', "answer does not end in"),
        ("[1]", "it is a list, not an object"),
        ("{", "not valid JSON"),
        ("", "has no records"),
    ],
)
def test_a_malformed_record_is_named(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "test.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        get_task("gsm8k", folder=tmp_path).problems("test")
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "split", "change", "part"),
    [
        ("aqua", "test", {"answer": "F"}, "answer is 'F', not one of [A-E]."),
        ("aqua", "test", {"answer": 2}, "answer is 2"),
        ("addsub", "test", {"answer": "B"}, "answer is 'B', not a number."),
        ("math10k", "train", {"answer": "F"}, "answer is 'F', not one of [A-E] or a number."),
        ("addsub", "test", {"answer": None}, "answer is null, not a str or int or float"),
        ("math", "test", {"solution": "no box"}, "no \\boxed{} answer"),
        ("metamathqa", "train", {"response": "no answer given"}, "names no answer"),
        ("boolq", "test", {"answer": "answer1"}, "answer is 'answer1', not one of true|false"),
        ("piqa", "train", {"answer": "solution3"}, "answer is 'solution3'"),
    ],
)
def test_an_answer_that_is_none_of_the_tasks(tmp_path: Path, name: str, split: Any, change: Any, part: str) -> None:
    source = TASKS[name].source
    assert source is not None
    write(tmp_path / source.own_place(split), [RECORDS[name][0] | change])
    with pytest.raises(UserError, match="record 1") as caught:
        get_task(name, folder=tmp_path).problems(split)
    assert part in str(caught.value)


def test_the_hub_is_asked_where_no_folder_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_list(GSM8K)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [problem.answer for problem in get_task("gsm8k").problems("test")] == ["10", "130000", "-2"]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_a_hub_that_cannot_be_reached_says_how_to_give_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        get_task("gsm8k").problems("test")
    for part in ("'openai/gsm8k'", "no route to host", "gsm8k/test.jsonl", "data.folder", "--data-folder"):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_task_that_no_hub_has_says_where_its_file_is() -> None:
    with pytest.raises(UserError, match=r"'math/SVAMP.test.json'.*github.com/AGI-Edgerunners.*data.folder"):
        get_task("svamp").problems("test")


def test_tested_problems_are_left_out_of_training(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GSM8K)
    write(tmp_path / "test.jsonl", GSM8K[1:2])
    task = get_task("gsm8k", folder=tmp_path)
    kept, left_out = without_tested([problem.row for problem in task.problems("train")], task.problems("test"))
    assert [row.number for row in kept] == [1, 3]
    assert left_out == 1
    # One question is one prompt, whichever of the number tasks it stands in.
    write(tmp_path / "AddSub.test.json", [WORDS[0] | {"instruction": GSM8K[2]["question"]}])
    other = get_task("addsub", folder=tmp_path).problems("test")
    assert [row.number for row in without_tested(kept, other)[0]] == [1]


def test_near_copies_differ_from_a_training_row_in_numbers_and_punctuation_alone() -> None:
    def problem(prompt: str, user: str | None = None) -> Problem:
        return Problem(Row(1, prompt, "1", user=user), 1)

    train = [Row(1, "Tom has 3 apples. How many?", "3"), Row(2, "12 + 5", "17")]
    tested = [
        problem("Tom has 40.5 apples , how many ?"),
        problem("TOM has three apples. How many?"),
        problem("Tom has 3 pears. How many?"),
        # Numbers alone are no words.
        problem("30 + 7"),
        problem("Below is a question. Tom has 3 apples. How many?", user="Tom has 3 apples. How many?"),
    ]
    assert near_copies(train, tested) == 2
    turns = ("user", "Tom has 8 apples. How many?"), ("assistant", "8")
    conversation = Row(1, messages=tuple({"role": role, "content": content} for role, content in turns))
    assert near_copies([conversation], tested) == 2
    assert near_copies([], tested) == near_copies(train, []) == 0


def test_near_copies_are_counted_beside_rows_that_cannot_be_encoded() -> None:
    broken = Row(1, "half a \ud83d surrogate 1", "x")
    assert (
        near_copies(
            [broken], [Problem(Row(1, "How many?", "1"), 1), Problem(Row(2, "Half a \ud83d surrogate", "1"), 1)]
        )
        == 1
    )


def test_no_row_is_read_where_nothing_is_tested() -> None:
    rows = iter([Row(1, "How many?", "1")])
    assert near_copies(rows, []) == 0
    assert next(rows).number == 1


def test_near_copies_of_other_scripts() -> None:
    tested = [Problem(Row(1, "Сколько будет 2 и 3?", "5"), 5), Problem(Row(2, "Сколько стоит 2?", "5"), 5)]
    assert near_copies([Row(1, "сколько будет 70 и 1", "71")], tested) == 1


def test_tasks_by_name() -> None:
    assert all(TASKS[name].name == name for name in TASKS)
    assert isinstance(get_task("gsm8k"), Gsm8k)
    with pytest.raises(UserError, match=r"no task 'gsm9k'; allowed: mawps, gsm8k, .* Did you mean gsm8k\?"):
        get_task("gsm9k")


def test_the_page_of_the_tasks_names_each_and_where_its_data_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    for name, task in TASKS.items():
        assert f"`{name}`" in page
        assert task.source is None or task.source.hub is None or f"`{task.source.hub}`" in page


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_says_what_it_is_and_has_a_file_for_each_split(name: str) -> None:
    task = TASKS[name]
    assert (task.__doc__ or "").strip()
    assert task.splits
    assert len(task.sizes) == len(task.splits) or (name, task.sizes) == ("safety", ())
    assert task.source is None or all(task.source.own_place(split) for split in task.splits)


def test_the_sizes_are_those_of_the_data() -> None:
    for name in ("mawps", "mawps_cot"):
        task = get_task(name)
        assert tuple(len(task.problems(split)) for split in task.splits) == task.sizes
    # Commonsense-170K is made of the training splits of the eight.
    sets = [task for name, task in TASKS.items() if issubclass(task, MultipleChoice) and name != "commonsense170k"]
    assert sum(task.sizes[0] for task in sets) == TASKS["commonsense170k"].sizes[0]


def test_the_headline_figure_is_the_share_of_right_samples() -> None:
    class Two(Gsm8k):
        samples = 2

    problems: list[Problem] = []
    assert Task.metrics(Two(), problems, [[True, False], [True, True]]) == {"accuracy": 0.75}


def test_strict_without_math_verify_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("gsm8k", "math"):
        with pytest.raises(UserError, match=r"diablo-peft\[answers\]"):
            get_task(name)
        get_task(name, protocol="paper")
