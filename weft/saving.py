"""Saves planned models as ordinary transformers checkpoints, with the plan beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from weft.bnb_config import Storage, config_for, storage_of, why_not_loadable
from weft.quant.modules import Replaced
from weft.quant.plan import PrecisionPlan
from weft.rewrite.errors import OptionError, PrecisionError
from weft.wrappers import innermost

PLAN_FILE = "weft_plan.json"
_ABSENT = object()


class UnsavableQuantizer(Bnb4BitHfQuantizer):
    """Stands in a model whose storage no bitsandbytes config describes: saving it says why it cannot be done."""

    reason = ""

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """What ``save_pretrained`` begins with; adapters alone can be saved.

        Raises:
            PrecisionError: always for the model itself.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        raise PrecisionError(
            f"plain transformers could not load this model again: {self.reason}; or keep the checkpoint in 16 bits and "
            f"the plan (plan.to_json(...)), and have optimize(model, precision=plan) store the weights again"
        )


def save_pretrained(model: Any, folder: str | Path, plan: PrecisionPlan | None = None, **options: Any) -> None:
    """``model.save_pretrained(folder, **options)``, and the plan beside it in ``weft_plan.json``.

    Plain ``from_pretrained(folder)`` loads the checkpoint without weft. ``PrecisionPlan.from_json(folder / "weft_plan.json")``
    reads the plan, for other copies of the model.

    Args:
        plan: None takes the one that ``optimize(model, precision=...)`` put into force.

    Raises:
        OptionError: nothing says what the plan is, or the model has no ``save_pretrained``.
        PrecisionError: plain transformers could not load what was stored; nothing is saved then.
    """
    plan = plan or getattr(getattr(innermost(model), "rewrite_report", None), "precision", None)
    if plan is None:
        raise OptionError(
            "this model has no precision plan: optimize(model, precision=...), or save_pretrained(..., plan=)"
        )
    if not hasattr(model, "save_pretrained"):
        raise OptionError(
            f"a {type(model).__name__} has no save_pretrained: torch.save(model.state_dict(), ...) saves it"
        )
    model.save_pretrained(folder, **options)
    plan.to_json(Path(folder) / PLAN_FILE)


def describe(root: nn.Module) -> Replaced | None:
    """Say of a transformers model what transformers says of one that it quantized itself; returns how to unsay it.

    None where nothing of ``root`` is quantized, or where it is no transformers model.
    """
    if not isinstance(root, PreTrainedModel):
        return None
    storage = storage_of(root)
    if not storage.kinds and not storage.parameters:
        return None
    dtype = next(iter(storage.dtypes.values()), root.dtype)
    config = config_for(storage.kinds, storage.kept, dtype, next(iter(storage.double.values()), True))
    facts = _facts(root, storage, config)
    undo = [_assign(root, facts), _assign(root.config, {"quantization_config": config})]
    undo += [_assign(m.config, {"_is_quantized": True}) for m in root.modules() if isinstance(m, PreTrainedModel)]

    def restore() -> None:
        for each in reversed(undo):
            each()

    return Replaced("", restore)


def _facts(root: PreTrainedModel, storage: Storage, config: BitsAndBytesConfig) -> dict[str, Any]:
    """The attributes that transformers, PEFT and accelerate look at."""
    kinds = set(storage.kinds.values()) | ({"4-bit"} if storage.parameters else set())
    facts = {
        "hf_quantizer": _quantizer(config, why_not_loadable(root, storage, config)),
        "is_quantized": True,
        "quantization_method": config.quant_method,
    }
    facts |= {"is_loaded_in_8bit": True} if "int8" in kinds else {}
    return facts | ({"is_loaded_in_4bit": True} if kinds - {"int8"} else {})


def _quantizer(config: BitsAndBytesConfig, reasons: list[str]) -> HfQuantizer:
    """transformers' own where it could load the model, so that nothing of weft's is in what is pickled."""
    if not reasons:
        return (Bnb8BitHfQuantizer if config.load_in_8bit else Bnb4BitHfQuantizer)(config, pre_quantized=True)
    refusing = UnsavableQuantizer(config, pre_quantized=True)
    refusing.reason = "; ".join(reasons)
    return refusing


def _assign(holder: Any, values: dict[str, Any]) -> Callable[[], None]:
    """Set attributes; returns how to set them back."""
    former = {name: vars(holder).get(name, _ABSENT) for name in values}
    for name, value in values.items():
        setattr(holder, name, value)

    def restore() -> None:
        for name, value in former.items():
            vars(holder).pop(name, None)
            if value is not _ABSENT:
                vars(holder)[name] = value

    return restore
