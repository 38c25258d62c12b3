"""How much quality do 4, 3 and 2 bits cost: by rounding, by GPTQ, and by MagR before GPTQ?

    python -m benchmarks.quantization --data-folder DATA

The model is calibrated on a task's training rows. It is measured on the task's test rows and on general text. No text
is used for both.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.tables import print_perplexities
from diablo.data import RowEncoder
from diablo.data.encoding import EncodedRow
from diablo.data.general_text import BUILTIN_TEXT, encode_general_text
from diablo.devices import choose_device, choose_dtype
from diablo.models.loading import load_model, load_tokenizer, resolve_model
from diablo.quantization import METHODS, Scheme, calibration_rows
from diablo.quantization.model import quantize_model
from diablo.records.results import write_record
from diablo.scoring.generation import held_out_loss
from diablo.tasks import get_task

QUESTION = "perplexity of a model in few bits"


def main(
    model: str = "builtin:smollm2-135m",
    calibration: Annotated[str, typer.Option(help="A task with a train and a test split.")] = "gsm8k",
    data_folder: Annotated[Path | None, typer.Option(help="A folder of the task's dataset.")] = None,
    bits: str = "4,3,2",
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(METHODS),
    group_size: int = 64,
    rows: int = 64,
    length: int = 512,
    tested: Annotated[int, typer.Option(help="Test rows.")] = 256,
    keep: Annotated[Path | None, typer.Option(help="Keep the quantized models in this folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="The record; one of the same settings is gone on with.")] = None,
) -> None:
    """Measure perplexities on text that the model was not calibrated on."""
    name = resolve_model(model)
    tokenizer = load_tokenizer(name)
    tokens = calibration_rows(calibration, tokenizer, rows=rows, length=length, folder=data_folder)
    texts = {
        f"{calibration} test": _whole_rows(RowEncoder(tokenizer), calibration, data_folder, tested),
        "general text": encode_general_text(BUILTIN_TEXT, tokenizer, length),
    }

    def measure(folder: str) -> dict[str, float]:
        device = choose_device()
        loaded: Any = load_model(folder, choose_dtype("auto", device)).to(device)
        return {
            what: math.exp(held_out_loss(loaded, encoded, tokenizer.pad_token_id)) for what, encoded in texts.items()
        }

    settings = {"model": model, "calibration": calibration, "rows": len(tokens), "length": length, "tested": tested}
    settings["group_size"] = group_size
    results = _measured_before(out, settings) or [{"method": "as it was", "bits": 16, "perplexity": measure(name)}]
    done = {(row["method"], row["bits"]) for row in results}
    schemes = [Scheme(int(each), group_size, method) for each in bits.split(",") for method in methods.split(",")]
    for scheme in schemes:
        if (scheme.method, scheme.bits) in done:
            continue
        scratch = Path(tempfile.mkdtemp()) if keep is None else keep
        folder = scratch / f"{scheme.method}-{scheme.bits}bit"
        start = time.perf_counter()
        report = quantize_model(model, folder, scheme, tokens, console=Console(stderr=True))
        seconds = time.perf_counter() - start
        errors = report.errors.values()
        results.append(
            {
                "method": scheme.method,
                "bits": scheme.bits,
                "perplexity": measure(str(folder)),
                "mean_output_error": sum(errors) / len(errors),
                "bytes": report.bytes_after,
                "seconds": seconds,
            }
        )
        if keep is None:
            shutil.rmtree(scratch)
        if out is not None:
            write_record(out, QUESTION, settings, results)
    print_perplexities(results)


def _measured_before(out: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an interrupted benchmark with the same settings; an empty list where there is no record."""
    if out is None or not out.is_file():
        return []
    record = json.loads(out.read_text(encoding="utf-8"))
    if record["settings"] != settings:
        raise typer.BadParameter(f"{out} is the record of other settings, {record['settings']}; give another file.")
    return record["results"]


def _whole_rows(encoder: RowEncoder, task: str, folder: Path | None, count: int) -> list[EncodedRow]:
    """Test rows in which the tokens of the prompt are supervised too."""
    encoded = [encoder.encode(problem.row) for problem in get_task(task, folder=folder).problems("test")[:count]]
    return [EncodedRow(row.number, row.input_ids, row.input_ids) for row in encoded]


if __name__ == "__main__":
    typer.run(main)
