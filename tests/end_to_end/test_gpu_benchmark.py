"""The benchmark of GPUs, rehearsed on a CPU with tiny sizes: every part gives rows, and none fails."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path

import pytest
from launching import run_python

from benchmarks import tables
from benchmarks.gpu.sizes import PARTS


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "benchmarks.gpu", "--device", "cpu", "--tiny", *arguments)


def test_every_part_gives_rows_and_none_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    done = run("--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name == "gpu-tiny-cpu.json"
    record = json.loads(path.read_text())
    assert [part["part"] for part in record["results"]] == list(PARTS)
    for part in record["results"]:
        assert part["status"] == "done", part
        measured = [row for row in part["rows"] if "seconds" in row]
        assert measured, part["part"]
        assert not [row for row in part["rows"] if "error" in row or "left_out" in row]
        # What has no figures says why.
        assert all("note" in row for row in part["rows"] if row not in measured and row.get("what") != "copy")
        assert f"### {part['part']}: done" in done.stdout
    steps = [
        row for part in record["results"] if part["part"] in ("steps", "compiled", "others") for row in part["rows"]
    ]
    assert all(row["repeats_to_the_bit"] for row in steps if "seconds" in row and row["method"] != "frozen")
    assert all(row["graphs"] == 1 and row["graph_breaks"] == 0 for row in steps if "graphs" in row)
    assert {row["mode"] for row in steps if "seconds" in row} == {"eager", "compiled"}

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables.main()
    assert capsys.readouterr().out.count("| DiaBlo in place |") >= 6


def test_what_comes_after_the_time_limit_is_left_out_and_no_failure(tmp_path: Path):
    path = tmp_path / "gpu.json"
    done = run("--out", path, "--parts", "switching,memory", "--minutes", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())["results"]
    assert [part["status"] for part in results] == ["left out in part"] * 2
    assert [part["part"] for part in results] == ["memory", "switching"]
    assert all("left_out" in row for part in results for row in part["rows"])


def test_a_process_that_dies_loses_the_row_it_was_at_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = importlib.import_module("benchmarks.gpu.__main__")
    path = tmp_path / "rows.jsonl"
    asked = []

    def die_at_the_second_row(task: dict, environment: dict[str, str]) -> int:
        asked.append((task["done"], environment))
        rows = [{"method": "frozen"}, {"method": "DiaBlo in place"}, {"method": "LoRA"}]
        todo = [keys for keys in rows if command.row_name("layers", keys) not in task["done"]]
        with path.open("a") as file:
            file.write(json.dumps({"event": "device", "device": {}}) + "\n")
            for keys in todo:
                file.write(json.dumps({"part": "layers", "event": "start", "keys": keys}) + "\n")
                if keys["method"] == "DiaBlo in place":
                    file.write('{"part": "lay')
                    file.write("\n")
                    return -11
                file.write(json.dumps({"part": "layers", "event": "row", "keys": keys, "seconds": 1.0}) + "\n")
            file.write(json.dumps({"part": "layers", "event": "part"}) + "\n")
        return 0

    monkeypatch.setattr(command, "run_worker", die_at_the_second_row)
    lines = command.measure(["layers"], "cpu", True, 0.0, path)
    rows = command.rows_of(lines, "layers")
    assert rows == [
        {"method": "frozen", "seconds": 1.0},
        {"method": "DiaBlo in place", "error": "the process ended with -11"},
        {"method": "LoRA", "seconds": 1.0},
    ]
    assert command.status_of(rows, {"event": "part"}) == "failed"
    assert command.status_of([{"method": "DoRA", "error": "out of memory"}], {"event": "part"}) == "done"
    assert [len(done) for done, _ in asked] == [0, 2]
    assert asked[1][1]["TEARDOWN_CUPTI"] == "0"


def test_a_process_that_cannot_begin_is_not_started_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = importlib.import_module("benchmarks.gpu.__main__")
    monkeypatch.setattr(command, "run_worker", lambda task, environment: 1)
    lines = command.measure(["layers", "steps"], "cpu", True, 0.0, tmp_path / "rows.jsonl")
    assert [(line["part"], line["error"]) for line in lines] == [
        ("layers", "the process ended with 1"),
        ("steps", "the process ended with 1"),
    ]
