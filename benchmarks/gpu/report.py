"""The record of the measurements on a GPU as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.gpu.kernels import KERNEL
from benchmarks.harness import print_table

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def _figure(key: str, scale: float = 1.0, form: str = ".3f") -> Callable[[Row], str]:
    """A function that makes the cell of a figure; the cell is empty where the row has no such figure."""
    return lambda row: "" if row.get(key) is None else format(row[key] if scale == 1 else row[key] * scale, form)


def _share_of_lora(rows: list[Row]) -> Callable[[Row], str]:
    """A function that makes the cell of a row's overhead over the frozen layer, as a share of LoRA's overhead."""
    lora = next((row.get("ratio_to_frozen") for row in rows if row["method"] == "LoRA"), None)

    def cell(row: Row) -> str:
        if lora is None or lora == 1.0 or row.get("ratio_to_frozen") is None:
            return ""
        return f"{(row['ratio_to_frozen'] - 1) / (lora - 1):.2f}"

    return cell


def _repeats(row: Row) -> str:
    """The cell that says whether two trainings ended with the same values."""
    if row.get("repeats_to_the_bit") is None:
        return ""
    if row["repeats_to_the_bit"]:
        return "yes"
    again = row.get("repeats_with_deterministic_algorithms")
    return "no" if again is None else f"no; with deterministic algorithms {'yes' if again else 'no'}"


def _print(rows: Iterable[Row], columns: list[Column], first: str = "method") -> None:
    """Print rows. A row without figures has the reason in their place."""
    cells = []
    for row in rows:
        if (reason := row.get("error") or row.get("note") or row.get("left_out")) is not None:
            kind = "error: " if "error" in row else "left out: " if "left_out" in row else ""
            figures = [kind + reason.replace("|", "/"), *[""] * (len(columns) - 1)]
        else:
            figures = [cell(row) for _, cell in columns]
        cells.append([row[first], *figures])
    print_table([first, *(name for name, _ in columns)], cells)


def _groups(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows grouped by their values of some keys, in order."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _layers(rows: list[Row]) -> None:
    for (in_features, out_features, tokens), group in _groups(rows, "in_features", "out_features", "tokens").items():
        print(f"\n{in_features} -> {out_features}, {tokens:,} tokens, forward and backward\n")
        columns: list[Column] = [
            ("parameters", _figure("parameters", form=",")),
            ("us", _figure("seconds", 1e6, ".0f")),
            ("us on the GPU", _figure("gpu_seconds", 1e6, ".0f")),
            ("ratio to frozen", _figure("ratio_to_frozen")),
            ("overhead / LoRA's", _share_of_lora(group)),
        ]
        _print(group, columns)
    print("\nrsLoRA differs from LoRA in a factor alone and costs the same.")


def _steps(rows: list[Row]) -> None:
    for (model, mode), group in _groups(rows, "model", "mode").items():
        weights = next((f" ({row['weights']})" for row in group if "weights" in row), "")
        print(f"\nA step of {model}{weights}, {mode}\n")
        columns: list[Column] = [
            ("parameters", _figure("parameters", form=",")),
            ("ms", _figure("seconds", 1e3, ".2f")),
            ("ms on the GPU", _figure("gpu_seconds", 1e3, ".2f")),
            ("ratio to frozen", _figure("ratio_to_frozen")),
            ("peak over the model, GB", _figure("peak_bytes", 1e-9, ".2f")),
            ("repeats to the bit", _repeats),
            ("distance to eager", _figure("distance_to_eager", form=".1e")),
        ]
        if mode == "compiled":
            columns += [("graphs", _figure("graphs", form="d")), ("breaks", _figure("graph_breaks", form="d"))]
        _print(group, columns)


def _memory(rows: list[Row]) -> None:
    for (model, choice), group in _groups(rows, "model", "checkpointing").items():
        print(f"\n{model}, eager, gradient checkpointing: {choice}\n")
        columns: list[Column] = [
            ("peak over the model, GB", _figure("peak_bytes", 1e-9, ".2f")),
            ("ms", _figure("seconds", 1e3, ".2f")),
            ("ms on the GPU", _figure("gpu_seconds", 1e3, ".2f")),
        ]
        _print(group, columns)


def _switching(rows: list[Row]) -> None:
    print(f"\nSwitching the adapter in the weights of {rows[0]['model']}\n" if rows else "")
    columns: list[Column] = [
        ("layers", _figure("layers", form="d")),
        ("us", _figure("seconds", 1e6, ".0f")),
        ("us on the GPU", _figure("gpu_seconds", 1e6, ".0f")),
    ]
    _print(rows, columns)


def _exact(row: Row) -> str:
    """The cell that says whether the result is exact, or how far off it is."""
    if "exact" in row:
        return "to the bit" if row["exact"] else "no"
    return f"off by {row['relative_error']:.1e}"


def _kernels(rows: list[Row]) -> None:
    for row in rows:
        if "bytes_per_second" in row:
            print(f"\nA copy moves {row['bytes_per_second'] / 1e9:,.0f} GB/s.")
    for (what,), group in _groups([row for row in rows if row["what"] != "copy"], "what").items():
        print(f"\n{what}\n")
        name = "in x out, N, tokens"
        shaped = [
            {
                **row,
                name: "{in_features} x {out_features}, {num_blocks}, {tokens}: ".format(**row)
                + ("our kernel" if row["by"] == KERNEL else "torch"),
            }
            for row in group
        ]
        columns: list[Column] = [
            ("us as called", _figure("seconds", 1e6, ".1f")),
            ("us on the GPU", _figure("gpu_seconds", 1e6, ".1f")),
            ("MB moved", _figure("bytes", 1e-6, ".1f")),
            ("GB/s", lambda row: f"{row['bytes'] / (row['gpu_seconds'] or row['seconds']) / 1e9:,.0f}"),
            ("share of a copy's", _figure("share_of_bandwidth", form=".2f")),
            ("exact", _exact),
        ]
        _print(shaped, columns, name)


_PARTS = {
    "layers": _layers,
    "kernels": _kernels,
    "steps": _steps,
    "memory": _memory,
    "switching": _switching,
    "compiled": _steps,
    "others": _steps,
}


def print_record(record: dict[str, Any]) -> None:
    """Print the tables of every part that a record has.

    Args:
        record: the ``settings`` and the ``results`` that ``python -m benchmarks.gpu`` writes.
    """
    settings = record["settings"]
    on = ", ".join(
        f"{name} {settings[key]}"
        for key, name in (
            ("driver", "driver"),
            ("torch", "torch"),
            ("cuda", "CUDA"),
            ("triton", "Triton"),
            ("commit", "commit"),
        )
        if settings.get(key)
    )
    print(f"\n{settings['device_name']}, {on}")
    for result in record["results"]:
        took = f", {result['took']} s" if "took" in result else ""
        print(f"\n### {result['part']}: {result['status']}{took}")
        if "error" in result:
            print(f"\n{result['error']}")
        if result["rows"]:
            _PARTS[result["part"]](result["rows"])
