"""One option for each block: against all combinations, and the waiting for copies against a simulation by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.rewrite.placement import (
    BlockCosts,
    Option,
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
    return BlockCosts((*near, *far), 0, without_waiting(near, forward), forward)


away = st.lists(st.integers(1, 60).flatmap(lambda n: st.builds(
    Option, st.none(), st.just(0), st.integers(0, 20).map(float), st.just(n), st.just(True), st.just(n / 4)
)), max_size=3)  # fmt: skip
blocks_away = st.lists(st.builds(costs, options, away, st.integers(1, 8).map(float)), min_size=1, max_size=2).flatmap(
    lambda kinds: st.lists(st.sampled_from(kinds), min_size=1, max_size=6)
)


@cases
@given(blocks_away, st.integers(0, 160), st.integers(0, 200), st.integers(0, 30))
def test_what_is_on_its_way_has_room(blocks: list[BlockCosts], room: int, host: int, spare: int) -> None:
    chosen = options_within(blocks, room, host, spare)
    narrow = choose_options([b.narrow for b in blocks], room)
    assert all(c in (*b.options, *b.narrow) for c, b in zip(chosen, blocks, strict=True))
    needed = sum(o.bytes for o in chosen[:-1]) + in_flight([o.host_bytes for o in chosen], spare)
    if any(o.all_away for o in chosen[:-1]):
        assert needed <= room and sum(o.host_bytes for o in chosen[:-1]) <= host
        assert sum(o.bytes for o in narrow[:-1]) + in_flight([o.host_bytes for o in narrow], spare) > room or (
            taken(blocks, chosen) <= taken(blocks, narrow)
        )
    assert not any(o.all_away for o in options_within(blocks, room, 0)), "only where the host may have it"
    assert options_within(blocks, None, host) == choose_options([b.narrow for b in blocks], 0)


def taken(blocks: Sequence[BlockCosts], chosen: Sequence[Option]) -> float:
    """Seconds that a choice adds to a step."""
    return sum(o.seconds for o in chosen[:-1]) + waiting([b.forward for b in blocks], chosen)


@cases
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=8))
def test_waiting_is_that_of_a_simulation_by_hand(given: list[tuple[int, int]]) -> None:
    """Tick by tick: one block computes, one copy goes on, and a block's end waits for the copies of all but the last before."""
    forwards, chosen = [float(f) for f, _ in given], [Option(None, 0, 0.0, c, True, float(c)) for _, c in given]
    queue, done, clock, left = list[list[int]](), 0, 0, [f for f, _ in given[:-1]]
    for i, (_, copy) in enumerate(given[:-1]):
        while left[i] > 0 or sum(1 for q in queue[: max(i - 1, 0)] if q[0] > 0):
            clock += 1
            left[i] -= 1
            running = next((q for q in queue if q[0] > 0), None)
            if running is not None:
                running[0] -= 1
                done += 1
        queue.append([copy])
    back = sum(max(0, c - 2 * given[i + 1][0]) for i, (_, c) in enumerate(given[:-1]))
    assert waiting(forwards, chosen) == clock - sum(f for f, _ in given[:-1]) + back


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
    near = [Option(None, 100, 0.0), Option(frozenset(), 0, 1.0, 10, copy=1.0)]
    block = costs(near, [Option(None, 0, 0.0, 60, True, 6.0)], forward=4.0)
    blocks = [block] * 9
    chosen = options_within(blocks, 120, 1000)
    sent = [o.host_bytes for o in chosen[:-1]]
    alone = [taken(blocks, [next(o for o in block.options if o.host_bytes == n)] * 9) for n in (10, 60)]
    assert set(sent) == {10, 60} and taken(blocks, chosen) < min(alone)
    assert options_within(blocks, 50, 1000)[0].host_bytes == 10, "there is no room for what is on its way"
    assert in_flight([60, 60, 60]) == 120 and in_flight([60, 60, 60], spare=50) == 70 and in_flight([60]) == 0
