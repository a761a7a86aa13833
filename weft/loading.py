"""Loads a checkpoint in 16 bits and stores its weights as a plan says, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weft.bnb_config import config_for, unreachable
from weft.checkpoints import lazy_tensors
from weft.quant.errors import PlanError
from weft.quant.plan import PrecisionPlan
from weft.rewrite.errors import CheckpointError, PrecisionError
from weft.wrappers import plan_for

_PLAIN = {"nf4", "fp4", "int8", "16-bit"}
INSTEAD = (
    "load the model in 16 bits and optimize(model, precision=plan, calibration=batches), or plan with "
    'formats=("nf4", "16-bit")'
)


def load_planned(
    folder: str | Path,
    plan: PrecisionPlan | str | Path,
    *,
    model_class: Any = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> PreTrainedModel:
    """Load the transformers checkpoint in ``folder`` with every weight stored as ``plan`` says.

    Weights are read and quantized one after the other: the host holds the quantized model and what quantizing one weight
    takes (on a CPU bitsandbytes takes some seven times the weight), which is less than a shard of a usual checkpoint. What
    is loaded is an ordinary transformers model over bitsandbytes.

    Args:
        folder: of a safetensors checkpoint in 16 or 32 bits, on this machine.
        plan: or its file.
        model_class: of transformers; None takes the one that the checkpoint's config names.
        device: where the model goes.
        options: further arguments of ``from_pretrained``, such as ``attn_implementation``.

    Raises:
        PrecisionError: the plan's file is corrupt; it is for other layers or shapes; it chose formats that cannot be had
            while loading (error feedback and searched scales need calibration data; int8 beside 4 bits is nothing that
            transformers knows).
        CheckpointError: a shard or a tensor is missing or cut off.
    """
    folder, plan = Path(folder), _read(plan)
    config = _config(folder)
    tensors = lazy_tensors(folder)
    skeleton = _skeleton(model_class or _class_of(config, folder), config)
    loader: Any = type(skeleton)
    plan = plan_for(skeleton, plan)
    model, info = loader.from_pretrained(
        None, config=config, state_dict=tensors, dtype=_dtype(plan), device_map={"": str(device)},
        output_loading_info=True, **_quantization(plan, skeleton), **options,
    )  # fmt: skip
    _check_loaded(folder, info)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.config.name_or_path = str(folder)
    return model


def _quantization(plan: PrecisionPlan, skeleton: PreTrainedModel) -> dict[str, Any]:
    """The arguments with which transformers quantizes as ``plan`` says, which is checked first."""
    _check_formats(plan)
    linears = _linears(skeleton)
    _check_fit(plan, skeleton, linears)
    kinds = {path: format_name for path, format_name in plan.choice.items() if format_name != "16-bit"}
    if not kinds:
        return {}
    config = config_for(kinds, [path for path in linears if path not in kinds], _dtype(plan))
    reasons = unreachable(skeleton, kinds, [], config)
    if reasons:
        raise PrecisionError(f"{'; '.join(reasons)}: {INSTEAD}")
    return {"quantization_config": config}


def _read(plan: PrecisionPlan | str | Path) -> PrecisionPlan:
    if isinstance(plan, PrecisionPlan):
        return plan
    try:
        return PrecisionPlan.from_json(plan)
    except PlanError as error:
        raise PrecisionError(str(error)) from error


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no config.json: load_planned takes the folder of a transformers checkpoint"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise PrecisionError(f"{folder} is quantized already: from_pretrained loads it, a plan needs it in 16 bits")
    return config


def _class_of(config: Any, folder: Path) -> Any:
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is None:
        raise CheckpointError(
            f"{folder / 'config.json'} names no class of transformers: load_planned(..., model_class=...)"
        )
    return named


def _skeleton(kind: Any, config: Any) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def _linears(skeleton: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes, as (out_features, in_features), of the linears that transformers can quantize while loading."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in skeleton.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            found[name] = tuple(module.weight.shape)
        elif isinstance(module, Conv1D):
            found[name] = tuple(reversed(module.weight.shape))
    return found


def _check_formats(plan: PrecisionPlan) -> None:
    for path, format_name in plan.choice.items():
        if format_name not in _PLAIN:
            raise PrecisionError(f"{path} is to be stored as {format_name}, which needs calibration data: {INSTEAD}")
    kinds = {f for f in plan.formats if f != "16-bit"}
    if len(kinds) > 1:
        several = " and ".join(sorted(kinds))
        raise PrecisionError(f"the plan stores linears as {several}, transformers loads in one format: {INSTEAD}")


def _check_fit(plan: PrecisionPlan, skeleton: nn.Module, linears: dict[str, tuple[int, ...]]) -> None:
    """The model has every weight of the plan, and those to be quantized are linears' of the plan's shapes, and not tied."""
    there = {name.removesuffix(".weight") for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    for layer, format_name in zip(plan.layers, plan.formats, strict=True):
        if layer.path not in there:
            raise PrecisionError(f"the plan is for another model: it has {layer.path}, this model does not")
        if format_name == "16-bit":
            continue
        if layer.path not in linears or len(layer.paths) > 1:
            what = "tied to another weight" if layer.path in linears else "no linear's weight"
            raise PrecisionError(
                f"{layer.path} is {what}, which transformers does not quantize while loading: {INSTEAD}"
            )
        if linears[layer.path] != layer.shape:
            raise PrecisionError(f"{layer.path} is {linears[layer.path]} in this model, {layer.shape} in the plan")


def _dtype(plan: PrecisionPlan) -> torch.dtype:
    dtypes = {layer.dtype for layer in plan.layers}
    if len(dtypes) > 1:
        raise PrecisionError(
            f"the plan's weights are in several dtypes ({', '.join(sorted(dtypes))}): load it in 16 bits"
        )
    return getattr(torch, dtypes.pop())


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
    """transformers fills what it did not find with random numbers, and only warns."""
    if info["missing_keys"]:
        raise CheckpointError(
            f"{folder} lacks {sorted(info['missing_keys'])[0]} and {len(info['missing_keys']) - 1} more"
        )
    if info["mismatched_keys"]:
        raise CheckpointError(f"{folder} holds {sorted(info['mismatched_keys'])[0]} in another shape than the model's")
