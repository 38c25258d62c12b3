"""Print the committed results of the benchmarks as Markdown tables.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import host
from benchmarks.gpu.report import print_record
from benchmarks.harness import print_table

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def _layer(record: dict[str, Any]) -> None:
    sizes = list(dict.fromkeys((row["in_features"], row["out_features"]) for row in record["results"]))
    methods = list(dict.fromkeys(row["method"] for row in record["results"]))
    cells = {(row["method"], row["in_features"], row["out_features"]): row for row in record["results"]}
    rows = []
    for method in methods:
        found = [cells[(method, *size)] for size in sizes]
        rows.append([method, *(f"{r['ratio_to_frozen']:.3f} ({r['overhead_over_loras']:.2f})" for r in found)])
    print_table(["method", *(f"{i} -> {o}" for i, o in sizes)], rows)


def _step(record: dict[str, Any]) -> None:
    rows = [
        [row["method"], f"{row['parameters']:,}", row["ratio_to_frozen"], round(row["tokens_per_second"])]
        for row in record["results"]
        if "parameters" in row
    ]
    print_table(["method", "parameters", "ratio to frozen", "tokens/s"], rows)
    for row in record["results"]:
        if "ratio_to_in_place" in row:
            print(f"\n{row['method']}: {row['median_seconds'] * 1e3:.1f} ms, {row['ratio_to_in_place']:.2%}")


def _switching(record: dict[str, Any]) -> None:
    rows = [[row["method"], row["median_seconds"] * 1e3, row["ratio_to_diablo"]] for row in record["results"]]
    print_table(["method", "ms a switch", "ratio"], rows)


def _memory(record: dict[str, Any]) -> None:
    lengths = list(dict.fromkeys(row["length"] for row in record["results"]))
    methods = list(dict.fromkeys(row["method"] for row in record["results"]))
    cells = {(row["method"], row["length"]): row for row in record["results"]}
    rows = []
    for method in methods:
        found = [cells[method, length] for length in lengths]
        rows.append([method, *(f"{r['saved'] / 1e6:.0f} / {r['peak'] / 1e6:.0f}" for r in found)])
    print_table(["method", *(f"{length} tokens" for length in lengths)], rows)


def _checkpointing(record: dict[str, Any]) -> None:
    rows = [[row["method"], row["ratio_to_frozen"], row["ratio_to_none"]] for row in record["results"]]
    print_table(["method", "ratio to frozen", "ratio to none"], rows)


def _scaling(record: dict[str, Any]) -> None:
    points: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in record["results"]:
        point = (row["in_features"], row["tokens"], row["num_blocks"])
        points.setdefault(point, {})[row["method"]] = row["ratio_to_frozen"]
    methods = [method for method in next(iter(points.values())) if method != "frozen"]
    print_table(
        ["width", "tokens", "N", *methods],
        [[*point, *(ratios[method] for method in methods)] for point, ratios in points.items()],
    )


def _training(record: dict[str, Any]) -> None:
    rows = [
        [
            row["trainer"],
            row["method"],
            round(row["tokens_per_second"]),
            row["ratio_to_lora_in_trl"],
            f"{row['padding_share']:.1%}",
        ]
        for row in record["results"]
    ]
    print_table(["trainer", "method", "tokens/s", "ratio", "padding"], rows)


def print_perplexities(results: list[dict[str, Any]]) -> None:
    """Print the results of the benchmark of quantization, row by row."""
    texts = list(results[0]["perplexity"])
    rows = [
        [
            row["method"],
            str(row["bits"]),
            *(f"{row['perplexity'][text]:,.2f}" for text in texts),
            f"{row['mean_output_error']:.1%}" if "mean_output_error" in row else "",
        ]
        for row in results
    ]
    print_table(["method", "bits", *texts, "output error"], rows)


_TABLES = {
    "gpu": print_record,
    "host": lambda record: host.print_rows(record["results"]),
    "quantization": lambda record: print_perplexities(record["results"]),
    "layer": _layer,
    "step": _step,
    "switching": _switching,
    "memory": _memory,
    "checkpointing": _checkpointing,
    "scaling": _scaling,
    "training": _training,
}


def main() -> None:
    """Print a table for each record, with its machine and commit."""
    for path in sorted(RESULTS.glob("*.json")):
        if table := _TABLES.get(path.name.partition("-")[0]):
            record = json.loads(path.read_text(encoding="utf-8"))
            machine, versions = record["machine"], record["versions"]
            print(f"\n{path.name}: {record['question']}; {machine['processor']}, {machine['cores']} cores,", end=" ")
            print(f"torch {versions['torch']}, peft {versions['peft']}, commit {versions['commit']}\n")
            table(record)


if __name__ == "__main__":
    main()
