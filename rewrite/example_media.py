"""Example images and sounds. Which layout a model takes, and how many placeholder tokens one fills, the model itself says.

Configs of vision and audio towers agree on a few names (``patch_size``, ``image_size``, ``num_mel_bins``), not on how the
numbers are laid out. So every layout that the forward's parameters allow is offered, and the first that the tower (or, where
it has no method of its own, the whole model) takes is used.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExampleInputsError

Inputs = dict[str, Any]
LARGEST = 448
"""Images larger than this are tried last: a tower that takes any size is captured on a small one."""
FRAMES, SAMPLES = 64, 4000


@dataclass(frozen=True)
class Media:
    """Forward arguments for one image or sound a row, and the token ids that stand for it in the text."""

    inputs: Inputs = field(default_factory=dict)
    token: int | None = None
    count: int = 0
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sort:
    """Images or sounds: the forward's parameters, the method that encodes them, the settings that name their tokens."""

    parameters: tuple[str, ...]
    encode: str
    token: tuple[str, ...]
    opening: tuple[str, ...]
    closing: tuple[str, ...]


IMAGES = Sort(
    ("pixel_values", "flattened_patches"),
    "get_image_features",
    ("image_token_id", "image_token_index", "image_patch_id"),
    ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"),
    ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"),
)
SOUNDS = Sort(
    ("input_features", "input_values"),
    "get_audio_features",
    ("audio_token_id", "audio_token_index"),
    ("audio_start_token_id", "audio_bos_token_id"),
    ("audio_end_token_id", "audio_eos_token_id"),
)
COUNTS = ("image_seq_length", "num_image_tokens", "latent_query_num", "num_query_tokens")
"""Settings that hold the number of placeholders, asked where no method encodes an image by itself."""


def media_for(model: nn.Module, known: frozenset[str], batch: int, generator: torch.Generator) -> list[Media]:
    """What ``model`` may be given besides text: one entry where that is certain, several where only a forward can tell."""
    draw = _Draw(next(model.parameters()), generator)
    if known & set(IMAGES.parameters) and _vision(model.config) is not None:
        return _accepted(model, IMAGES, list(image_layouts(model.config, known, batch, draw)), batch)
    needed = "input_ids" not in known
    if known & set(SOUNDS.parameters) and (needed or _encoder(model, SOUNDS)):
        return _accepted(model, SOUNDS, list(sound_layouts(model.config, known, batch, draw)), batch)
    return [Media()]


def _accepted(model: nn.Module, sort: Sort, layouts: list[Inputs], batch: int) -> list[Media]:
    """The first layout that the encoder takes; all where there is no encoder to ask."""
    encode = _encoder(model, sort)
    if encode is None:
        count = find_setting(model.config, *COUNTS) or 1
        return [_media(model.config, sort, layout, count) for layout in layouts]
    reasons = []
    for layout in layouts:
        outcome = trial(model, lambda layout=layout: _call(encode, layout))
        if not isinstance(outcome, Exception):
            return [_media(model.config, sort, layout, _rows(outcome) // batch)]
        reasons.append(describe_failure(layout, outcome))
    raise ExampleInputsError(
        f"{type(model).__name__} takes none of the example {sort.parameters[0]} that its config suggests "
        f"({'; '.join(reasons)}): pass optimize(model, example_inputs={{...}})"
    )


def _media(config: Any, sort: Sort, layout: Inputs, count: int) -> Media:
    token = find_setting(config, *sort.token)
    if token is None:
        return Media(layout)
    around = [() if i is None else (i,) for i in (find_setting(config, *sort.opening), find_setting(config, *sort.closing))]
    return Media(layout, token, count, *around)


def _encoder(model: nn.Module, sort: Sort) -> Callable[..., Any] | None:
    return next((getattr(m, sort.encode) for m in model.modules() if hasattr(m, sort.encode)), None)


def _call(function: Callable[..., Any], given: Inputs) -> Any:
    known = inspect.signature(function).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in known.values()):
        return function(**given)
    return function(**{k: v for k, v in given.items() if k in known})


def _rows(encoded: Any) -> int:
    """How many feature vectors an encoder returned, however they are packed."""
    if isinstance(encoded, Tensor):
        return prod(encoded.shape[:-1])
    if isinstance(encoded, list | tuple):
        return sum(_rows(e) for e in encoded)
    pooled = getattr(encoded, "pooler_output", None)
    return _rows(pooled if pooled is not None else encoded[0])


# layouts ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Draw:
    """Draws numbers of the dtype and on the device of ``like``."""

    like: Tensor
    generator: torch.Generator

    def __call__(self, *shape: int) -> Tensor:
        dtype = self.like.dtype if self.like.is_floating_point() else torch.get_default_dtype()
        return torch.rand(shape, generator=self.generator).to(self.like.device, dtype)

    def whole(self, rows: Any) -> Tensor:
        """``rows`` as integers."""
        return torch.tensor(rows, device=self.like.device)


def image_layouts(config: Any, known: frozenset[str], batch: int, draw: _Draw) -> Iterator[Inputs]:
    """One small image a row, in each layout that goes with the parameters ``known``."""
    vision = _vision(config)
    channels = find_setting(vision, "num_channels", "in_channels", "in_chans") or 3
    patch = _side(find_setting(vision, "patch_size") or find_setting(config, "patch_size") or 16)
    merge = _side(find_setting(config, "spatial_merge_size", "merge_kernel_size", "merge_size", "downsample_factor") or 2)
    side = 2 * merge
    if known & {"image_grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes", "flattened_patches"}:
        frames = find_setting(vision, "temporal_patch_size", "patch_temporal") or 1
        yield from _patches(channels, _side(frames), patch, side, batch, draw)
    full = _side(find_setting(vision, "image_size", "crop_size") or find_setting(config, "image_size") or 4 * patch)
    for size in dict.fromkeys((full, side * patch) if full <= LARGEST else (side * patch, full)):
        yield from _pictures(config, channels, size, batch, draw)


def _patches(channels: int, frames: int, patch: int, side: int, batch: int, draw: _Draw) -> Iterator[Inputs]:
    """Images cut into patches, packed one after the other or row by row, with the number of patches each way."""
    each, area = side * side, channels * patch * patch
    sizes = draw.whole([[side, side]] * batch)
    grids = {
        "image_grid_thw": draw.whole([[1, side, side]] * batch),
        "image_grid_hw": sizes,
        "target_sizes": sizes,
        "spatial_shapes": sizes,
        "pixel_attention_mask": torch.ones_like(draw(batch, each)).long(),
    }
    for shape in dict.fromkeys([(frames * area,), (area,), (channels, patch, patch), (frames, channels, patch, patch)]):
        yield {"pixel_values": draw(batch * each, *shape), **grids}
    yield {"pixel_values": draw(batch, each, area), **grids}
    yield {"pixel_values": draw(batch, channels, patch, each * patch), **grids}
    sides = draw.whole([[side]] * batch)
    yield {"flattened_patches": draw(batch, each, 2 + area), "width": sides, "height": sides}


def _pictures(config: Any, channels: int, size: int, batch: int, draw: _Draw) -> Iterator[Inputs]:
    """Whole images: one a row, a list of one a row, or one of several tiles a row."""
    mask = torch.ones_like(draw(batch, 1, size, size)).long()
    sizes = {"image_sizes": draw.whole([[size, size]] * batch)}
    yield {"pixel_values": draw(batch, channels, size, size), "pixel_mask": mask[:, 0], **sizes}
    yield {"pixel_values": draw(batch, 1, channels, size, size), "pixel_attention_mask": mask, **sizes}
    tiles = find_setting(config, "max_num_tiles", "num_frames") or 4
    ones = draw.whole([[1]] * batch)
    tiled = {"aspect_ratio_ids": ones, "aspect_ratio_mask": ones[..., None].expand(batch, 1, tiles).contiguous()}
    yield {"pixel_values": draw(batch, 1, tiles, channels, size, size), **tiled}
    yield {"pixel_values": draw(batch, tiles, channels, size, size), **sizes}


def sound_layouts(config: Any, known: frozenset[str], batch: int, draw: _Draw) -> Iterator[Inputs]:
    """A short sound a row: spectrogram frames either way round, as long as the tower's table of positions, or samples."""
    names = ("num_mel_bins", "n_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "d_model")
    bins = find_setting(config, *names) or 80
    longest = 2 * (find_setting(config, "max_source_positions") or FRAMES)
    for shape, frames in (((FRAMES, bins), FRAMES), ((bins, FRAMES), FRAMES), ((bins, longest), longest)):
        ones = torch.ones_like(draw(batch, frames)).long()
        masks = {"input_features_mask": ones, "feature_attention_mask": ones}
        yield {"input_features": draw(batch, *shape), **masks, **({} if "input_ids" in known else {"attention_mask": ones})}
    yield {"input_values": draw(batch, SAMPLES)}


# asking ------------------------------------------------------------------------------------------------------------
def find_setting(config: Any, *names: str) -> Any:
    """The first of ``names`` that ``config``, or a config inside it, sets; outer configs before inner ones."""
    for part in _parts(config):
        for name in names:
            found = getattr(part, name, None)
            if found is not None:
                return found
    return None


def _parts(config: Any) -> Iterator[Any]:
    pending = deque([config])
    while pending:
        part = pending.popleft()
        yield part
        pending.extend(v for v in vars(part).values() if hasattr(v, "to_dict") and hasattr(v, "model_type"))


def _vision(config: Any) -> Any:
    """The innermost config that describes images."""
    found = [p for p in _parts(config) if any(hasattr(p, name) for name in ("patch_size", "image_size"))]
    return found[-1] if found else None


def _side(size: Any) -> int:
    return int(size[-1]) if isinstance(size, Iterable) else int(size)


def describe_failure(given: Inputs, error: Exception) -> str:
    """One line: the shapes that were offered, and what came back."""
    shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in given.items() if isinstance(v, Tensor))
    lines = str(error).strip().splitlines() or [""]
    return f"{shapes}: {type(error).__name__}: {lines[0][:120]}"


def trial(model: nn.Module, run: Callable[[], Any]) -> Any:
    """What ``run`` returns, or the exception it raises; neither gradients nor state of ``model`` are touched."""
    with evaluating(model):
        try:
            return run()
        except Exception as error:  # any: the answer to the question asked
            return error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, and the random state as before."""
    modes = {m: m.training for m in model.modules()}
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model.eval()
        try:
            yield
        finally:
            for module, was in modes.items():
                module.training = was
