"""Without a GPU the Triton kernels run in the interpreter, which must be chosen before they are defined."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _pytest.runner
import pytest
import torch

from .float32 import as_precise_as_before

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
_trace = logging.getLogger("torch.__trace")
_trace.setLevel(logging.ERROR)  # else pytest keeps a record per symbol and line of source
_trace.handlers.clear()  # else each is still made: torch's handler takes itself away only when it gets one
_trace.addHandler = lambda hdlr: None  # pytest gives its own to every logger that propagates nothing


@pytest.fixture(autouse=True, scope="session")
def _no_output_aliases_an_input() -> None:
    from weft.kernels import operator

    operator.CHECKED = True


@pytest.fixture(autouse=True, scope="session")
def _triton_interprets_without_doing_everything_again() -> Iterator[None]:
    from weft.kernels.dispatch import INTERPRETED

    with pytest.MonkeyPatch.context() as patched:
        if INTERPRETED:
            from .interpreter import quicken

            quicken(patched)
        yield


@pytest.fixture(autouse=True, scope="session")
def _torch_writes_nothing_down() -> Iterator[None]:
    from .quiet import turn_off

    with pytest.MonkeyPatch.context() as patched:
        turn_off(lambda *what: patched.setattr(*what, raising=False))
        yield


@pytest.fixture(autouse=True)
def _as_precise_as_before() -> Iterator[None]:
    with as_precise_as_before():
        yield


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


def pytest_collection_finish() -> None:
    """Looking for garbage took a third of a Trainer's run, and a seventh of a capture.

    All libraries are imported by now: what they hold is no garbage. And since a graph's nodes refer to each other, each
    capture makes enough of it to have everything that lives looked through again.
    """
    _look_no_more_through_what_lives()
    gc.set_threshold(10_000, 20, 50)


def _look_no_more_through_what_lives() -> None:
    """What torch keeps of every capture, too: after a hundred tests, a Trainer's one look took longer than its steps."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> object:
    """pytest's own, where there is room on Python's stack."""
    done = _with_room(item, nextitem)
    if nextitem is None or nextitem.path != item.path:
        _look_no_more_through_what_lives()
    return done


def _with_room(item: pytest.Item, nextitem: pytest.Item | None) -> object:
    """CPython keeps frames in chunks of 16 KB, and gives the last chunk back as soon as its first frame returns.

    A loop at a depth where that happens at every call has the system map and clear memory each time: in a worker of
    pytest-xdist it took half of the time of some tests. This frame is so large that it gets a chunk of 2 MB, half of
    which is left for what it calls.
    """
    return _pytest.runner.pytest_runtest_protocol(item, nextitem)


_with_room.__code__ = _with_room.__code__.replace(co_stacksize=2**17)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``: a file whose tests share models that are slow to make goes to one worker, others test by test.

    Whole files are begun first, so that what is left at the end is short. Not ``--dist loadgroup``: pytest-xdist 3.8
    writes the group into an attribute that pytest 9.2 no longer reads, and each test is then a group of its own.
    """
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if Path(file).parent.name in ("tests", "training", "packing") else nodeid

    return ByFile(config, log)


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
