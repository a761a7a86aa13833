"""Which parameters of a model its products read, and the statistics of what they are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from ..quant.formats import Calibration
from ..quant.statistics import Statistics
from ..rewrite.install import Installation
from ..rewrite.whole import capture_model
from .observe_linears import ObserveLinears


@dataclass
class Use:
    """One parameter that is (a stack of) matrices in products.

    ``layout``: whether it lies by ``"rows"``, (..., out_features, in_features), or by ``"columns"``. ``statistics``: of all
    that it is multiplied with; ``each``: for a stack, of what each matrix is, where the products tell.
    """

    name: str
    parameter: nn.Parameter
    layout: str
    statistics: Statistics = field(repr=False)
    each: list[Statistics] = field(default_factory=list, repr=False)

    @property
    def calibration(self) -> Calibration:
        """Of each matrix, if every row of every input is known to be one's; else of all."""
        whole = self.each and sum(s.count for s in self.each) == self.statistics.count
        return self.each if whole else self.statistics

    def update(self, x: Tensor, ends: Tensor | None) -> None:
        """Take in an input; ``ends``: where the rows of each matrix end."""
        self.statistics.update(x)
        if ends is None or x.dim() != 2:
            return
        self.each = self.each or [Statistics(self.statistics.in_features) for _ in range(len(ends))]
        first = 0
        for statistics, last in zip(self.each, ends.tolist(), strict=True):
            statistics.update(x[first:last])
            first = last


class Survey:
    """Watches the products of a model during :meth:`watch`: the graphs that Dynamo captures call :meth:`_note`."""

    def __init__(self, model: nn.Module, root: nn.Module) -> None:
        self.model, self.root = model, root
        self.uses: dict[str, Use] = {}
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._is_on = False
        self._wanted: frozenset[str] | None = None
        self._wants_hessians = False
        self._installation: Installation | None = None

    def install(self, run: Callable[[], None]) -> None:
        """Capture the model's graphs by ``run``, which calls it; they watch from then on, until :meth:`remove`."""
        watch = [ObserveLinears(self._note)]
        self._installation = capture_model(self.model, self.root, watch, run, "inference", verify=False)

    def remove(self) -> None:
        """Give every forward back."""
        if self._installation is not None:
            self._installation.remove_all()
            self._installation = None

    def watch(self, run: Callable[[], None], only: Iterable[str] = (), hessians: bool = False) -> None:
        """Keep the statistics of every product's input while ``run`` calls the model.

        Args:
            only: names of parameters; none: all that are found.
            hessians: whether to keep the whole second-moment matrix too: 4 · in_features² bytes each.
        """
        wanted, self._wants_hessians = frozenset(only), hessians
        for name in wanted:
            self.uses[name].statistics = Statistics(self.uses[name].statistics.in_features, hessians)
            self.uses[name].each = []
        self._wanted = wanted or None
        self._is_on = True
        try:
            run()
        finally:
            self._is_on = False

    def _note(self, x: Tensor, weight: Tensor, layout: str, ends: Tensor | None = None) -> None:
        name = self._names.get(id(weight))
        if not self._is_on or name is None or (self._wanted is not None and name not in self._wanted):
            return
        if name not in self.uses:
            size = weight.shape[-1 if layout == "rows" else -2]
            statistics = Statistics(size, self._wants_hessians)
            self.uses[name] = Use(name, cast(nn.Parameter, weight), layout, statistics)
        self.uses[name].update(x.detach(), ends)
