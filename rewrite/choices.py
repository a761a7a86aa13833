"""The last placements of blocks, kept: what is resident differs a little from step to step, and choosing takes the host longer
than a block."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .placement import BlockCosts, Placement, options_within, thriftier

KEPT = 8
"""Choices: what is resident differs between steps that log, or evaluate, and others."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for which blocks (kept, so that they stay who they are), of which the last may save so much, in which
    room."""

    blocks: Sequence[BlockCosts]
    last_most: int | None
    room: int | None
    placement: Placement

    def is_of(self, blocks: Sequence[BlockCosts], last_most: int | None) -> bool:
        """Whether these very blocks were chosen for."""
        same = len(blocks) == len(self.blocks) and all(a is b for a, b in zip(blocks, self.blocks, strict=True))
        return same and last_most == self.last_most


class Choices:
    """Chooses for the blocks of a forward, anew only where what was chosen for them before is no longer as good."""

    def __init__(self) -> None:
        self._made: deque[Choice] = deque(maxlen=KEPT)

    def within(
        self, blocks: Sequence[BlockCosts], room: int | None, host: int, spare: int, last_most: int | None
    ) -> Placement:
        """As :func:`~.placement.options_within`, but for the last block.

        Args:
            last_most: bytes that the last block may save; None: all that it has.
        """
        for choice in self._made:
            if choice.is_of(blocks, last_most) and choice.placement.still_fits(choice.room, room, host, spare):
                return choice.placement
        last = blocks[-1] if last_most is None else thriftier(blocks[-1], last_most)
        found = options_within([*blocks[:-1], last], room, host, spare)
        self._made.appendleft(Choice(blocks, last_most, room, found))
        return found
