"""Base classes of callbacks: a step of a run, one that solves, one that hooks."""

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any, ClassVar, Self

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from moeq.fit.preflight import FitWork
from moeq.fit.solve import Solver, quantize_sites
from moeq.models.observe import TokenMask
from moeq.module import MoEQuantModule
from moeq.preflight.phases import Phase


class Step(Callback):
    """A step of a fit: its constructor arguments are told apart when a run continues.

    Attributes:
        affects_weights: False for steps that only write down what happens.
        gathers_hessians: True for steps that fill ``run.hessians``.
        constructor_arguments: By name, defaults included.
    """

    affects_weights: ClassVar[bool] = True
    gathers_hessians: ClassVar[bool] = False
    constructor_arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Write the arguments down; a wrong one is ``__init__``'s to refuse."""
        step = super().__new__(cls)
        step.constructor_arguments = {}
        if cls.__init__ is not object.__init__:
            with suppress(TypeError):
                bound = inspect.signature(cls.__init__).bind(step, *args, **kwargs)
                bound.apply_defaults()
                _, *given = bound.arguments.items()
                step.constructor_arguments = dict(given)
        return step

    def expected(self, module: MoEQuantModule, work: FitWork) -> Sequence[Phase]:
        """What this step adds to a run, for the preflight; one with the label of a pass stands for its sweep."""
        return ()

    def check(self, module: MoEQuantModule) -> None:
        """Raise ValueError where this step cannot work on the schedule or on what is finished of a fit.

        All that a run may be refused for is here or in ``on_fit_start``, and neither writes a file.
        """

    def begin(self, module: MoEQuantModule) -> None:
        """Write what tells a fit from others, before its first pass: it is not refused any more."""


class SolveStep(Step):
    """A step that quantizes the weights of each calibration pass: override ``solver``.

    Attributes:
        needs_hessians: Whether the solver reads ``run.hessians``.
        solves_named: Whether the solver takes two-level and table grids (``moeq.quant.kinds``).
        fewest_bits: That the solver takes.
        takes_factors: Whether the solver reads ``run.factors``.
    """

    needs_hessians: ClassVar[bool] = False
    solves_named: ClassVar[bool] = False
    takes_factors: ClassVar[bool] = False
    fewest_bits: ClassVar[int] = 1

    @abstractmethod
    def solver(self, module: MoEQuantModule) -> Solver:
        """A function (unit, weight_EOI float32) -> Solution for the current pass; called once per pass on each rank."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before any work a list of callbacks that cannot work.

        Raises:
            ValueError: Two steps quantize, or nothing gathers the Hessians that this one needs.
        """
        name, steps = type(self).__name__, _callbacks(trainer)
        if others := [type(step).__name__ for step in steps if isinstance(step, SolveStep) and step is not self]:
            raise ValueError(f"{name} and {others[0]} both quantize every weight; keep one of them in the callbacks")
        if self.needs_hessians and not any(getattr(step, "gathers_hessians", False) for step in steps):
            raise ValueError(f"{name} needs Hessians, which no callback gathers; add HessianCalibration to the list")

    @override
    def check(self, module: MoEQuantModule) -> None:
        """Refuse two-level and table grids, and few bits, where the solver does not take them."""
        named = {name: grid for name, grid in module.run.plan.items() if grid.is_named}
        if named and not self.solves_named:
            name, grid = next(iter(named.items()))
            raise ValueError(
                f"{type(self).__name__} solves uniform groups alone, and {name} is to have {grid.kind}; use RTN or "
                "GPTQ, or grid: uniform"
            )
        for name, grid in module.run.plan.items():
            if grid.bits < self.fewest_bits:
                raise ValueError(
                    f"{type(self).__name__} needs {self.fewest_bits} bits at least, and {name} is to have {grid.bits}; "
                    "use RTN or GPTQ, or more bits"
                )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize what this pass calibrated."""
        module = module_of(pl_module)
        if module.current_pass.kind == "calibrate":
            self.solve_pass(module)

    def solve_pass(self, module: MoEQuantModule) -> None:
        """Solve the parts of the current pass."""
        current = module.current_pass
        quantize_sites(module.adapter, module.run, current.sites, self.solver(module), current.parts)


class HookedStep(Step):
    """A step that watches the batches of a pass through hooks: override ``attach`` and ``finish``.

    Hooks come off after the last batch, before any callback's end of the pass: what others then run is not seen.

    Attributes:
        mask: Which tokens of the current batch are no padding.
        batch_idx: Index of the current batch.
    """

    def __init__(self) -> None:
        self.mask, self.batch_idx = TokenMask(), 0
        self._hooks = ExitStack()

    @abstractmethod
    def attach(self, module: MoEQuantModule, hooks: ExitStack) -> None:
        """Register the hooks of a pass; ``hooks`` takes them off."""

    def finish(self, module: MoEQuantModule) -> None:
        """Act on what was seen in the pass."""

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach for this pass."""
        self.attach(module_of(pl_module), self._hooks)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Padding tokens do not count."""
        mask_BT = batch.get("attention_mask")
        self.mask.keep, self.batch_idx = None if mask_BT is None else mask_BT.flatten().bool(), batch_idx

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the hooks off after the last batch."""
        if trainer.is_last_batch:
            self._hooks.close()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the pass."""
        self._hooks.close()
        self.finish(module_of(pl_module))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hooks come off whatever happens."""
        self._hooks.close()


def module_of(pl_module: LightningModule) -> MoEQuantModule:
    """The module of a callback's hook, which is moeq's."""
    assert isinstance(pl_module, MoEQuantModule), f"callbacks of moeq need its module, not a {type(pl_module).__name__}"
    return pl_module


def _callbacks(trainer: Trainer) -> list[Callback]:
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found
