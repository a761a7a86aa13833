"""Steps that go wrong: the model raises what it raised before, and works afterwards as if nothing had happened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import weft

from ..models import assert_same, batch, llama, outcome, quickly, twin, with_lora
from .runs import SMALL, adapted, pair


class Exhausting(torch.autograd.Function):
    """Passes its input on; the device's memory ends where it is told to."""

    at = ""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        _allocate("forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        _allocate("backward")
        return gradient


def _allocate(where: str) -> None:
    if Exhausting.at == where:
        raise torch.OutOfMemoryError(f"out of memory in the {where}")


@torch.library.custom_op("weft_tests::allocating", mutates_args=())
def allocating(x: Tensor) -> Tensor:
    """An operator inside the graph of a block."""
    _allocate("forward")
    return x.clone()


@torch.library.custom_op("weft_tests::allocating_backward", mutates_args=())
def allocating_backward(gradient: Tensor) -> Tensor:
    """Its gradient."""
    _allocate("backward")
    return gradient.clone()


allocating.register_fake(torch.empty_like)
allocating_backward.register_fake(torch.empty_like)
allocating.register_autograd(lambda ctx, gradient: allocating_backward(gradient))


class Activation(nn.Module):
    """In the middle of a block."""

    def forward(self, x: Tensor) -> Tensor:
        return allocating(torch.nn.functional.silu(x))


@pytest.fixture(scope="module")
def both() -> Any:
    """A model whose second block may run out of memory, optimized, and its twin."""
    model = adapted("float32")
    model.get_submodule("base_model.model.model.layers.1.mlp").act_fn = Activation()
    model.get_submodule("base_model.model.model.layers.0.mlp").act_fn = Activation()
    return pair(model)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory(where: str, reentrant: bool | None, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step, with checkpointing or without: the caller sees torch's error, and a smaller batch then works."""
    for model in both:
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
    wanted = outcome(both[1], batch(1, 9))
    forwards = {path: vars(m)["forward"] for path, m in both[0].named_modules() if "forward" in vars(m)}
    monkeypatch.setattr(Exhausting, "at", where)
    for model in both:
        with pytest.raises(torch.OutOfMemoryError, match=f"out of memory in the {where}"):
            outcome(model, batch(4, 9))
    monkeypatch.setattr(Exhausting, "at", "")
    assert_same(outcome(both[0], batch(1, 9)), wanted)
    assert {path: vars(m)["forward"] for path, m in both[0].named_modules() if "forward" in vars(m)} == forwards
    for model in both:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads() if reentrant is not None else None
        model.zero_grad(set_to_none=True)


def test_out_of_memory_while_optimizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is as it was, and can be optimized once there is room."""
    model = adapted("float32")
    model.get_submodule("base_model.model.model.layers.1.mlp").act_fn = Activation()
    plain = twin(model)
    monkeypatch.setattr(Exhausting, "at", "forward")
    with pytest.raises(weft.WeftError, match="out of memory in the forward"):
        quickly(model)
    assert not any("forward" in vars(m) for m in model.modules())
    monkeypatch.setattr(Exhausting, "at", "")
    assert_same(outcome(quickly(model), batch(2, 9)), outcome(plain, batch(2, 9)))


def error_of(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[str, str] | None:
    """What a call raises."""
    try:
        model(**inputs)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_longer_than_the_model_has_positions() -> None:
    """Rotary positions go on; learned ones end, with the model's own error, and the model works afterwards."""
    ours, plain = pair(llama(max_position_embeddings=16, **SMALL).train(), "rms_norm")
    assert_same(outcome(ours, batch(1, 24)), outcome(plain, batch(1, 24)))
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=61, n_positions=12, bos_token_id=1, eos_token_id=2)
    for rate in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(config, rate, 0.0)
    ours, plain = pair(GPT2LMHeadModel(config).train(), "layer_norm")
    wanted = error_of(plain, batch(1, 20))
    assert wanted is not None and error_of(ours, batch(1, 20)) == wanted
    assert_same(outcome(ours, batch(2, 9)), outcome(plain, batch(2, 9)))


@pytest.mark.parametrize("count", [None, 0, 5])
def test_all_labels_ignored(count: int | None) -> None:
    """0 / 0 as in transformers, and 0 / n where Trainer gives the number of labels of all micro-batches."""
    ours, plain = pair(adapted("float32"))
    inputs: dict[str, Any] = {**batch(2, 8), "labels": torch.full((2, 8), -100)}
    if count is not None:
        inputs["num_items_in_batch"] = torch.tensor(count)
    found, wanted = (m(**inputs).loss for m in (ours, plain))
    torch.testing.assert_close(found, wanted, equal_nan=True)
    assert bool(wanted.isnan()) == (count != 5)
    for loss in (found, wanted):
        loss.backward()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, equal_nan=True, rtol=0, atol=0)


def test_gradients_that_are_nan_stay_where_they_are() -> None:
    """Where eager has them, and nowhere else; the next step is clean."""
    ours, plain = pair(adapted("float32"))
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight"
    for model in (ours, plain):
        with torch.no_grad():
            dict(model.named_parameters())[name][3, 1] = float("nan")
        model(**batch(2, 8)).loss.backward()
    spoilt = [
        {n for n, p in m.named_parameters() if p.grad is not None and p.grad.isnan().any()} for m in (ours, plain)
    ]
    assert spoilt[0] == spoilt[1] and spoilt[1]
    for model in (ours, plain):
        with torch.no_grad():
            dict(model.named_parameters())[name][3, 1] = 0.0
        model.zero_grad(set_to_none=True)
    assert_same(outcome(ours, batch(2, 8)), outcome(plain, batch(2, 8)))


@pytest.mark.parametrize("rank", [2, 8])
def test_an_adapter_of_another_rank_is_not_loaded(rank: int, tmp_path: Any) -> None:
    """PEFT's error names the parameter; the optimized model keeps its own adapter and works."""
    with_lora(llama(**SMALL), r=rank).save_pretrained(str(tmp_path))
    ours, plain = pair(adapted("float32"))
    errors = [_loading(model, str(tmp_path)) for model in (ours, plain)]
    assert errors[0] == errors[1] and "lora_A" in errors[0]
    assert_same(outcome(ours, batch(2, 8)), outcome(plain, batch(2, 8)))


def _loading(model: PeftModel, folder: str) -> str:
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    with pytest.raises(RuntimeError) as caught:
        set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
    return str(caught.value)


def test_a_weight_of_a_wrong_shape_is_the_models_own_error() -> None:
    """Put in by hand after optimizing; with the right one back, everything works."""
    ours, plain = pair(adapted("float32"))
    path = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.default"
    errors = []
    for model in (ours, plain):
        module = model.get_submodule(path)
        right, module.weight = module.weight, nn.Parameter(torch.zeros(33, 4))
        errors.append(error_of(model, batch(2, 8)))
        module.weight = right
    assert errors[1] is not None and errors[0] is not None
    assert errors[0][0] == errors[1][0] and "33" in errors[0][1]
    assert_same(outcome(ours, batch(2, 8)), outcome(plain, batch(2, 8)))
