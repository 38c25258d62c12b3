"""Reading users' files: three forms of rows in three formats, and what is wrong with a row is said with its number."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from diablo.data.faults import name_rows
from diablo.data.reading.files import ENDINGS
from diablo.data.reading.sources import read_rows
from diablo.data.rows import Row
from diablo.errors import UserError

GOOD = {"prompt": "p", "completion": "c"}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def write(folder: Path, records: list[Any], suffix: str) -> Path:
    """A file of records. Its ending says how; a .txt has the text of the first alone."""
    path = folder / f"rows{suffix}"
    kind = suffix.removesuffix(".gz").removesuffix(".zst")
    if kind == ".jsonl":
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
    elif kind == ".json":
        content = json.dumps(records).encode()
    elif kind == ".txt":
        content = records[0]["text"].encode()
    elif kind in (".csv", ".tsv"):
        lines = io.StringIO(newline="")
        table = csv.DictWriter(lines, list(records[0]), delimiter="," if kind == ".csv" else "\t")
        table.writeheader()
        table.writerows(records)
        content = lines.getvalue().encode()
    else:
        content = as_table(pyarrow.Table.from_pylist(records), kind)
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    elif suffix.endswith(".zst"):
        content = packed(content)
    path.write_bytes(content)
    return path


def as_table(table: pyarrow.Table, kind: str) -> bytes:
    content = io.BytesIO()
    if kind == ".parquet":
        parquet.write_table(table, content)
    else:
        with pyarrow.ipc.new_file(content, table.schema) as file:
            file.write_table(table)
    return content.getvalue()


def packed(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


TABLES = [ending for ending in ENDINGS if not ending.startswith(".txt")]
NESTED = [ending for ending in TABLES if not ending.startswith((".csv", ".tsv"))]
# Lines of these count from the header.
BEGIN = {ending: 2 if ending.startswith((".csv", ".tsv")) else 1 for ending in ENDINGS}


@pytest.mark.parametrize("suffix", TABLES)
def test_prompt_and_completion(tmp_path: Path, suffix: str) -> None:
    records = [{"prompt": "a", "completion": "b", "id": 3}, {"prompt": "", "completion": ' ü,\t"\n', "id": 4}]
    path = write(tmp_path, records, suffix)
    first = BEGIN[suffix]
    # An empty prompt is a legitimate row: text to go on from nothing.
    assert read_rows(path) == ([Row(first, "a", "b"), Row(first + 1, "", ' ü,\t"\n')], [])


@pytest.mark.parametrize("suffix", ENDINGS)
def test_documents(tmp_path: Path, suffix: str) -> None:
    text = "One paragraph.\n\nAnother, ü."
    assert read_rows(write(tmp_path, [{"text": text}], suffix)) == ([Row(BEGIN[suffix], text=text)], [])


@pytest.mark.parametrize("suffix", NESTED)
def test_messages(tmp_path: Path, suffix: str) -> None:
    rows, faults = read_rows(write(tmp_path, [{"messages": TURNS}], suffix))
    assert (rows, faults) == ([Row(1, messages=tuple(TURNS))], [])
    assert rows[0].as_messages() == tuple(TURNS)


@pytest.mark.parametrize("suffix", TABLES)
def test_instruction_with_and_without_input(tmp_path: Path, suffix: str) -> None:
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "la"},
        {"instruction": "Sing.", "input": None, "output": "la"},
    ]
    rows, _ = read_rows(write(tmp_path, records, suffix))
    assert rows[0].prompt == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert rows[1].prompt == rows[2].prompt == "### Instruction:\nSing.\n\n### Response:\n"
    assert [row.completion for row in rows] == ["3", "la", "la"]
    # As a conversation, the user says the instruction, not the headings that stand in for a template.
    assert rows[0].as_messages()[0] == {"role": "user", "content": "Add.\n\n1 2"}
    assert rows[1].as_messages() == ({"role": "user", "content": "Sing."}, {"role": "assistant", "content": "la"})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{bad", "not valid JSON; write one JSON object a line"),
        ("3", "a number, not an object; give an object with prompt and completion, messages"),
        ("null", "null, not an object"),
        ("{}", "has no keys; needs prompt and completion"),
        ('{"words": "x"}', "has words; needs prompt and completion, messages, conversations, instruction and output"),
        ('{"text": " "}', "text is empty; give the text"),
        ('{"text": 3}', "text is a number, not text; put it in quotes, or name the column in data.columns"),
        ('{"prompt": "x"}', "completion is missing, not text"),
        ('{"completion": "x"}', "prompt is missing, not text"),
        ('{"prompt": "x", "completion": null}', "completion is null, not text; give it"),
        ('{"prompt": 3, "completion": "x"}', "prompt is a number, not text; put it in quotes"),
        ('{"prompt": "x", "completion": ""}', "completion is empty"),
        ('{"prompt": "x", "completion": " \\n"}', "completion is empty"),
        ('{"instruction": "x"}', "output is missing, not text"),
        ('{"instruction": "x", "output": ["y"]}', "output is a list, not text; give one text"),
        ('{"instruction": "x", "output": "y", "input": 3}', "input is a number, not text"),
        ('{"messages": []}', "messages is not a list of turns"),
        ('{"messages": null}', "messages is not a list of turns"),
        ('{"messages": "hi"}', "messages is not a list of turns"),
        ('{"messages": ["hi"]}', "a turn has no content that is text"),
        ('{"messages": [{"role": "user", "content": null}]}', "a turn has no content that is text"),
        (
            '{"messages": [{"role": "bot", "content": "x"}]}',
            "a turn has the role 'bot'; allowed: system, user, assistant, tool",
        ),
        ('{"messages": [{"role": [], "content": "x"}]}', "a turn has the role []"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "does not end with an assistant's turn"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "an assistant's turn is empty"),
        (
            json.dumps({"messages": [TURNS[0], {"role": "assistant", "content": ""}, *TURNS]}),
            "an assistant's turn is empty; give the text that is to be trained on",
        ),
        (
            json.dumps({"messages": TURNS[::-1] + TURNS}),
            "begins with the assistant's turn; put a turn of the user before it",
        ),
        # Half of a surrogate pair is valid JSON, but no text: tokenizers cannot take it.
        ('{"prompt": "\\ud800", "completion": "x"}', "prompt is not valid Unicode"),
        ('{"prompt": "x", "completion": "\\ud800"}', "completion is not valid Unicode"),
        ('{"instruction": "x", "output": "x", "input": "\\ud800"}', "input is not valid Unicode"),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "a turn is not valid Unicode"),
    ],
)
def test_malformed_row_is_refused_by_number_or_skipped(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n{json.dumps(GOOD)}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_rows(path)
    # The blank line counts: the number is that of the line in an editor.
    assert f"1 malformed of 3 rows. Row 3: {reason}" in str(caught.value)
    rows, faults = read_rows(path, on_malformed="skip")
    assert [row.number for row in rows] == [1, 4]
    assert [fault.number for fault in faults] == [3]
    assert f"{faults[0].reason}; {faults[0].mend}".startswith(reason)


@pytest.mark.parametrize("header", ["prompt;completion", '"prompt";"completion"'])
def test_semicolons_separate_where_the_first_line_has_no_comma(tmp_path: Path, header: str) -> None:
    (tmp_path / "rows.csv").write_text(f'{header}\n"1,5; 2";3\n4,5;"6"\n')
    rows, faults = read_rows(tmp_path / "rows.csv")
    assert [(row.number, row.prompt, row.completion) for row in rows] == [(2, "1,5; 2", "3"), (3, "4,5", "6")]
    assert faults == []


def test_a_reason_is_said_once_with_its_rows_and_how_to_mend_it(tmp_path: Path) -> None:
    numbers = [{"prompt": "x", "completion": number} for number in (1, 2.5, 1e300)]
    path = write(tmp_path, [*numbers[:2], GOOD, 3, *numbers * 5, {"prompt": "x", "completion": ""}], ".jsonl")
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert str(caught.value) == (
        f"{path} has 19 malformed of 20 rows. Rows 1, 2, 5 and 14 more: completion is a number, not text; put it in "
        "quotes, or name the column in data.columns. Row 4: a number, not an object; give an object with prompt and "
        "completion, messages, conversations, instruction and output, or text. Row 20: completion is empty; give the "
        "text that is to be trained on. Mend them, or set data.on_malformed=skip to leave them out."
    )


def test_only_the_first_reasons_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD, *[{f"key {number}": "x"} for number in range(7)]], ".jsonl")
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert "7 malformed of 8 rows" in str(caught.value)
    assert "Row 6: has key 4" in str(caught.value)
    assert "Row 7:" not in str(caught.value)
    assert " Further reasons, not listed: 2. " in str(caught.value)


@pytest.mark.parametrize(
    ("count", "name"),
    [(1, "row 1"), (2, "rows 1 and 2"), (4, "rows 1, 2, 3 and 4"), (5, "rows 1, 2, 3 and 2 more")],
)
def test_rows_are_named_by_number(count: int, name: str) -> None:
    assert name_rows(range(1, count + 1)) == name


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_rows_of_other_formats_count_from_one(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, [GOOD, {"prompt": "p", "completion": ""}], suffix)
    with pytest.raises(UserError, match="Row 2: completion is empty"):
        read_rows(path)


def test_null_in_a_parquet_column(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD, {"prompt": "p", "completion": None}], ".parquet")
    with pytest.raises(UserError, match="Row 2: completion is null, not text"):
        read_rows(path)


def test_a_value_of_parquet_that_python_cannot_hold_names_its_column(tmp_path: Path) -> None:
    columns = {"prompt": ["p"], "completion": ["c"], "when": pyarrow.array([2**31 - 1], pyarrow.date32())}
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(UserError, match=r"rows\.parquet: the column 'when' has a value that cannot be read"):
        read_rows(path)


def test_nothing_usable_is_an_error_also_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "x"}], ".jsonl")
    with pytest.raises(UserError, match=r"no usable row \(of 1\)"):
        read_rows(path, on_malformed="skip")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", r"no usable row \(of 0\)"),
        ("a.jsonl", b"\n \n", r"no usable row \(of 0\)"),
        ("a.json", b"", "not valid JSON"),
        ("a.json", b"[]", r"no usable row \(of 0\)"),
        ("a.json", b'{"prompt": "p", "completion": "c"}', "must hold a JSON list of rows, or an object .*; found dict"),
        ("a.json", b'{"prompt": "p"}\n{"prompt": "q"}', r"One object a line makes a \.jsonl file"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.parquet", b"", "not a Parquet file"),
        ("a.parquet", b"PAR1 and junk", "not a Parquet file"),
        ("a.jsonl", b"\x80\x81\xff", r"not a text file in UTF-8 \(byte 0"),
        ("a.json", b"[\xff]", r"not a text file in UTF-8 \(byte 1"),
        ("a.json", b'{"data": {}}', "must hold a JSON list of rows, or an object .*; found dict"),
        ("a.arrow", b"", "not an Arrow file"),
        ("a.arrow", b"ARROW1 and junk", "not an Arrow file"),
        ("a.csv", b"", r"no usable row \(of 0\)"),
        ("a.csv", b"prompt,completion", r"no usable row \(of 0\)"),
        ("a.csv", b"prompt,prompt\na,b", "names the column 'prompt' twice"),
        ("a.csv", b'prompt,completion\na,b\nc,"d" e', r"no table that can be read \(line 3: "),
        ("a.csv", b'prompt,completion\na,"b', r"no table that can be read \(line 2: "),
        ("a.csv", "prompt,completion\nü,b".encode("latin-1"), r"not a text file in UTF-8 \(byte 18"),
        ("a.txt", b" \n", r"no usable row|text is empty"),
        ("a.jsonl.zst", b"junk", r"cannot be read: .*ZSTD"),
        ("a.xlsx", b"", r"allowed: \.jsonl, \.json, \.csv"),
        ("rows", b"{}", r"allowed: \.jsonl, \.json, \.csv"),
    ],
)
def test_file_that_is_no_dataset(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_rows(path)
    assert name in str(caught.value)


@pytest.mark.parametrize("suffix", ENDINGS)
def test_folder_and_absent_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UserError, match="there is no file"):
        read_rows(tmp_path / f"absent{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(UserError, match="has no dataset file"):
        read_rows(tmp_path / f"folder{suffix}")


def test_byte_order_mark_as_windows_editors_write_it(tmp_path: Path) -> None:
    for suffix, text in (
        (".jsonl", json.dumps(GOOD)),
        (".json", json.dumps([GOOD])),
        (".csv", "prompt,completion\np,c"),
    ):
        path = tmp_path / f"bom{suffix}"
        path.write_text(text, encoding="utf-8-sig")
        assert read_rows(path)[0] == [Row(BEGIN[suffix], "p", "c")]


KEYS = ["prompt", "completion", "messages", "role", "content", "instruction", "input", "output", "text", "data"]
KEYS += ["conversations", "from", "value", "tools", "tool_calls", "name", "arguments", "train", "weight", "type"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
contents = st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode())


@given(contents, st.sampled_from(ENDINGS), st.sampled_from(["error", "skip"]))
@settings(max_examples=200, deadline=None)
def test_no_content_raises_anything_but_a_user_error(content: bytes, suffix: str, on_malformed: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        try:
            rows, _ = read_rows(path, on_malformed=on_malformed)
        except UserError:
            return
    assert rows
    for row in rows:
        assert (row.text + "".join(message["content"] for message in row.as_messages())).encode() or row.messages
        json.dumps([row.messages, row.tools], ensure_ascii=False).encode()


def test_offsets_of_a_damaged_arrow_file_are_not_believed(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD] * 3, ".arrow")
    content = path.read_bytes()
    # The offsets of the three texts: each ends one character further on.
    offsets = b"".join(number.to_bytes(4, "little") for number in range(4))
    assert offsets in content
    path.write_bytes(content.replace(offsets, offsets[:12] + b"\xff\xff\xff\x7f"))
    with pytest.raises(UserError, match="not an Arrow file that can be read"):
        read_rows(path)


@given(
    st.integers(0, 10_000),
    st.binary(min_size=1, max_size=8),
    st.sampled_from([".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst"]),
)
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_raises_only_a_user_error(position: int, junk: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), [GOOD] * 3, suffix)
        content = path.read_bytes()
        at = position % len(content)
        path.write_bytes(content[:at] + junk + content[at + len(junk) :])
        try:
            rows, _ = read_rows(path, on_malformed="skip")
        except UserError:
            return
        assert rows
