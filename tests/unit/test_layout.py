"""The geometry of the blocks against hand-computed numbers, the authors' formulas and entry-by-entry loops."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import LAYOUTS, dense_delta

from diablo import BlockLayout
from diablo.layout import Tile

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def sizes(draw: st.DrawFn, largest: int = 24) -> tuple[int, int, int]:
    in_features = draw(st.integers(1, largest))
    out_features = draw(st.integers(1, largest))
    return in_features, out_features, draw(st.integers(1, min(in_features, out_features)))


def write_ones(layout: BlockLayout, weight: torch.Tensor) -> None:
    """Add one, through the tiles, so that an entry that two tiles share would show as a two."""
    for tile in layout.tiles:
        tile.of_weight(weight).add_(1)


# The numbers here were worked out on paper from d = ceil(m / N) and N_eff = max(ceil(m1 / d1), ceil(m2 / d2)).
@pytest.mark.parametrize(
    ("size", "shape", "tiles"),
    [
        ((12, 8, 4), (4, 3, 2), [Tile(0, 4, 3, 2, 0, 0)]),
        ((6, 4, 1), (1, 6, 4), [Tile(0, 1, 6, 4, 0, 0)]),
        # Three whole blocks; the fourth is cut to one row, but its columns start where the output ends.
        ((10, 9, 4), (4, 3, 3), [Tile(0, 3, 3, 3, 0, 0)]),
        # Both edges cut the same, third, block: one of its three rows and one of its two columns are inside.
        ((7, 5, 3), (3, 3, 2), [Tile(0, 2, 3, 2, 0, 0), Tile(2, 1, 1, 1, 6, 4)]),
        # Only the input cuts the last block.
        ((10, 8, 4), (4, 3, 2), [Tile(0, 3, 3, 2, 0, 0), Tile(3, 1, 1, 2, 9, 6)]),
        # Only the output cuts it.
        ((12, 7, 4), (4, 3, 2), [Tile(0, 3, 3, 2, 0, 0), Tile(3, 1, 3, 1, 9, 6)]),
        # ceil(9 / 4) = 3, and three such blocks cover both sides: one fewer than asked for.
        ((9, 9, 4), (3, 3, 3), [Tile(0, 3, 3, 3, 0, 0)]),
        # Blocks of 2 x 5: the input ends inside the fourth, the two after it are wholly outside.
        ((7, 30, 6), (6, 2, 5), [Tile(0, 3, 2, 5, 0, 0), Tile(3, 1, 1, 5, 6, 15)]),
        # ceil(1023 / 8) = 128, ceil(21 / 8) = 3: seven blocks of outputs, the eighth block has none left.
        ((1023, 21, 8), (8, 128, 3), [Tile(0, 7, 128, 3, 0, 0)]),
        # As many blocks as the shorter side has features: blocks one column wide.
        ((1023, 21, 21), (21, 49, 1), [Tile(0, 20, 49, 1, 0, 0), Tile(20, 1, 43, 1, 980, 20)]),
    ],
)
def test_hand_computed_geometry(size, shape, tiles):
    layout = BlockLayout(*size)
    assert layout.blocks_shape == shape
    assert (layout.num_stored_blocks, layout.block_in, layout.block_out) == shape
    assert list(layout.tiles) == tiles
    assert layout.num_parameters == math.prod(shape)


def test_share_of_parameters_that_the_paper_reports():
    # LLaMA2-7B: q, k, v are 4096 x 4096, up and down 4096 x 11008, in 32 layers; N = 64 gives 70.25 M.
    per_layer = 3 * BlockLayout(4096, 4096, 64).num_parameters
    per_layer += BlockLayout(4096, 11008, 64).num_parameters + BlockLayout(11008, 4096, 64).num_parameters
    assert round(32 * per_layer / 1e6, 2) == 70.25


@PROPERTY
@given(sizes(largest=5000))
def test_authors_formulas(size):
    in_features, out_features, num_blocks = size
    layout = BlockLayout(*size)
    d1, d2 = math.ceil(in_features / num_blocks), math.ceil(out_features / num_blocks)
    stored = max(math.ceil(in_features / d1), math.ceil(out_features / d2))
    assert layout.blocks_shape == (stored, d1, d2)
    assert stored <= num_blocks
    assert stored * d1 >= in_features
    assert stored * d2 >= out_features


@pytest.mark.parametrize("size", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_tiles_cover_every_entry_of_the_blocks_once(size):
    layout = BlockLayout(*size)
    weight = torch.zeros(layout.out_features, layout.in_features)
    write_ones(layout, weight)
    assert torch.equal(weight, dense_delta(torch.ones(layout.blocks_shape), layout.in_features, layout.out_features))


@PROPERTY
@given(sizes())
def test_tiles_cover_every_entry_of_the_blocks_once_for_any_size(size):
    layout = BlockLayout(*size)
    weight = torch.zeros(layout.out_features, layout.in_features)
    write_ones(layout, weight)
    assert torch.equal(weight, dense_delta(torch.ones(layout.blocks_shape), layout.in_features, layout.out_features))
    # The runs over inputs and outputs must not overlap either, and stay inside.
    for features, of in ((layout.in_features, Tile.of_input), (layout.out_features, Tile.of_output)):
        row = torch.zeros(1, features)
        for tile in layout.tiles:
            of(tile, row).add_(1)
        assert row.max() == 1
        # A run is a prefix: no feature is left out between the tiles.
        assert torch.equal(row, row.sort(descending=True).values)


def storages(out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    """Zero weights of the same shape whose entries lie differently in memory."""
    return {
        "contiguous": torch.zeros(out_features, in_features),
        "transposed": torch.zeros(in_features, out_features).t(),
        "offset": torch.zeros(out_features + 2, in_features)[2:],
        "strided": torch.zeros(2 * out_features + 1, 3 * in_features + 2)[1::2, 2::3],
        "transposed_strided": torch.zeros(2 * in_features + 1, 3 * out_features + 2)[1::2, 2::3].t(),
    }


@PROPERTY
@given(sizes(largest=14))
def test_of_weight_writes_through_for_any_strides(size):
    layout = BlockLayout(*size)
    generator = torch.Generator().manual_seed(0)
    # From 1 on, so that an entry which was not written differs from every entry that was.
    blocks = torch.rand(layout.blocks_shape, generator=generator) + 1
    expected = dense_delta(blocks, layout.in_features, layout.out_features)
    for name, weight in storages(layout.out_features, layout.in_features).items():
        for tile in layout.tiles:
            tile.of_weight(weight).copy_(tile.of_blocks(blocks))
        assert torch.equal(weight, expected), name
        # What lies around the weight in the same storage is somebody else's.
        around = torch.empty(0).set_(weight.untyped_storage())
        assert torch.count_nonzero(around) == torch.count_nonzero(expected), name


def test_of_weight_reads_the_block_that_trains_that_part():
    weight = torch.arange(35.0).reshape(5, 7)
    whole, cut = BlockLayout(7, 5, 3).tiles
    # Block 1 takes inputs 3..5 to outputs 2..3, and holds the weight's part transposed.
    assert whole.of_weight(weight)[1].tolist() == [[17.0, 24.0], [18.0, 25.0], [19.0, 26.0]]
    assert cut.of_weight(weight).tolist() == [[[34.0]]]


@pytest.mark.parametrize("size", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_views_share_memory_and_have_the_documented_shapes(size):
    layout = BlockLayout(*size)
    x, y = torch.zeros(2, layout.in_features), torch.zeros(2, layout.out_features)
    blocks = torch.zeros(layout.blocks_shape)
    for tile in layout.tiles:
        for view, base, shape in (
            (tile.of_input(x), x, (tile.count, 2, tile.block_in)),
            (tile.of_output(y), y, (tile.count, 2, tile.block_out)),
            (tile.of_blocks(blocks), blocks, (tile.count, tile.block_in, tile.block_out)),
        ):
            assert tuple(view.shape) == shape
            assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


@PROPERTY
@given(sizes())
def test_transposed_is_an_involution_with_the_same_blocks_transposed(size):
    layout = BlockLayout(*size)
    transposed = layout.transposed
    assert transposed.transposed == layout
    count, rows, columns = layout.blocks_shape
    assert transposed.blocks_shape == (count, columns, rows)
    assert [(t.first, t.count, t.block_out, t.block_in, t.out_start, t.in_start) for t in transposed.tiles] == [
        (t.first, t.count, t.block_in, t.block_out, t.in_start, t.out_start) for t in layout.tiles
    ]


@pytest.mark.parametrize("num_blocks", [0, -1, 5, 1000])
def test_num_blocks_out_of_bounds(num_blocks):
    with pytest.raises(ValueError, match=rf"num_blocks={num_blocks} .*in_features=7, out_features=4.* from 1 to 4 "):
        BlockLayout(7, 4, num_blocks)


@pytest.mark.parametrize("size", [(0, 4, 1), (4, 0, 1), (-3, 4, 1)])
def test_matrix_without_entries(size):
    with pytest.raises(ValueError, match="does not fit a matrix"):
        BlockLayout(*size)


def test_bounds_themselves_are_allowed():
    assert BlockLayout(7, 4, 1).blocks_shape == (1, 7, 4)
    assert BlockLayout(7, 4, 4).blocks_shape == (4, 2, 1)
    assert BlockLayout(7, 4, 4).max_num_blocks == 4


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("value", [True, False, 2.0, "2", None], ids=repr)
def test_sizes_that_are_not_integers(position, value):
    size = [4, 4, 2]
    size[position] = value
    name = ("in_features", "out_features", "num_blocks")[position]
    with pytest.raises(TypeError, match=f"{name} must be an integer, got {value!r}"):
        BlockLayout(*size)


@PROPERTY
@given(sizes(), st.data())
def test_a_layout_is_found_again_by_the_shape_of_its_blocks(size, data):
    in_features, out_features, num_blocks = size
    layout = BlockLayout(*size, stack=(3,))
    shape = layout.blocks_shape
    assert layout.with_shape(shape) is layout
    other = BlockLayout(in_features, out_features, data.draw(st.integers(1, layout.max_num_blocks)), stack=(3,))
    found = other.with_shape(shape)
    assert (found.blocks_shape, found.tiles) == (shape, layout.tiles)
    fitting = [n for n in range(1, layout.max_num_blocks + 1) if replace(layout, num_blocks=n).blocks_shape == shape]
    assert found.num_blocks == (other.num_blocks if other.num_blocks in fitting else fitting[0])
    assert num_blocks in fitting


@pytest.mark.parametrize("shape", [(), (4,), (3, 2), (4, 3, 3), (5, 3, 2), (0, 3, 2), (100, 3, 2), (2, 4, 3, 2)])
def test_a_shape_that_no_number_of_blocks_gives(shape):
    assert BlockLayout(12, 8, 4).with_shape(shape) is None


def test_layouts_are_values():
    assert BlockLayout(7, 5, 3) == BlockLayout(7, 5, 3)
    assert hash(BlockLayout(7, 5, 3)) == hash(BlockLayout(7, 5, 3))
    assert BlockLayout(7, 5, 3) != BlockLayout(7, 5, 2)
    with pytest.raises(FrozenInstanceError):
        BlockLayout(7, 5, 3).num_blocks = 2


@PROPERTY
@given(sizes(), st.data(), st.booleans())
def test_slices_have_every_entry_once_and_each_in_its_place(size, data, along_inputs):
    layout = BlockLayout(*size)
    length = size[0] if along_inputs else size[1]
    # Processes can be left without anything, where there are more of them than features.
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, length), min_size=1, max_size=3))), length]
    slices = list(pairwise(edges))
    whole = torch.arange(1.0, 1 + layout.num_parameters).reshape(layout.blocks_shape)
    dense, seen = dense_delta(whole, *size[:2]), torch.zeros(layout.blocks_shape)
    put_together = torch.zeros(layout.blocks_shape)
    parts = layout.cut(slices, along_inputs)
    stored = parts[0].num_stored_blocks
    if stored * len(parts) == layout.num_stored_blocks:
        # What looks like the whole is the whole.
        assert all(part.first == number * stored for number, part in enumerate(parts) if part.tiles)
    for part, (start, stop) in zip(parts, slices, strict=True):
        own = part.taken_from(whole)
        assert tuple(own.shape) == part.blocks_shape
        assert part.blocks_shape[0] == stored
        update = torch.zeros(part.out_features, part.in_features)
        for tile in part.tiles:
            tile.of_weight(update).add_(tile.of_blocks(own))
        expected = dense[:, start:stop] if along_inputs else dense[start:stop]
        assert torch.equal(update, expected)
        # What is stored beside the slice's own entries is zero: norms over the processes are those of the whole.
        assert float(own.square().sum()) == float(expected.square().sum())
        turned = torch.zeros(part.in_features, part.out_features)
        for tile in part.transposed.tiles:
            tile.of_weight(turned).add_(tile.of_blocks(own.transpose(1, 2)))
        assert torch.equal(turned, expected.T)
        part.put_into(put_together, own)
        part.put_into(seen, torch.ones_like(own))
    assert torch.equal(put_together, whole * seen)
    assert torch.equal(dense_delta(put_together, *size[:2]), dense)


def test_slices_that_end_between_blocks_store_whole_blocks_only():
    parts = BlockLayout(12, 24, 6).cut([(0, 12), (12, 24)], along_inputs=False)
    assert [(part.first, part.blocks_shape) for part in parts] == [(0, (3, 2, 4)), (3, (3, 2, 4))]
    assert [part.tiles for part in parts] == [(Tile(0, 3, 2, 4, 0, 0),), (Tile(0, 3, 2, 4, 6, 0),)]


def test_a_block_that_a_slice_cuts_through_is_stored_twice():
    parts = BlockLayout(9, 9, 3).cut([(0, 5), (5, 9)], along_inputs=True)
    assert [part.blocks_shape for part in parts] == [(2, 3, 3), (2, 3, 3)]
    assert parts[0].tiles == (Tile(0, 1, 3, 3, 0, 0), Tile(1, 1, 2, 3, 3, 3))
    assert parts[1].tiles == (Tile(0, 1, 1, 3, 0, 3, row=2), Tile(1, 1, 3, 3, 1, 6))
