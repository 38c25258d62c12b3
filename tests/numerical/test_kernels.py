"""The Triton kernels, run by Triton's interpreter on the CPU, against plain torch in float64 or to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import LAYOUTS
from torch.utils._python_dispatch import TorchDispatchMode

from diablo import BlockLayout, block_diagonal_linear
from diablo.ops import backend, linear

pytest.importorskip("triton", reason="Triton is not installed: it has wheels for Linux alone")
from diablo.ops import kernels
from diablo.ops.kernels import gradient
from diablo.ops.kernels import table as table_kernels

pytestmark = pytest.mark.skipif(
    not kernels.INTERPRETED, reason="TRITON_INTERPRET is not 1: a GPU compiles the kernels, and has tensors of its own"
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(x, grad_y, layout):
    """The gradient in float64 and the sum of its terms' magnitudes, block by block and tile by tile."""
    total, magnitude = (torch.zeros(layout.blocks_shape, dtype=torch.float64) for _ in range(2))
    for tile in layout.tiles:
        left, right = tile.of_input(x.double()).transpose(1, 2), tile.of_output(grad_y.double())
        tile.of_blocks(total).copy_(left @ right)
        tile.of_blocks(magnitude).copy_(left.abs() @ right.abs())
    return total, magnitude


def assert_summed(actual, x, grad_y, layout):
    """Within what a sum in fp32, in any order, and one rounding to the result's dtype explain.

    Each of the sum's roundings is at most 2^-24 of the terms' magnitudes, and the products of fp32 are rounded too.
    """
    total, magnitude = exact(x, grad_y, layout)
    assert actual.shape == total.shape
    rounding = 0.5 * torch.finfo(actual.dtype).eps
    bound = (x.shape[0] + 1) * 2**-24 * magnitude * (1 + rounding) + rounding * total.abs()
    excess = (actual.double() - total).abs() - bound - torch.finfo(actual.dtype).tiny
    assert excess.max() <= 0, f"{excess.max()} beyond the bound"


@pytest.fixture
def memory_is_filled(monkeypatch):
    """New memory that is not written to reads as NaN."""
    torch.use_deterministic_algorithms(True)
    # It is the default, which a library that was imported before may have changed.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert torch.ones(1).new_empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@DTYPES
@pytest.mark.parametrize("size", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_gradient_is_that_of_float64(size, dtype, memory_is_filled):
    layout = BlockLayout(*size)
    x, grad_y = random(7, size[0], dtype=dtype), random(7, size[1], dtype=dtype, seed=1)
    actual = kernels.outer_product(x, grad_y, layout, torch.float32)
    assert_summed(actual, x, grad_y, layout)
    inside, _ = exact(torch.ones_like(x), torch.ones_like(grad_y), layout)
    assert torch.count_nonzero(actual[inside == 0]) == 0


# Sizes that are divided in every way: splits, several tiles for a block, several blocks for a tile, both for torch.
DIVIDED = {
    "splits": ((64, 64, 2), 700),
    "splits_ragged": ((70, 67, 4), 520),
    "neighbours": ((144, 144, 16), 520),
    "neighbours_3_wide": ((96, 96, 32), 40),
    "many_blocks": ((512, 768, 256), 20),
    "odd_neighbours": ((63, 21, 7), 530),
    "wide_and_flat": ((448, 18, 2), 33),
    "flat_and_wide": ((18, 448, 2), 33),
    "tiles_of_a_block": ((300, 150, 2), 20),
    "whole_matrix": ((40, 30, 1), 20),
    "whole_matrix_for_torch": ((257, 300, 1), 20),
    "one_token": ((36, 24, 4), 1),
}


@DTYPES
@pytest.mark.parametrize(("size", "tokens"), DIVIDED.values(), ids=DIVIDED.keys())
def test_however_the_work_is_divided(size, tokens, dtype, memory_is_filled):
    layout = BlockLayout(*size)
    x, grad_y = random(tokens, size[0], dtype=dtype), random(tokens, size[1], dtype=dtype, seed=1)
    for result in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        actual = kernels.outer_product(x, grad_y, layout, result)
        assert actual.dtype == result
        if min(layout.block_in, layout.block_out) > gradient.WIDEST:
            assert torch.equal(actual, linear._outer_product(x, grad_y, layout, result))
        else:
            assert_summed(actual, x, grad_y, layout)
        assert torch.equal(actual, kernels.outer_product(x, grad_y, layout, result))


def test_the_sizes_above_are_divided_in_every_way():
    # Otherwise the test above compares less than it says.
    plans = {}
    for name, (size, tokens) in DIVIDED.items():
        tile = BlockLayout(*size).tiles[0]
        plans[name] = gradient.planned(tokens, tile.count, tile.block_in, tile.block_out, 2)
    assert plans["splits"].splits > 1
    assert plans["splits_ragged"].splits > 1
    assert plans["neighbours"].group > 1 < plans["neighbours"].splits
    assert plans["odd_neighbours"].group == 7
    assert plans["tiles_of_a_block"].rows < 150
    assert plans["one_token"].splits == 1
    counts = range(1, 99)
    assert all(n % gradient.planned(1, n, 3, 2, 2).group == 0 for n in counts)


def test_the_bound_notices_one_lost_token():
    layout = BlockLayout(36, 24, 4)
    x, grad_y = random(20, 36), random(20, 24, seed=1)
    assert_summed(kernels.outer_product(x, grad_y, layout, torch.float32), x, grad_y, layout)
    with pytest.raises(AssertionError, match="beyond the bound"):
        assert_summed(kernels.outer_product(x[:19], grad_y[:19], layout, torch.float32), x, grad_y, layout)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_the_gradient_for_any_size(data):
    in_features, out_features = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80))
    num_blocks = data.draw(st.integers(1, min(in_features, out_features)))
    tokens = data.draw(st.sampled_from([0, 1, 3, 63, 65, 511, 513, 800]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    layout, seed = BlockLayout(in_features, out_features, num_blocks), data.draw(st.integers(0, 2**16))
    x, grad_y = random(tokens, in_features, dtype=dtype, seed=seed), random(tokens, out_features, dtype=dtype, seed=1)
    assert_summed(kernels.outer_product(x, grad_y, layout, torch.float32), x, grad_y, layout)


@pytest.mark.parametrize("along_inputs", [True, False], ids=["inputs", "outputs"])
def test_slices_of_a_matrix(along_inputs, memory_is_filled):
    size = (40, 28, 4)
    cuts = [(0, 13), (13, 26), (26, 40)] if along_inputs else [(0, 3), (3, 17), (17, 28)]
    for part in BlockLayout(*size).cut(cuts, along_inputs):
        x, grad_y = random(9, part.in_features), random(9, part.out_features, seed=1)
        actual = kernels.outer_product(x, grad_y, part, torch.float32)
        assert_summed(actual, x, grad_y, part)
        assert torch.equal(actual == 0, exact(x, grad_y, part)[0] == 0)


def test_any_strides():
    layout = BlockLayout(36, 24, 4)
    wide = random(80, 100)
    for x in (
        wide[::2, 3:39],
        wide[:40, 2:74:2],
        wide.T[:40, :36],
        wide[:1, :36].expand(40, -1),
        wide[:40, :1].expand(-1, 36),
    ):
        grad_y = random(40, 24, seed=1)
        assert_summed(kernels.outer_product(x, grad_y, layout, torch.float32), x, grad_y, layout)
        assert_summed(kernels.outer_product(grad_y, x, layout.transposed, torch.float32), grad_y, x, layout.transposed)


def test_no_tokens_and_values_that_are_not_finite():
    layout = BlockLayout(6, 4, 2)
    assert torch.equal(
        kernels.outer_product(torch.ones(0, 6), torch.ones(0, 4), layout, torch.float32), torch.zeros(2, 3, 2)
    )
    # A spoiled value spoils its block's row, and nothing of the neighbours' that shares the tile.
    x, grad_y = torch.ones(3, 6), torch.ones(3, 4)
    x[1, 1] = torch.nan
    expected = torch.full((2, 3, 2), 3.0)
    expected[0, 1] = torch.nan
    actual = kernels.outer_product(x, grad_y, layout, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_float64_is_summed_in_float64():
    layout = BlockLayout(70, 67, 4)
    x, grad_y = random(300, 70, dtype=torch.float64), random(300, 67, dtype=torch.float64, seed=1)
    actual = kernels.outer_product(x, grad_y, layout, torch.float64)
    torch.testing.assert_close(actual, exact(x, grad_y, layout)[0], rtol=1e-12, atol=1e-12)


def test_the_product_takes_its_gradient_from_the_kernels_where_they_are_let(monkeypatch):
    layout = BlockLayout(36, 24, 4)
    # On a CPU they are not asked for few tokens.
    x, grad_y, blocks = random(2, 50, 36), random(2, 50, 24, seed=1), random(*layout.blocks_shape, seed=2)
    calls, whole = [], kernels.outer_product
    monkeypatch.setattr(kernels, "outer_product", lambda *args: calls.append(args) or whole(*args))
    for wanted, expected in (("", 0), ("0", 0), ("cpu", 1)):
        monkeypatch.setenv(backend.SWITCH, wanted)
        leaf = blocks.clone().requires_grad_()
        (grad,) = torch.autograd.grad(block_diagonal_linear(x, leaf, layout), leaf, grad_y)
        assert len(calls) == expected
        assert_summed(grad, x.flatten(0, 1), grad_y.flatten(0, 1), layout)
    assert backend.kernels_for(torch.device("cpu")) is kernels
    assert backend.kernels_for(torch.device("meta")) is None
    leaves = [random(3, 6, dtype=torch.float64).requires_grad_(), random(2, 3, 2, dtype=torch.float64).requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda x, b: block_diagonal_linear(x, b, BlockLayout(6, 4, 2)), leaves)


def test_tensors_without_memory_are_left_to_torch():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout = BlockLayout(36, 24, 4)
    with FakeTensorMode():
        made = kernels.outer_product(torch.ones(5, 36), torch.ones(5, 24), layout, torch.float32)
    assert made.shape == layout.blocks_shape


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def views(layout, weights, blocks):
    """The rows of a table for weights of one layout: views of the weights and of the blocks."""
    return [
        pair
        for weight, own in zip(weights, blocks, strict=True)
        for pair in ((tile.of_weight(weight), tile.of_blocks(own)) for tile in layout.tiles)
    ]


def turned(tensor):
    """The same values with the last two dimensions exchanged in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def assert_written_and_restored(weights, rows, saved_like=torch.empty_like):
    """Every entry of the weights, outside of the diagonals too, is to the bit what torch's addition makes of it."""
    before = [weight.clone() for weight in weights]
    saved = [saved_like(view).fill_(7) for view, _ in rows]
    bases = [view.clone() for view, _ in rows]
    table = kernels.DiagonalTable([view for view, _ in rows], [own for _, own in rows], saved)
    for _ in range(2):
        table.write()
        written = [weight.clone() for weight in weights]
        for kept, base in zip(saved, bases, strict=True):
            assert torch.equal(bits(kept), bits(base))
        table.restore()
        for weight, base in zip(weights, before, strict=True):
            assert torch.equal(bits(weight), bits(base))
    # The same by torch, in the weights themselves, since the views are of these.
    for view, own in rows:
        wide = torch.float64 if torch.float64 in (view.dtype, own.dtype) else torch.float32
        view.copy_(view.to(wide) + own.to(wide))
    for weight, ours, base in zip(weights, written, before, strict=True):
        assert torch.equal(bits(ours), bits(weight))
        assert not torch.equal(ours, base), "nothing was added"
        weight.copy_(base)


ALL = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("blocks_dtype", ALL, ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("size", [(70, 100, 4), (10, 9, 4), (130, 6, 2)], ids=str)
def test_the_diagonals_are_written_and_restored(size, dtype, blocks_dtype):
    layout = BlockLayout(*size)
    linear_weight = random(size[1], size[0], dtype=dtype)
    convolution = random(size[0], size[1], dtype=dtype, seed=1).T
    blocks = [random(*layout.blocks_shape, dtype=blocks_dtype, seed=seed) for seed in (2, 3)]
    assert_written_and_restored([linear_weight, convolution], views(layout, [linear_weight, convolution], blocks))


@pytest.mark.parametrize(
    "saved_like", [torch.empty_like, lambda t: turned(torch.empty_like(t))], ids=["like", "turned"]
)
@pytest.mark.parametrize("stack", [(3,), (2, 3)], ids=str)
def test_stacks_of_experts_of_any_strides(stack, saved_like):
    layout = BlockLayout(10, 14, 4, stack)
    weights = [
        random(*stack, 14, 10, dtype=torch.bfloat16),
        turned(random(*stack, 14, 10, dtype=torch.bfloat16, seed=1)),
    ]
    blocks = [turned(random(*layout.blocks_shape, seed=2)), random(*layout.blocks_shape, 2, seed=3)[..., 0]]
    assert_written_and_restored(weights, views(layout, weights, blocks), saved_like)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_the_diagonals_for_any_sizes(data):
    weights, rows = [], []
    for seed in range(data.draw(st.integers(1, 3))):
        in_features, out_features = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
        layout = BlockLayout(in_features, out_features, data.draw(st.integers(1, min(in_features, out_features))))
        turn = data.draw(st.sampled_from([turned, torch.clone]))
        weight = turn(random(out_features, in_features, dtype=torch.bfloat16, seed=seed))
        # Larger than the smallest step of a weight, so that something is added to the smallest weight too.
        own = turn(4 + random(*layout.blocks_shape, seed=9 + seed))
        weights.append(weight)
        rows += views(layout, [weight], [own])
    assert_written_and_restored(weights, rows)


@pytest.mark.filterwarnings("ignore:.*encountered in add:RuntimeWarning")
def test_sums_are_rounded_once_to_nearest_and_ties_to_even():
    step = 2.0**-7
    inf, nan = float("inf"), float("nan")
    cases = [
        # A tie goes down to an even digit, or up to one.
        (1.0, step / 2, 1.0),
        (1.0 + step, step / 2, 1.0 + 2 * step),
        # A little more than a tie: cut off, or rounded to bf16 before the sum, it would stay 1.
        (1.0, step / 2 + 2.0**-20, 1.0 + step),
        (-1.0, -step * 0.75, -1.0 - step),
        (2.0 - step, step / 2, 2.0),
        (3.3895e38, 3e36, inf),
        (inf, 1.0, inf),
        (inf, -inf, nan),
        (nan, 1.0, nan),
        (-0.0, -0.0, -0.0),
        (5.0, -5.0, 0.0),
    ]
    base, added, expected = torch.tensor(cases, dtype=torch.float64).unbind(1)
    weight = base.to(torch.bfloat16).view(1, 1, -1)
    saved = torch.empty_like(weight)
    with_torch = weight.float() + added.float().view_as(weight)
    kernels.DiagonalTable([weight], [added.float().view_as(weight)], [saved]).write()
    torch.testing.assert_close(weight.flatten(), expected.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    number = ~weight.isnan()
    assert torch.equal(bits(weight[number]), bits(with_torch.to(torch.bfloat16)[number]))


@pytest.mark.filterwarnings("ignore:.*encountered in add:RuntimeWarning")
def test_restoring_keeps_the_bits_of_what_is_no_number():
    weight = torch.tensor([0x7F81, 0x7FC1, -63, -32768, 1], dtype=torch.int16).view(torch.bfloat16).view(1, 5, 1)
    before = bits(weight).clone()
    table = kernels.DiagonalTable([weight], [torch.ones(1, 5, 1)], [torch.empty_like(weight)])
    table.write()
    assert not torch.equal(bits(weight), before)
    table.restore()
    assert torch.equal(bits(weight), before)


@pytest.mark.filterwarnings("ignore:.*encountered in add:RuntimeWarning")
def test_no_number_stays_none_whatever_its_bits():
    # The GPU's own has all bits set, which a carry would turn into a zero.
    added = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32).view(1, 3, 1)
    weight = torch.ones(1, 3, 1, dtype=torch.bfloat16)
    kernels.DiagonalTable([weight], [added], [torch.empty_like(weight)]).write()
    assert weight.isnan().all()


class Launches:
    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.grids.append(grid)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_one_launch_for_each_pair_of_dtypes_and_nothing_else(monkeypatch):
    layouts = [BlockLayout(10, 9, 4), BlockLayout(70, 100, 2), BlockLayout(6, 8, 2, (3,))]
    rows = []
    for layout in layouts:
        for dtype in (torch.bfloat16, torch.float32):
            weight = random(*layout.stack, layout.out_features, layout.in_features, dtype=dtype)
            rows += views(layout, [weight], [random(*layout.blocks_shape)])
    table = kernels.DiagonalTable(*map(list, zip(*((w, b, torch.empty_like(w)) for w, b in rows), strict=True)))
    written, restored = Launches(), Launches()
    monkeypatch.setattr(table_kernels, "_write", written)
    monkeypatch.setattr(table_kernels, "_restore", restored)
    with Operations() as operations:
        table.write()
        table.restore()
        assert operations.seen == []
        torch.zeros(1)
    assert len(operations.seen) == 1, "the operations are not seen at all"
    # 2 + 6 + 3 rows of one program, but for the whole blocks of 35 x 50, which two programs share.
    assert written.grids == restored.grids
    assert len(written.grids) == 2


def test_tables_without_rows_and_rows_without_entries():
    kernels.DiagonalTable([], [], []).write()
    empty = torch.empty(0, 3, 2)
    weight, blocks = torch.ones(2, 3, 2), torch.full((2, 3, 2), 0.5)
    table = kernels.DiagonalTable([empty, weight], [empty, blocks], [empty.clone(), weight.clone()])
    table.write()
    assert torch.equal(weight, torch.full((2, 3, 2), 1.5))
    table.restore()
    assert torch.equal(weight, torch.ones(2, 3, 2))


def test_errors_name_what_does_not_fit():
    weight, blocks = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    table = kernels.DiagonalTable
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\), \(2, 3, 3\) and \(2, 3, 4\)"):
        table([weight], [blocks[..., :3]], [weight.clone()])
    with pytest.raises(ValueError, match="of 3 to 5 dimensions"):
        table([weight[0]], [blocks[0]], [weight[0]])
    with pytest.raises(ValueError, match="shorter"):
        table([weight, weight], [blocks], [weight])
    with pytest.raises(TypeError, match=r"saved is torch\.float16 and the weight torch\.float32"):
        table([weight], [blocks], [weight.half()])
    with pytest.raises(TypeError, match=r"not in torch\.int8"):
        table([weight.to(torch.int8)], [blocks], [weight.to(torch.int8)])
    with pytest.raises(ValueError, match=r"on one device, got \['cpu', 'meta'\]"):
        table([weight], [blocks.to("meta")], [weight.clone()])


@pytest.fixture
def a_gpu(monkeypatch):
    """What the choice of kernels asks of a GPU is answered as by one that has them compiled."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "try_out", lambda device: None)
    backend._compiled.cache_clear()
    yield torch.device("cuda", 0)
    backend._compiled.cache_clear()


def test_a_gpu_has_the_kernels(a_gpu):
    assert backend.kernels_for(a_gpu) is kernels


def test_a_gpu_may_be_told_not_to_use_them(a_gpu, monkeypatch):
    monkeypatch.setenv(backend.SWITCH, "0")
    assert backend.kernels_for(a_gpu) is None


def test_a_gpu_of_before_bf16_has_none(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend.kernels_for(a_gpu) is None


def test_the_interpreter_is_not_let_near_a_gpu(a_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert backend.kernels_for(a_gpu) is None


def test_where_triton_cannot_compile_torch_is_used_and_one_warning_says_so(a_gpu, monkeypatch):
    def try_out(device):
        raise RuntimeError("Failed to find C compiler.\nMore lines.")

    monkeypatch.setattr(kernels, "try_out", try_out)
    with pytest.warns(UserWarning, match=r"for cuda:0 \(RuntimeError: Failed to find C compiler\.\)") as warned:
        chosen = [backend.kernels_for(a_gpu) for _ in range(2)]
    assert chosen == [None, None]
    assert len(warned) == 1


def test_what_is_tried_out_is_a_kernel(monkeypatch):
    launched = Launches()
    monkeypatch.setattr(gradient, "_outer_product", launched)
    kernels.try_out(torch.device("cpu"))
    assert launched.grids == [(1, 1)]


def run_python(*args, **environment):
    done = subprocess.run(
        [sys.executable, *args], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_library_works_without_triton():
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        import diablo.tuner
        from diablo import BlockLayout, block_diagonal_linear
        from diablo.ops.backend import kernels_for
        # Nothing has tried to import them yet.
        assert "diablo.ops.kernels" not in sys.modules
        layout = BlockLayout(6, 4, 2)
        blocks = torch.ones(layout.blocks_shape, requires_grad=True)
        block_diagonal_linear(torch.ones(5, 6), blocks, layout).sum().backward()
        print(blocks.grad.sum().item(), kernels_for(torch.device("cpu")))
    """
    assert run_python("-c", code, DIABLO_KERNELS="cpu").split() == ["60.0", "None"]


def test_every_kernel_compiles_for_the_gpus_of_both_makers(tmp_path):
    # Triton's own cache would hide that nothing is compiled any more.
    script = Path(__file__).with_name("kernel_compilation.py")
    output = run_python(str(script), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(output.splitlines()) == 4 * 2, output
