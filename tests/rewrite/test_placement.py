"""One option for each block: against all combinations, and the waiting for copies against a simulation by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.rewrite.placement import (
    RATED,
    BlockCosts,
    Option,
    Placement,
    choose_options,
    hull,
    in_flight,
    options_within,
    spread,
    waiting,
    without_waiting,
)

from ..graphs import cases

options = st.lists(
    st.builds(Option, st.none(), st.integers(0, 40), st.integers(0, 20).map(float), st.sampled_from([0, 7])),
    min_size=1,
    max_size=5,
)
models = st.lists(options.map(lambda o: hull(o)), min_size=1, max_size=4)


@cases
@given(options, st.sampled_from([0.0, 0.5]))
def test_the_hull_keeps_what_may_be_best_and_nothing_else(given: list[Option], price: float) -> None:
    found = hull(given, price)
    assert found[-1].bytes == min(o.bytes for o in given)
    assert found[0].seconds == min(o.seconds for o in given)
    rates = [(b.seconds - a.seconds) / (a.bytes - b.bytes) for a, b in pairwise(found)]
    assert all(r > 0 for r in rates) and all(a < b for a, b in pairwise(rates))
    for memory in (0.0, 0.3, 1.0, 5.0, 100.0):
        cost: Callable[[Option], float] = lambda o, p=memory: o.seconds + price * o.copy + p * o.bytes  # noqa: E731
        assert min(map(cost, found)) == pytest.approx(min(map(cost, given)))


@cases
@given(models, st.integers(0, 120))
def test_the_room_is_kept_and_the_time_is_the_least_but_for_one_step(
    blocks: list[tuple[Option, ...]], room: int
) -> None:
    chosen = choose_options(blocks, room)
    assert all(c in b for c, b in zip(chosen, blocks, strict=True))
    assert chosen[-1] == blocks[-1][0], "what the last one saved is alive in its backward anyway"
    held = blocks[:-1]
    fitting = [c for c in product(*held) if sum(o.bytes for o in c) <= room]
    bytes_, seconds = sum(o.bytes for o in chosen[:-1]), sum(o.seconds for o in chosen[:-1])
    if not fitting:
        assert all(c == b[-1] for c, b in zip(chosen[:-1], held, strict=True))
        return
    assert bytes_ <= room
    least = min(sum(o.seconds for o in c) for c in fitting)
    largest = max((b.seconds - a.seconds for block in held for a, b in pairwise(block)), default=0.0)
    assert least <= seconds <= least + largest


@cases
@given(options, st.integers(1, 6), st.integers(0, 200))
def test_earlier_ones_of_equal_blocks_give_first(given: list[Option], count: int, room: int) -> None:
    block = hull(given)
    chosen = choose_options([block] * count, room)
    *places, last = [block.index(c) for c in chosen]
    assert places == sorted(places, reverse=True) and (not places or places[0] - places[-1] <= 1) and last == 0


@cases
@given(models, st.integers(0, 100), st.integers(0, 50))
def test_more_room_never_takes_longer(blocks: list[tuple[Option, ...]], room: int, more: int) -> None:
    seconds = [sum(o.seconds for o in choose_options(blocks, r)) for r in (room, room + more)]
    assert seconds[1] <= seconds[0]


def test_all_is_saved_where_there_is_room() -> None:
    block = Option(None, 10, 0.0), Option(frozenset("a"), 4, 1.0), Option(frozenset(), 0, 5.0)
    at = lambda room: [o.bytes for o in choose_options([block] * 3, room)]  # noqa: E731
    assert at(20) == [10, 10, 10]
    assert at(19) == [4, 10, 10]
    assert at(8) == [4, 4, 10]
    assert at(4)[:2] == [0, 4]
    assert at(-1) == [0, 0, 10]


# the host's memory -------------------------------------------------------------------------------------------------------
def costs(near: Sequence[Option], far: Sequence[Option], forward: float) -> BlockCosts:
    """As of a block: options on the device first."""
    return BlockCosts((*near, *far), 0, without_waiting(near, forward), forward, forward)


away = st.lists(st.integers(1, 60).flatmap(lambda n: st.builds(
    Option, st.none(), st.just(0), st.integers(0, 20).map(float), st.just(n), st.just(True), st.just(n / 4)
)), max_size=3)  # fmt: skip
blocks_away = st.lists(st.builds(costs, options, away, st.integers(1, 8).map(float)), min_size=1, max_size=2).flatmap(
    lambda kinds: st.lists(st.sampled_from(kinds), min_size=1, max_size=6)
)


@cases
@given(blocks_away, st.integers(0, 160), st.integers(0, 200), st.integers(0, 30))
def test_what_is_on_its_way_has_room(blocks: list[BlockCosts], room: int, host: int, spare: int) -> None:
    placement = options_within(blocks, room, host, spare)
    chosen, narrow = placement.options, Placement(choose_options([b.narrow for b in blocks], room))
    assert all(c in (*b.options, *b.narrow) for c, b in zip(chosen, blocks, strict=True))
    needed = sum(o.bytes for o in chosen[:-1]) + in_flight([o.host_bytes for o in chosen], placement.ahead, spare)
    if any(o.all_away for o in chosen[:-1]):
        assert needed <= room and sum(o.host_bytes for o in chosen[:-1]) <= host and placement.fits(room, host, spare)
        assert not narrow.fits(room, host, spare) or placement.seconds(blocks) <= narrow.seconds(blocks)
    assert not any(o.all_away for o in options_within(blocks, room, 0).options), "only where the host may have it"
    assert options_within(blocks, None, host).options == choose_options([b.narrow for b in blocks], 0)


@cases
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=8),
    st.integers(1, 3),
)
def test_waiting_is_that_of_a_simulation_by_hand(given: list[tuple[int, int, int]], ahead: int) -> None:
    """Tick by tick: one block computes, one copy goes on."""
    chosen = [Option(None, 0, 0.0, c, True, float(c)) for _, _, c in given]
    blocks = [BlockCosts((o,), 0, (), f / RATED, b / RATED) for o, (f, b, _) in zip(chosen, given, strict=True)]
    held = given[:-1]
    there = ticks([f for f, _, _ in held], [c for _, _, c in held], lambda done, i: done >= i - ahead, lambda i: i + 1)
    copies = [c for _, _, c in held][::-1]
    back = ticks([b for _, b, _ in given[::-1]], [0, *copies], lambda done, i: done > i, lambda i: i + ahead + 1, False)
    assert waiting(blocks, chosen, ahead) == pytest.approx(
        there + back - sum(f for f, _, _ in held) - sum(b for _, b, _ in given)
    )


def ticks(
    work: Sequence[int], copies: Sequence[int], may: Callable[[int, int], bool], begun: Callable[[int], int],
    at_end: bool = True,
) -> int:  # fmt: skip
    """How long ``work`` takes. Copies begin with the end (or beginning) of work i as far as ``begun`` says; it ends (or begins)
    when ``may`` of the number of copies that are over."""
    clock, queue, done = 0, list(copies), 0

    def over() -> None:
        nonlocal done
        while done < allowed and queue[done] == 0:
            done += 1

    def tick() -> None:
        nonlocal clock
        over()
        if done < allowed:
            queue[done] -= 1
        clock += 1
        over()

    allowed = 0
    for i, takes in enumerate(work):
        if at_end:
            for _ in range(takes):
                tick()
        allowed = allowed if at_end else min(begun(i), len(copies))
        over()
        while not may(done, i):
            tick()
        allowed = min(begun(i), len(copies))
        over()
        if not at_end:
            for _ in range(takes):
                tick()
    return clock


@cases
@given(blocks_away, st.data())
def test_spreading_keeps_what_each_kind_does(blocks: list[BlockCosts], data: st.DataObject) -> None:
    chosen = [data.draw(st.sampled_from(b.options)) for b in blocks]
    placed = spread(blocks, chosen)
    assert placed[-1] == chosen[-1]
    for kind in blocks:
        of = [i for i, b in enumerate(blocks[:-1]) if b is kind]
        key: Callable[[Option], tuple[float, ...]] = lambda o: (o.bytes, o.seconds, o.host_bytes, o.copy)  # noqa: E731
        assert sorted((chosen[i] for i in of), key=key) == sorted((placed[i] for i in of), key=key)


def test_equal_options_stand_apart() -> None:
    large, small = (Option(None, 0, 0.0, n, True, n / 10) for n in (60, 10))
    block = costs([small], [large], 4.0)
    placed = spread([block] * 9, [large, large, *[small] * 6, small])
    assert [i for i, o in enumerate(placed) if o is large] == [1, 5]


def test_large_copies_take_turns_with_small_ones() -> None:
    """A block that sends more away than its forward hides, beside one that sends little: no waiting, and more saved."""
    near = [Option(None, 300, 0.0), Option(frozenset(), 0, 1.0, 10, copy=1.0)]
    block = costs(near, [Option(None, 0, 0.0, 60, True, 6.0)], forward=4.0)
    blocks = [block] * 9
    placement = options_within(blocks, 240, 1000)
    alone = [Placement([next(o for o in block.options if o.host_bytes == n)] * 9, 2) for n in (10, 60)]
    assert {10, 60} <= {o.host_bytes for o in placement.options[:-1]}
    assert placement.seconds(blocks) < min(each.seconds(blocks) for each in alone)
    assert options_within(blocks, 50, 1000).options[0].host_bytes == 10, "there is no room for what is on its way"


def test_in_flight() -> None:
    assert in_flight([60, 0, 60, 10, 60, 60], 2) == 130 and in_flight([60, 60, 60, 60], 2, spare=70) == 120
    assert in_flight([60, 0, 60, 10, 60, 60], 1, spare=100) == 60 and in_flight([60, 0, 60, 10, 60, 60], 1) == 120
    assert in_flight([60], 1) == in_flight([], 2) == 0
