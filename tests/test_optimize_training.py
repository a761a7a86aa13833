"""Training an optimized model: checkpointing, frozen and thawed parameters, logits that are kept or dropped.

Trainer, TRL and several processes are in tests/training/.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import get_compilation_metrics

import weft
from weft.kernels.deferred_logits import DeferredLogits
from weft.passes.defaults import default_passes
from weft.rewrite.errors import DroppedOutputError

from .models import NoBlocks, RootLoop, assert_same, batch, llama, outcome, quickly, twin, with_lora

SMALL = {"hidden_size": 16, "intermediate_size": 24}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = with_lora(llama(**SMALL), lora_dropout=0.3)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    plain = twin(model)
    quickly(model, verify=True)
    assert sum(r.rule == "lora_linear" for r in model.rewrite_report.rewrites) == 14, str(model.rewrite_report)
    for enabled in (True, False):
        found = []
        for each in (model, plain):
            if not enabled:
                each.gradient_checkpointing_disable()
            torch.manual_seed(3)
            found.append(outcome(each, batch(2, 8, seed=1)))
        assert_same(*found)


def test_checkpointing_recomputes() -> None:
    """What a checkpointed step keeps for its backward is less than what a plain one keeps, and as little as eager's."""
    kept = {}
    for name in ("plain", "checkpointed", "eager"):
        model = llama(num_hidden_layers=4, **SMALL).train()
        if name != "plain":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if name != "eager":
            quickly(model)
        kept[name] = _kept(model)
    assert kept["checkpointed"] < 0.6 * kept["plain"] and kept["checkpointed"] <= 1.1 * kept["eager"], kept


def _kept(model: nn.Module) -> int:
    """Bytes that autograd keeps of one forward, parameters left out."""
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, dict[int, int]()

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**batch(4, 32), use_cache=False).loss
    loss.backward()
    return sum(seen.values())


@pytest.mark.parametrize("cached", [False, True])
def test_the_calls_of_a_loop_and_of_a_collator_are_captured(cached: bool) -> None:
    """Ids that are their own labels, and padded ones beside labels: neither is traced again. Configs stay as they are."""
    model = with_lora(llama(**SMALL, use_cache=cached))
    plain = twin(model)
    weft.optimize(model, verify=False)
    assert model.config.use_cache == cached
    model.config.use_cache = plain.config.use_cache = False
    ids = torch.randint(0, 31, (3, 11))
    calls = {"input_ids": ids, "labels": ids}, batch(2, 7, padded=True)
    wanted = [outcome(plain, inputs) for inputs in calls]
    traced = get_compilation_metrics()
    for inputs, each in zip(calls, wanted, strict=True):
        assert_same(outcome(model, inputs), each)
    assert get_compilation_metrics() == traced


def test_calls_with_other_arguments_are_calls_of_their_own() -> None:
    """Dynamo asked the mask of a call without one which tensors it is the same as."""
    model = llama(**SMALL).train()
    plain = twin(model)
    weft.optimize(model, verify=False)
    ids = torch.randint(0, 31, (3, 11))
    places = torch.arange(11).expand(3, -1)
    for beside in ({"use_cache": False}, {"position_ids": places}, {"use_cache": False, "position_ids": places}):
        for labels in (ids, ids.clone()):
            assert_same(*(outcome(m, {"input_ids": ids, "labels": labels, **beside}) for m in (model, plain)))


def test_parameters_frozen_and_thawed_after_optimizing() -> None:
    model = RootLoop().train()
    plain = twin(model)
    quickly(model)
    for names in (("head",), ("gain", "embed"), ("fused", "low"), ()):
        for each in (model, plain):
            for name, p in each.named_parameters():
                p.requires_grad_(not any(n in name for n in names))
        assert_same(outcome(model, batch(2, 6)), outcome(plain, batch(2, 6)))


def test_gradients_accumulate_over_steps() -> None:
    model = NoBlocks().train()
    plain = twin(model)
    quickly(model)
    for each in (model, plain):
        for seed in range(3):
            each(**batch(2, 6, seed=seed)).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_few_steps_of_an_optimizer_follow_the_plain_model() -> None:
    model = with_lora(llama(**SMALL))
    plain = twin(model)
    quickly(model)
    losses = []
    for each in (model, plain):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for seed in range(4):
            loss = each(**batch(4, 12, seed=seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][-1]


@pytest.mark.parametrize("logits", ["keep", "drop", "defer"])
def test_what_becomes_of_the_logits(logits: Any) -> None:
    model = llama(**SMALL).train()
    plain = twin(model)
    quickly(model, passes=default_passes("train", logits=logits), verify=True)
    output, wanted = model(**batch(2, 6)), plain(**batch(2, 6))
    torch.testing.assert_close(output.loss, wanted.loss)
    assert output.logits.shape == wanted.logits.shape and output.logits.dtype == wanted.logits.dtype
    assert isinstance(output.logits, DeferredLogits) == (logits != "keep")
    fused = any(r.rule == "linear_cross_entropy" for r in model.rewrite_report.rewrites)
    assert fused == (logits != "keep"), str(model.rewrite_report)
    if logits == "drop":
        with pytest.raises(DroppedOutputError, match='logits="defer"'):
            output.logits.argmax(-1)
    else:
        torch.testing.assert_close(output.logits.float(), wanted.logits, rtol=1e-4, atol=1e-5)


def test_own_passes_and_no_passes() -> None:
    model = NoBlocks().train()
    plain = twin(model)
    quickly(model, passes=[p for p in default_passes("train") if p.name in ("rms_norm", "functionalize")])
    assert {r.rule for r in model.rewrite_report.rewrites} == {"rms_norm"}
    assert_same(outcome(model, batch()), outcome(plain, batch()))
    weft.undo(model)
    quickly(model, passes=())
    assert not model.rewrite_report.rewrites and not any("forward" in m.__dict__ for m in model.modules())
    assert_same(outcome(model, batch()), outcome(plain, batch()))


class WritingBlock(nn.Module):
    """Adds to its residual stream in place, behind norms that compute on a copy of it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.gains = nn.ParameterList([torch.ones(16), torch.ones(16)])
        self.linears = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def update(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """The update of the stream, from its norm in float32."""
        y = x.float()
        return self.linears[i]((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.gains[i])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The stream, written to."""
        if self.way == "argument":
            x += self.update(x, 0)
            x += self.update(x, 1)
            return x
        x = x + self.update(x, 0)
        x.add_(self.update(x, 1))
        return x


class WritingModel(nn.Module):
    """Two such blocks."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.blocks = nn.ModuleList([WritingBlock(way), WritingBlock(way)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The stream."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("memory", [None, "min"])
@pytest.mark.parametrize("way", ["argument", "own"])
def test_what_is_overwritten_later_is_not_kept(way: str, memory: str | None) -> None:
    """In eager the norms keep float32 copies: what takes their place must not keep the stream itself."""
    torch.manual_seed(0)
    model = WritingModel(way).bfloat16().train()
    plain = twin(model)
    weft.optimize(model, example_inputs={"ids": torch.arange(6).view(2, 3)}, memory=memory)
    norms = [r for r in model.rewrite_report.rewrites if "norm" in r.rule]
    assert bool(norms) == (way == "own"), str(model.rewrite_report)
    ids = torch.arange(12).view(3, 4)
    for m in (model, plain):
        m(ids).float().square().sum().backward()
    found, wanted = ({n: p.grad for n, p in m.named_parameters()} for m in (model, plain))
    assert_same(found, wanted, rounding=0.03)
