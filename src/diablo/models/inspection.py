"""What an adapter changes: the norm and effective rank of every block, and its norm relative to the base weight."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diablo.errors import UserError
from diablo.layout import Layout
from diablo.models.adapters import load_adapter, read_adapter_config
from diablo.models.folders import adapter_folder
from diablo.tuner import DiabloConfig, DiabloLayer
from diablo.tuner.layers.tensor_parallel import check_whole
from diablo.tuner.weights import is_quantized


@dataclass(frozen=True)
class InspectedWeight:
    """The blocks of one adapted weight. Blocks that lie wholly outside of the matrix are left out.

    Attributes:
        name: the module's name. Where a parameter is adapted by itself, the parameter's name follows.
        kind: the last part of the module's name, or the name of a parameter that is adapted by itself. Where a model
            has modules of one name in several places, what tells the places apart comes first: ``encoder q_proj``.
        layer: the first number in the name; None where there is none.
        norms: Frobenius norm of each block. In a stack of matrices, such as experts, one matrix follows another.
        base_norms: Frobenius norm of the same entries of the base weight; None where the weight is quantized.
        effective_ranks: effective rank of each block, from 0 for a block of zeros to the block's smaller side. It is
            the exponential of the entropy of the singular values divided by their sum (Roy and Vetterli, EUSIPCO 2007).
    """

    name: str
    kind: str
    layer: int | None
    norms: list[float]
    base_norms: list[float] | None
    effective_ranks: list[float]

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole update."""
        return math.hypot(*self.norms)

    @property
    def relative_norms(self) -> list[float] | None:
        """Norm of each block, divided by that of the same entries of the base weight; None where it is quantized."""
        if self.base_norms is None:
            return None
        return [_ratio(norm, base) for norm, base in zip(self.norms, self.base_norms, strict=True)]

    @property
    def relative_norm(self) -> float | None:
        """Norm of the update, divided by the norm of the base weight's diagonal; None where it is quantized."""
        return None if self.base_norms is None else _ratio(self.norm, math.hypot(*self.base_norms))

    @property
    def effective_rank(self) -> float:
        """Mean effective rank of the blocks."""
        return statistics.fmean(self.effective_ranks)


@dataclass(frozen=True)
class Inspection:
    """What an adapter changes.

    Attributes:
        adapter: the adapter's folder.
        weights: the weights that it adapts, in the order of the model.
        label: a letter that names it where several adapters are shown together.
    """

    adapter: Path
    weights: list[InspectedWeight]
    label: str = "A"

    @property
    def kinds(self) -> dict[str, list[InspectedWeight]]:
        """The weights by kind. The kinds are in the order in which they first appear."""
        kinds: dict[str, list[InspectedWeight]] = {}
        for weight in self.weights:
            kinds.setdefault(weight.kind, []).append(weight)
        return kinds


def inspect_adapter(adapter: str | Path, *, base: str | None = None, label: str = "A") -> Inspection:
    """Measure the blocks of an adapter against the weights that they are added to.

    Args:
        adapter: the adapter's folder, or the folder of its run.
        base: base model to use in place of the one that the adapter names.
        label: a letter that names it where several adapters are shown together.

    Raises:
        UserError: it is no DiaBlo adapter, it cannot be read, it does not fit its base model, or its blocks are not
            finite.
    """
    folder = adapter_folder(adapter)
    config = read_adapter_config(folder)
    if not isinstance(config, DiabloConfig):
        method = str(config.peft_type).removeprefix("PeftType.")
        raise UserError(f"{str(folder)!r} is an adapter of {method}; only DiaBlo's has blocks to inspect.")
    model, _ = load_adapter(folder, base=base)
    return Inspection(folder, list(inspect_model(model)), label)


def inspect_model(model: torch.nn.Module, adapter_name: str = "default") -> Iterable[InspectedWeight]:
    """Measure the blocks of an adapter of a model in memory.

    Args:
        model: a ``PeftModel`` that runs no forward or backward, and has no merged adapters.
        adapter_name: name of the adapter.

    Yields:
        One item for each adapted weight, in the order of the model.

    Raises:
        UserError: blocks are not finite.
        ValueError: layers are cut over processes (tensor parallelism).
    """
    check_whole(model, "Inspecting an adapter")
    kinds = _kinds([path for path, _ in model.named_modules()])
    for path, module in model.named_modules():
        if not isinstance(module, DiabloLayer):
            continue
        layouts = module.layouts_of(adapter_name)
        for parameter, blocks in module.blocks_of(adapter_name).items():
            name = path.removeprefix("base_model.model.")
            own: Any = module.get_base_layer()
            if not bool(torch.isfinite(blocks).all()):
                raise UserError(f"{name} has blocks with NaN or infinite values: the adapter is broken.")
            weight = (
                None if is_quantized(own) else module.weights[parameter].matrix(own._parameters[parameter].detach())
            )
            yield InspectedWeight(
                name=name if parameter == "weight" else f"{name}.{parameter}",
                kind=kinds[path] if parameter == "weight" else parameter.rpartition(".")[2],
                layer=int(found[0]) if (found := re.findall(r"\.(\d+)(?=\.|$)", f".{name}")) else None,
                norms=_norms(_of_parameter(blocks.detach(), layouts[parameter])),
                base_norms=None if weight is None else _norms(_of_weight(weight, layouts[parameter])),
                effective_ranks=_effective_ranks(_of_parameter(blocks.detach(), layouts[parameter])),
            )


def _kinds(paths: Iterable[str]) -> dict[str, str]:
    """What each module is called: the last part of its name, behind the parts that others of that name do not share.

    Numbers, which count layers and experts, tell no places apart.
    """
    places = {path: tuple(part for part in path.split(".") if not part.isdigit()) for path in paths}
    same_name: dict[str, list[tuple[str, ...]]] = {}
    for place in dict.fromkeys(places.values()):
        same_name.setdefault(place[-1] if place else "", []).append(place)
    shared = {name: set.intersection(*map(set, found)) for name, found in same_name.items()}
    return {
        path: " ".join([*(part for part in place if part not in shared[place[-1]]), place[-1]])
        for path, place in places.items()
        if place
    }


def mean_relative_norm(weights: Sequence[InspectedWeight]) -> float | None:
    """Mean relative norm of the updates; None where a base weight is quantized, or where there are no updates."""
    found = [weight.relative_norm for weight in weights]
    known = [share for share in found if share is not None]
    return statistics.fmean(known) if known and len(known) == len(found) else None


def inspection_record(inspection: Inspection) -> dict[str, Any]:
    """An inspection as the content of a JSON file."""
    return {"adapter": str(inspection.adapter), "weights": [asdict(weight) for weight in inspection.weights]}


def plot_inspections(path: Path, inspections: Sequence[Inspection]) -> None:
    """Draw the norm of every block in heat maps, as a PNG: a column for each kind of module, a row for each adapter.

    In a heat map, a row is a layer and a column is a block. Norms are relative to the base weight, unless one of the
    base weights is quantized. The maps in a column have the same scale of colours, so that adapters can be compared.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(kind for inspection in inspections for kind in inspection.kinds))
    is_relative = all(weight.base_norms is not None for each in inspections for weight in each.weights)
    size = (max(3.0 * len(kinds), 6.0), 3.6 * len(inspections) + 0.4)
    figure, grid = pyplot.subplots(len(inspections), len(kinds), figsize=size, layout="constrained", squeeze=False)
    for column, kind in enumerate(kinds):
        found = [inspection.kinds.get(kind, []) for inspection in inspections]
        maps = [[weight.relative_norms if is_relative else weight.norms for weight in weights] for weights in found]
        highest = max((value for rows in maps for row in rows for value in row or []), default=0.0)
        for axes, inspection, rows in zip(grid[:, column], inspections, maps, strict=True):
            if not rows:
                axes.set_axis_off()
                continue
            width = max(len(row or []) for row in rows)
            # Layers of one kind can have different numbers of blocks. The shorter rows end in white.
            padded = [[*(row or []), *[float("nan")] * (width - len(row or []))] for row in rows]
            image = axes.imshow(padded, aspect="auto", vmin=0, vmax=highest or 1.0, interpolation="nearest")
            axes.set(
                title=kind,
                xlabel="block",
                ylabel=f"{inspection.label}\nlayer" if column == 0 and len(inspections) > 1 else "layer",
            )
        figure.colorbar(image, ax=list(grid[:, column]), location="bottom", shrink=0.9)
    what = "norm of each block / norm of the base weight there" if is_relative else "norm of each block"
    figure.suptitle("; ".join([what, *(f"{each.label}: {_short(each.adapter)}" for each in inspections)]))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _short(folder: Path) -> str:
    """The folder's name. Where the folder is ``adapter``, this is the name of the run's folder around it."""
    return folder.resolve().parent.name if folder.name == "adapter" else folder.resolve().name


def _ratio(norm: float, base: float) -> float:
    return norm / base if base else math.inf if norm else 0.0


def _of_parameter(blocks: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    return [tile.of_blocks(blocks) for tile in layout.tiles]


def _of_weight(weight: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    return [tile.of_weight(weight) for tile in layout.tiles]


def _norms(runs: list[torch.Tensor]) -> list[float]:
    return torch.cat([run.float().norm(dim=(-2, -1)) for run in runs], dim=-1).flatten().tolist()


def _effective_ranks(runs: list[torch.Tensor]) -> list[float]:
    ranks = []
    for run in runs:
        values = torch.linalg.svdvals(run.float())
        total = values.sum(-1)
        shares = values / total.unsqueeze(-1).clamp_min(torch.finfo(values.dtype).tiny)
        ranks.append(torch.special.entr(shares).sum(-1).exp() * (total > 0))
    return torch.cat(ranks, dim=-1).flatten().tolist()
