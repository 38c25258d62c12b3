"""What the experiments share: their command line, and where their records and figures go."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from diablo.records.results import write_record

RESULTS = Path("docs/results")

Model = Annotated[str, typer.Option(help="A folder, a hub id or builtin:NAME.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


def kept_runs(kept: str) -> list[dict[str, Any]]:
    """What is in a file of JSON lines, one for each run; nothing where there is no file."""
    if not kept or not Path(kept).exists():
        return []
    return [json.loads(line) for line in Path(kept).read_text(encoding="utf-8").splitlines()]


def keep_run(kept: str, run: Mapping[str, Any]) -> None:
    """Add a run to such a file, where there is to be one, so that an experiment goes on after an interruption."""
    if kept:
        with Path(kept).open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")


@dataclass(frozen=True)
class Experiment:
    """A question, the measurement that answers it, and what is shown of the answer.

    Attributes:
        name: name of the experiment.
        question: what is asked.
        run: measures, and returns the results. Its parameters, each of which has a default, are the settings that are
            recorded; those that are numbers or texts are options of the command line.
        report: results -> lines to print.
        draw: draws the results on a matplotlib figure.
        size: width and height of the figure, in inches.
    """

    name: str
    question: str
    run: Callable[..., dict[str, Any]]
    report: Callable[[dict[str, Any]], Iterable[str]]
    draw: Callable[[Any, dict[str, Any]], None]
    size: tuple[float, float] = (10, 4)

    def publish(self, settings: Mapping[str, Any], results: dict[str, Any], folder: Path) -> None:
        """Write ``experiment-NAME.json`` and ``experiment-NAME.png``.

        Args:
            settings: how it was measured.
            results: what was found.
            folder: where to write.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        write_record(folder / f"experiment-{self.name}.json", self.question, settings, results)
        figure = pyplot.figure(figsize=self.size, layout="constrained")
        self.draw(figure, results)
        figure.savefig(folder / f"experiment-{self.name}.png", dpi=130)
        pyplot.close(figure)

    def command(self) -> Callable[..., None]:
        """What the command line runs: measure, print, draw and record."""
        parameters = inspect.signature(self.run, eval_str=True).parameters.values()

        def measure(*, out: Path = RESULTS, **given: Any) -> None:
            settings = {parameter.name: parameter.default for parameter in parameters} | given
            results = self.run(**settings)
            for line in self.report(results):
                print(line)
            self.publish(settings, results, out)

        # typer makes an option of each parameter.
        options = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in parameters
            if isinstance(parameter.default, int | str)
        ]
        where = Annotated[Path, typer.Option(help="Folder of the record and the figure.")]
        options.append(inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY, default=RESULTS, annotation=where))
        measure.__signature__ = inspect.Signature(options)  # pyrefly: ignore[missing-attribute]
        measure.__annotations__ = {}
        measure.__doc__ = f"Measure {self.question}."
        return measure

    def main(self) -> None:
        """Run it from the command line."""
        typer.run(self.command())
