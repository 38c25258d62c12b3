"""Coverage-guided fuzzing of what reads files of others: recipes, datasets, adapters, checkpoints of the authors.

    make fuzz                                           # a minute each
    python tests/fuzz/readers.py dataset CORPUS/ -max_total_time=600

Each corpus starts with files that are right. A reader may refuse a file with a :class:`UserError`; any other exception,
a file that appears, or a hang is a finding. Arguments after the reader's name are those of libFuzzer.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import atheris
import pyarrow
import torch
from pyarrow import parquet
from safetensors.torch import save

with atheris.instrument_imports(include=["diablo"]):
    from diablo import DiabloConfig
    from diablo.data.reading.files import ENDINGS
    from diablo.data.reading.sources import read_rows
    from diablo.errors import UserError
    from diablo.models.adapters import check_tensors, read_adapter_config
    from diablo.models.authors import import_checkpoint
    from diablo.recipes.reading import load_recipe

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import make_tiny_model

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def recipe(folder: Path, content: bytes) -> None:
    """A recipe."""
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    load_recipe(path)


def dataset(folder: Path, content: bytes) -> None:
    """A dataset of any format, which the first byte chooses."""
    path = folder / f"rows{ENDINGS[content[0] % len(ENDINGS)]}"
    path.write_bytes(content[1:])
    read_rows(path)


def adapter(folder: Path, content: bytes) -> None:
    """The settings or the tensors of an adapter, as the first byte says."""
    (folder / ADAPTER_FILES[content[0] % 2]).write_bytes(content[1:])
    if content[0] % 2:
        check_tensors(folder, "default", {"base_model.model.q_proj.diablo_blocks.default": (4, 8, 8)})
    else:
        read_adapter_config(folder)


def authors(folder: Path, content: bytes) -> None:
    """A checkpoint of the authors' scripts."""
    path = folder / "adapter.chkpt"
    path.write_bytes(content)
    import_checkpoint(path, folder / "adapter", base=str(BASE))


READERS: dict[str, Callable[[Path, bytes], None]] = {
    reader.__name__: reader for reader in (recipe, dataset, adapter, authors)
}


def seeds() -> dict[str, list[bytes]]:
    """Files that are read without an error, for each reader."""
    rows = [
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 1}]},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "tools": "[{}]"},
        {"text": "x"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    columns = pyarrow.table({"prompt": ["a"], "completion": ["b"]})
    table, arrow = io.BytesIO(), io.BytesIO()
    parquet.write_table(columns, table)
    with pyarrow.ipc.new_stream(arrow, columns.schema) as stream:
        stream.write_table(columns)
    formats = {
        ".jsonl": lines,
        ".json": json.dumps({"data": rows}).encode(),
        ".csv": b'prompt,completion\na,"b, c"\n',
        ".tsv": b"prompt\tcompletion\na\tb\n",
        ".parquet": table.getvalue(),
        ".arrow": arrow.getvalue(),
        ".txt": b"text",
        ".jsonl.gz": gzip.compress(lines),
        ".jsonl.zst": pyarrow.compress(lines, codec="zstd", asbytes=True),
    }
    settings = DiabloConfig(num_blocks=4, target_modules=["q_proj"]).to_dict() | {"target_modules": ["q_proj"]}
    checkpoint = io.BytesIO()
    torch.save({"model.layers.0.self_attn.q_proj.block_A": torch.zeros(4, 8, 8)}, checkpoint)
    return {
        "recipe": [
            path.read_bytes() for path in files("diablo").joinpath("recipes").iterdir() if path.name.endswith(".yaml")
        ],
        "dataset": [bytes([ENDINGS.index(ending)]) + content for ending, content in formats.items()],
        "adapter": [
            b"\0" + json.dumps(settings).encode(),
            b"\1" + save({"base_model.model.q_proj.diablo_blocks.default": torch.zeros(4, 8, 8)}),
        ],
        "authors": [checkpoint.getvalue()],
    }


def test_one_input(content: bytes) -> None:
    """Read a file in an empty folder, and see that nothing has come of it."""
    if not content:
        return
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        folder = Path(scratch)
        with contextlib.suppress(UserError):
            READER(folder, content)
            return
        left = {path.name for path in folder.iterdir()}
        assert len(left) == 1, f"a file that was refused has left {left}"


if __name__ == "__main__":
    READER = READERS[sys.argv.pop(1)]
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()[READER.__name__]):
        (corpus / f"seed-{number}").write_bytes(seed)
    if READER is authors:
        BASE = make_tiny_model(Path(tempfile.mkdtemp()) / "model")
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
