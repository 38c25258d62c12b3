"""Puts DiaBlo into PEFT's own comparison of methods, beside the methods that stand there.

    git clone https://github.com/huggingface/peft
    python -m benchmarks.peft_board peft

It writes folders of settings into the clone, where the comparison's own scripts look for them, and prints the commands
that run these on a GPU. The scripts, their data, their scores and all other settings stay PEFT's.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from diablo import DiabloConfig
from diablo.errors import UserError

WITH_DIABLO = "import diablo, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
"""A script of PEFT's is run by this, since PEFT knows the method from the import of diablo on."""


@dataclass(frozen=True)
class Board:
    """One of PEFT's comparisons.

    Attributes:
        folder: where it is in the clone.
        prefix: what the names of its experiments begin with.
        settings: what of the adapter's settings is the board's own.
        rates: learning rates to try; the board's own is for LoRA.
    """

    folder: str
    prefix: str
    settings: dict[str, Any]
    rates: tuple[float, ...]


BOARDS = {
    "MetaMathQA": Board(
        "method_comparison/MetaMathQA",
        "llama-3.2-3B",
        {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"},
        (2.5e-4, 5e-4, 1e-3, 2e-3),
    ),
    "image-gen": Board(
        "method_comparison/image-gen",
        "flux2-klein",
        # Those that the other methods adapt there.
        {
            "target_modules": [
                *("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "linear_in", "linear_out"),
                *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            ]
        },
        (3e-4, 1e-3),
    ),
}


def write_experiment(board: Board, clone: Path, num_blocks: int, rate: float) -> Path:
    """Write the settings of one experiment.

    Args:
        board: the comparison.
        clone: a clone of huggingface/peft.
        num_blocks: N.
        rate: the learning rate.

    Returns:
        The experiment's folder, relative to the comparison's.

    Raises:
        UserError: the clone has no such comparison.
    """
    defaults = clone / board.folder / "default_training_params.json"
    if not defaults.is_file():
        raise UserError(f"{str(clone)!r} has no {board.folder}; give the folder of a clone of huggingface/peft.")
    own = Path("experiments") / "diablo" / f"{board.prefix}-blocks{num_blocks}-lr{rate:g}"
    folder = clone / board.folder / own
    DiabloConfig(num_blocks=num_blocks, **board.settings).save_pretrained(str(folder))
    # PEFT's script takes a section of these as a whole, so that what it holds by default stands here again.
    optimizer = json.loads(defaults.read_text(encoding="utf-8"))["optimizer_kwargs"]
    # Decay pulls blocks to zero, which is the base model, and not to small weights as with LoRA's factors.
    training = {"optimizer_kwargs": {**optimizer, "lr": rate, "weight_decay": 0.0}}
    (folder / "training_params.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    return own


def command(board: Board, clone: Path, experiment: Path) -> str:
    """The line for a shell that runs an experiment by PEFT's script."""
    script = shlex.join(["python", "-c", WITH_DIABLO, "run.py", "-v", str(experiment)])
    return f"(cd {shlex.quote(str(clone / board.folder))} && {script})"


def main(
    clone: Path,
    board: Annotated[str, typer.Option(help=f"One of {', '.join(BOARDS)}.")] = "MetaMathQA",
    num_blocks: Annotated[str, typer.Option(help="N, separated by commas.")] = "64,128,256",
    rates: Annotated[str, typer.Option(help="Learning rates, separated by commas; the board's own if none.")] = "",
) -> None:
    """Write the experiments and print the commands that run them."""
    chosen = BOARDS[board]
    tried = [float(rate) for rate in rates.split(",")] if rates else chosen.rates
    for number in num_blocks.split(","):
        for rate in tried:
            print(command(chosen, clone, write_experiment(chosen, clone, int(number), rate)))


if __name__ == "__main__":
    typer.run(main)
