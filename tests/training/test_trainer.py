"""transformers' Trainer on an optimized model: the losses and gradient norms of the untouched twin, with what people set."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer

import weft

from ..models import assert_same, batch, llama, outcome, twin, with_lora
from .runs import KINDS, SMALL, adapted_pair, arguments, as_before, assert_same_losses, pair, recorded, rows, trained

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "adamw_8bit": {"optim": "adamw_8bit"},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "label_smoothing": {"label_smoothing_factor": 0.1},
}


ONCE = ("bf16", "adamw_8bit", "reentrant", "label_smoothing")
"""Options to which it makes no difference how the base is stored."""


def repacks() -> bool:
    """Whether bitsandbytes repacks weights in evaluation mode on this CPU, through which it then passes no gradient."""
    described = Path("/proc/cpuinfo")
    return not torch.cuda.is_available() and described.exists() and "avx512_bf16" in described.read_text()


CASES = [
    (kind, name)
    for kind in KINDS
    for name in OPTIONS
    if (kind == "float32" or name not in ONCE) and not (kind == "nf4" and name == "evaluated" and repacks())
]


@functools.cache
def both(kind: str) -> tuple[Any, Any]:
    """An optimized model over weights of that kind, and its twin; whoever trains them gives them back as they were."""
    return adapted_pair(kind)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_losses(kind: str, name: str, tmp_path: Path) -> None:
    more = {"eval_dataset": rows(4)} if name == "evaluated" else {}
    with as_before(*both(kind)):
        found, wanted = (trained(m, arguments(tmp_path, **OPTIONS[name]), **more) for m in both(kind))
    close = "bfloat16" if name == "bf16" else kind
    assert_same_losses(found.losses, wanted.losses, close)
    assert len(found.losses) == (6 if name == "accumulated" else 3)
    ours, theirs = found.logged("grad_norm"), wanted.logged("grad_norm")
    assert ours[0] == pytest.approx(theirs[0], rel=2e-2)
    # from the second step on the weights differ by rounding, which Adam's first steps make as large as the gradient
    assert ours == pytest.approx(theirs, rel=2e-2 if close != "bfloat16" else 1e-1)
    if name == "evaluated":
        assert_same_losses(found.logged("eval_loss"), wanted.logged("eval_loss"), close)


@pytest.mark.gpu
def test_float16_on_a_gpu(tmp_path: Path) -> None:
    """Trainer scales losses on a GPU only; on the CPU the loop of one's own does."""
    model = with_lora(llama(**SMALL)).cuda()
    models = [model, twin(model)]
    weft.optimize(model, example_inputs={name: x.cuda() for name, x in batch(2, 6).items()}, verify=False)
    assert any(r.rule == "lora_linear" for r in model.rewrite_report.rewrites), str(model.rewrite_report)
    runs = [trained(m, arguments(tmp_path, fp16=True, use_cpu=False, max_steps=6)) for m in models]
    assert_same_losses(runs[0].losses, runs[1].losses, "bfloat16")


def test_all_weights(tmp_path: Path) -> None:
    """Full fine-tuning, embeddings and head in one weight."""
    models = pair(llama(tie_word_embeddings=True, **SMALL).train(), "gated_mlp")
    runs = [trained(m, arguments(tmp_path)) for m in models]
    assert_same_losses(runs[0].losses, runs[1].losses)


@pytest.mark.parametrize("kind", ["float32", "nf4"])
@pytest.mark.parametrize("saved_by", ["weft", "transformers alone"])
def test_resuming_continues_the_curve(kind: str, saved_by: str, tmp_path: Path) -> None:
    """Four steps at once; and the last two, from the checkpoint that either model left after the second."""
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    ours, plain = both(kind)
    saver = ours if saved_by == "weft" else plain
    checkpoint = str(tmp_path / "saver" / "checkpoint-2")
    with as_before(plain):
        wanted = trained(plain, arguments(tmp_path / "plain", **steps), rows(16))
    with as_before(saver):
        at_once = trained(saver, arguments(tmp_path / "saver", **steps), rows(16))
    with as_before(ours):
        resumed = trained(ours, arguments(tmp_path / "resumed", **steps), rows(16), resume=checkpoint)
    assert len(wanted.losses) == 8 and len(resumed.losses) == 4
    assert_same_losses(at_once.losses, wanted.losses, kind)
    assert_same_losses(resumed.losses, wanted.losses[4:], kind)


def test_resuming_where_modules_are_trained_whole(tmp_path: Path) -> None:
    """Norms beside the adapters, and a model that is optimized before its checkpoint is read."""
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    made = with_lora(llama(**SMALL), modules_to_save=["norm", "input_layernorm"])
    ours, plain = pair(made)
    wanted = trained(plain, arguments(tmp_path / "plain", **steps))
    found = trained(ours, arguments(tmp_path / "ours", **steps), resume=str(tmp_path / "plain" / "checkpoint-2"))
    assert_same_losses(found.losses, wanted.losses[2:])
    assert_same(outcome(ours, batch(2, 9)), outcome(plain, batch(2, 9)), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_trainer_saves_loads_without_weft(kind: str, tmp_path: Path) -> None:
    ours, plain = both(kind)
    base = twin(plain).unload()  # type: ignore[operator]
    with as_before(ours):
        trainer = recorded()(ours, arguments(tmp_path), train_dataset=rows())
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        found = outcome(ours, batch(2, 9))
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved"), is_trainable=True).train()
    assert not any("forward" in m.__dict__ for m in loaded.modules())
    assert_same(found, outcome(loaded, batch(2, 9)), 1e-3 if kind != "bfloat16" else 1e-1)


def test_compiled_by_trainer(tmp_path: Path) -> None:
    """``torch_compile=True`` compiles around an optimized model."""
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    ours, plain = both("float32")
    with as_before(ours, plain):
        found = trained(ours, arguments(tmp_path, **options))
        assert_same_losses(found.losses, trained(plain, arguments(tmp_path)).losses)


def test_trainer_reads_the_signature() -> None:
    """Trainer keeps the columns that the model's forward takes, and passes it the number of labels if it takes that."""
    ours, plain = pair(llama(**SMALL).train(), "rms_norm")
    trainers = [Trainer(m, arguments(Path("unused"))) for m in (ours, plain)]
    for trainer in trainers:
        trainer._set_signature_columns_if_needed()
    assert trainers[0]._signature_columns == trainers[1]._signature_columns
    assert trainers[0].model_accepts_loss_kwargs == trainers[1].model_accepts_loss_kwargs
