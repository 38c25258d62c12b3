"""Training and scoring on tasks whose data is a folder of files, with every way of generating and reading answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from diablo.data import RowEncoder
from diablo.errors import UserError
from diablo.scoring.asking import Decoding, decoding_for
from diablo.scoring.generation import evaluate_task, generate
from diablo.tasks import TASKS, get_task
from diablo.tasks.arithmetic.equations import Mawps

FAST = ["training.max_steps=2", "training.batch_size=4", "training.warmup_steps=0", "precision=fp32", "merge=false"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a few rows of GSM8K, AddSub and BoolQ; one tested question stands in the training split as well."""
    folder = tmp_path / "data"
    for name in ("gsm8k", "math", "commonsense"):
        (folder / name).mkdir(parents=True)
    rows = [
        {"question": f"What are {n} and 4?", "answer": f"{n} + 4 = <<{n}+4={n + 4}>>{n + 4}\n#### {n + 4}"}
        for n in range(9)
    ]
    (folder / "gsm8k" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, rows[3:4])))
    sums = [
        {"instruction": f"What are {n} and 4?", "output": f"The answer is {n + 4}.", "answer": str(n + 4)}
        for n in (5, 6, 60)
    ]
    (folder / "math" / "AddSub.test.json").write_text(json.dumps(sums))
    claims = [{"instruction": "Is it so?", "output": "the correct answer is true", "answer": "true"}] * 2
    (folder / "commonsense" / "boolq.test.json").write_text(json.dumps(claims))
    return folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model never stops; hundreds of its tokens say no more than a few."""
    for task in ("gsm8k", "addsub", "boolq"):
        monkeypatch.setattr(TASKS[task], "max_new_tokens", 6)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def recipe(tmp_path: Path, model: Path, data: Path, more: str = "") -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {model}\ntask: gsm8k\ndata: {{folder: {data}}}\nmethod: {{num_blocks: 4}}\n"
        f"output: {tmp_path / 'run'}\n{more}"
    )
    return ["train", str(path), *FAST]


def test_a_task_is_trained_on_and_scored(diablo, tiny_model, tmp_path, data):
    status, out, err = diablo(*recipe(tmp_path, tiny_model, data))
    assert (status, err.count("error")) == (0, 0)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["rows"] == 8
    assert record["data"]["tested_rows_left_out"] == 1
    assert record["data"]["held_out_rows"] == 1
    for when in ("before", "after"):
        score = record["scores"][when]["gsm8k"]
        assert (score["protocol"], score["accuracy"], score["total"]) == ("strict", 0, 1)
        [answer] = lines_of(tmp_path / "run" / f"answers-{when}.jsonl")
        assert answer["task"] == "gsm8k"
        assert (answer["number"], answer["sample"], answer["answer"], answer["right"]) == (1, 0, "7", False)
        assert "What are 3 and 4?" in answer["prompt"]
        assert answer["text"]
        assert f"gsm8k accuracy {when}" in out
    assert "1 rows that are tested on" in out

    # A run's folder is scored as it was trained, without being told where the data is.
    status, out, _ = diablo("evaluate", tmp_path / "run")
    assert status == 0
    assert "gsm8k: accuracy 0.0% (0 of 1)" in out


def test_other_tasks_are_scored_in_its_place_and_left_out_of_training(diablo, tiny_model, tmp_path, data):
    more = "evaluation: {tasks: [addsub, boolq], protocol: paper, before: false}\n"
    status, out, _ = diablo(*recipe(tmp_path, tiny_model, data, more))
    assert status == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    # Two of AddSub's three questions and GSM8K's own tested one stand in the training split.
    assert record["data"]["rows"] == 6
    assert list(record["scores"]) == ["after"]
    scores = record["scores"]["after"]
    assert {name: score["total"] for name, score in scores.items()} == {"addsub": 3, "boolq": 2}
    assert {score["protocol"] for score in scores.values()} == {"paper"}
    answers = lines_of(tmp_path / "run" / "answers-after.jsonl")
    assert [answer["task"] for answer in answers] == ["addsub"] * 3 + ["boolq"] * 2
    assert not (tmp_path / "run" / "answers-before.jsonl").exists()
    assert "addsub accuracy after" in out
    assert "boolq accuracy after" in out
    # Another run in the same folder leaves no answers of this one.
    assert diablo(*recipe(tmp_path, tiny_model, data, more), "evaluation.after=false")[0] == 0
    assert not (tmp_path / "run" / "answers-after.jsonl").exists()


def test_several_tasks_are_trained_on_in_turns_and_scored_by_likelihood(diablo, tiny_model, tmp_path, data):
    claims = [
        {
            "instruction": f"Is {number} odd?\n\nAnswer format: true/false",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        for number, answer in enumerate(["false", "true"] * 4)
    ]
    for split, rows in (("train", claims[:5]), ("test", claims[4:])):
        (data / "commonsense" / f"boolq.{split}.json").write_text(json.dumps(rows))
    command = recipe(tmp_path, tiny_model, data, "evaluation: {likelihood: true, tasks: [boolq]}\n")
    mixed = [*command, "task=[gsm8k, boolq]", "data.limit=6"]
    status, out, _ = diablo(*mixed, "--dry-run")
    assert status == 0
    assert "boolq (share of right choices), by the likelihood of its choices" in out
    status, out, _ = diablo(*mixed)
    assert status == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    # One row of each is tested on too; the limit takes three of either.
    assert (record["data"]["rows"], record["data"]["tested_rows_left_out"]) == (6, 2)
    assert record["data"]["held_out_rows"] == 1 + 4
    answers = lines_of(tmp_path / "run" / "answers-after.jsonl")
    score = record["scores"]["after"]["boolq"]
    assert (score["protocol"], score["headline"], score["total"]) == ("likelihood", "acc", 4)
    assert score["acc"] == sum(answer["right"] for answer in answers) / 4
    assert [[each["text"] for each in answer["candidates"]] for answer in answers] == [
        ["the correct answer is true", "the correct answer is false"]
    ] * 4
    assert "boolq acc after" in out

    # A run's folder is scored as the run was.
    status, out, _ = diablo("evaluate", tmp_path / "run", "--out", tmp_path / "again.jsonl")
    assert status == 0
    assert f"boolq: acc {score['acc']:.1%}" in out
    again = lines_of(tmp_path / "again.jsonl")
    assert [answer["text"] for answer in again] == [answer["text"] for answer in answers]
    status, out, _ = diablo("evaluate", tmp_path / "run", "--no-likelihood")
    assert "boolq: accuracy" in out

    (data / "commonsense" / "boolq.test.json").write_text(json.dumps([claims[0] | {"instruction": "Is 0 odd?"}]))
    for key, arguments in (("evaluation.likelihood", ["evaluation.tasks=[gsm8k]"]), ("row 1 must end with", [])):
        status, _, err = diablo(*command, *arguments)
        assert status == 2
        assert key in err


def test_what_is_scored_cannot_change_when_a_run_is_resumed(diablo, tiny_model, tmp_path, data):
    # It says which rows are left out of training, and so the batches would not be the same.
    command = [*recipe(tmp_path, tiny_model, data), "training.save_steps=1", "evaluation.limit=1"]
    assert diablo(*command)[0] == 0
    (tmp_path / "run" / "run.json").unlink()
    status, _, err = diablo(*command, "--resume", "evaluation.tasks=[addsub]")
    assert status == 2
    assert "evaluation.tasks: changed" in err
    assert diablo(*command, "--resume", "evaluation.protocol=paper")[0] == 0


def test_own_rows_that_are_tested_on_are_left_out(diablo, tiny_model, tmp_path, data):
    rows = [{"instruction": f"What are {n} and 4?", "output": str(n + 4)} for n in range(4, 9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [arg for arg in recipe(tmp_path, tiny_model, data) if arg not in FAST]
    (tmp_path / "recipe.yaml").write_text(
        (tmp_path / "recipe.yaml").read_text().replace("task: gsm8k\n", "evaluation: {tasks: [addsub]}\n")
    )
    status, out, _ = diablo(*command, f"data.train={tmp_path / 'rows.jsonl'}", "--dry-run")
    assert status == 0
    assert "training rows       3:" in out
    assert "tested rows         2 left out of training" in out
    assert "near copies         3 of 3 test problems have the words of a training row, with other numbers" in out


def test_a_dry_run_says_what_is_scored_and_what_is_left_out(diablo, tiny_model, tmp_path, data):
    more = "evaluation: {tasks: [boolq, gsm8k], protocol: paper}\n"
    status, out, _ = diablo(*recipe(tmp_path, tiny_model, data, more), "--dry-run")
    assert status == 0
    assert "tested rows         1 left out" in out
    assert "boolq (share of right choices), paper protocol, 4 beams" in out
    assert "gsm8k (share of right numbers), paper protocol, greedy" in out


def test_several_tasks_with_several_samples_to_a_file(diablo, tiny_model, tmp_path, data):
    command = ["evaluate", tiny_model, "--task", "addsub,mawps", "--data-folder", data, "--limit", 2, "--examples", 0]
    sampled = [*command, "--samples", 3, "--temperature", 1.5]
    texts = []
    for number, seed in enumerate((0, 0, 1)):
        out_file = tmp_path / f"{number}.jsonl"
        status, out, _ = diablo(*sampled, "--seed", seed, "--out", out_file)
        assert status == 0
        assert "addsub: accuracy" in out
        assert "of 6)" in out
        answers = lines_of(out_file)
        assert [(a["task"], a["number"], a["sample"]) for a in answers] == [
            (task, number, sample) for task in ("addsub", "mawps") for number in (1, 2) for sample in (0, 1, 2)
        ]
        texts.append([answer["text"] for answer in answers])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len(set(texts[0][:3])) > 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task", "gsm9k"], "--task: found 'gsm9k'; allowed: mawps, gsm8k"),
        (["--task", "gsm9k"], "Did you mean gsm8k?"),
        (["--task", "mawps,math10k"], "--task: found 'math10k', which has no test split"),
        ([], "--task: missing; allowed: mawps, gsm8k"),
        (["--task", "gsm8k", "--protocol", "papers"], "--protocol: found 'papers'; allowed: strict, paper."),
        (["--task", "svamp", "--data-folder", "DATA"], "math/SVAMP.test.json"),
        (["--task", "svamp", "--data-folder", "DATA/absent"], "--data-folder: there is no folder"),
        (["--task", "mawps", "--data-folder", "DATA"], "from which mawps reads nothing"),
        (["--task", "svamp"], "--data-folder"),
        (["--task", "gsm8k", "--data-folder", "DATA", "--samples", 2], "2 samples at temperature 0"),
        (["--task", "gsm8k", "--data-folder", "DATA", "--out", "DATA"], "--out: "),
        (["--task", "gsm8k", "--data-folder", "DATA", "--out", "DATA/no/file"], "a folder that exists"),
    ],
)
def test_a_fault_is_one_line_before_a_model_is_looked_for(diablo, data, arguments, expected):
    # The folder has no model.
    status, _, err = diablo("evaluate", data, *[str(a).replace("DATA", str(data)) for a in arguments])
    assert status == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1


def test_code_runs_only_where_it_is_allowed(diablo, tiny_model, tmp_path, data, monkeypatch):
    monkeypatch.setattr(Mawps, "runs_code", True)
    status, _, err = diablo("evaluate", tiny_model, "--task", "mawps")
    assert status == 2
    assert "Task 'mawps' runs code that the model wrote; allow it with --allow-code-execution" in err
    status, _, err = diablo("evaluate", tiny_model, "--task", "mawps", "--limit", 1, "--allow-code-execution")
    assert status == 0
    command = recipe(tmp_path, tiny_model, data, "evaluation: {tasks: [mawps], limit: 1}\n")
    status, _, err = diablo(*command)
    assert status == 2
    assert "evaluation.allow_code_execution: true" in err
    assert diablo(*command, "--dry-run", "evaluation.allow_code_execution=true")[0] == 0


@pytest.mark.parametrize("columns", [80, 200])
def test_the_list_of_tasks_can_be_read_in_a_narrow_terminal(diablo, columns):
    status, out, _ = diablo("tasks", columns=columns)
    assert status == 0
    table, _, hint = out.strip().rpartition("\n")
    assert hint.endswith("diablo tasks NAME")
    assert max(map(len, table.splitlines())) <= columns
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if line[0] == "│"]
    # Each row begins with the name and the sizes, whole; no text is cut off or split into many lines.
    first = {name: (train, test) for name, train, test, _ in rows if name}
    assert list(first) == list(TASKS)
    assert first["gsm8k"] == ("7,473", "1,319")
    assert first["math10k"] == ("9,919", "")
    assert first["safety"] == ("", "any")
    assert "…" not in table
    assert len(rows) == len(TASKS) if columns == 200 else len(rows) <= 3 * len(TASKS)


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_everything_about_itself(diablo, name, columns):
    task = TASKS[name]
    status, out, _ = diablo("tasks", name, columns=columns)
    assert status == 0
    assert max(map(len, out.splitlines())) <= columns
    lines = [line.strip() for line in out.splitlines()]
    words = " ".join(out.split())
    assert task.__doc__.split(".")[0].split("\n")[0].replace("``", "'") in words
    for split in task.splits:
        assert split in words
    if task.source is None:
        assert "in the package" in words
        assert "--data-folder" not in words
    else:
        assert task.source.origin in words
        for path in task.source.paths(task.splits[0] if len(task.splits) == 1 else "{train,test}"):
            assert any(line.endswith(path) for line in lines)
    if "test" in task.splits:
        assert all(task.readings)
        for part in (task.measure, *task.readings, f"diablo evaluate MODEL --task {name}"):
            assert part in words
    else:
        assert "trained on only" in words
    if "train" in task.splits:
        assert f"diablo train recipe.yaml task={name}" in words
    assert ("--allow-code-execution" in words) == task.runs_code


def test_an_unknown_task_is_refused_with_the_closest_name(diablo):
    status, out, err = diablo("tasks", "gsm9k")
    assert (status, out) == (2, "")
    assert err.startswith("error: There is no task 'gsm9k'; allowed: mawps, gsm8k")
    assert err.strip().endswith("Did you mean gsm8k?")


@pytest.fixture(scope="module")
def loaded(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return model, RowEncoder(AutoTokenizer.from_pretrained(tiny_model))


def test_beams_find_a_likelier_text_than_greedy_generation(loaded, data):
    model, encoder = loaded
    task = get_task("boolq", folder=data, protocol="paper")
    assert decoding_for(task) == Decoding(beams=4)
    assert decoding_for(get_task("boolq", folder=data)) == Decoding()
    prompts = [encoder.prompt(problem.row) for problem in task.problems("test")][:1]
    expected = generate(model, encoder, prompts, max_new_tokens=6, num_beams=4)
    greedy = generate(model, encoder, prompts, max_new_tokens=6)
    [answer] = evaluate_task(model, encoder, task, limit=1).answers
    assert [answer.text] == expected
    assert expected != greedy


def test_sampling_leaves_the_random_numbers_of_training_alone(loaded):
    model, encoder = loaded
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    evaluate_task(model, encoder, Mawps(), decoding=Decoding(samples=2, temperature=1.0), limit=2)
    assert torch.equal(torch.rand(4), expected)


def test_a_tasks_own_samples_and_what_overrides_them(monkeypatch):
    monkeypatch.setattr(Mawps, "samples", 10)
    monkeypatch.setattr(Mawps, "temperature", 0.8)
    assert decoding_for(Mawps(), seed=4) == Decoding(10, 0.8, 1, 4)
    assert decoding_for(Mawps(), samples=1, temperature=0) == Decoding(1, 0, 1)
    with pytest.raises(UserError, match="10 samples at temperature 0"):
        decoding_for(Mawps(), temperature=0)
