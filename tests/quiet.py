"""What torch writes down while it captures and lowers graphs, and nobody reads here: off in tests and in their processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def turn_off(replace: Callable[[Any, str, Any], object]) -> None:
    """Through ``replace``, which sets an attribute.

    Dynamo times the guards of each graph for its own statistics, with the processor's cache flushed before: 20 ms a graph. It
    writes the stack of every change of an object that a forward makes, and AOTAutograd each graph as text, for logs and a cache
    of theirs.
    """
    from torch._dynamo import config, guards
    from torch._functorch._aot_autograd import graph_compile

    replace(guards, "profile_guard_manager", lambda *_: 0.0)
    replace(graph_compile, "_log_joint_graph", lambda *_: None)
    replace(graph_compile, "_log_fw_bw_graphs", lambda *_: (None, None))
    if hasattr(config, "side_effect_replay_policy"):
        replace(config, "side_effect_replay_policy", "silent")
