"""Files of datasets to records, by the endings of their names, with the libraries that others read them with."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from diablo.data.faults import RowFault
from diablo.errors import UserError, first_line

Records = Iterator[tuple[int, Any]]

# What says something about a folder's datasets and is none.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_TESTS = ("test", "validation", "valid", "val", "dev", "eval")


def read_records_of(path: Path) -> list[tuple[int, Any]]:
    """The records of a dataset file as they stand there, each with its number from 1.

    The number is the line of a .jsonl, .csv or .tsv, and the position in others. A line that is no record is given as a
    :class:`RowFault`.

    Raises:
        UserError: the file cannot be read.
    """
    reader = _reader_of(path)
    try:
        with _opened(path) as file:
            return list(reader(path, file))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 (byte {error.start} cannot be read).") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or first_line(error)}.") from None


def files_of(path: Path) -> list[Path]:
    """The dataset files that a path of the user's stands for: itself, or those of a folder in the order of their names.

    Raises:
        UserError: there are none, or the folder seems to have rows to test on among them.
    """
    if not path.exists():
        raise UserError(f"there is no file {str(path)!r}; paths count from the current folder.")
    if not path.is_dir():
        _reader_of(path)
        return [path]
    found = sorted(
        file
        for file in path.iterdir()
        if file.is_file() and ending_of(file) and not file.name.startswith(".") and file.name not in _ABOUT
    )
    if not found:
        raise UserError(f"the folder {str(path)!r} has no dataset file itself; allowed: {', '.join(ENDINGS)}.")
    splits = [file.name for file in found if _first_word(file) in ("train", *_TESTS)]
    if any(_first_word(Path(name)) == "train" for name in splits) and any(
        _first_word(Path(name)) in _TESTS for name in splits
    ):
        raise UserError(
            f"the folder {str(path)!r} has several splits ({', '.join(splits[:4])}); name the files that are meant."
        )
    return found


def ending_of(path: Path) -> str | None:
    """The ending by which a file is read; None where it is no dataset."""
    return next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)


def _first_word(path: Path) -> str:
    return path.name.lower().partition(".")[0].partition("-")[0].partition("_")[0]


def _reader_of(path: Path) -> Callable[[Path, IO[bytes]], Records]:
    ending = ending_of(path)
    if ending is None:
        raise UserError(f"{path} is not a dataset that diablo reads; allowed: {', '.join(ENDINGS)}.")
    return _READERS[ending.removesuffix(".gz").removesuffix(".zst")]


@contextmanager
def _opened(path: Path) -> Generator[IO[bytes]]:
    """The bytes of a file, decompressed."""
    if path.name.lower().endswith(".zst"):
        import pyarrow

        with path.open("rb") as packed, pyarrow.input_stream(packed, compression="zstd") as stream:
            yield io.BytesIO(stream.read())
    elif path.name.lower().endswith(".gz"):
        with gzip.open(path) as unpacked:
            yield io.BufferedReader(unpacked)
    else:
        with path.open("rb") as file:
            yield file


def _lines(file: IO[bytes], newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def _read_jsonl(path: Path, file: IO[bytes]) -> Records:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield number, _parse_json(number, line)


def _parse_json(number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return RowFault(number, "not valid JSON", "write one JSON object a line")


def _read_json(path: Path, file: IO[bytes]) -> Records:
    text = _lines(file).read()
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. One object a line makes a .jsonl file.") from None
    if isinstance(records, dict) and isinstance(records.get("data"), list):
        records = records["data"]
    if not isinstance(records, list):
        raise UserError(
            f'{path} must hold a JSON list of rows, or an object that has one as "data"; found '
            f"{type(records).__name__}."
        )
    yield from enumerate(records, start=1)


def _read_csv(path: Path, file: IO[bytes]) -> Records:
    return _read_table(path, file, ",")


def _read_tsv(path: Path, file: IO[bytes]) -> Records:
    return _read_table(path, file, "\t")


def _read_table(path: Path, file: IO[bytes], delimiter: str) -> Records:
    before = csv.field_size_limit(sys.maxsize)  # its own limit is shorter than many documents
    try:
        lines = iter(_lines(file, newline=""))
        first = next(lines, "")
        # Where a comma is the decimal mark, spreadsheets write .csv with semicolons.
        delimiter = ";" if delimiter == "," and "," not in first and ";" in first else delimiter
        rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        header = next(rows, [])
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise UserError(f"{path} names the column {twice[0]!r} twice in its first line; name each once.")
        number = rows.line_num + 1
        for values in rows:
            if values and len(values) != len(header):
                yield (
                    number,
                    RowFault(
                        number,
                        f"has {len(values)} values where the first line names {len(header)} columns",
                        "quote a value that has the separator, a quote or a line break in it",
                    ),
                )
            elif values:
                yield number, dict(zip(header, values, strict=True))
            number = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} is no table that can be read (line {rows.line_num}: {first_line(error)}).") from None
    finally:
        csv.field_size_limit(before)


def _read_text(path: Path, file: IO[bytes]) -> Records:
    yield 1, {"text": _lines(file).read()}


def _read_parquet(path: Path, file: IO[bytes]) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        return _records_of_table(path, parquet.read_table(file))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {first_line(error)}") from None


def _read_arrow(path: Path, file: IO[bytes]) -> Records:
    import pyarrow

    content = file.read()
    is_file = content.startswith(b"ARROW1")
    try:
        # A stream is what the library datasets saves.
        with pyarrow.ipc.open_file(content) if is_file else pyarrow.ipc.open_stream(content) as reader:
            table = reader.read_all()
        # What a damaged file has for lengths and offsets would be believed otherwise, and end the process.
        table.validate(full=True)
        return _records_of_table(path, table)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not an Arrow file that can be read: {first_line(error)}") from None


def _records_of_table(path: Path, table: Any) -> Records:
    columns = [_column_of(path, name, values) for name, values in zip(table.column_names, table.columns, strict=True)]
    names = table.column_names
    return enumerate((dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)), start=1)


def _column_of(path: Path, name: str, values: Any) -> list[Any]:
    try:
        return [without_nulls(value) for value in values.to_pylist()]
    # What pyarrow raises for what Python has no value for, such as a date in the year 5 million.
    except (ValueError, OverflowError, LookupError, NotImplementedError) as error:
        raise UserError(
            f"{path}: the column {name!r} has a value that cannot be read ({first_line(error)}); mend it, or leave the "
            "column out."
        ) from None


def without_nulls(value: Any) -> Any:
    """A value of a table without the keys that are null in it: a table has every key in every object of a column."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path, IO[bytes]], Records]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
ENDINGS = tuple(f"{ending}{packed}" for packed in ("", ".gz", ".zst") for ending in _READERS)
"""The endings of files that are read, those of compressed files last."""
