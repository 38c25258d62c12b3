"""Records of what was run, on which machine, with which versions and with what outcome, as JSON and as a figure."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diablo.errors import UserError
from diablo.records.formats import FORMAT_KEY, RUN_FORMAT, format_fault

VERSIONED = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")


def describe_machine() -> dict[str, Any]:
    """The machine in general terms: processor, cores, threads, GPU, system and Python."""
    # Everything else here reads and writes records, for which nobody is to wait for torch.
    import torch

    from diablo.devices import choose_device, describe_device

    return {
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": describe_device(choose_device()),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def describe_versions() -> dict[str, str | None]:
    """Versions of diablo and of the packages that it uses; None for one that is not installed.

    Where the code is a git checkout, ``commit`` is its commit; see :func:`commit_of`. A process finds it once, since it
    does not run what is checked out later.
    """
    return dict(_versions_of_this_process())


@functools.cache
def _versions_of_this_process() -> dict[str, str | None]:
    from diablo._version import __version__

    versions: dict[str, str | None] = {"diablo": __version__, "commit": commit_of(Path(__file__))}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def json_text(content: Any) -> str:
    """One line of JSON for programs of others. NaN and infinities, for which JSON has no form, are null there."""
    return json.dumps(_finite(content), default=str, allow_nan=False)


def write_record(path: Path, question: str, settings: Mapping[str, Any], results: Any) -> None:
    """Write the results of a measurement, with the machine, the versions and the commit.

    Args:
        path: the JSON file. Its folder is made where it is missing.
        question: what was measured.
        settings: how it was measured.
        results: the results.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"question": question, "machine": describe_machine(), "versions": describe_versions()}
    write_json(path, {**record, "settings": dict(settings), "results": results})
    print(f"Wrote {path}.")


def read_run(path: Path) -> dict[str, Any]:
    """The record of a run, given its ``run.json``.

    Raises:
        UserError: it is of a newer format.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if fault := format_fault(record.get(FORMAT_KEY), RUN_FORMAT):
        raise UserError(f"{path} cannot be read: {fault}.")
    return record


def recipe_of_run(model: str | Path) -> dict[str, Any]:
    """The recipe of a run, given the run's folder or a folder inside it; empty where neither belongs to a run.

    Raises:
        UserError: the run's record is of a newer format.
    """
    for folder in (Path(model), Path(model).parent):
        if (folder / "recipe.yaml").is_file() and (folder / "run.json").is_file():
            return read_run(folder / "run.json")["recipe"]
    return {}


def recipes_behind(model: str | Path) -> list[dict[str, Any]]:
    """The recipe of a run, and those of the runs whose adapters it has gone on from, the last one first.

    Args:
        model: as for :func:`recipe_of_run`; nothing is found where it is of no run.
    """
    found: list[dict[str, Any]] = []
    place: str | Path | None = model
    while place is not None:
        place = Path(place)
        recipe = recipe_of_run(place.parent if place.parent.name == "checkpoints" else place)
        # A folder may have been written to again, by a run that goes on from a later one.
        if not recipe or recipe in found:
            break
        found.append(recipe)
        place = recipe.get("adapter")
    return found


def kept_loss(training: Mapping[str, Any]) -> float | None:
    """The held-out loss of what a run has kept, given ``training`` of its record; None where it has none."""
    return dict(training["held_out_loss"]).get(training["kept_step"])


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the settings whose values have changed. A setting inside a section is named ``section.key``."""
    changed = []
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            changed += [f"{key}.{name}" for name in changed_settings(old, value)]
        elif old != value:
            changed.append(key)
    return changed


def plot_losses(
    path: Path, train: list[tuple[int, float]], held_out: list[tuple[int, float]], title: str, measure: str
) -> None:
    """Draw the loss over steps, or the reward of completions, as a PNG.

    Args:
        path: the PNG file.
        train: pairs of a step and the training loss.
        held_out: pairs of a step and the loss on held-out rows.
        title: title of the figure.
        measure: what is drawn, with its unit.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    # Margins that hold the labels of any loss; to measure the labels takes as long again as to draw them.
    figure.subplots_adjust(left=0.11, right=0.97, bottom=0.13, top=0.91)
    if train:
        # The dot shows a run that logged once.
        axes.plot(*zip(*train, strict=True), ".-", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held out")
    axes.set(xlabel="step", ylabel=measure)
    # A given height spares the search for one that is free of labels, and little compression half the time of writing.
    axes.set_title(title, y=1.0)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    figure.savefig(path, dpi=130, pil_kwargs={"compress_level": 1})
    pyplot.close(figure)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit_of(file: Path) -> str | None:
    """The commit of the git checkout that a file belongs to; None where there is none.

    ``-dirty`` is appended where a tracked file outside of ``docs`` has changed. Changes in ``docs`` do not count:
    records are written there, and a record does not change what the next benchmark measures.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, check=False)

    try:
        if git("ls-files", "--error-unmatch", str(file)).returncode != 0:
            return None
        commit = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        is_dirty = git("diff", "--quiet", "HEAD", "--", ":(top)", ":(top,exclude)docs").returncode != 0
    except OSError:
        return None
    return commit + "-dirty" * is_dirty if commit else None
