"""What the experiments share: where their records and figures go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from diablo.records.results import write_record

RESULTS = Path("docs/results")

Out = Annotated[Path, typer.Option(help="Folder of the record and the figure.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


def publish(
    name: str,
    question: str,
    settings: Mapping[str, Any],
    results: Any,
    draw: Callable[[Any, Any], None],
    folder: Path,
    size: tuple[float, float] = (10, 4),
) -> None:
    """Write ``experiment-NAME.json`` and ``experiment-NAME.png``.

    Args:
        name: name of the experiment.
        question: what was asked.
        settings: how it was measured.
        results: what was found.
        draw: draws the results on a matplotlib figure.
        folder: where to write.
        size: width and height of the figure, in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    write_record(folder / f"experiment-{name}.json", question, settings, results)
    figure = pyplot.figure(figsize=size, layout="constrained")
    draw(figure, results)
    figure.savefig(folder / f"experiment-{name}.png", dpi=130)
    pyplot.close(figure)
