"""Regions reach every module that computes something, and report it by its own path."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from weft.rewrite.expr import View
from weft.rewrite.match import Miss, find
from weft.rewrite.pattern import trace_patterns
from weft.rewrite.regions import plan_sites

from ..graphs import normal, trace


class Norm(nn.Module):
    """x / rms(x), with a weight or without."""

    def __init__(self, size: int, weight: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size)) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y if self.weight is None else y * self.weight


class Mlp(nn.Module):
    """A block of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = Norm(8), nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Other(nn.Module):
    """A block whose class occurs once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = Norm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.norm(x))


class Trunk(nn.Module):
    """One block of its own kind beside two alike, norms in a list of their own, and a last norm without weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Other(), Mlp(), Mlp()])
        self.norms = nn.ModuleList([Norm(8), Norm(8)])
        self.last = Norm(8, weight=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        for norm in self.norms:
            x = norm(x)
        return self.last(x)


class Model(nn.Module):
    """The trunk and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def norms_of(model: Any) -> set[str]:
    """The paths of the rewritten norms."""
    return {r.module_path for r in model.rewrite_report.rewrites if r.rule == "rms_norm"}


def test_every_norm_is_reached_under_its_own_path() -> None:
    torch.manual_seed(0)
    model = Model()
    x = normal(0, 2, 5, 8)
    wanted = model(x)
    weft.optimize(model, mode="train", example_inputs={"x": x})
    norms = norms_of(model)
    blocks = {f"trunk.layers.{i}.norm" for i in range(3)}
    assert norms == {*blocks, "trunk.norms.0", "trunk.norms.1", "trunk.last"}
    torch.testing.assert_close(model(x), wanted)


def test_sites_cover_what_stands_beside_blocks() -> None:
    sites = {s.path: s.role for s in plan_sites(Model()).first}
    assert sites["trunk.layers.0"] == sites["trunk.layers.1"] == sites["trunk.last"] == "region"
    assert sites["trunk.norms.0"] == "region" and sites["trunk"] == "opaque"
    assert "trunk.layers" not in sites and "trunk.norms" not in sites


class Stages(nn.Module):
    """Lists in a list: what is called are the blocks inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleList([Mlp(), Mlp()]), nn.ModuleList([Mlp()])])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage.children():
                x = block(x)
        return x


def test_lists_of_lists_are_no_blocks() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Stages(), nn.Linear(8, 4)), normal(0, 2, 5, 8)
    wanted = model(x)
    weft.optimize(model, mode="train", example_inputs={"input": x})
    assert norms_of(model) == {f"0.stages.{path}.norm" for path in ("0.0", "0.1", "1.0")}
    torch.testing.assert_close(model(x), wanted)


class Broken(nn.Module):
    """Two inner modules of one class, behind an interruption of the graph: one compiled frame serves both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Other(), Other()

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


class Stack(nn.Module):
    """Two blocks that break."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(Broken(), Broken())

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x)


def test_modules_behind_a_graph_break_keep_their_paths() -> None:
    torch.manual_seed(0)
    model, x = Stack(), normal(0, 2, 5, 8)
    wanted = model(x)
    weft.optimize(model, mode="train", example_inputs={"x": x})
    norms = norms_of(model)
    assert norms == {f"trunk.{i}.{name}.norm" for i in (0, 1) for name in ("first", "second")}
    torch.testing.assert_close(model(x), wanted)


def test_values_that_share_parts_are_named_in_a_word() -> None:
    """Sixty doublings written out would be 2^60 terms long."""

    def doubled(x: Any) -> Any:
        for _ in range(60):
            x = torch.sin(x) + torch.cos(x)
        return torch.tanh(x * torch.exp(x))

    module = trace(doubled, {"x": normal(0, 2, 3, 4)})
    view = View()
    root = view.of(next(n for n in module.graph.nodes if "tanh" in n.name))
    assert len(repr(root)) < 100
    pattern = trace_patterns(lambda x: torch.tanh(x * 2.0), {})[0]
    miss = Miss()
    assert not list(find(pattern, root, miss))
    assert 0 < len(miss.reason) < 100


class Chain(nn.Module):
    """Embedding, blocks and head in one ``nn.Sequential``, and the loss around it."""

    def __init__(self, *last: nn.Module, kind: Any = Mlp) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chain, self.last = nn.Sequential(nn.Embedding(11, 8), kind(), kind(), *last), nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.chain(ids)
        found = self.last(found) if found.shape[-1] == 8 else found
        return F.cross_entropy(found.flatten(0, 1), ids.flatten()[: found[..., 0].numel()])


class Growing(Mlp):
    """Its result is longer than its input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((super().forward(x), x[:, :1]), 1)


def test_a_head_at_the_end_of_a_chain_is_in_one_graph_with_the_loss() -> None:
    ids = torch.arange(14).view(2, 7) % 11
    for last, graphs in (([nn.Linear(8, 11)], 1), ([Norm(8), nn.Linear(8, 11)], 1), ([], 3)):
        model: Any = Chain(*last)
        plain = copy.deepcopy(model)
        weft.optimize(model, mode="train", example_inputs={"ids": ids})
        rules = [r.rule for r in model.rewrite_report.rewrites]
        assert rules.count("linear_cross_entropy") == 1 and rules.count("rms_norm") == 2 + (len(last) == 2)
        assert len({p for r in model.rewrite_report.regions for p in r.paths if "chain.1" not in r.paths}) <= graphs
        for length in (7, 4):
            torch.testing.assert_close(model(ids[:, :length]), plain(ids[:, :length]))
        assert "read by what was rewritten around it: linear_cross_entropy" in model.rewrite_report.why_not(
            f"chain.{2 + len(last)}" if last else "last"
        )


def test_a_chain_whose_blocks_cannot_be_calls_in_a_graph_is_cut_as_ever() -> None:
    ids = torch.arange(14).view(2, 7) % 11
    model: Any = Chain(Norm(8), kind=Growing)
    model.forward = lambda ids: F.cross_entropy(model.last(model.chain(ids))[:, :7].flatten(0, 1), ids.flatten())
    weft.optimize(model, mode="train", example_inputs={"ids": ids})
    rules = [r.rule for r in model.rewrite_report.rewrites]
    assert rules.count("rms_norm") == 3 and rules.count("linear_cross_entropy") == 1, str(model.rewrite_report)


def test_what_has_a_graph_of_its_own_is_said_to_have_one() -> None:
    model: Any = Chain(nn.Linear(8, 11), kind=Growing)
    ids = torch.arange(14).view(2, 7) % 11
    model.forward = lambda ids: F.cross_entropy(model.chain(ids)[:, :7].flatten(0, 1), ids.flatten())
    weft.optimize(model, mode="train", example_inputs={"ids": ids})
    assert "linear_cross_entropy" not in [r.rule for r in model.rewrite_report.rewrites]
    assert "no rewrite spans two" in model.rewrite_report.why_not("chain.3")
