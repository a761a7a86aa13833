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

AHEAD = 1, 2
"""Blocks whose copies to the host the computation may be ahead of, and whose copies back are begun before they are needed: the
more, the less it waits for them, and the more is in flight."""
RATED = 0.95
"""Of the time that the computation takes by its rates, what copies are counted on to hide behind."""
COPY_PRICES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0)
"""Seconds of a step that a second of copying is asked to be worth."""
MIXTURES = 8
"""Shares of blocks that are tried between what is chosen at two prices."""
DIFFERENT = 32
"""Part of a room by which it may differ before what was chosen for it is chosen anew."""
MOST_AWAY = 10
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
    """The options of one block at the sizes of a call, the first of which saves all on the device and the last of which send all
    to the host, if any do; and the most that its backward has alive.

    Attributes:
        narrow: the options that send no more to the host than the block's input, so that little is on its way; those that may
            be best, with the waiting for copies among their seconds.
        forward, backward: seconds that they take if all is saved.
        result: bytes of what it returns, of the first tensor of that with a gradient.
    """

    options: tuple[Option, ...]
    working: int
    narrow: tuple[Option, ...] = ()
    forward: float = 0.0
    backward: float = 0.0
    result: int = 0

    def __post_init__(self) -> None:
        if not self.narrow:
            object.__setattr__(self, "narrow", hull(self.options))

    @property
    def may_send_all(self) -> bool:
        """Whether an option sends all that is saved to the host."""
        return self.options[-1].all_away


def thriftier(costs: BlockCosts, most: int) -> BlockCosts:
    """A block with one option: the fastest that keeps no more than ``most`` bytes on the device and sends none away, or that
    which keeps least."""
    here = [o for o in costs.options if not o.host_bytes]
    fitting = [o for o in here if o.bytes <= most] or [min(here, key=attrgetter("bytes"))]
    only = (min(fitting, key=attrgetter("seconds")),)
    return replace(costs, options=only, narrow=only)


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

    The last block does as its first option says, which saves all if it has others: its backward, which runs first, would have as
    much alive in any case.

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


@dataclass(frozen=True)
class Placement:
    """One option a block, and of how many blocks copies are under way."""

    options: list[Option]
    ahead: int = AHEAD[0]

    def fits(self, room: int, host: int, spare: int) -> bool:
        """Whether there is room for what stays, and for what is on its way."""
        sent = [o.host_bytes for o in self.options]
        return self.lean_bytes + in_flight(sent, self.ahead, spare) <= room and sum(sent[:-1]) <= host

    def still_fits(self, former_room: int | None, room: int | None, host: int, spare: int) -> bool:
        """Whether this is as good as another choice, in a room that differs little from the one that it was made for: what is
        resident changes with every step, and choosing takes the host longer than a block."""
        if former_room is None or room is None:
            return former_room is room
        little = abs(former_room) // DIFFERENT
        fits, fitted = self.fits(room, host, spare), self.fits(former_room, host, spare)
        return room <= former_room + little and (fits or (not fitted and room >= former_room - little))

    @property
    def lean_bytes(self) -> int:
        """Bytes without those in flight."""
        return sum(o.bytes for o in self.options[:-1])

    @property
    def lean_seconds(self) -> float:
        """Seconds without those of waiting."""
        return sum(o.seconds for o in self.options[:-1])

    def seconds(self, blocks: Sequence[BlockCosts]) -> float:
        """That a step takes longer."""
        return self.lean_seconds + waiting(blocks, self.options, self.ahead)

    def mixed(self, other: Placement, share: float) -> Placement:
        """``other`` for a share of the blocks, evenly among them, this for the rest."""
        each = enumerate(zip(self.options, other.options, strict=True))
        options = [b if int((i + 1) * share) > int(i * share) else a for i, (a, b) in each]
        return Placement(options, max(self.ahead, other.ahead))


def options_within(blocks: Sequence[BlockCosts], room: int | None, host: int, spare: int = 0) -> Placement:
    """As :func:`choose_options`, where the host may take more than the inputs of blocks.

    Args:
        room: None asks for as few bytes as possible.
        host: bytes that the host has for it; none: no more than inputs go there.
        spare: bytes by which what a backward has alive is more than what a forward has.
    """
    narrow = Placement(choose_options([b.narrow for b in blocks], room or 0))
    if room is None or not host or not any(b.may_send_all for b in blocks):
        return narrow
    tried = {(ahead, *map(id, p.options)): p for ahead in AHEAD for p in _candidates(blocks, room, spare, ahead)}
    found = [each for each in tried.values() if each.fits(room, host, spare)]
    found += [narrow] if not found or narrow.fits(room, host, spare) else []
    best = min(found, key=lambda each: each.seconds(blocks))
    seconds = best.seconds(blocks)
    for other in [each for each in found if each.lean_seconds < best.lean_seconds]:
        for mixed in [best.mixed(other, share / MIXTURES) for share in range(1, MIXTURES)]:
            if mixed.lean_seconds < seconds and mixed.fits(room, host, spare) and mixed.seconds(blocks) < seconds:
                best, seconds = mixed, mixed.seconds(blocks)
    return Placement([*best.options[:-1], narrow.options[-1]], best.ahead)


def _candidates(blocks: Sequence[BlockCosts], room: int, spare: int, ahead: int) -> Iterator[Placement]:
    """What is chosen at each price of copying, by the most that one block may send away."""
    distinct = {id(b): b for b in blocks}
    sizes = sorted({o.host_bytes for b in distinct.values() for o in b.options})
    sizes = [n for n in sizes if n <= room]
    for most in sizes[:: -max(len(sizes) // MOST_AWAY, 1)]:
        for price in COPY_PRICES:
            allowed = {key: hull(_allowed(b.options, most), price) for key, b in distinct.items()}
            options, moving = [allowed[id(b)] for b in blocks], ahead * most
            for _ in range(2):
                chosen = spread(blocks, choose_options(options, room - moving, price))
                moving = in_flight([o.host_bytes for o in chosen], ahead, spare)
                yield Placement(chosen, ahead)


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


def waiting(blocks: Sequence[BlockCosts], chosen: Sequence[Option], ahead: int) -> float:
    """Seconds that the computation waits for copies, each of which begins when the one before is over.

    A block's copies to the host begin with the end of its forward. Those of all but ``ahead`` blocks before it must be over then.
    Copies back of as many blocks begin with the backward of the block behind them.
    """
    now, copied = 0.0, [0.0]
    for block, option in zip(blocks[:-1], chosen, strict=False):
        now = max(now + RATED * block.forward, copied[-ahead - 1] if len(copied) > ahead else 0.0)
        copied.append(max(now, copied[-1]) + option.copy)
    waited = now - RATED * sum(b.forward for b in blocks[:-1])
    count, now, there = len(chosen) - 1, 0.0, [0.0]
    for i in range(count, -1, -1):
        begun = min(count, count - i + ahead) - len(there) + 1
        for _ in range(begun):
            there.append(max(now, there[-1]) + chosen[count - len(there)].copy)
        arrived = max(now, there[count - i])
        waited += arrived - now
        now = arrived + RATED * (blocks[i].backward + (chosen[i].seconds if i < count else 0.0))
    return waited


def in_flight(host_bytes: Sequence[int], ahead: int, spare: int = 0) -> int:
    """Bytes on the device while they are copied, of what each block has in the host's memory; the last one keeps all.

    Of as many blocks as the copies back are ahead, beside a backward; of one more beside a forward, which has ``spare`` bytes
    less alive.
    """
    sent = [n for n in host_bytes[:-1] if n]
    back, there = (max((sum(sent[i : i + count]) for i in range(len(sent))), default=0) for count in (ahead, ahead + 1))
    return max(back, there - spare)


def without_waiting(options: Sequence[Option], forward: float) -> tuple[Option, ...]:
    """The hull of ``options`` where every block does the same: what a copy takes longer than the forward is among the seconds."""
    alike = [replace(o, seconds=o.seconds + max(0.0, o.copy - forward), copy=0.0) for o in options]
    return hull(alike)
