"""What of a weight is trained: patterns of equal size behind one interface.

Most patterns train some of the entries. Those of :data:`MIXTURES` are fed sums of the inputs, so that every output
depends on all inputs. A pattern is a module around a frozen ``nn.Linear``. It holds the trained values as one
parameter, says what they add to the output, and can write them as a dense matrix, by which it is tested. A new one is a
subclass with three methods and a line in :data:`PATTERNS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import nn

from diablo import BlockLayout, block_diagonal_linear


class Pattern(nn.Module, ABC):
    """A linear layer to which something is added that is trained, from zero.

    In the paper's convention, Y = X W: a row of W belongs to an input, a column to an output.

    Args:
        base: the layer; frozen.
        num_blocks: N: as many values are trained as N diagonal blocks have; of whole rows or columns, the fewest that
            are no less.
        generator: draws the entries.
    """

    def __init__(self, base: nn.Linear, num_blocks: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.layout = BlockLayout(base.in_features, base.out_features, num_blocks)
        self.generator = generator
        self.values = nn.Parameter(torch.zeros(self.choose(), device=base.weight.device))

    @abstractmethod
    def choose(self) -> tuple[int, ...]:
        """Choose the entries, keep where they are, and return the shape of the values."""

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in_features) -> (..., out_features)``: the base layer's output and what the values add."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The update as ``(out_features, in_features)``, as ``nn.Linear`` holds a weight."""

    def some(self, total: int, count: int) -> torch.Tensor:
        """``count`` different numbers below ``total``, in ascending order."""
        return torch.randperm(total, generator=self.generator)[:count].sort().values.to(self.base.weight.device)

    def zeros(self) -> torch.Tensor:
        """A dense matrix of zeros."""
        return torch.zeros(self.base.weight.shape, dtype=self.values.dtype, device=self.values.device)


class DiagonalBlocks(Pattern):
    """DiaBlo."""

    def choose(self) -> tuple[int, ...]:
        """All blocks on the diagonal."""
        return self.layout.blocks_shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One batched product of slices and blocks."""
        return block_diagonal_linear(x, self.values, self.layout, self.base(x))

    def dense(self) -> torch.Tensor:
        """Blocks on the diagonal."""
        delta = self.zeros()
        for tile in self.layout.tiles:
            tile.of_weight(delta).copy_(tile.of_blocks(self.values.detach()))
        return delta


class RandomBlocks(Pattern):
    """As many blocks of the same size, anywhere on the N x N grid. Sizes must divide."""

    reads: torch.Tensor
    writes: torch.Tensor

    def choose(self) -> tuple[int, ...]:
        """N of the N x N places."""
        layout = self.layout
        if layout.in_features % layout.num_blocks or layout.out_features % layout.num_blocks:
            raise ValueError(
                f"num_blocks={layout.num_blocks} does not divide {layout.in_features} x {layout.out_features}, as "
                "random blocks need; choose one that does."
            )
        places = self.some(layout.num_blocks**2, layout.num_blocks)
        self.register_buffer("reads", places // layout.num_blocks)
        self.register_buffer("writes", places % layout.num_blocks)
        return layout.blocks_shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the slices, multiply them by their blocks, and add each product to its slice of the output."""
        slices = x.unflatten(-1, (self.layout.num_blocks, -1)).index_select(-2, self.reads)
        products = torch.einsum("...ni,nio->...no", slices, self.values.to(x.dtype))
        y = self.base(x)
        return y + torch.zeros_like(y).unflatten(-1, (self.layout.num_blocks, -1)).index_add(
            -2, self.writes, products.to(y.dtype)
        ).flatten(-2)

    def dense(self) -> torch.Tensor:
        """Blocks at their places."""
        delta, rows, columns = self.zeros(), self.layout.block_out, self.layout.block_in
        for block, read, write in zip(self.values.detach(), self.reads.tolist(), self.writes.tolist(), strict=True):
            delta[write * rows : (write + 1) * rows, read * columns : (read + 1) * columns] = block.T
        return delta


class ShiftedBlocks(DiagonalBlocks):
    """Blocks one below the other that begin at another input in every layer: the diagonal, shifted cyclically."""

    shift: int

    def choose(self) -> tuple[int, ...]:
        """A shift by whole blocks."""
        self.shift = int(self.some(self.layout.num_blocks, 1)) * self.layout.block_in
        return self.layout.blocks_shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the diagonal, of inputs in another order."""
        return block_diagonal_linear(x.roll(-self.shift, -1), self.values, self.layout, self.base(x))

    def dense(self) -> torch.Tensor:
        """Blocks beside the diagonal."""
        return super().dense().roll(self.shift, 1)


class InterleavedBlocks(DiagonalBlocks):
    """Blocks of features that are N apart: the first block has the features 0, N, 2 N, .... Sizes must divide."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the diagonal, between two changes of order."""
        number = self.layout.num_blocks
        slices = x.unflatten(-1, (-1, number)).transpose(-1, -2).flatten(-2)
        products = block_diagonal_linear(slices, self.values, self.layout)
        return self.base(x) + products.unflatten(-1, (number, -1)).transpose(-1, -2).flatten(-2)

    def dense(self) -> torch.Tensor:
        """Entries whose input and output leave the same remainder when they are divided by N."""
        number = self.layout.num_blocks
        delta = super().dense().unflatten(0, (number, -1)).transpose(0, 1).flatten(0, 1)
        return delta.unflatten(1, (number, -1)).transpose(1, 2).flatten(1)


class RandomEntries(Pattern):
    """Single entries, as SHiRA trains them."""

    places: torch.Tensor

    def choose(self) -> tuple[int, ...]:
        """Any entries."""
        self.register_buffer("places", self.some(self.base.weight.numel(), self.layout.num_parameters))
        return (self.layout.num_parameters,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with a copy of the whole weight that has the values added: no smaller product exists."""
        flat = self.base.weight.flatten()
        weight = flat.index_add(0, self.places, self.values.to(flat.dtype)).view_as(self.base.weight)
        return F.linear(x, weight, self.base.bias)

    def dense(self) -> torch.Tensor:
        """Values at their places."""
        return self.zeros().flatten().index_add(0, self.places, self.values.detach()).view_as(self.base.weight)


class RandomColumns(Pattern):
    """Whole columns of W: some outputs train all their weights."""

    outputs: torch.Tensor

    def choose(self) -> tuple[int, ...]:
        """Some outputs."""
        layout = self.layout
        count = -(-layout.num_parameters // layout.in_features)
        self.register_buffer("outputs", self.some(layout.out_features, count))
        return layout.in_features, count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A narrow product, added to some outputs."""
        y = self.base(x)
        return y.index_add(-1, self.outputs, (x @ self.values.to(x.dtype)).to(y.dtype))

    def dense(self) -> torch.Tensor:
        """Columns of W, which are rows of the weight."""
        delta = self.zeros()
        delta[self.outputs] = self.values.detach().T
        return delta


class RandomRows(Pattern):
    """Whole rows of W: some inputs train all their weights."""

    inputs: torch.Tensor

    def choose(self) -> tuple[int, ...]:
        """Some inputs."""
        layout = self.layout
        count = -(-layout.num_parameters // layout.out_features)
        self.register_buffer("inputs", self.some(layout.in_features, count))
        return count, layout.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A product of some inputs, added to the output."""
        y = self.base(x)
        return y + (x.index_select(-1, self.inputs) @ self.values.to(x.dtype)).to(y.dtype)

    def dense(self) -> torch.Tensor:
        """Rows of W, which are columns of the weight."""
        delta = self.zeros()
        delta[:, self.inputs] = self.values.detach().T
        return delta


class RotatedBlocks(DiagonalBlocks):
    """Diagonal blocks that see the inputs turned by a random rotation: each output sees block_in sums of all inputs."""

    rotation: torch.Tensor

    def choose(self) -> tuple[int, ...]:
        """A rotation of the inputs."""
        drawn = torch.randn(self.layout.in_features, self.layout.in_features, generator=self.generator)
        self.register_buffer("rotation", torch.linalg.qr(drawn).Q.to(self.base.weight))
        return super().choose()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product of the turned inputs with the diagonal."""
        return block_diagonal_linear(x @ self.rotation.to(x.dtype), self.values, self.layout, self.base(x))

    def dense(self) -> torch.Tensor:
        """The diagonal, turned back."""
        return super().dense() @ self.rotation.to(self.values.dtype).T


class PooledInputs(Pattern):
    """What MiSS trains: every output sees the same block_in sums, each of N inputs that are block_in apart."""

    def choose(self) -> tuple[int, ...]:
        """As many sums as a block has inputs."""
        return self.layout.block_in, self.layout.out_features

    def signs(self) -> torch.Tensor:
        """``(in_features,)``: with which factor an input is part of its sum."""
        return torch.ones(self.layout.in_features, device=self.base.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sums, and a product with them."""
        filled = F.pad(x * self.signs().to(x.dtype), (0, -self.layout.in_features % self.layout.block_in))
        sums = filled.unflatten(-1, (-1, self.layout.block_in)).sum(-2)
        return self.base(x) + sums @ self.values.to(x.dtype)

    def dense(self) -> torch.Tensor:
        """The values below each other, as often as there are inputs."""
        repeated = self.values.detach().repeat(-(-self.layout.in_features // self.layout.block_in), 1)
        return (repeated[: self.layout.in_features] * self.signs().to(self.values.dtype)[:, None]).T.contiguous()


class PooledWithSigns(PooledInputs):
    """The same with a random sign for each input, so that a sum does not hold what its inputs have in common."""

    drawn: torch.Tensor

    def choose(self) -> tuple[int, ...]:
        """The signs."""
        signs = torch.randint(0, 2, (self.layout.in_features,), generator=self.generator) * 2 - 1
        self.register_buffer("drawn", signs.to(self.base.weight))
        return super().choose()

    def signs(self) -> torch.Tensor:
        """Those that were drawn."""
        return self.drawn


MIXTURES: dict[str, type[Pattern]] = {
    "rotated blocks": RotatedBlocks,
    "pooled inputs": PooledInputs,
    "pooled with signs": PooledWithSigns,
}
"""Of these no entry of the weight is trained by itself."""

PATTERNS: dict[str, type[Pattern]] = {
    "diagonal blocks": DiagonalBlocks,
    "shifted blocks": ShiftedBlocks,
    "interleaved blocks": InterleavedBlocks,
    "random blocks": RandomBlocks,
    "random entries": RandomEntries,
    "random columns": RandomColumns,
    "random rows": RandomRows,
    **MIXTURES,
}


def apply_pattern(
    model: nn.Module, name: str, num_blocks: int, target_modules: Collection[str], seed: int
) -> nn.Module:
    """Put a pattern around linear layers, and freeze everything else.

    Args:
        model: the model; changed in place.
        name: a key of :data:`PATTERNS`.
        num_blocks: N.
        target_modules: last parts of the names of the layers.
        seed: draws the entries.

    Returns:
        The model.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        parent, _, kind = path.rpartition(".")
        if kind in target_modules and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), kind, PATTERNS[name](module, num_blocks, generator))
    return model
