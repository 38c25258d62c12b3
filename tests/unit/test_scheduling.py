"""Turns on one model: nobody waits beyond the bound, nothing is lost, and memory is kept within its limit."""

from __future__ import annotations

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


def served(rows: list[tuple[str, int, int, int]], limits: Limits = LIMITS) -> list[tuple[str, list[str], list[str]]]:
    """What each forward did: whose it was, what began in it, and what else wrote a token in it.

    Args:
        rows: for each the adapter, the tokens of the prompt, those that it writes, and the forward at which it comes.
        limits: the limits.
    """
    scheduler = Scheduler(limits)
    coming = sorted(enumerate(rows), key=lambda item: item[1][3])
    left = {number: written for number, (_, _, written, _) in enumerate(rows)}
    forwards: list[tuple[str, list[str], list[str]]] = []
    started: dict[int, str] = {}

    def arrive() -> None:
        while coming and coming[0][1][3] <= len(forwards):
            number, (adapter, prompt, written, _) = coming.pop(0)
            scheduler.add(Job(number, adapter, prompt, prompt + written))

    def forward(adapter: str, begun: list[int], going: list[int]) -> None:
        forwards.append((adapter, begun, going))
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
        adapter = scheduler.begin_turn()
        if adapter is None:
            assert not scheduler.waiting
            forwards.append(("", [], []))
            continue
        while scheduler.goes_on(adapter):
            going = [key for key, whose in started.items() if whose == adapter]
            if admitted := [job.key for job in scheduler.admit(adapter)]:
                started |= dict.fromkeys(admitted, adapter)
                forward(adapter, admitted, [])
            else:
                assert len(going) <= limits.rows
                forward(adapter, [], going)
    assert not any(left.values())
    return forwards


@given(ROWS)
def test_every_row_is_served_once_and_in_the_order_of_its_adapter(rows):
    forwards = served(rows)
    begun = [key for _, keys, _ in forwards for key in keys]
    assert sorted(begun) == list(range(len(rows)))
    for adapter in "abcde":
        own = [key for key in begun if rows[key][0] == adapter]
        assert own == sorted(own, key=lambda key: (rows[key][3], key))
    for adapter, keys, going in forwards:
        assert {rows[key][0] for key in keys + going} <= {adapter}


@given(ROWS)
def test_an_adapter_waits_for_no_more_than_one_turn_of_each_other(rows):
    # Memory is no bound here.
    limits = Limits(rows=3, steps=4, tokens=10_000, prefill=20)
    forwards = served(rows, limits)
    for adapter in {row[0] for row in rows}:
        waited, others = 0, set()
        for at, (whose, _, _) in enumerate(forwards):
            has_work = any(
                row[0] == adapter and row[3] <= at and not _is_done(number, row, forwards[:at])
                for number, row in enumerate(rows)
            )
            if whose == adapter or not has_work:
                waited, others = 0, set()
                continue
            waited += 1
            others.add(whose)
            # The turn that is under way when a row comes may have one budget behind it and one before it.
            assert waited <= limits.steps * len(others)


def _is_done(number: int, row: tuple[str, int, int, int], forwards: list[tuple[str, list[str], list[str]]]) -> bool:
    return sum(number in keys + going for _, keys, going in forwards) == row[2]


@given(ROWS, st.integers(0, 29))
def test_a_row_that_is_removed_leaves_room_and_no_trace(rows, which):
    scheduler = Scheduler(LIMITS)
    for number, (adapter, prompt, written, _) in enumerate(rows):
        scheduler.add(Job(number, adapter, prompt, prompt + written))
    adapter = scheduler.begin_turn()
    scheduler.admit(adapter)
    scheduler.remove(which)
    for number in range(len(rows)):
        scheduler.remove(number)
    assert (scheduler.waiting, scheduler.begun, scheduler.tokens, scheduler.begin_turn()) == (0, 0, 0, None)


def test_a_long_row_is_not_passed_by_for_ever_by_short_ones():
    scheduler = Scheduler(Limits(rows=8, tokens=100))
    scheduler.add(Job("short", "a", 1, 60))
    assert scheduler.begin_turn() == "a"
    assert [job.key for job in scheduler.admit("a")] == ["short"]
    scheduler.add(Job("long", "b", 1, 90))
    scheduler.add(Job("later", "a", 1, 10))
    # There is room for the later one, and it would go on like this.
    assert scheduler.admit("a") == []
    scheduler.remove("short")
    assert scheduler.begin_turn() == "b"
    assert [job.key for job in scheduler.admit("b")] == ["long"]
    assert [job.key for job in scheduler.admit("a")] == ["later"]


def test_alone_an_adapter_goes_on_and_a_turn_ends_when_another_comes():
    scheduler = Scheduler(Limits(steps=2))
    scheduler.add(Job(1, "a", 1, 9))
    assert scheduler.begin_turn() == "a"
    scheduler.admit("a")
    for _ in range(5):
        scheduler.step()
    assert scheduler.goes_on("a")
    scheduler.add(Job(2, "b", 1, 9))
    assert not scheduler.goes_on("a")
    assert scheduler.begin_turn() == "b"


def test_prompts_of_one_forward_are_bounded_and_a_single_long_one_is_not_left_out():
    scheduler = Scheduler(Limits(prefill=100))
    for number, prompt in enumerate((40, 60, 10, 500)):
        scheduler.add(Job(number, "a", prompt, prompt + 1))
    assert [job.key for job in scheduler.admit("a")] == [0]
    assert [job.key for job in scheduler.admit("a")] == [1]
    assert [job.key for job in scheduler.admit("a")] == [2]
    assert [job.key for job in scheduler.admit("a")] == [3]


def test_what_could_never_begin_is_refused():
    scheduler = Scheduler(LIMITS)
    with pytest.raises(ValueError, match="A row of 61 tokens exceeds the 60"):
        scheduler.add(Job(1, "a", 60, 61))
    scheduler.add(Job(1, "a", 1, 2))
    with pytest.raises(ValueError, match="is there already"):
        scheduler.add(Job(1, "b", 1, 2))
