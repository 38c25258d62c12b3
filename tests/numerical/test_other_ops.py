"""Convolution, embedding and parameter against torch's operation on the dense weight, derivatives, and sweeps."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from references import LAYOUTS
from torch import nn

from diablo.layout import BlockLayout
from diablo.ops import add_to_diagonal, block_diagonal_conv, block_diagonal_embedding
from diablo.ops.sweep import DiagonalSweep

every_layout = pytest.mark.parametrize("sizes", [s for n, s in LAYOUTS.items() if "large" not in n], ids=str)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(blocks: torch.Tensor, in_features: int, out_features: int) -> torch.Tensor:
    """The stacked matrices ``(*stack, out, in)``, made of padded blocks with torch's own ``block_diag``."""
    flat = blocks.reshape(-1, *blocks.shape[-3:])
    matrices = torch.stack([torch.block_diag(*each)[:in_features, :out_features].T for each in flat])
    return matrices.reshape(*blocks.shape[:-3], out_features, in_features)


@every_layout
@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}], ids=str)
def test_the_convolution_is_that_with_the_dense_kernel(sizes, kernel, settings):
    layout = BlockLayout(*sizes, stack=kernel)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    conv = kind(layout.in_features, layout.out_features, kernel, bias=False, dtype=torch.float64, **settings)
    blocks = draw(*layout.blocks_shape)
    x = draw(2, layout.in_features, *[6] * len(kernel), seed=1)
    # (*kernel, out, in) -> (out, in, *kernel)
    conv.weight.data = dense(blocks, *sizes[:2]).movedim((-2, -1), (0, 1))
    expected = conv(x)
    base = draw(*expected.shape, seed=2)
    got = block_diagonal_conv(
        x, blocks, layout, base.clone(), stride=conv.stride, padding=conv.padding, dilation=conv.dilation
    )
    torch.testing.assert_close(got, base + expected)
    # Without a batch.
    single = block_diagonal_conv(
        x[0], blocks, layout, base[0].clone(), stride=conv.stride, padding=conv.padding, dilation=conv.dilation
    )
    torch.testing.assert_close(single, base[0] + expected[0])


@every_layout
def test_the_embedding_is_that_with_the_dense_table(sizes):
    layout = BlockLayout(*sizes)
    blocks = draw(*layout.blocks_shape)
    table = dense(blocks, *sizes[:2]).T
    for indices in (torch.arange(layout.in_features), torch.zeros(2, 3, dtype=torch.long), torch.tensor(0)):
        base = draw(*indices.shape, layout.out_features, seed=2)
        got = block_diagonal_embedding(indices, blocks, layout, base.clone(), factor=0.5)
        torch.testing.assert_close(got, base + 0.5 * F.embedding(indices, table))


@pytest.mark.parametrize("settings", [{"padding_idx": 1}, {"scale_grad_by_freq": True}], ids=str)
def test_the_embeddings_gradient_follows_its_settings(settings):
    layout = BlockLayout(7, 5, 3)
    blocks = draw(*layout.blocks_shape).requires_grad_(True)
    table = dense(blocks.detach(), 7, 5).T.contiguous().requires_grad_(True)
    indices = torch.tensor([1, 2, 2, 2, 6, 0])
    weights = draw(6, 5, seed=1)
    (
        block_diagonal_embedding(indices, blocks, layout, torch.zeros(6, 5).double(), **settings) * weights
    ).sum().backward()
    (F.embedding(indices, table, **settings) * weights).sum().backward()
    torch.testing.assert_close(dense(blocks.grad, 7, 5).T, table.grad * (dense(torch.ones_like(blocks), 7, 5).T))


@every_layout
@pytest.mark.parametrize("stack", [(), (3,)], ids=str)
def test_the_sum_with_a_diagonal_is_the_dense_sum_whatever_the_strides(sizes, stack):
    layout = BlockLayout(*sizes, stack=stack)
    blocks = draw(*layout.blocks_shape)
    weight = draw(*stack, layout.out_features, layout.in_features, seed=1)
    for given in (
        weight,
        weight.transpose(-1, -2).contiguous().transpose(-1, -2),
        torch.stack([weight, weight], -1)[..., 1],
    ):
        before = given.clone()
        got = add_to_diagonal(given, blocks, layout)
        assert torch.equal(got, weight + dense(blocks, *sizes[:2]))
        assert torch.equal(given, before), "the weight was written to"


@pytest.mark.parametrize("sizes", [(6, 4, 2), (7, 5, 3), (5, 3, 1), (3, 8, 3)], ids=str)
def test_first_and_second_derivatives(sizes):
    layout = BlockLayout(*sizes, stack=(2,))
    blocks = draw(*layout.blocks_shape).requires_grad_(True)
    weight = draw(2, layout.out_features, layout.in_features, seed=1).requires_grad_(True)
    x = draw(2, layout.in_features, 4, seed=2).requires_grad_(True)
    base = draw(2, layout.out_features, 3, seed=3).requires_grad_(True)
    plain = BlockLayout(*sizes)
    table = draw(*plain.blocks_shape).requires_grad_(True)
    rows = draw(layout.in_features, layout.out_features, seed=4).requires_grad_(True)
    indices = torch.arange(layout.in_features)

    def conv(x, blocks, base):
        return block_diagonal_conv(x, blocks, layout, base.clone(), stride=(1,), padding=(0,), dilation=(1,))

    def embedding(table, rows):
        return block_diagonal_embedding(indices, table, plain, rows.clone())

    def parameter(weight, blocks):
        # Squared: of a linear function the second derivative would be zero whatever the code did.
        return add_to_diagonal(weight, blocks, layout).square()

    for function, inputs in ((conv, (x, blocks, base)), (embedding, (table, rows)), (parameter, (weight, blocks))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_low_precision_sum_is_rounded_once_and_the_gradient_keeps_the_blocks_dtype(dtype):
    layout = BlockLayout(7, 5, 3)
    blocks = draw(*layout.blocks_shape).float().requires_grad_(True)
    weight = draw(5, 7, seed=1).to(dtype)
    got = add_to_diagonal(weight, blocks, layout)
    assert torch.equal(got, (weight.float() + dense(blocks.detach(), 7, 5)).to(dtype))
    got.sum().backward()
    assert blocks.grad.dtype == torch.float32


@pytest.mark.parametrize("kernels", ["0", "cpu"])
def test_sweeps_that_share_the_memory_for_base_values_take_turns_to_the_bit(kernels, monkeypatch):
    if kernels == "cpu" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    monkeypatch.setenv("DIABLO_KERNELS", kernels)
    layout = BlockLayout(10, 7, 3)
    weight = torch.randn(7, 10, dtype=torch.bfloat16)
    base = weight.clone()
    blocks = [torch.randn(layout.blocks_shape) for _ in range(2)]
    first = DiagonalSweep([(weight, {layout: [blocks[0]]})])
    sweeps = [first, DiagonalSweep([(weight, {layout: [blocks[1]]})], like=first)]
    assert sweeps[1]._tables[0].saved is first._tables[0].saved
    for which in (0, 1, 1, 0):
        sweeps[which].write()
        assert torch.equal(weight, add_to_diagonal(base, blocks[which], layout))
        sweeps[which].restore()
        assert torch.equal(weight, base)
