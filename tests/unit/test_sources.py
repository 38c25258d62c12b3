"""Sources of rows: files, folders, datasets as the library of that name reads them, mixtures and documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoTokenizer

from diablo.data.documents import encode_document
from diablo.data.encoding import IGNORED
from diablo.data.faults import Place, name_places
from diablo.data.reading.hub import HubDataset
from diablo.data.reading.sources import Source, read_rows, read_sources
from diablo.data.rows import Row
from diablo.data.special_text import TextTokenizer
from diablo.data.splits import cut_validation, take_turns
from diablo.errors import UserError


def rows_of(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name}{number}", "completion": "c"} for number in range(1, count + 1)]


def write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# Files


def test_rows_of_a_csv_are_told_by_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"two\nlines",a\nb\n\nc,d,e\nf,\n', encoding="utf-8")
    rows, faults = read_rows(path, on_malformed="skip")
    assert rows == [Row(2, "two\nlines", "a")]
    assert [(fault.number, fault.reason) for fault in faults] == [
        (4, "has 1 values where the first line names 2 columns"),
        (6, "has 3 values where the first line names 2 columns"),
        (7, "completion is empty"),
    ]


def test_a_csv_takes_a_long_document(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"text\n{'x' * 200_000}\n", encoding="utf-8")
    assert len(read_rows(path)[0][0].text) == 200_000


def test_nulls_that_a_table_puts_into_turns_are_left_out(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"b": 2}}}
    turns = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x", "tool_calls": [each]}]
        for each in (call, other)
    ]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": each} for each in turns]), tmp_path / "a.parquet")
    rows, _ = read_rows(tmp_path / "a.parquet")
    assert [list(row.messages) for row in rows] == turns


def test_what_the_library_datasets_saved_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(rows_of("a", 2)).save_to_disk(tmp_path / "saved")
    assert [row.prompt for row in read_rows(tmp_path / "saved")[0]] == ["a1", "a2"]


# Folders and several sources


def test_a_folder_is_its_files_in_order_and_names_them(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", rows_of("b", 1))
    write(tmp_path / "a.jsonl", [*rows_of("a", 1), 3])
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / ".hidden.jsonl").write_text("no rows")
    [found] = read_sources([Source(tmp_path)], on_malformed="skip")
    assert [(row.source, row.prompt) for row in found.rows] == [("a.jsonl", "a1"), ("b.jsonl", "b1")]
    assert name_places(found.faults) == "a.jsonl: row 2"
    assert found.describe() == f"{tmp_path}: prompt/completion, 2 rows"


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("train-0.jsonl", "train-1.jsonl", "dev.csv")])
def test_a_folder_of_several_splits_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path / name, rows_of("a", 1))
    with pytest.raises(UserError, match=rf"has several splits \(.*{names[0]}.*name the files that are meant"):
        read_rows(tmp_path)


def test_each_file_with_faults_has_its_line(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [*rows_of("a", 1), 3])
    other = write(tmp_path / "b.jsonl", [{"prompt": "x"}])
    with pytest.raises(UserError) as caught:
        read_sources([Source(one), Source(other)])
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{one} has 1 malformed of 2 rows. Row 2: a number, not an object; ")
    assert second.startswith(f"{other} has 1 malformed of 1 rows. Row 1: completion is missing")


def test_files_of_one_name_are_told_by_their_folders(tmp_path: Path) -> None:
    paths = [write(tmp_path / folder / "rows.jsonl", rows_of("a", 1)) for folder in ("x", "y")]
    found = read_sources([Source(path) for path in paths])
    assert [each.rows[0].source for each in found] == [str(path) for path in paths]


def test_a_limit_takes_the_first_rows_over_files_and_reads_no_further(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows_of("a", 2))
    write(tmp_path / "b.jsonl", [*rows_of("b", 1), 3])
    [found] = read_sources([Source(tmp_path, limit=3)])
    assert [row.prompt for row in found.rows] == ["a1", "a2", "b1"]


def test_places_are_grouped_by_file() -> None:
    places = [Place(3, "b.csv"), Place(1, "a.jsonl"), Place(7, "b.csv")]
    assert name_places(places) == "b.csv: rows 3 and 7; a.jsonl: row 1"
    assert name_places([Place(3), Place(4)]) == "rows 3 and 4"


# The hub


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_as_the_library_reads_it(tmp_path: Path, monkeypatch: Any, streaming: bool) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "set" / "train.jsonl", [*rows_of("a", 3), {"prompt": None, "completion": "c"}])
    place = HubDataset(str(tmp_path / "set"), "train", streaming=streaming)
    [found] = read_sources([Source(place, limit=2)])
    assert [row.prompt for row in found.rows] == ["a1", "a2"]
    assert found.record() == {
        "hub": str(tmp_path / "set"),
        "name": None,
        "split": "train",
        "revision": None,
        "format": {"prompt/completion": 2},
        "rows": 2,
        "weight": 1.0,
    }
    with pytest.raises(UserError, match=r"1 malformed of 4 rows\. Row 4: prompt is null, not text"):
        read_sources([Source(place)])
    with pytest.raises(UserError, match=r"cannot be read .*mend hub, name, split or revision"):
        read_sources([Source(HubDataset(str(tmp_path / "set"), "dev", streaming=streaming))])


def test_a_hub_that_does_not_answer(monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"The hub did not answer .* dataset 'some/data' .* give files in its place"):
        read_sources([Source(HubDataset("some/data", "train"))])


# Mixtures


def test_weights_are_rows_a_turn_and_times_an_epoch() -> None:
    sources = [[Row(n, prompt=letter) for n in range(count)] for letter, count in (("a", 4), ("b", 2), ("c", 4))]
    mixed = take_turns(sources, [1, 2, 0.5])
    assert [sum(row.prompt == letter for row in mixed) for letter in "abc"] == [4, 4, 2]
    assert "".join(row.prompt for row in mixed) == "babbabcaac"
    assert [row.number for row in mixed if row.prompt == "b"] == [0, 1, 0, 1]
    assert [row.number for row in mixed if row.prompt == "c"] == [0, 1]


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0])), min_size=1, max_size=4))
def test_the_first_rows_are_as_the_weights_say(kinds: list[tuple[int, float]]) -> None:
    sources = [[Row(number, str(index)) for number in range(count)] for index, (count, _) in enumerate(kinds)]
    mixed = take_turns(sources, [weight for _, weight in kinds])
    for length in range(len(mixed)):
        taken = [sum(row.prompt == str(index) for row in mixed[:length]) for index in range(len(kinds))]
        ended = [number == sum(row.prompt == str(index) for row in mixed) for index, number in enumerate(taken)]
        turns = [number / weight for number, (_, weight), end in zip(taken, kinds, ended, strict=True) if not end]
        # Nobody is a whole row ahead of another.
        if turns:
            lightest = min(weight for (_, weight), end in zip(kinds, ended, strict=True) if not end)
            assert max(turns) - min(turns) <= 1 / lightest + 1e-9


def test_a_row_that_is_taken_twice_is_on_one_side_of_the_cut() -> None:
    rows = take_turns([[Row(number, str(number), "c") for number in range(10)]], [2])
    train, held_out = cut_validation(rows, 3, 0)
    assert len(held_out) == 3
    assert len(train) == 14
    assert not {row.number for row in train} & {row.number for row in held_out}


def test_rows_without_a_prompt_are_cut_by_what_they_say() -> None:
    for rows in ([Row(n, text=f"text {n}") for n in range(9)], [Row(n, completion=f"c {n}") for n in range(9)]):
        train, held_out = cut_validation(rows, 2, 0)
        assert (len(train), len(held_out)) == (7, 2)


# Documents


@pytest.mark.parametrize("max_length", [2, 5, 7, 1000])
def test_every_token_of_a_document_but_the_first_carries_loss_once(tiny_model: Path, max_length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "The quick brown fox.\n\nThe dog sleeps on."
    pieces = encode_document(Row(4, text=text, source="a.txt"), TextTokenizer(tokenizer), max_length)
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    predicted = [label for piece in pieces for label in piece.labels[1:]]
    assert predicted == whole[1:]
    assert pieces[0].input_ids[0] == whole[0]
    assert all(len(piece.input_ids) <= max_length and IGNORED not in piece.labels for piece in pieces)
    assert {(piece.number, piece.source) for piece in pieces} == {(4, "a.txt")}


def test_special_text_of_a_document(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    row = Row(1, text="a</s>b")
    [kept] = encode_document(row, TextTokenizer(tokenizer), 100)
    [plain] = encode_document(row, TextTokenizer(tokenizer, "plain"), 100)
    assert kept.input_ids.count(tokenizer.eos_token_id) == 2
    assert plain.input_ids.count(tokenizer.eos_token_id) == 1
    assert kept.special_text == plain.special_text == ("</s>",)
