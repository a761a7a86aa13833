"""Without a GPU the Triton kernels run in the interpreter, which must be chosen before they are defined."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
logging.getLogger("torch.__trace").setLevel(logging.ERROR)  # else pytest keeps a record per symbol and line of source


@pytest.fixture(autouse=True, scope="session")
def _no_output_aliases_an_input() -> None:
    from weft.kernels import operator

    operator.CHECKED = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are deselected, and counted as such, where there is no GPU."""
    if torch.cuda.is_available():
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    config.hook.pytest_deselected(items=on_gpu)
    items[:] = [item for item in items if item not in on_gpu]
    if hasattr(config, "workeroutput"):
        config.workeroutput["deselected"] = [item.nodeid for item in on_gpu]


class _Counted:
    """pytest-xdist leaves out of the closing line what its workers deselect: all tell, the first is counted."""

    def __init__(self) -> None:
        self.done = False

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Called where the tests are distributed, when a worker is done."""
        names = getattr(node, "workeroutput", {}).get("deselected", [])
        if names and not self.done:
            self.done = True
            node.config.hook.pytest_deselected(items=[SimpleNamespace(nodeid=name) for name in names])


def pytest_configure(config: pytest.Config) -> None:
    """One counter a run."""
    config.pluginmanager.register(_Counted())
