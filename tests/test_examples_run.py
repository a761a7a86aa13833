"""The examples, at the smallest size that shows what they are for.

The demo runs as a reader runs it, and all are imported by an interpreter that knows nothing else. The others run in this
process: starting another took longer than some of them.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CLOSE = 1e-4 if not torch.cuda.is_available() else 1e-1
"""On a GPU the examples compute in bfloat16."""
Run = Callable[..., str]


def fresh(folder: Path, *arguments: str) -> str:
    """What an interpreter prints that is started in ``folder``, where no example is."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)  # the demo imports what lies beside it
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{command} gave {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What a script prints that is run in an unrelated folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")  # as they do, but for the time of the test

    def printed(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return printed


def number(pattern: str, text: str) -> float:
    """The number that ``pattern`` captures in ``text``."""
    found = re.search(pattern, text)
    assert found is not None, f"{pattern!r} is not in\n{text}"
    return float(found[1])


def rewritten(text: str) -> set[str]:
    """The rules in the table of rewrites that a printed report shows."""
    return set(re.findall(r"^(\w+)  ", text.partition("\nRewritten\n")[2].partition("\n\n")[0], re.MULTILINE)) - {
        "rule"
    }


def test_the_demo_trains_both_models_alike(tmp_path: Path) -> None:
    """Equal curves, equal tokens (else its exit status is 1), and every rule that applies."""
    printed = fresh(tmp_path, str(EXAMPLES / "demo.py"), "--steps", "3", "--layers", "2", "--tokens", "6")
    assert number(r"largest difference of the two curves: (\S+)", printed) < CLOSE
    assert len(re.findall(r"^ +\d+ +\d+\.\d{5} +\d+\.\d{5}", printed, re.MULTILINE)) == 3
    assert {"rms_norm", "rope", "lora_linear", "gated_mlp", "linear_cross_entropy"} <= rewritten(printed)


def test_all_start_in_a_fresh_interpreter(tmp_path: Path) -> None:
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert len(names) > 6
    fresh(tmp_path, "-c", f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import {', '.join(names)}")


def test_a_fine_tuned_adapter_loads_without_weft(run: Run) -> None:
    """The loss falls, and PEFT alone computes the same from what was saved."""
    printed = run("finetune_lora.py", "--steps", "10", "--layers", "1")
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert number(r"reloaded by PEFT alone: (\S+)", printed) < CLOSE
    assert "lora_linear" in rewritten(printed)


def test_a_rule_of_ones_own_is_in_the_report(run: Run) -> None:
    """The new rule rewrote every layer, and the loss stayed."""
    printed = run("write_a_rule.py")
    assert re.search(r"^squared_relu +model\.layers\.0-2\.mlp\.act_fn +3 ", printed, re.MULTILINE), printed
    before, after = (number(rf"{when} (\d+\.\d+)", printed) for when in ("before", "after"))
    assert after == pytest.approx(before, abs=CLOSE)


def test_a_report_answers_questions(run: Run) -> None:
    """What was rewritten, what was not and why, as text, JSON and HTML; and ``undo`` takes it off again."""
    printed = run("inspect_report.py")
    assert {"rms_norm", "gated_mlp"} <= rewritten(printed)
    assert re.search(r"scaled\.1: rms_norm came as far as \d+ of \d+ operations", printed), printed
    assert "report.html" in printed and "report.json" in printed
    assert printed.rstrip().endswith("the model has a report: False")


def test_a_plan_does_less_harm_in_the_same_bytes(run: Run) -> None:
    """Four rows: nothing is lost in 16 bits, and the plan that takes no more than NF4 everywhere is nearer than that."""
    printed = run("dynamic_4bit.py", "--steps", "80", "--layers", "1", "--measurements", "3")
    rows = re.findall(r"^(\S.*?) +([\d.]+) KB   KL +(\S+) ", printed, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["16-bit", "NF4 everywhere", "weft, as many bytes", "weft, +10% bytes"]
    (_, _, exact), (_, plain, harm), (_, same, less), (_, more, least) = rows
    assert float(exact) == 0 < float(harm)
    assert float(same) <= float(plain) and float(less) < 0.8 * float(harm)
    assert float(more) <= 1.101 * float(plain) and float(least) < 0.8 * float(harm)
    assert "lm_head" in printed and "KL alone" in printed


def test_packed_documents_have_the_loss_of_padded_ones(run: Run) -> None:
    """Fewer places, the same loss, and a refusal that names the operator and the module."""
    printed = run("pack_documents.py", "--documents", "8", "--layers", "1")
    places, losses = (
        [number(rf"{n}: .*{what}", printed) for n in ("padded", "packed")] for what in (r" (\d+) places", r"loss (\S+)")
    )
    assert places[1] < places[0] and losses[1] == pytest.approx(losses[0], abs=CLOSE)
    assert re.search(r"^refused: .*layers\.0\.conv: conv1d of kernel", printed, re.MULTILINE), printed
