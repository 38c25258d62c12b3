"""Batches of which none has a text twice."""

from __future__ import annotations

import random

import pytest

from diablo.data.batching import DistinctSampler


def sampler_of(texts: list[frozenset[str]], batch: int = 8, forward: int = 4, seed: int = 0) -> DistinctSampler:
    lengths = [1 + len(max(own)) for own in texts]
    return DistinctSampler(lengths, batch, seed, texts, forward)


def often(rows: int, different: int, seed: int) -> list[frozenset[str]]:
    """Rows of an anchor that several have and a positive of their own, or one that another row has too."""
    chance = random.Random(seed)
    return [frozenset({f"a{chance.randrange(different)}", f"p{chance.randrange(2 * rows)}"}) for _ in range(rows)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [64, 61, 42])
def test_no_text_stands_twice_in_a_forward_and_each_row_comes_once_in_an_epoch(rows, seed):
    sampler = sampler_of(often(rows, 24, seed), seed=seed)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(rows))
        for first in range(0, rows, 4):
            texts = [text for index in order[first : first + 4] for text in sampler.texts[index]]
            assert len(set(texts)) == len(texts)
        assert not sampler.doubles()
        orders.append(order)
    assert orders[0] != orders[1]


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    texts = often(64, 24, 1)
    one, other = sampler_of(texts, seed=3), sampler_of(texts, seed=3)
    one.batches()
    one.set_epoch(2)
    other.set_epoch(2)
    assert list(one) == list(other)
    assert list(one) != list(sampler_of(texts, seed=3))


def test_rows_that_cannot_be_apart_are_named():
    texts = [frozenset({"the same", f"p{n}"}) for n in range(6)] + [frozenset({f"a{n}"}) for n in range(10)]
    # Six rows have the text, and there are four forwards.
    sampler = sampler_of(texts)
    assert len(sampler.doubles()) == 2
    assert all(index < 6 for index in sampler.doubles())
