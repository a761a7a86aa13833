"""The report: what it says of every module, as text, data and pages, and that it is complete."""

from __future__ import annotations

import json
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from weft.rewrite.report import GraphRecord, NearMiss, Refusal, RegionRecord, Rewrite, RewriteReport
from weft.rewrite.report_text import to_text

SIZE = 8


class Block(nn.Module):
    """A norm that is one, one over another dimension, one with an odd eps, and a linear beside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.near, self.odd, self.idle = Norm(-1), Norm(1), Odd(), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.idle(x) + self.odd(torch.tanh(self.near(torch.tanh(self.norm(x)))))


class Norm(nn.Module):
    """RMSNorm over one dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.gain = dim, nn.Parameter(torch.ones(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(self.dim, keepdim=True) + 1e-5) * self.gain


class Odd(nn.Module):
    """RMSNorm with an eps that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.full((1,), 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Model(nn.Module):
    """Three blocks and a head that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out, self.unused = nn.Linear(SIZE, 3), Norm(-1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.log_softmax(self.out(x), -1)


@pytest.fixture(scope="module")
def model() -> Model:
    """Optimized with replay."""
    return weft.optimize(Model(), example_inputs={"x": torch.randn(2, 5, SIZE)})


@pytest.fixture
def report(model: Model) -> RewriteReport:
    """Its report."""
    return model.rewrite_report


def test_it_is_complete_when_optimize_returns(model: Model, report: RewriteReport) -> None:
    before = report.to_dict()
    model(torch.randn(2, 5, SIZE)).sum().backward()
    assert report.to_dict() == before


def test_one_rewrite_for_each_module(report: RewriteReport) -> None:
    norms = [r for r in report.rewrites if r.rule == "rms_norm"]
    assert [r.module_path for r in norms] == [f"blocks.{i}.norm" for i in range(3)]
    assert all(re.fullmatch(r"test_report\.py:\d+", r.source) for r in norms)
    assert all(r.nodes_removed > r.nodes_added >= 1 and r.bytes_saved > 0 for r in norms)
    assert all(r.error is not None and 0 <= r.error <= 1 for r in report.rewrites)


def test_refusals_and_misses_name_module_line_and_reason(report: RewriteReport) -> None:
    refused = [r for r in report.refusals if r.rule == "rms_norm"]
    assert [r.module_path for r in refused] == [f"blocks.{i}.odd" for i in range(3)]
    assert all("eps" in r.reason and r.source.startswith("test_report.py:") and not r for r in refused)
    misses = [m for m in report.near_misses if m.rule == "rms_norm"]
    assert [m.module_path for m in misses] == [f"blocks.{i}.near" for i in range(3)]
    assert all(re.fullmatch(r"\d+ of \d+ operations", m.progress) and m.reason for m in misses)


@pytest.mark.parametrize(("path", "sentence"), [
    ("blocks.1.norm", r"blocks\.1\.norm: rewritten by rms_norm"),
    ("blocks.1.near", r"blocks\.1\.near: rms_norm came as far as \d+ of \d+ operations, then .* \(test_report\.py:\d+\)"),
    ("blocks.2.odd", r"blocks\.2\.odd: rms_norm refused: .*eps.* \(test_report\.py:\d+\)"),
    ("blocks.0", r"(?s)blocks\.0\.norm: rewritten.*blocks\.0\.odd: rms_norm refused"),
    ("blocks.0.idle", "'blocks.0.idle' was captured and no rule found anything"),
    ("unused", "'unused'.* was in no captured graph|'unused' was captured and no rule found anything"),
    ("blocks.7", "no module had the path 'blocks.7' when the model was optimized$"),
    ("blocks.1.nor", "no module had the path 'blocks.1.nor'"),
    ("1.norm", r"no module had the path '1\.norm' .*: did you mean 'blocks\.1\.norm'\?"),
    ("", r"(?s)blocks\.0\.norm: rewritten.*blocks\.2\.norm"),
])  # fmt: skip
def test_why_not(path: str, sentence: str, report: RewriteReport) -> None:
    assert re.search(sentence, report.why_not(path)), report.why_not(path)


def test_passes_and_shares(report: RewriteReport) -> None:
    names = [p.name for p in report.passes]
    assert len(names) == len(set(names)) and {"rms_norm", "lora_linear", "gated_mlp"} <= set(names)
    by_name = {p.name: p for p in report.passes}
    assert by_name["rms_norm"].rewrites == 3 and by_name["rms_norm"].refusals == 3
    assert all(p.seconds >= 0 for p in report.passes)
    assert 0 < report.node_share < 1 and 0 < report.parameter_share < 1
    assert report.parameter_share == pytest.approx(3 * SIZE / sum(report.parameters.values()))
    assert report.total_seconds >= report.capture_seconds > 0


def test_data_and_json_say_the_same(report: RewriteReport, tmp_path: Path) -> None:
    data = report.to_dict()
    assert json.loads(report.to_json(tmp_path / "report.json")) == json.loads(json.dumps(data))
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(report.to_json())
    assert [Rewrite(**r) for r in data["rewrites"]] == report.rewrites
    assert [Refusal(**r) for r in data["refusals"]] == report.refusals
    assert [NearMiss(**m) for m in data["near_misses"]] == report.near_misses
    assert [RegionRecord(**r) for r in data["regions"]] == report.regions
    assert pickle.loads(pickle.dumps(report)) == data


class _Balanced(HTMLParser):
    """Checks that every element that is opened is closed, and gathers the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.text = list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """Opened."""
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Closed."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Between them."""
        self.text.append(data)


def test_the_page_is_well_formed_and_says_what_the_text_says(report: RewriteReport, tmp_path: Path) -> None:
    page = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    parser = _Balanced()
    parser.feed(page)
    assert not parser.open
    text = "".join(parser.text)
    for word in ("Rewritten", "Refused", "Nearest misses", "Passes", "blocks.0-2.norm", "rms_norm"):
        assert word in text, word


def test_pages_escape_what_they_quote() -> None:
    record = GraphRecord(
        RegionRecord(["<b>"], "graph", places=["<b>"]), refusals=[Refusal("r", "", "f.py:1", "a < b & <script>")]
    )
    page = RewriteReport(graphs=[record], notes=["<note>"]).to_html()
    assert "<script>" not in page and "<note>" not in page and "a &lt; b &amp; &lt;script&gt;" in page


def test_the_text_folds_equal_layers(report: RewriteReport) -> None:
    text = to_text(report)
    assert text == str(report)
    assert re.search(r"^rms_norm +blocks\.0-2\.norm +3 +\d+ → \d+ ", text, re.MULTILINE)
    assert re.search(r"^rms_norm +blocks\.0-2\.odd +.*eps", text, re.MULTILINE)
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_an_empty_report() -> None:
    report = RewriteReport("inference")
    assert report.node_share == report.parameter_share == 0 and not report.rewrites and not report.passes
    assert "0 rewrites" in str(report) and json.loads(report.to_json())["mode"] == "inference"
    assert "no module had the path" in report.why_not("x")


def _region(*paths: str) -> RegionRecord:
    return RegionRecord(list(paths), "graph", places=list(paths))


def test_the_same_module_in_two_graphs_counts_once() -> None:
    rewrite = Rewrite("rule", "norm", "f.py:1", 3, 1, 8, 0.5)
    graphs = [
        GraphRecord(_region("a"), [rewrite]),
        GraphRecord(_region("a", "b"), [rewrite]),
    ]
    report = RewriteReport(graphs=graphs)
    assert [r.module_path for r in report.rewrites] == ["a.norm", "b.norm"]
    twice = GraphRecord(_region("a"), [rewrite, rewrite])  # two on one line are two
    assert len(RewriteReport(graphs=[twice]).rewrites) == 2


def test_later_calls_are_added() -> None:
    model = Model()
    weft.optimize(model, example_inputs={"x": torch.randn(2, 5, SIZE)}, verify=False)
    count, graphs = len(model.rewrite_report.rewrites), len(model.rewrite_report.graphs)
    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 5, SIZE))
    assert len(model.rewrite_report.graphs) > graphs and len(model.rewrite_report.rewrites) == count
