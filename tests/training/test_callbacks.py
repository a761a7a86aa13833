"""The callback that watches training: tokens per second, memory, and where the first NaN came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from weft import WeftError
from weft.callbacks import FiniteGuard, NonFiniteError, TrainingMonitor, tokens_in

from ..models import batch, quickly
from .runs import adapted, arguments, assert_same_losses, rows, trained

DOWN = "base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight"
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@pytest.fixture(scope="module")
def model() -> Any:
    """An optimized one with adapters."""
    return quickly(adapted("float32"))


def hooks(model: nn.Module) -> int:
    """How many hooks are on the model and its parameters."""
    on_modules = sum(len(getattr(m, kind)) for m in model.modules() for kind in HOOKS)
    return on_modules + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def spoil(model: nn.Module, name: str, value: float = float("nan")) -> Any:
    """From now on the gradient of one parameter holds ``value``."""
    return dict(model.named_parameters())[name].register_hook(lambda g: torch.full_like(g, value))


def test_figures_are_logged_and_nothing_is_changed(model: Any, tmp_path: Path) -> None:
    """Tokens without padding: 12 and 6 a pair of rows. The loss is that without the callback, nothing is captured anew."""
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    plain = trained(model, arguments(tmp_path))
    model.load_state_dict(start)
    graphs = len(model.rewrite_report.graphs)
    options = arguments(tmp_path, gradient_accumulation_steps=2, logging_steps=2, max_steps=4)
    watched = trained(model, options, rows(16), callbacks=[TrainingMonitor()])
    model.load_state_dict(start)
    again = trained(model, arguments(tmp_path), callbacks=[TrainingMonitor()])
    model.load_state_dict(start)
    assert_same_losses(again.losses, plain.losses)
    assert len(model.rewrite_report.graphs) == graphs and hooks(model) == 0
    logs = [h for h in watched.history if "loss" in h]
    assert len(logs) == 2
    assert all(h["tokens_per_second"] > 0 and h["peak_memory_gib"] > 0 for h in logs)
    assert not any("tokens_per_second" in h for h in plain.history)


def test_tokens_per_second_are_tokens_over_seconds(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own, which a step moves by one second and an evaluation by a hundred."""
    now = [0.0]
    monkeypatch.setattr("weft.callbacks.time.perf_counter", lambda: now[0])

    class Clocked(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            now[0] += 1.0
            return super().training_step(*args, **kwargs)

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            now[0] += 100.0
            return super().evaluate(*args, **kwargs)

    options = arguments(tmp_path, eval_strategy="steps", eval_steps=1, per_device_train_batch_size=4, max_steps=2)
    data = [dict(r) for r in rows(8)]
    run = trained(model, options, data, Clocked, eval_dataset=rows(2), callbacks=[TrainingMonitor()])
    counted = sum(int(r["attention_mask"].sum()) for r in data)
    assert sum(run.logged("tokens_per_second")) == pytest.approx(counted, abs=0.2)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_gradient_that_is_not_finite_is_named(
    model: Any, tmp_path: Path, value: float, accumulation: int
) -> None:
    """By the step and the module, though Trainer has clipped by a norm of NaN since; no weight has changed."""
    handle = spoil(model, DOWN, value)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    options = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    with pytest.raises(NonFiniteError, match="step 1: the loss is finite") as caught:
        trained(model, options, callbacks=[TrainingMonitor()])
    handle.remove()
    assert caught.value.step == 1 and caught.value.parameter == DOWN
    assert caught.value.module_path == DOWN.removesuffix(".weight")
    assert isinstance(caught.value, WeftError) and isinstance(caught.value, FloatingPointError)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert hooks(model) == 0
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_of_several_the_one_that_backward_reached_first(checkpointing: bool | None) -> None:
    """That of the later layer, under checkpointing, too, where re-entrant passes run inside the backward pass."""
    model = adapted("float32")
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    quickly(model)
    before = hooks(model)
    for name in (DOWN.replace("layers.1", "layers.0"), DOWN):
        spoil(model, name)
    with FiniteGuard(model) as guard:
        model(**batch(2, 8)).loss.backward()
        with pytest.raises(NonFiniteError, match="and of 1 parameters after it") as caught:
            guard.check(7)
        assert caught.value.step == 7 and caught.value.parameter == DOWN
        guard.check(8)
    assert hooks(model) == before


def test_a_loss_that_is_nan_is_named(model: Any, tmp_path: Path) -> None:
    """All labels ignored: 0 / 0 in transformers, and the remedy says so."""
    data = [{**r, "labels": torch.full_like(r["labels"], -100)} for r in rows()]
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is nan.*-100"):
        trained(model, arguments(tmp_path), data, callbacks=[TrainingMonitor()])
    model.zero_grad(set_to_none=True)


def test_overflows_of_loss_scaling_are_let_pass() -> None:
    """As many in a row as were asked for, counted anew after a finite step."""
    model = nn.Linear(2, 2)
    args: Any = type("Args", (), {"fp16": True, "device": torch.device("cpu")})()
    state: Any = type("State", (), {"global_step": 4})()
    monitor = TrainingMonitor(overflows=2)
    monitor.on_train_begin(args, state, None, model=model)

    def step(factor: float) -> None:
        model.zero_grad()
        (model(torch.ones(1, 2)).sum() * factor).backward()
        monitor.on_pre_optimizer_step(args, state, None)

    for factor in (1.0, float("inf"), float("inf"), 1.0, float("inf"), float("inf")):
        step(factor)
    with pytest.raises(NonFiniteError, match=r"step 5: .*gradient.* of (weight|bias)"):
        step(float("inf"))
    assert hooks(model) == 0


def test_the_guard_can_be_left_out(model: Any, tmp_path: Path) -> None:
    handle = spoil(model, DOWN)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trained(model, arguments(tmp_path, max_steps=1), callbacks=[TrainingMonitor(guard=False)])
    handle.remove()
    model.load_state_dict(before)
    assert len(run.logged("tokens_per_second")) == 1


def test_tokens_are_counted_by_what_the_model_is_given() -> None:
    inputs = batch(2, 8, padded=True)
    assert int(tokens_in(inputs)) == 12
    assert int(tokens_in({"input_ids": inputs["input_ids"]})) == int(tokens_in({}, (inputs["input_ids"],))) == 16
    assert int(tokens_in({"inputs_embeds": torch.zeros(2, 3, 5)})) == 6
    assert int(tokens_in({"pixel_values": None})) == 0
