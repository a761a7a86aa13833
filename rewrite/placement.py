"""Chooses one option for each block: the least time within the room on the device, and within what the host takes meanwhile.

Without copies to the host options are exchanged one step at a time, earlier blocks first, for whatever takes the least time for
each byte freed: on options of decreasing return that is the optimum but for the last step. A copy takes no time as long as the
computation beside it takes longer, so that all of a step's copies share the time of its forward: they are given a price, seconds
of the step for a second of copying, and what is chosen at the different prices is looked at with the waiting that it means
(:func:`waiting`). Between two prices some blocks do as at the one, some as at the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter

COPY_PRICES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0)
"""Seconds of a step that a second of copying is asked to be worth."""
MIXTURES = 16
"""Shares of blocks that are tried between what is chosen at two prices."""
MOST_AWAY = 6
"""Sizes of what a block may have on its way to the host that are tried."""


@dataclass(frozen=True)
class Option:
    """What one block may do: names of saved values (None: all), bytes that stay on the device, extra seconds, bytes in the
    host's memory, whether that is all that it saves, not its input alone, and seconds that copying them there takes."""

    saved: frozenset[str] | None
    bytes: int
    seconds: float
    host_bytes: int = 0
    all_away: bool = False
    copy: float = 0.0


@dataclass(frozen=True)
class BlockCosts:
    """The options of one block at the sizes of a call, most bytes first, and the most that its backward has alive.

    Attributes:
        narrow: the options that send no more to the host than the block's input, so that little is on its way; those that may
            be best, with the waiting for copies among their seconds.
        forward: seconds of the block's forward.
    """

    options: tuple[Option, ...]
    working: int
    narrow: tuple[Option, ...] = ()
    forward: float = 0.0

    def __post_init__(self) -> None:
        if not self.narrow:
            object.__setattr__(self, "narrow", hull(self.options))


def hull(options: Sequence[Option], price: float = 0.0) -> tuple[Option, ...]:
    """Those of decreasing return, where copying has this price: each step to fewer bytes costs more seconds a byte than the one
    before."""
    found: list[tuple[int, float, Option]] = []
    for option in sorted(options, key=lambda o: (-o.bytes, o.seconds + price * o.copy)):
        this = option.bytes, option.seconds + price * option.copy, option
        while found and (this[1] <= found[-1][1] or (len(found) > 1 and _bends(found[-2], found[-1], this))):
            found.pop()
        if not found or option.bytes < found[-1][0]:
            found.append(this)
    return tuple(option for *_, option in found)


def _bends(a: tuple[int, float, Option], b: tuple[int, float, Option], c: tuple[int, float, Option]) -> bool:
    return (b[1] - a[1]) * (a[0] - c[0]) >= (c[1] - a[1]) * (a[0] - b[0])


def choose_options(blocks: Sequence[Sequence[Option]], room: int, price: float = 0.0) -> list[Option]:
    """One option a block: the least time of those that fit into ``room`` bytes, or the fewest bytes if none does.

    The last block saves all: its backward, which runs first, would have as much alive in any case.

    Args:
        blocks: the :func:`hull` of each block's options.
        price: of copying, as in the hulls.
    """
    at = [0] * len(blocks)
    over = sum(block[0].bytes for block in blocks[:-1]) - room
    steps = [
        ((after.seconds - before.seconds + price * (after.copy - before.copy)) / (before.bytes - after.bytes), i, k)
        for i, block in enumerate(blocks[:-1])
        for k, (before, after) in enumerate(pairwise(block))
    ]
    for _, i, k in sorted(steps):
        if over <= 0:
            break
        before, after = blocks[i][k : k + 2]
        at[i] = k + 1
        over -= before.bytes - after.bytes
    return [block[k] for block, k in zip(blocks, at, strict=True)]


def options_within(blocks: Sequence[BlockCosts], room: int | None, host: int, spare: int = 0) -> list[Option]:
    """As :func:`choose_options`, where the host may take more than the inputs of blocks.

    Args:
        room: None asks for as few bytes as possible.
        host: bytes that the host has for it; none: no more than inputs go there.
        spare: bytes by which what a backward has alive is more than what a forward has.
    """
    narrow = choose_options([b.narrow for b in blocks], room or 0)
    if room is None or not host:
        return narrow
    last = choose_options([hull(b.options) for b in blocks[-1:]], room)
    found = [each for each in _candidates(blocks, room, spare) if _fits(each, room, host, spare)]
    found += [narrow] if not found or _fits(narrow, room, host, spare) else []
    best = min(found, key=lambda each: _seconds(blocks, each))
    for other in [each for each in found if _lean(each) < _lean(best)]:
        for share in range(1, MIXTURES):
            mixed = _mixed(best, other, share / MIXTURES)
            if _fits(mixed, room, host, spare) and _seconds(blocks, mixed) < _seconds(blocks, best):
                best = mixed
    return [*best[:-1], *last]


def _candidates(blocks: Sequence[BlockCosts], room: int, spare: int) -> Iterator[list[Option]]:
    """What is chosen at each price of copying, by the most that one block may send away."""
    sizes = sorted({o.host_bytes for b in blocks for o in b.options})
    sizes = [n for n in sizes if _moving(n, spare) <= room]
    for most in sizes[:: -max(len(sizes) // MOST_AWAY, 1)]:
        for price in COPY_PRICES:
            allowed = {id(b): hull(_allowed(b.options, most), price) for b in blocks}
            chosen = choose_options([allowed[id(b)] for b in blocks], room - _moving(most, spare), price)
            yield spread(blocks, chosen)


def _allowed(options: Sequence[Option], most: int) -> Sequence[Option]:
    return [o for o in options if o.host_bytes <= most] or [min(options, key=lambda o: o.host_bytes)]


def spread(blocks: Sequence[BlockCosts], chosen: Sequence[Option]) -> list[Option]:
    """The same options, in another order among blocks of the same costs: those that send much away stand as far apart as they
    can."""
    placed = list(chosen)
    for costs in {id(b): b for b in blocks[:-1]}.values():
        places = [i for i, b in enumerate(blocks[:-1]) if b is costs]
        options = sorted((chosen[i] for i in places), key=attrgetter("copy"), reverse=True)
        counts = {o: options.count(o) for o in options}
        order = [((k + 0.5) / count, o) for o, count in counts.items() for k in range(count)]
        for place, (_, option) in zip(places, sorted(order, key=lambda each: each[0]), strict=True):
            placed[place] = option
    return placed


def _mixed(one: Sequence[Option], other: Sequence[Option], share: float) -> list[Option]:
    """``other`` for a share of the blocks, evenly among them, ``one`` for the rest."""
    return [b if int((i + 1) * share) > int(i * share) else a for i, (a, b) in enumerate(zip(one, other, strict=True))]


def _lean(chosen: Sequence[Option]) -> float:
    """Seconds without those of waiting."""
    return sum(o.seconds for o in chosen[:-1])


def _seconds(blocks: Sequence[BlockCosts], chosen: Sequence[Option]) -> float:
    return _lean(chosen) + waiting([b.forward for b in blocks], chosen)


def waiting(forwards: Sequence[float], chosen: Sequence[Option]) -> float:
    """Seconds that the computation waits for copies.

    A block's copies begin when its forward and the copies before are over, and are over when the next but one's begin: so much
    is in flight. On the way back they begin with the backward of the block behind, which takes twice as long as its forward.
    """
    now, copied, waited = 0.0, [0.0, 0.0], 0.0
    for forward, option in zip(forwards[:-1], chosen, strict=False):
        now = max(now + forward, copied[-2])
        copied = [copied[-1], max(now, copied[-1]) + option.copy]
    for i, option in enumerate(chosen[:-1]):
        waited += max(0.0, option.copy - 2 * forwards[i + 1] - chosen[i + 1].seconds)
    return now - sum(forwards[:-1]) + waited


def _fits(chosen: Sequence[Option], room: int, host: int, spare: int) -> bool:
    needed = sum(o.bytes for o in chosen[:-1]) + in_flight([o.host_bytes for o in chosen], spare)
    return needed <= room and sum(o.host_bytes for o in chosen[:-1]) <= host


def in_flight(host_bytes: Sequence[int], spare: int = 0) -> int:
    """Bytes on the device while they are copied, of what each block has in the host's memory; the last one keeps all.

    One block's beside a backward; two blocks' beside a forward, which has ``spare`` bytes less alive.
    """
    return _moving(max(host_bytes[:-1], default=0), spare)


def _moving(most: int, spare: int) -> int:
    return max(most, 2 * most - spare)


def without_waiting(options: Sequence[Option], forward: float) -> tuple[Option, ...]:
    """The hull of ``options`` where every block does the same: what a copy takes longer than the forward is among the seconds."""
    alike = [replace(o, seconds=o.seconds + max(0.0, o.copy - forward), copy=0.0) for o in options]
    return hull(alike)
