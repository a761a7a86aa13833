"""Replaced forwards: they copy and pickle as the original, they come off in any order, and others may be put around them."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.rewrite.errors import UndoError
from weft.rewrite.example_media import trial
from weft.rewrite.forwards import InlineCall, InstalledForward
from weft.rewrite.state import preserved

SIZE = 8
X = torch.linspace(-1, 1, 2 * 5 * SIZE).view(2, 5, SIZE)


class Block(nn.Module):
    """A norm by hand and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.out = nn.Parameter(torch.ones(SIZE)), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """x plus a product."""
        return x + self.out(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain) * scale


class Model(nn.Module):
    """Two blocks in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = Body()
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Body(nn.Module):
    """Loops over its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def optimized() -> Model:
    """A model with two rewritten norms."""
    model = weft.optimize(Model(), example_inputs={"x": X}, verify=False)
    assert [r.rule for r in model.rewrite_report.rewrites] == ["rms_norm", "rms_norm"]
    return model


def forwards(model: nn.Module) -> list[str]:
    """The paths whose forward is replaced."""
    return [
        path for path, m in model.named_modules() if isinstance(vars(m).get("forward"), InstalledForward | InlineCall)
    ]


def test_signatures_names_and_documentation_stay() -> None:
    block = optimized().body.blocks[0]
    assert inspect.signature(block.forward) == inspect.signature(Block().forward)
    assert block.forward.__doc__ == Block.forward.__doc__ and block.forward.__name__ == "forward"


def test_a_deep_copy_is_the_original() -> None:
    model, plain = optimized(), Model()
    copied = copy.deepcopy(model)
    assert not forwards(copied) and forwards(model)
    assert torch.equal(copied(X), plain(X))
    assert "call optimize() on it" in copied.rewrite_report.notes[0] and not copied.rewrite_report.rewrites
    with torch.no_grad():
        copied.head.weight.zero_()
    torch.testing.assert_close(model(X), plain(X))
    again = weft.optimize(copied, example_inputs={"x": X}, verify=False)
    assert forwards(again) and len(again.rewrite_report.rewrites) == 2
    with pytest.raises(UndoError):
        weft.undo(copy.deepcopy(model))


def test_a_copied_part_runs() -> None:
    model, plain = optimized(), Model()
    assert torch.equal(copy.deepcopy(model.body.blocks[1])(X), plain.body.blocks[1](X))


def test_a_forward_that_was_the_instances_own_is_copied_along() -> None:
    model, plain = Model(), Model()
    for each in (model, plain):
        block = each.body.blocks[0]
        block.forward = functools.partial(Block.forward, block, scale=3.0)
    weft.optimize(model, example_inputs={"x": X}, verify=False)
    torch.testing.assert_close(model(X), plain(X))
    assert torch.equal(copy.deepcopy(model)(X), plain(X))
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), plain(X))
    weft.undo(model)
    assert isinstance(model.body.blocks[0].forward, functools.partial) and torch.equal(model(X), plain(X))


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_a_saved_model_loads_as_the_original(save: str) -> None:
    model, file = optimized(), io.BytesIO()
    torch.save(model, file) if save == "torch" else pickle.dump(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False) if save == "torch" else pickle.load(file)
    assert not forwards(loaded) and torch.equal(loaded(X), Model()(X))
    assert loaded.rewrite_report["mode"] == "train" and len(loaded.rewrite_report["rewrites"]) == 2


WITHOUT_WEFT = """
import sys, torch
sys.modules["weft"] = None
model = torch.load(sys.argv[1], weights_only=False)
assert torch.isfinite(model(torch.ones(2, 4))).all() and type(model.forward).__name__ == "method"
"""


def test_a_saved_model_loads_where_weft_is_not_installed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 4))
    weft.optimize(model, example_inputs={"input": torch.ones(2, 4)}, verify=False)
    assert forwards(model)
    torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", WITHOUT_WEFT, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_state_dicts_travel_both_ways() -> None:
    model, plain = optimized(), Model()
    assert list(model.state_dict()) == list(plain.state_dict())
    changed = {k: v * 1.5 for k, v in plain.state_dict().items()}
    for each in (model, plain):
        each.load_state_dict(changed)
    torch.testing.assert_close(model(X), plain(X))
    plain.load_state_dict(model.state_dict())


def test_twice_changes_nothing() -> None:
    model = optimized()
    report, held = model.rewrite_report, [vars(m).get("forward") for m in model.modules()]
    assert weft.optimize(model, example_inputs={"x": X}) is model and model.rewrite_report is report
    assert all(a is b for a, b in zip(held, [vars(m).get("forward") for m in model.modules()], strict=True))


def test_undo_then_optimize_then_undo() -> None:
    model, plain = Model(), Model()
    before = {path: set(vars(m)) for path, m in model.named_modules()}
    for _ in range(2):
        weft.optimize(model, example_inputs={"x": X}, verify=False)
        torch.testing.assert_close(model(X), plain(X))
        weft.undo(model)
        assert {path: set(vars(m)) for path, m in model.named_modules()} == before
        assert torch.equal(model(X), plain(X))


def test_two_models_undone_in_the_order_they_were_optimized_in() -> None:
    first, second, plain = optimized(), optimized(), Model()
    weft.undo(first)
    assert not forwards(first) and forwards(second)
    torch.testing.assert_close(second(X), plain(X))
    weft.undo(second)
    assert not forwards(second) and torch.equal(second(X), plain(X))


def _wrapped(module: nn.Module, seen: list[str]) -> Any:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append("called")
        return inner(*args, **kwargs) * 2

    module.forward = forward  # type: ignore[method-assign]
    return inner


def test_a_forward_put_around_ours_stays_when_ours_comes_off() -> None:
    model, plain, seen = optimized(), Model(), list[str]()
    block = model.body.blocks[0]
    inner = _wrapped(block, seen)
    _wrapped(plain.body.blocks[0], [])
    torch.testing.assert_close(model(X), plain(X))
    weft.undo(model)
    assert seen == ["called"] and not forwards(model)
    assert torch.equal(model(X), plain(X)) and len(seen) == 2
    block.forward = inner  # and whoever put it there takes it off again
    assert torch.equal(model(X), Model()(X))


def test_a_forward_put_around_the_roots() -> None:
    """As trainers do that look at the outputs."""
    model, plain, seen = optimized(), Model(), list[str]()
    _wrapped(model, seen), _wrapped(plain, [])
    torch.testing.assert_close(model(X), plain(X))
    assert seen == ["called"]
    weft.undo(model)
    assert torch.equal(model(X), plain(X))


def test_a_module_that_is_exchanged_or_added_later() -> None:
    model, plain = optimized(), Model()
    for each in (model, plain):
        torch.manual_seed(1)
        each.body.blocks[1] = Block()
        each.body.blocks.append(Block())
    torch.testing.assert_close(model(X), plain(X))
    weft.undo(model)
    assert not forwards(model) and torch.equal(model(X), plain(X))


def test_conversion_of_the_whole_model() -> None:
    model, plain = optimized(), Model()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype), plain.to(dtype)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(model(X.to(dtype)), plain(X.to(dtype)), **tolerance)


def test_a_failed_optimize_leaves_nothing_behind() -> None:
    model = Model()

    class Interrupted(BaseException):
        """As by Ctrl-C."""

    def interrupt(*_: Any) -> None:
        raise Interrupted

    handle = model.head.register_forward_pre_hook(interrupt)
    before = {path: set(vars(m)) for path, m in model.named_modules()}
    with pytest.raises(Interrupted):
        weft.optimize(model, example_inputs={"x": X})
    assert {path: set(vars(m)) for path, m in model.named_modules()} == before
    handle.remove()
    assert torch.equal(model(X), Model()(X))


class Stateful(nn.Module):
    """Changes in every way in which a call can change it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.count, self.seen, self.mode = nn.BatchNorm1d(SIZE), 0, None, torch.float32
        self.weight = nn.Parameter(torch.ones(3))
        self.weight.note = "old"

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen = float(x.shape[0])
        self.weight.note = "new"
        self.weight.more = True
        self.weight.data = self.weight.data.repeat(2)
        return self.norm(x)


def test_calls_that_leave_no_trace() -> None:
    model = Stateful()
    held, mean = model.weight.data_ptr(), model.norm.running_mean
    model.norm.eval()
    with preserved(model):
        model.train()
        model(torch.randn(4, SIZE))
        assert model.count == 1 and model.weight.shape == (6,) and mean.abs().sum() > 0
    assert (model.count, model.seen, model.norm.training, model.training) == (0, None, False, True)
    assert model.norm.running_mean is mean and mean.abs().sum() == 0 and model.norm.num_batches_tracked == 0
    assert model.weight.data_ptr() == held and model.weight.shape == (3,)
    assert vars(model.weight) == {"note": "old"}


def test_a_trial_leaves_no_trace_either() -> None:
    model = Stateful().train()
    held = model.weight.data_ptr()
    found = trial(model, lambda: (model.training, torch.is_grad_enabled(), model(torch.randn(4, SIZE))))
    assert found[:2] == (False, False) and found[2].shape == (4, SIZE)
    assert (model.count, model.seen, model.norm.training, model.training) == (0, None, True, True)
    assert model.weight.data_ptr() == held and model.weight.shape == (3,) and vars(model.weight) == {"note": "old"}


def test_no_trace_is_left_where_the_call_fails() -> None:
    model = Stateful()
    with pytest.raises(ValueError), preserved(model):
        model(torch.randn(4, SIZE))
        raise ValueError
    assert model.count == 0 and model.norm.num_batches_tracked == 0


def test_optimizing_draws_no_random_numbers_and_touches_no_gradients() -> None:
    model = Model()
    model(X).sum().backward()
    grads, state = [p.grad.clone() for p in model.parameters()], torch.random.get_rng_state()
    weft.optimize(model, example_inputs={"x": X})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert model.training
