"""The fast product against its readable definition, a loop over blocks and a dense matrix, with all derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import LAYOUTS, dense_delta, loop_product
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diablo import BlockLayout, block_diagonal_linear, block_diagonal_linear_reference
from diablo.ops.linear import outer_product

ALL_LAYOUTS = pytest.mark.parametrize("size", LAYOUTS.values(), ids=LAYOUTS.keys())
# gradcheck takes one forward pass for each entry: the large layouts are compared with the dense product instead.
SMALL_LAYOUTS = {name: size for name, size in LAYOUTS.items() if max(size) <= 30}
BOTH = pytest.mark.parametrize("product", [block_diagonal_linear, block_diagonal_linear_reference])


def tensors(size, leading=(3,), dtype=torch.float64, blocks_dtype=None, seed=0):
    layout = BlockLayout(*size)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, layout.in_features, generator=generator, dtype=torch.float64).to(dtype)
    blocks = torch.randn(layout.blocks_shape, generator=generator, dtype=torch.float64).to(blocks_dtype or dtype)
    base = torch.randn(*leading, layout.out_features, generator=generator, dtype=torch.float64).to(dtype)
    return layout, x, blocks, base


def double(*values):
    return [value.detach().double() for value in values]


def assert_close(actual, expected):
    """Equal but for the order of summation in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@ALL_LAYOUTS
def test_four_ways_to_the_same_product(size):
    layout, x, blocks, base = tensors(size)
    dense = x @ dense_delta(blocks, layout.in_features, layout.out_features).T
    assert_close(loop_product(x, blocks, layout.out_features), dense)
    for product in (block_diagonal_linear, block_diagonal_linear_reference):
        assert_close(product(x, blocks, layout), dense)
        assert_close(product(x, blocks, layout, base.clone()), base + dense)


@ALL_LAYOUTS
@BOTH
def test_gradients_are_those_of_the_dense_product(size, product):
    layout, x, blocks, base = tensors(size)
    grad_y = torch.randn(base.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [value.requires_grad_() for value in (base, x, blocks)]
    y = product(x, blocks, layout, base.clone())
    grad_base, grad_x, grad_blocks = torch.autograd.grad(y, leaves, grad_y)
    assert_close(grad_base, grad_y)
    assert_close(grad_x, grad_y @ dense_delta(blocks.detach(), layout.in_features, layout.out_features))
    # The gradient of the blocks is that of full fine-tuning, looked at where the blocks are: with the same loops, and
    # zero outside of them.
    full = grad_y.T @ x.detach()
    inside = dense_delta(torch.ones(layout.blocks_shape), layout.in_features, layout.out_features)
    assert_close(dense_delta(grad_blocks, layout.in_features, layout.out_features), full * inside)


@ALL_LAYOUTS
def test_entries_outside_the_matrix_have_no_effect_and_exactly_no_gradient(size):
    layout, x, blocks, _ = tensors(size)
    count, rows, columns = blocks.shape
    row = torch.arange(count).view(-1, 1, 1) * rows + torch.arange(rows).view(1, -1, 1)
    column = torch.arange(count).view(-1, 1, 1) * columns + torch.arange(columns).view(1, 1, -1)
    outside = (row >= layout.in_features) | (column >= layout.out_features)
    blocks.requires_grad_()
    y = block_diagonal_linear(x, blocks, layout)
    y.square().sum().backward()
    assert torch.equal(blocks.grad == 0, outside)
    # Not even a value that spoils every product it enters has an effect.
    spoiled = blocks.detach().masked_fill(outside, float("nan"))
    assert torch.equal(block_diagonal_linear(x, spoiled, layout), y.detach())


def test_the_table_has_layouts_with_and_without_entries_outside():
    # Otherwise the test above compares nothing with nothing.
    layouts = [BlockLayout(*size) for size in LAYOUTS.values()]
    covered = [sum(t.count * t.block_in * t.block_out for t in layout.tiles) for layout in layouts]
    outside = [layout.num_parameters - inside for layout, inside in zip(layouts, covered, strict=True)]
    assert outside[0] == 0
    assert sum(entries > 0 for entries in outside) >= 6


@pytest.mark.parametrize("size", SMALL_LAYOUTS.values(), ids=SMALL_LAYOUTS.keys())
def test_gradcheck(size):
    layout, x, blocks, base = tensors(size, leading=(2,))
    inputs = tuple(value.requires_grad_() for value in (x, blocks, base))
    # The product writes into its base, which for a leaf that requires gradients autograd forbids.
    assert torch.autograd.gradcheck(lambda x, b, y: block_diagonal_linear(x, b, layout, y.clone()), inputs)


@pytest.mark.parametrize("size", [(4, 6, 2), (7, 5, 3), (10, 9, 4), (5, 7, 3), (4, 3, 1)], ids=str)
def test_gradgradcheck(size):
    layout, x, blocks, base = tensors(size, leading=(2,))
    inputs = tuple(value.requires_grad_() for value in (x, blocks, base))
    assert torch.autograd.gradgradcheck(lambda x, b, y: block_diagonal_linear(x, b, layout, y.clone()), inputs)


def test_only_what_needs_a_gradient_gets_one():
    layout, x, blocks, base = tensors((7, 5, 3))
    y = block_diagonal_linear(x, blocks.requires_grad_(), layout, base)
    y.sum().backward()
    assert x.grad is None
    assert blocks.grad is not None
    only_blocks = blocks.grad
    x, blocks = x.clone().requires_grad_(), blocks.detach()
    block_diagonal_linear(x, blocks, layout).sum().backward()
    assert blocks.grad is None
    assert_close(x.grad, dense_delta(blocks, 7, 5).sum(0).expand(3, -1))
    assert torch.count_nonzero(only_blocks) > 0


def assert_rounded(actual, exact, magnitude):
    """Within what the roundings of one low-precision product explain.

    Each of these rounds to nearest, an error of at most eps/2 of the magnitude: the cast of a factor, the product, its
    sum with the base. That is 1.5 eps; sums inside the product are held in float32, whose error is the rest.
    """
    eps = torch.finfo(actual.dtype).eps
    excess = (actual.double() - exact).abs() - 1.6 * eps * magnitude - torch.finfo(actual.dtype).tiny
    assert excess.max() <= 0, f"{excess.max()} beyond the bound, eps {eps}"


@pytest.mark.parametrize("blocks_dtype", [None, torch.float32], ids=["same", "float32_blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@ALL_LAYOUTS
def test_low_precision_stays_within_its_roundings(size, dtype, blocks_dtype):
    layout, x, blocks, base = tensors(size, leading=(2, 4), dtype=dtype, blocks_dtype=blocks_dtype)
    x64, blocks64, base64 = double(x, blocks, base)
    x.requires_grad_()
    blocks.requires_grad_()
    y = block_diagonal_linear(x, blocks, layout, base.clone())
    assert y.dtype == dtype
    exact = base64 + loop_product(x64, blocks64, layout.out_features)
    magnitude = base64.abs() + loop_product(x64.abs(), blocks64.abs(), layout.out_features)
    assert_rounded(y.detach(), exact, magnitude)

    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(grad_y)
    assert x.grad.dtype == dtype
    assert blocks.grad.dtype == blocks.dtype
    delta = dense_delta(blocks64, layout.in_features, layout.out_features)
    assert_rounded(x.grad, grad_y.double() @ delta, grad_y.double().abs() @ delta.abs())
    flat_x, flat_grad = x64.flatten(0, -2), grad_y.double().flatten(0, -2)
    inside = dense_delta(torch.ones_like(blocks64), layout.in_features, layout.out_features)
    # To x's precision even where the gradient is kept in float32: the product runs in x's dtype.
    grad_blocks = dense_delta(blocks.grad.to(torch.float64), layout.in_features, layout.out_features)
    assert torch.equal(grad_blocks, grad_blocks.to(dtype).double())
    assert_rounded(grad_blocks.to(dtype), (flat_grad.T @ flat_x) * inside, (flat_grad.abs().T @ flat_x.abs()) * inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocks_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes_of_result_and_gradients(dtype, blocks_dtype):
    layout, x, blocks, base = tensors((7, 5, 3), dtype=dtype, blocks_dtype=blocks_dtype)
    y = block_diagonal_linear(x.requires_grad_(), blocks.requires_grad_(), layout, base)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, blocks.grad.dtype) == (dtype, dtype, blocks_dtype)


def test_base_output_is_overwritten_and_returned():
    layout, x, blocks, base = tensors((7, 5, 3))
    expected = base + loop_product(x, blocks, 5)
    y = block_diagonal_linear(x, blocks.requires_grad_(), layout, base)
    assert y.data_ptr() == base.data_ptr()
    assert_close(base.detach(), expected)


class Seen(TorchDispatchMode):
    """Every tensor that an operation makes, as (dtype, number of entries)."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.made += [(t.dtype, t.numel()) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


@pytest.mark.parametrize("size", [(32, 24, 4), (31, 26, 4)], ids=["divisible", "ragged"])
def test_activations_are_never_cast_to_float32(size):
    layout, x, blocks, base = tensors(size, leading=(64,), dtype=torch.bfloat16, blocks_dtype=torch.float32)
    activation = 64 * min(size[:2]) // 2
    assert layout.num_parameters < activation, "the test could not tell blocks from activations"
    x.requires_grad_()
    blocks.requires_grad_()
    grad_y = torch.ones_like(base)
    with Seen() as forward:
        y = block_diagonal_linear(x, blocks, layout, base)
    with Seen() as backward:
        y.backward(grad_y)
    for seen in (forward, backward):
        assert any(dtype == torch.bfloat16 and numel >= activation for dtype, numel in seen.made), "nothing was seen"
        assert not [made for made in seen.made if made[0] in (torch.float32, torch.float64) and made[1] >= activation]


def test_forward_saves_exactly_the_input_and_the_blocks():
    layout, x, blocks, base = tensors((7, 5, 3), leading=(2, 3), dtype=torch.bfloat16, blocks_dtype=torch.float32)
    x.requires_grad_()
    blocks.requires_grad_()
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = block_diagonal_linear(x, blocks, layout, base)
    # The tensors themselves: a copy or a cast would cost memory.
    assert [(t.data_ptr(), t.dtype, t.shape) for t in saved] == [(t.data_ptr(), t.dtype, t.shape) for t in (x, blocks)]
    y.sum().backward()
    assert torch.count_nonzero(blocks.grad) > 0


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (2, 0), (0,), (0, 4)], ids=str)
@pytest.mark.parametrize("size", [(7, 5, 3), (12, 8, 4), (10, 9, 4)], ids=str)
@BOTH
def test_leading_dimensions(size, leading, product):
    layout, x, blocks, base = tensors(size, leading=leading)
    x.requires_grad_()
    blocks.requires_grad_()
    expected_x, expected_blocks = (value.detach().clone().requires_grad_() for value in (x, blocks))
    expected = base + loop_product(expected_x, expected_blocks, layout.out_features)
    y = product(x, blocks, layout, base)
    assert y.shape == (*leading, layout.out_features)
    assert_close(y, expected)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(x.grad, expected_x.grad)
    assert_close(blocks.grad, expected_blocks.grad)
    without_base = product(x, blocks, layout)
    assert without_base.shape == y.shape
    assert_close(without_base, loop_product(x, blocks, layout.out_features))


def scattered(value):
    """The same values, with a stride of two along the features."""
    wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), 7.0, dtype=value.dtype)
    wide[..., ::2] = value
    return wide[..., ::2]


@pytest.mark.parametrize("size", [(7, 5, 3), (12, 8, 4)], ids=str)
@pytest.mark.parametrize("spread", [scattered, lambda v: v.transpose(0, 1).contiguous().transpose(0, 1)])
def test_non_contiguous_arguments(size, spread):
    layout, x, blocks, base = tensors(size, leading=(2, 3))
    expected = base + loop_product(x, blocks, layout.out_features)
    expected_grad = torch.autograd.grad(loop_product(x, blocks.requires_grad_(), layout.out_features).sum(), blocks)[0]
    x, base = spread(x), spread(base)
    assert not x.is_contiguous()
    assert not base.is_contiguous()
    before = base.clone()
    y = block_diagonal_linear(x.requires_grad_(), blocks, layout, base)
    assert_close(y, expected)
    # The documentation promises a copy here, so the caller's tensor is as it was.
    assert torch.equal(base, before)
    # The sum's gradient is an expanded scalar, which is not contiguous either.
    y.sum().backward()
    assert_close(blocks.grad, expected_grad)
    assert_close(x.grad, dense_delta(blocks.detach(), *size[:2]).sum(0).expand(2, 3, -1))


def test_non_contiguous_blocks():
    layout, x, blocks, _ = tensors((7, 5, 3))
    transposed = blocks.transpose(1, 2).contiguous().transpose(1, 2)
    assert not transposed.is_contiguous()
    assert_close(block_diagonal_linear(x, transposed, layout), loop_product(x, blocks, 5))


def test_errors_name_what_does_not_fit():
    layout, x, blocks, base = tensors((7, 5, 3))
    with pytest.raises(ValueError, match=r"x has shape \(3, 6\); the layout takes \(\.\.\., 7\)"):
        block_diagonal_linear(x[:, :6], blocks, layout)
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        block_diagonal_linear(x[0, 0], blocks, layout)
    with pytest.raises(ValueError, match=r"blocks has shape \(2, 3, 2\); the layout takes \(3, 3, 2\)"):
        block_diagonal_linear(x, blocks[:2], layout)
    with pytest.raises(ValueError, match=r"base_output has shape \(3, 4\); x and the layout make it \(3, 5\)"):
        block_diagonal_linear(x, blocks, layout, base[:, :4])
    # Broadcasting would hide a mistake: a base without the leading dimension is refused.
    with pytest.raises(ValueError, match=r"base_output has shape \(5,\)"):
        block_diagonal_linear(x, blocks, layout, base[0])
    with pytest.raises(TypeError, match=r"base_output is torch\.float32 and x is torch\.float64"):
        block_diagonal_linear(x, blocks, layout, base.float())


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no_base"])
@pytest.mark.parametrize("size", [(12, 8, 4), (7, 5, 3), (7, 30, 6)], ids=str)
def test_compiled_equals_eager(size, with_base):
    torch._dynamo.reset()
    layout, x, blocks, base = tensors(size, leading=(2, 3))

    def run(x, blocks, base):
        return block_diagonal_linear(x, blocks, layout, base * 2 if with_base else None).square()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [value.clone().requires_grad_() for value in (x, blocks, base)]
        y = function(*leaves)
        y.sum().backward()
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*results, strict=True):
        if eager is None or compiled is None:
            assert eager is compiled
            assert not with_base
        else:
            assert_close(compiled, eager)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_fast_equals_loop_and_dense_for_any_size(data):
    in_features, out_features = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    num_blocks = data.draw(st.integers(1, min(in_features, out_features)))
    leading = tuple(data.draw(st.lists(st.integers(0, 3), max_size=2)))
    seed = data.draw(st.integers(0, 2**16))
    layout, x, blocks, base = tensors((in_features, out_features, num_blocks), leading=leading, seed=seed)
    delta = dense_delta(blocks, in_features, out_features)
    expected = base + x @ delta.T
    assert_close(base + loop_product(x, blocks, out_features), expected)
    weights = torch.randn(base.shape, dtype=base.dtype, generator=torch.Generator().manual_seed(seed))
    x.requires_grad_()
    blocks.requires_grad_()
    wanted = torch.autograd.grad(loop_product(x, blocks, out_features), (x, blocks), weights)
    y = block_diagonal_linear(x, blocks, layout, base)
    assert_close(y, expected)
    for actual, grad in zip(torch.autograd.grad(y, (x, blocks), weights), wanted, strict=True):
        assert_close(actual, grad)


@pytest.mark.parametrize("tokens", [3, 100])
@pytest.mark.parametrize("sizes", [(8, 24), (24, 8), (9, 24), (24, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_lies_in_memory_as_the_parameter_does(sizes, dtype, tokens):
    layout = BlockLayout(*sizes, 4)
    x, grad_y = torch.randn(tokens, sizes[0], dtype=dtype), torch.randn(tokens, sizes[1], dtype=dtype)
    with torch.no_grad():
        grad = outer_product(x, grad_y, layout, torch.float32)
    assert grad.is_contiguous()
    assert grad.dtype == torch.float32
    assert tuple(grad.shape) == layout.blocks_shape
