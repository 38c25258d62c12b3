"""Turns on one model: nobody waits beyond the bound, nothing is lost, and memory is kept within its limit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diablo.serving.scheduling import Job, Limits, Scheduler

LIMITS = Limits(rows=3, steps=4, tokens=60, prefill=20)
ROWS = st.lists(
    st.tuples(st.sampled_from("abcde"), st.integers(1, 12), st.integers(1, 25), st.integers(0, 30)),
    min_size=1,
    max_size=30,
)
MIXED = st.sampled_from(["never", "auto", "always"])
# Which adapters can share turns: "e" can with nobody, as the base model.
GROUPS = {"a": 1, "b": 1, "c": 1, "d": 2}


@dataclass(frozen=True)
class Forward:
    """What a forward did: who had the turn, what began in it, and what else wrote a token in it."""

    turn: tuple[str, ...]
    is_shared: bool
    begun: list[int]
    going: list[int]


def served(rows: list[tuple[str, int, int, int]], mixed: str, limits: Limits = LIMITS) -> list[Forward]:
    """The forwards that serve rows.

    Args:
        rows: for each the adapter, the tokens of the prompt, those that it writes, and the forward at which it comes.
        mixed: when adapters share turns.
        limits: the other limits.
    """
    limits = Limits(limits.rows, limits.steps, limits.tokens, limits.prefill, mixed)
    scheduler = Scheduler(limits, GROUPS.get)
    coming = sorted(enumerate(rows), key=lambda item: item[1][3])
    left = {number: written for number, (_, _, written, _) in enumerate(rows)}
    forwards: list[Forward] = []
    started: dict[int, str] = {}

    def arrive() -> None:
        while coming and coming[0][1][3] <= len(forwards):
            number, (adapter, prompt, written, _) = coming.pop(0)
            scheduler.add(Job(number, adapter, prompt, prompt + written))

    def forward(begun: list[int], going: list[int]) -> None:
        forwards.append(Forward(tuple(scheduler.turn), scheduler.is_shared, begun, going))
        scheduler.step()
        assert scheduler.tokens <= limits.tokens
        for key in begun + going:
            left[key] -= 1
            if left[key] == 0:
                scheduler.remove(key)
                del started[key]
        arrive()

    while coming or scheduler.waiting or scheduler.begun:
        arrive()
        if not scheduler.begin_turn():
            assert not scheduler.waiting
            forwards.append(Forward((), False, [], []))
            continue
        assert scheduler.goes_on()
        while scheduler.goes_on():
            admitted = [job.key for job in scheduler.admit()]
            started |= {key: rows[key][0] for key in admitted}
            together = [key for key, whose in started.items() if whose in scheduler.turn]
            assert len(together) <= limits.rows
            forward(admitted, [] if admitted else together)
    assert not any(left.values())
    return forwards


@given(ROWS, MIXED)
def test_every_row_is_served_once_and_in_the_order_of_its_adapter(rows, mixed):
    forwards = served(rows, mixed)
    begun = [key for forward in forwards for key in forward.begun]
    assert sorted(begun) == list(range(len(rows)))
    for adapter in "abcde":
        own = [key for key in begun if rows[key][0] == adapter]
        assert own == sorted(own, key=lambda key: (rows[key][3], key))
    for forward in forwards:
        assert bool(forward.begun) + bool(forward.going) == bool(forward.turn)
        assert {rows[key][0] for key in forward.begun + forward.going} <= set(forward.turn)


@given(ROWS, MIXED)
def test_only_adapters_of_one_group_share_a_turn_and_only_where_that_is_allowed(rows, mixed):
    for forward in served(rows, mixed):
        assert len({GROUPS.get(adapter, adapter) for adapter in forward.turn}) <= 1
        assert forward.is_shared or len(forward.turn) <= 1
        assert not (forward.is_shared and (mixed == "never" or forward.turn[0] in "de"))


@given(ROWS, MIXED)
def test_an_adapter_waits_for_no_more_than_one_turn_of_each_other(rows, mixed):
    # Memory is no bound here.
    limits = Limits(rows=3, steps=4, tokens=10_000, prefill=20)
    forwards = served(rows, mixed, limits)
    for adapter in {row[0] for row in rows}:
        waited, others = 0, set()
        for at, forward in enumerate(forwards):
            has_work = any(
                row[0] == adapter and row[3] <= at and not _is_done(number, row, forwards[:at])
                for number, row in enumerate(rows)
            )
            whose = {rows[key][0] for key in forward.begun + forward.going}
            if adapter in whose or not has_work:
                waited, others = 0, set()
                continue
            waited += 1
            others |= whose
            # The turn that is under way when a row comes may have one budget behind it and one before it.
            assert waited <= limits.steps * len(others)


def _is_done(number: int, row: tuple[str, int, int, int], forwards: list[Forward]) -> bool:
    return sum(number in forward.begun + forward.going for forward in forwards) == row[2]


@given(ROWS, st.integers(0, 29), MIXED)
def test_a_row_that_is_removed_leaves_room_and_no_trace(rows, which, mixed):
    scheduler = Scheduler(Limits(rows=3, steps=4, tokens=60, prefill=20, mixed=mixed), GROUPS.get)
    for number, (adapter, prompt, written, _) in enumerate(rows):
        scheduler.add(Job(number, adapter, prompt, prompt + written))
    scheduler.begin_turn()
    scheduler.admit()
    scheduler.remove(which)
    for number in range(len(rows)):
        scheduler.remove(number)
    assert not scheduler.goes_on()
    assert (scheduler.waiting, scheduler.begun, scheduler.tokens, scheduler.begin_turn()) == (0, 0, 0, [])


def keys(jobs: list[Job]) -> list:
    return [job.key for job in jobs]


def waiting(*sizes: tuple[str, int], **limits: object) -> Scheduler:
    """A scheduler with so many rows of each adapter, named by the adapter and a number."""
    scheduler = Scheduler(Limits(**limits), GROUPS.get)
    for adapter, count in sizes:
        for number in range(count):
            scheduler.add(Job(f"{adapter}{number}", adapter, 1, 10))
    return scheduler


def test_adapters_whose_rows_fit_into_one_batch_share_it_and_a_full_one_has_turns_for_itself():
    assert waiting(("a", 3), ("b", 1), ("e", 1), ("c", 1), rows=8).begin_turn() == ["a", "b", "c"]
    # Ten rows do not fit into one batch of eight, and three quarters of that are six.
    scheduler = waiting(("a", 6), ("b", 3), ("e", 1), ("c", 1), rows=8, steps=1)
    turns = []
    for _ in range(3):
        turns.append((scheduler.begin_turn().copy(), scheduler.is_shared))
        scheduler.admit()
        scheduler.step()
    assert turns == [(["a"], False), (["b", "c"], True), (["e"], False)]
    assert waiting(("a", 4), ("b", 3), ("c", 5), rows=8, mixed="always").begin_turn() == ["a", "b", "c"]
    assert waiting(("a", 5), ("b", 3), ("c", 1), rows=8).begin_turn() == ["a", "b"]
    assert waiting(("a", 1), ("b", 1), rows=8, mixed="never").begin_turn() == ["a"]
    # Those of another group, and the base model, share with none of these.
    assert waiting(("e", 1), ("d", 1), ("a", 1)).begin_turn() == ["e"]


def test_another_adapter_joins_a_shared_turn_in_the_middle_and_the_last_one_goes_on_alone():
    scheduler = waiting(("a", 1), ("b", 1), rows=3)
    assert scheduler.begin_turn() == ["a", "b"]
    assert keys(scheduler.admit()) == ["a0", "b0"]
    scheduler.step()
    scheduler.add(Job("c0", "c", 1, 10))
    # What has just begun writes a token first.
    assert keys(scheduler.admit()) == []
    scheduler.step()
    assert keys(scheduler.admit()) == ["c0"]
    assert scheduler.turn == ["a", "b", "c"]
    scheduler.remove("a0")
    assert scheduler.goes_on()
    scheduler.remove("b0")
    assert not scheduler.goes_on()
    assert scheduler.begin_turn() == ["c"]
    assert not scheduler.is_shared
    # Alone it stays only until another comes.
    scheduler.add(Job("a1", "a", 1, 10))
    assert not scheduler.goes_on()
    assert sorted(scheduler.begin_turn()) == ["a", "c"]


def test_a_long_row_is_not_passed_by_for_ever_by_short_ones():
    scheduler = Scheduler(Limits(rows=8, tokens=100))
    scheduler.add(Job("short", "a", 1, 60))
    assert scheduler.begin_turn() == ["a"]
    assert keys(scheduler.admit()) == ["short"]
    scheduler.add(Job("long", "b", 1, 90))
    scheduler.add(Job("later", "a", 1, 10))
    # There is room for the later one, and it would go on like this.
    assert scheduler.admit() == []
    scheduler.remove("short")
    assert scheduler.begin_turn() == ["b"]
    assert keys(scheduler.admit()) == ["long"]
    assert scheduler.begin_turn() == ["a"]
    assert keys(scheduler.admit()) == ["later"]


def test_alone_an_adapter_goes_on_and_a_turn_ends_when_another_comes():
    scheduler = Scheduler(Limits(steps=2))
    scheduler.add(Job(1, "a", 1, 9))
    assert scheduler.begin_turn() == ["a"]
    scheduler.admit()
    for _ in range(5):
        scheduler.step()
    assert scheduler.goes_on()
    scheduler.add(Job(2, "b", 1, 9))
    assert not scheduler.goes_on()
    assert scheduler.begin_turn() == ["b"]


def test_prompts_of_one_forward_are_bounded_and_a_single_long_one_is_not_left_out():
    scheduler = Scheduler(Limits(prefill=100))
    for number, prompt in enumerate((40, 60, 10, 500)):
        scheduler.add(Job(number, "a", prompt, prompt + 1))
    scheduler.begin_turn()
    assert [keys(scheduler.admit()) for _ in range(4)] == [[0], [1], [2], [3]]


def test_what_could_never_begin_is_refused():
    scheduler = Scheduler(LIMITS)
    with pytest.raises(ValueError, match="A row of 61 tokens exceeds the 60"):
        scheduler.add(Job(1, "a", 60, 61))
    scheduler.add(Job(1, "a", 1, 2))
    with pytest.raises(ValueError, match="is there already"):
        scheduler.add(Job(1, "b", 1, 2))
