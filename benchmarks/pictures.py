"""Generated pictures with captions: "two red squares above one blue ring", as word numbers.

Captions of one kind in ten are never trained on, so that pictures held out are of scenes that were never seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIDE = 64
COUNTS = ("one", "two", "three")
COLORS = {
    "red": (0.9, 0.1, 0.1), "orange": (1.0, 0.55, 0.1), "yellow": (0.95, 0.95, 0.2), "green": (0.1, 0.7, 0.2),
    "blue": (0.15, 0.25, 0.95), "purple": (0.6, 0.2, 0.8), "pink": (1.0, 0.6, 0.75), "white": (1.0, 1.0, 1.0),
}  # fmt: skip
SHAPES = ("square", "disc", "cross", "ring", "triangle")
RELATIONS = ("above", "left of")
SPECIAL = ("<picture>", "<video>", "<see>", "<seen>", "<say>")
WORDS = (*SPECIAL, *COUNTS, *COLORS, *SHAPES, *RELATIONS)
CAPTION = 7
_KINDS = (COUNTS, tuple(COLORS), SHAPES, RELATIONS, COUNTS, tuple(COLORS), SHAPES)
_WEIGHTS = (1, 7, 3, 1, 3, 1, 7)
_SLOTS = 3


def scenes(count: int, seed: int, device: torch.device, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, SIDE, SIDE) in float32, from about -1 to 1, and captions (count, CAPTION) as numbers of words."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack(
        [torch.randint(len(k), (count * (20 if held_out else 2),), generator=generator) for k in _KINDS], 1
    )
    is_held = (drawn * torch.tensor(_WEIGHTS)).sum(1) % 10 == 0
    chosen = drawn[is_held == held_out][:count]
    starts = torch.tensor([WORDS.index(kind[0]) for kind in _KINDS])
    return _pictures(chosen, generator, device), (chosen + starts).to(device)


def _pictures(chosen: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
    """The first group in the upper (left) half, the second in the lower (right); three places in each half."""
    count = len(chosen)

    def random(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator).to(device)

    chosen, tints = chosen.to(device), torch.tensor(list(COLORS.values()), device=device)
    picture = 0.3 * random(1, 1, 1).expand(count, 3, SIDE, SIDE)
    is_beside = (chosen[:, 3] == 1)[:, None]
    for group in (0, 1):
        number, color, shape = chosen[:, [4 * group, 4 * group + 1, 4 * group + 2]].unbind(1)
        order = random(_SLOTS).argsort(1)
        for slot in range(_SLOTS):
            along = (order[:, slot, None] + 0.5) * (SIDE / _SLOTS)
            across = torch.full_like(along, SIDE / 4 + group * SIDE / 2)
            place = torch.where(is_beside, torch.cat([along, across], 1), torch.cat([across, along], 1))
            inside = _drawn(place + 6 * random(2) - 3, 6 + 2 * random(), shape) & (slot <= number)[:, None, None]
            picture = torch.where(inside[:, None], tints[color][:, :, None, None], picture)
    noise = torch.Generator(device).manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return 2 * picture - 1 + 0.1 * torch.randn(picture.shape, generator=noise, device=device)


def _drawn(place: Tensor, size: Tensor, shape: Tensor) -> Tensor:
    """Where each shape is, (count, SIDE, SIDE)."""
    at = torch.arange(SIDE, dtype=torch.float32, device=place.device)
    y, x = at[None, :, None] - place[:, 0, None, None], at[None, None, :] - place[:, 1, None, None]
    size = size[:, None, None]
    far, near, round_ = torch.maximum(y.abs(), x.abs()), torch.minimum(y.abs(), x.abs()), (y * y + x * x).sqrt()
    shapes = torch.stack([
        far <= size, round_ <= size, (near <= 2) & (far <= size), (round_ <= size) & (round_ >= size - 3),
        (y.abs() <= size) & (2 * x.abs() <= y + size),
    ])  # fmt: skip
    return shapes[shape, torch.arange(len(shape), device=shape.device)]
