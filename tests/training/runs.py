"""Runs of transformers' Trainer and of a loop of one's own, with every step's loss, on an optimized model and on its twin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import weft

from ..models import Inputs, batch, in_four_bits, llama, quickly, twin, with_lora

SMALL = {"hidden_size": 64, "intermediate_size": 64}
"""The smallest width that NF4 stores in whole blocks."""
KINDS = ("float32", "bfloat16", "nf4")
CLOSE = {"float32": 1e-4, "nf4": 1e-4, "bfloat16": 2e-2}
"""How far a loss may be off, relatively: rounding of the dtype that is computed in."""


def adapted(kind: str, **options: Any) -> Any:
    """A Llama with LoRA over weights of that kind."""
    model = llama(**SMALL)
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    return with_lora(in_four_bits(model) if kind == "nf4" else model, **options)


def pair(model: Any, rule: str = "lora_linear", examples: Inputs | None = None) -> tuple[Any, Any]:
    """The model, optimized, and its twin; ``rule`` was applied."""
    plain = twin(model)
    if examples is None:
        quickly(model)
    else:
        weft.optimize(model, example_inputs=examples, verify=False)
    assert any(r.rule == rule for r in model.rewrite_report.rewrites), str(model.rewrite_report)
    return model, plain


def adapted_pair(kind: str) -> tuple[Any, Any]:
    """``pair`` of ``adapted``.

    In float32, training captures anew: the data are longer than the examples and have padding, and the first block's
    input needs no gradient. None of that depends on how weights are stored, and it takes most of a test's time; so the
    others have examples like the data, and an input that needs a gradient, as PEFT arranges it for quantized weights.
    """
    model = adapted(kind)
    if kind == "float32":
        return pair(model)
    model.enable_input_require_grads()
    return pair(model, examples=batch(2, 12, padded=True))


def rows(count: int = 8, length: int = 12) -> list[dict[str, Tensor]]:
    """Rows of token ids with labels; every second one has padding."""
    made = [batch(2, length, seed=i, padded=True) for i in range((count + 1) // 2)]
    return [{name: value[i] for name, value in inputs.items()} for inputs in made for i in range(2)][:count]


@dataclass
class Run:
    """What a run did: the loss of every micro-batch, and what Trainer logged."""

    losses: list[float]
    history: list[dict[str, Any]]

    def logged(self, name: str) -> list[float]:
        """Every value that was logged under ``name``."""
        return [h[name] for h in self.history if name in h]


def arguments(folder: Path, kind: Any = TrainingArguments, **options: Any) -> Any:
    """For a CPU, three steps, nothing saved."""
    settings = {
        "max_steps": 3, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "learning_rate": 1e-2, "seed": 0, "logging_steps": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    return kind(str(folder), **{**settings, **options})


def recorded(kind: type[Any] = Trainer) -> type[Any]:
    """``kind``, which is a Trainer, noting the loss of every micro-batch."""

    class Recorded(kind):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            self.losses = [*getattr(self, "losses", ()), float(loss)]
            return loss

    return Recorded


def trained(
    model: Any, options: Any, data: Any = None, kind: type[Any] = Trainer, resume: Any = None, **more: Any
) -> Run:
    """One run of a Trainer; the model stays as trained."""
    trainer = recorded(kind)(model, options, train_dataset=rows() if data is None else data, **more)
    trainer.train(resume_from_checkpoint=resume)
    return Run(trainer.losses, trainer.state.log_history)


@contextmanager
def as_before(*models: nn.Module) -> Iterator[None]:
    """What is trained, mode, and checkpointing of each model are given back."""
    kept = [{n: p.detach().clone() for n, p in m.named_parameters() if p.requires_grad} for m in models]
    try:
        yield
    finally:
        for model, values in zip(models, kept, strict=True):
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in values.items():
                    parameters[name].copy_(value)
            model.zero_grad(set_to_none=True)
            model.train()
            if getattr(model, "is_gradient_checkpointing", False):
                model.gradient_checkpointing_disable()  # type: ignore[operator]


def assert_same_losses(found: Iterable[float], wanted: Iterable[float], kind: str = "float32") -> None:
    """Equal step by step, and not because nothing was learned."""
    ours, theirs = list(found), list(wanted)
    assert len(set(theirs)) > 1
    assert ours == pytest.approx(theirs, rel=CLOSE[kind])


def loop(
    model: nn.Module,
    batches: Iterable[Inputs],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[float]:
    """A loop of one's own; the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = torch.optim.AdamW(parameters, lr=1e-2) if optimizer is None else optimizer(parameters)
    losses = []
    for inputs in batches:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(**inputs).loss
        losses.append(float(loss.detach()))
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            made.step()
        else:
            scaler.step(made)
            scaler.update()
        made.zero_grad()
    return losses
