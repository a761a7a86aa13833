"""The batches on which the precision of a model is measured: those given, or ones that weft makes and says so."""

from __future__ import annotations

import inspect
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoTokenizer

from weft.rewrite.errors import CalibrationError
from weft.rewrite.example_labels import SMALL
from weft.rewrite.examples import make_examples

BATCHES, LENGTH = 4, 256
"""Of batches made here: two rows of :data:`LENGTH` tokens each."""


def check_batches(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``batches`` as dictionaries on the device of ``model``, without labels, whose loss nobody reads.

    Raises:
        CalibrationError: there are none, one is no mapping or holds an empty tensor, or the forward takes no such argument.
    """
    if isinstance(batches, Mapping | str | bytes) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"calibration is an iterable of forward keyword arguments, one mapping a batch, not a {type(batches).__name__}"
        )
    device = next(model.parameters()).device
    found = []
    for i, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"calibration batch {i} is a {type(batch).__name__}, not a mapping of keyword arguments"
            )
        _check_batch(model, i, batch)
        kept = {name: value for name, value in batch.items() if "labels" not in name}
        found.append(tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, kept))
    if not found:
        raise CalibrationError("calibration is empty: give at least one batch, or None to have weft make its own")
    return found


def _check_batch(model: nn.Module, index: int, batch: Mapping[str, Any]) -> None:
    tensors = [t for t in tree_leaves(dict(batch)) if isinstance(t, Tensor)]
    if not tensors or any(t.numel() == 0 for t in tensors):
        raise CalibrationError(f"calibration batch {index} holds no tensor, or an empty one")
    if any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors):
        raise CalibrationError(f"calibration batch {index} holds NaN or infinity")
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.any():
        raise CalibrationError(f"the attention mask of calibration batch {index} keeps no token: no prediction counts")
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in batch if name not in parameters]
    if unknown and not open_ended:
        raise CalibrationError(
            f"calibration batch {index} holds {', '.join(unknown)}, which {type(model).__name__}.forward does not take"
        )


def own_batches(model: nn.Module, tokenizer: Any = None) -> tuple[list[dict[str, Any]], str]:
    """Batches made for ``model``, and what they are, in words for the report.

    The text is the source code of Python's standard library, if ``tokenizer`` or one that lies beside the model's weights
    can read it; else tokens are random, which tells little about how a model is used.

    Raises:
        ExampleInputsError: the inputs of ``model`` cannot be made from its config.
    """
    scale = replace(SMALL, batch=2, length=LENGTH)
    made = [make_examples(model, "inference", replace(scale, seed=i))[0] for i in range(BATCHES)]
    tokenizer = tokenizer if tokenizer is not None else _tokenizer_of(model)
    text_only = set(made[0]) <= {"input_ids", "attention_mask"}
    if tokenizer is None or not text_only:
        return check_batches(model, made), f"{BATCHES} batches of random tokens, made by weft: give calibration data"
    ids = torch.tensor(tokenizer(_text(), add_special_tokens=False)["input_ids"][: BATCHES * 2 * LENGTH])
    rows = ids[: len(ids) // (2 * LENGTH) * 2 * LENGTH].view(-1, 2, LENGTH)
    return check_batches(model, [{"input_ids": row} for row in rows]), (
        f"{len(rows)} batches of 2 × {LENGTH} tokens of Python source text, chosen by weft: give calibration data"
    )


def _tokenizer_of(model: nn.Module) -> Any:
    place = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not place or not Path(place, "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(place, local_files_only=True)


def _text() -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n".join((folder / name).read_text("utf-8") for name in ("argparse.py", "textwrap.py", "statistics.py"))
