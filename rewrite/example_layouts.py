"""The layouts in which models take images and sounds, each as the forward arguments of one small medium a row."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
LARGEST = 448
"""Images larger than this are tried last: a tower that takes any size is captured on a small one."""
FRAMES, SAMPLES = 200, 4000

GRIDS = frozenset(("image_grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes"))
"""Parameters that give the number of patches each way: the images come as patches."""


@dataclass(frozen=True)
class Draw:
    """Draws numbers of the dtype and on the device of ``like``."""

    like: Tensor
    generator: torch.Generator

    def __call__(self, *shape: int) -> Tensor:
        dtype = self.like.dtype if self.like.is_floating_point() else torch.get_default_dtype()
        return torch.rand(shape, generator=self.generator).to(self.like.device, dtype)

    def whole(self, rows: Any) -> Tensor:
        """``rows`` as integers."""
        return torch.tensor(rows, device=self.like.device)

    def ones(self, *shape: int) -> Tensor:
        """A mask that hides nothing."""
        return torch.ones(shape, dtype=torch.long, device=self.like.device)


@dataclass(frozen=True)
class Picture:
    """What a config says of images: channels, sides of patch and image, how many frames and patches are merged."""

    channels: int
    patch: int
    frames: int
    merge: int
    size: int
    tiles: int
    area: int

    @classmethod
    def of(cls, config: Any) -> Picture:
        """Read off the vision config, then the whole one."""
        vision = vision_part(config)

        def find(*names: str, default: int) -> int:
            found = find_setting(vision, *names)
            return side(default if found is None and (found := find_setting(config, *names)) is None else found)

        patch, channels = find("patch_size", default=16), find("num_channels", "in_channels", "in_chans", default=3)
        return cls(
            channels=channels,
            patch=patch,
            area=find("patch_embed_hidden_size", default=channels * patch * patch),
            frames=find("temporal_patch_size", "patch_temporal", default=1),
            merge=find("spatial_merge_size", "merge_kernel_size", "merge_size", "downsample_factor", default=2),
            size=find("image_size", "crop_size", default=max(4 * patch, 64)),
            tiles=find("max_num_tiles", "num_frames", default=4),
        )


def image_layouts(config: Any, known: frozenset[str], batch: int, draw: Draw) -> Iterator[Inputs]:
    """One small image a row, in each layout that goes with the parameters ``known``."""
    picture = Picture.of(config)
    patches = list(_patches(picture, batch, draw))
    packed = bool(known & (GRIDS | {"flattened_patches"}))
    if packed:
        yield from patches
    small = 2 * picture.merge * picture.patch
    for size in dict.fromkeys((picture.size, small) if picture.size <= LARGEST else (small, picture.size)):
        plain, *others = _pictures(picture, size, batch, draw)
        plain |= {
            name: _second_image(config, name, picture.channels, batch, draw) for name in known if _is_second(name)
        }
        yield plain
        sizes = {"image_sizes": draw.whole([[size, size]] * batch)}
        yield from (layout | sizes for layout in (plain, *others))
        yield from others
    if not packed:
        yield from patches


def _is_second(name: str) -> bool:
    return name.endswith("_pixel_values")


def _second_image(config: Any, name: str, channels: int, batch: int, draw: Draw) -> Tensor:
    """Images for a second tower: ``high_res_pixel_values`` belong to ``high_res_vision_config``."""
    part = getattr(config, name.removesuffix("pixel_values") + "vision_config", config)
    size = side(find_setting(part, "image_size") or 32)
    return draw(batch, channels, size, size)


def _patches(picture: Picture, batch: int, draw: Draw) -> Iterator[Inputs]:
    """Images cut into patches, packed one after the other or row by row, with the number of patches each way."""
    wide = 2 * picture.merge
    each, channels, patch, frames = wide * wide, picture.channels, picture.patch, picture.frames
    area, block = picture.area, patch * picture.merge
    sizes = draw.whole([[wide, wide]] * batch)
    grids = {
        "image_grid_thw": draw.whole([[1, wide, wide]] * batch),
        "image_merge_sizes": draw.whole([picture.merge] * batch),
        **dict.fromkeys(("image_grid_hw", "target_sizes", "spatial_shapes"), sizes),
    }
    square = (patch, patch)
    shapes = ((frames * area,), (area,), (channels, *square), (frames, channels, *square), (block, block, channels))
    for shape in dict.fromkeys(shapes):
        yield {"pixel_values": draw(batch * each, *shape), **grids}
    yield {"pixel_values": draw(batch, each, area), "pixel_attention_mask": draw.ones(batch, each), **grids}
    yield {"pixel_values": draw(batch, channels, patch, each * patch), **grids}
    yield {"pixel_values": draw(1, channels, patch, batch * each * patch), **grids}
    sides = draw.whole([[wide]] * batch)
    yield {"flattened_patches": draw(batch, each, 2 + area), "width": sides, "height": sides}


def _pictures(picture: Picture, size: int, batch: int, draw: Draw) -> Iterator[Inputs]:
    """Whole images: one a row, or a list of them a row, or one of several tiles a row."""
    image = (picture.channels, size, size)
    yield {"pixel_values": draw(batch, *image), "pixel_mask": draw.ones(batch, size, size)}
    ones, tiles = draw.ones(batch, 1), picture.tiles
    tiled = {"aspect_ratio_ids": ones, "aspect_ratio_mask": draw.ones(batch, 1, tiles)}
    yield {"pixel_values": draw(batch, 1, tiles, *image), **tiled}
    for count in (1, 2, 3, 4, 5):
        yield {"pixel_values": draw(batch, count, *image), "pixel_attention_mask": draw.ones(batch, count, size, size)}


BINS = ("num_mel_bins", "n_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
"""Settings that hold the number of features of one frame of sound."""


def sound_layouts(config: Any, known: frozenset[str], batch: int, draw: Draw) -> Iterator[Inputs]:
    """A short sound a row: frames of a spectrogram either way round, as many as the tower has positions, or samples."""
    bins = find_setting(config, *BINS) or 80
    longest = 2 * (find_setting(config, "max_source_positions") or FRAMES)
    for shape, frames in (((FRAMES, bins), FRAMES), ((bins, FRAMES), FRAMES), ((bins, longest), longest)):
        names = (
            "input_features_mask",
            "feature_attention_mask",
            *(() if "input_ids" in known else ("attention_mask",)),
        )
        yield {"input_features": draw(batch, *shape), **dict.fromkeys(names, draw.ones(batch, frames))}
    yield {"input_values": draw(batch, SAMPLES)}


# settings -----------------------------------------------------------------------------------------------------------
def find_setting(config: Any, *names: str) -> Any:
    """The first of ``names`` that ``config``, or a config inside it, sets; outer configs before inner ones."""
    for part in config_parts(config):
        for name in names:
            found = getattr(part, name, None)
            if found is not None:
                return found
    return None


def vision_part(config: Any) -> Any:
    """The innermost config that describes images; None if none does."""
    names = ("patch_size", "image_size", "patch_embed_hidden_size")
    found = [p for p in config_parts(config) if any(hasattr(p, name) for name in names)]
    return found[-1] if found else None


def config_parts(config: Any) -> Iterator[Any]:
    """``config`` and every config inside it, outer ones first."""
    pending = deque([] if config is None else [config])
    while pending:
        part = pending.popleft()
        yield part
        pending.extend(v for v in vars(part).values() if hasattr(v, "to_dict") and hasattr(v, "get_text_config"))


def side(size: Any) -> int:
    """A size given once, or once a dimension."""
    return int(size[-1]) if isinstance(size, list | tuple) else int(size)
