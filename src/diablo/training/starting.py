"""The start of a run: what can be refused without torch is, and then the run is carried out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from diablo.planning.materials import gather
from diablo.recipes.recipe import Recipe
from diablo.training.output import check_output

if TYPE_CHECKING:
    from diablo.training.run import RunResult


def train(
    recipe: Recipe, *, console: Console | None = None, resume: bool = False, overwrite: bool = False
) -> RunResult:
    """Carry out a recipe: check, train, save, score.

    The output folder then holds ``adapter/`` (``model/`` for full fine-tuning), ``merged/`` where asked for,
    ``run.json``, ``train.log``, ``loss.png``, ``recipe.yaml``, the answers of what was scored as
    ``answers-before.jsonl`` and ``answers-after.jsonl`` and, where ``training.save_steps`` is set, ``checkpoints/``.
    Where the recipe has ``push_to_hub``, the adapter or the model is then uploaded; a failed upload is no error of the
    run.

    Args:
        recipe: the recipe.
        console: where progress is written; standard error where None.
        resume: go on from the last checkpoint in the output folder.
        overwrite: discard an unfinished run that lies in the output folder.

    Raises:
        UserError: something in the recipe, the data or the output folder does not fit, a loss is not finite, or memory
            or the disk is full; or the hub says that nothing can be uploaded there.
        Interrupted: somebody asked to stop, and a checkpoint was saved.
    """
    start = check_output(recipe, resume=resume, overwrite=overwrite)
    materials = gather(recipe)
    # Torch and what stands on it take seconds to import, and nothing that is refused above is to wait for them.
    from diablo.training.run import carry_out

    return carry_out(recipe, materials, start, console or Console(stderr=True))
