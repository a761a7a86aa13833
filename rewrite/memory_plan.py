"""The memory of a training step as it is planned. When the backward of the last block begins, all others hold what they saved,
and it holds all that it reads:

    peak  =  resident  +  Σ saved, without the last block  +  in flight  +  the most that one backward has alive

in flight: what one block has in the host's memory, which is on its way out of the device, or back. If that is more, what the head
and the loss have alive beside all that is saved takes the place of the backward.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .placement import in_flight


@dataclass
class BlockMemory:
    """What one block does: bytes that it keeps on the device and in the host's memory, and seconds that it takes longer."""

    path: str
    saved_bytes: int
    host_bytes: int
    extra_seconds: float
    choice: str


@dataclass
class MemoryPlan:
    """The memory of a training step: the limit, what is predicted, and what each block does. Bytes.

    Attributes:
        limit: None asks for as few as possible.
        resident: weights, optimizer state, gradients and whatever else is there besides activations.
        working: the most that one block's backward, or the head with its loss, has alive beside what the other blocks saved.
        spare: bytes by which ``working`` is more than what a forward has alive.
        ahead: blocks whose copies to the host or back are under way beside a backward.
        measured: the step's own peak, on a GPU, once the next one has begun, where it was the highest until then.
        before: the plan of the step before, measured.
    """

    limit: int | None
    resident: int
    working: int
    blocks: list[BlockMemory] = field(default_factory=list)
    measured: int | None = None
    peak_before: int | None = None
    before: MemoryPlan | None = None
    spare: int = 0
    ahead: int = 1

    @property
    def predicted(self) -> int:
        """The predicted peak."""
        return self.resident + self.working + sum(b.saved_bytes for b in self.blocks[:-1]) + self.in_flight

    @property
    def in_flight(self) -> int:
        """What is on its way to the host's memory, or back."""
        return in_flight([b.host_bytes for b in self.blocks], self.ahead, self.spare)

    @property
    def extra_seconds(self) -> float:
        """What the plan costs, by the device's measured rates."""
        return sum(b.extra_seconds for b in self.blocks)

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the limit."""
        return self.limit is None or self.predicted <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        names = ("limit", "resident", "working", "in_flight", "predicted", "measured", "fits")
        kept = {name: getattr(self, name) for name in names}
        before = None if self.before is None else {k: getattr(self.before, k) for k in ("predicted", "measured")}
        return kept | {
            "before": before,
            "extra_seconds": self.extra_seconds,
            "blocks": [asdict(b) for b in self.blocks],
        }
