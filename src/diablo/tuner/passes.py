"""The pass: a weight holds blocks while a forward or a backward of its model runs, and at no other time.

A forward of an adapted model, or of any module in it that has adapted layers inside, writes the blocks of all these
layers into their weights when it begins and takes them out when it ends, by return or by exception. A backward does the
same around itself: it writes when the first adapted layer's gradient is asked for, and restores when autograd's engine
has finished. Whoever looks at a weight at any other time sees the base's, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from operator import attrgetter, getitem, is_
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch.autograd.variable import Variable
from torch.utils._pytree import tree_leaves

from diablo.ops.sweep import DiagonalSweep

if TYPE_CHECKING:
    from diablo.tuner.layer import DiabloLayer

LAYERS: WeakValueDictionary[int, DiabloLayer] = WeakValueDictionary()
"""The adapted layers by number, for those who must not keep them alive: plans, which graphs hold, and operators."""

_CHOICE = attrgetter("_active_adapter", "_disable_adapters", "merged_adapters")
_ADDRESS = torch.Tensor.data_ptr
_REQUIRES_GRAD = attrgetter("requires_grad")
_MOST_PLANS = 4


class Watched(NamedTuple):
    """What a layer's part in a pass hangs on, as it is found again in each pass.

    Attributes:
        places: tensors and modules, each by torch's table of them and its key there.
        hooks: tables of hooks that are empty, or are not.
    """

    places: Sequence[tuple[dict[str, Any], str]] = ()
    hooks: Sequence[Mapping[int, Any]] = ()


class Plan:
    """What a pass uses and writes: which adapters each layer has, and what stands in its weights meanwhile.

    Args:
        layers: the layers of the pass.
        names: the adapters that each of them uses, by its number.
        bare: whether the weights are left alone; the products of all blocks are then added beside them.

    Attributes:
        names: as given.
        parts: what the layers compute with that it has prepared, by the layer's number.
        held: the numbers of those whose blocks stand in their weights.
        writes: whether anything is written.
        sweep: what writes it, and restores the base values.
        active: the adapters that were active when it was made; None where they were disabled.
    """

    def __init__(self, layers: Sequence[DiabloLayer], names: Mapping[int, tuple[str, ...]], bare: bool) -> None:
        self.names = names
        self.active = None if layers[0].disable_adapters else tuple(layers[0].active_adapters)
        self.parts: dict[int, Any] = {}
        self.held: set[int] = set()
        diagonals = []
        for layer in () if bare else layers:
            part, holds = layer.part(names[layer.number])
            if part is not None:
                self.parts[layer.number] = part
            if holds:
                self.held.add(layer.number)
                diagonals += layer.diagonals_of(names[layer.number])
        self.writes = bool(diagonals)
        self.sweep = DiagonalSweep(diagonals)
        # What it hangs on, in lists that are compared without coming back to Python for each layer.
        watched = [layer.watched(names[layer.number]) for layer in layers]
        self._choices = copy.deepcopy([_CHOICE(layer) for layer in layers])
        self._tables = [table for own in watched for table, _ in own.places]
        self._keys = [key for own in watched for _, key in own.places]
        self._found = list(map(getitem, self._tables, self._keys))
        self._parameters = [found for found in self._found if type(found) is torch.nn.Parameter]
        self._addresses = list(map(_ADDRESS, self._parameters))
        self._trained = list(map(_REQUIRES_GRAD, self._parameters))
        self._hooks = [hooks for own in watched for hooks in own.hooks]
        self._hooked = list(map(bool, self._hooks))

    def is_there(self) -> bool:
        """Whether the weights and parameters are still the same ones, where they were."""
        try:
            if not all(map(is_, map(getitem, self._tables, self._keys), self._found)):
                return False
        except KeyError:
            return False
        return list(map(_ADDRESS, self._parameters)) == self._addresses

    def is_chosen(self, layers: Sequence[DiabloLayer]) -> bool:
        """Whether the adapters are chosen, trained and frozen as they were, and hooks registered."""
        return (
            list(map(_CHOICE, layers)) == self._choices
            and list(map(_REQUIRES_GRAD, self._parameters)) == self._trained
            and list(map(bool, self._hooks)) == self._hooked
        )

    def covers(self, layers: Sequence[DiabloLayer]) -> bool:
        """Whether the layers are among those of the plan."""
        return all(layer.number in self.names for layer in layers)

    def check_unmerged(self) -> None:
        """Refuse to write blocks into weights that others have been merged into since.

        Raises:
            RuntimeError: a weight has merged adapters.
        """
        for number in self.held:
            if (layer := LAYERS.get(number)) is not None and layer.merged_adapters:
                raise RuntimeError(
                    f"{', '.join(layer.merged_adapters)} was merged between a forward and its backward, which needs "
                    "the weight as it was: call backward() before merge_adapter()."
                )


class Pass:
    """One forward that runs, as a context.

    Attributes:
        plan: what it uses and writes.
        is_claimed: whether a module has taken it on itself to mark what the forward returns.
    """

    def __init__(self, passes: Passes, plan: Plan) -> None:
        self._passes, self.plan = passes, plan
        self.is_claimed = False

    def __enter__(self) -> Pass:
        passes, thread = self._passes, get_ident()
        with passes.lock:
            self._outer = passes.running.get(thread)
            passes.running[thread] = self
            passes.opened += 1
            try:
                passes.put(self.plan)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        passes, thread = self._passes, get_ident()
        with passes.lock:
            passes.opened -= 1
            if self._outer is None:
                del passes.running[thread]
            else:
                passes.running[thread] = self._outer
            # A graph may hold this pass for long.
            self._outer = None
            passes.settle()

    def reach(self) -> None:
        """Make the weights, in a backward, what they were in this pass."""
        # Every layer asks, and the first of them has done it.
        if self._passes.reached is not self.plan or torch._C._current_graph_task_id() not in self._passes.backwards:
            self._passes.reach(self.plan)

    def mark(self, result: Any) -> None:
        """See to it that a backward from what the forward returns comes through :meth:`reach` first.

        A recomputation under checkpointing then uses the adapters of this pass, whichever are active by that time.
        """
        if torch.is_grad_enabled():
            for output in tree_leaves(result):
                node = output.grad_fn if isinstance(output, torch.Tensor) else None
                # A module may return what it was given, which is another pass's.
                if node is not None and "diablo" not in node.metadata:
                    node.metadata["diablo"] = "marked"
                    node.register_prehook(lambda _: self.reach())


class Passes:
    """The passes of a model: which run, and what stands in the weights. All adapted layers of a model share one.

    It refers to no module, so that a model is freed as soon as nobody refers to it.

    Attributes:
        running: the innermost forward of each thread.
        opened: how many forwards and backwards run.
        written: the plan whose blocks stand in the weights; None for the base values.
        lock: held while any of these changes.
        changes: how often the choice of adapters has changed.
        backwards: the backwards that run, by the number that autograd's engine gives them.
        reached: the plan whose gradients the backward has come to.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.running: dict[int, Pass] = {}
        self.opened = 0
        self.written: Plan | None = None
        self.changes = 0
        self._plans: dict[Hashable, list[Plan]] = {}
        self.backwards: set[int] = set()
        self.reached: Plan | None = None
        self._changes_before = 0
        self._recomputable: set[tuple[str, ...]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a model, or what was pickled, has passes of its own.
        return Passes, ()

    def current(self) -> Pass | None:
        """The forward that runs in this thread."""
        return self.running.get(get_ident())

    def begin(self, layers: Sequence[DiabloLayer], inputs: Any = (), bare: bool = False) -> Pass:
        """A forward of some layers, to be entered as a context.

        In a backward it is a recomputation, which uses the adapters of the pass that it repeats.

        Args:
            layers: the layers.
            inputs: what the forward is given.
            bare: whether the weights are left alone.

        Raises:
            RuntimeError: ``in_place=True`` has become impossible for a layer, or nothing tells which adapters a
                recomputation has to use.
        """
        if bare:
            plan = self.plan(layers, bare=True)
        elif torch._C._current_graph_task_id() != -1 and not (self.backwards and self.changes != self._changes_before):
            plan = self._plan_of_backward(layers)
        else:
            plan = self.plan(layers)
            if plan.active is not None and not torch.is_grad_enabled() and _any_requires_grad(inputs):
                # As reentrant checkpointing runs a forward, of which no graph is left that would tell of the pass.
                self._recomputable.add(plan.active)
        return Pass(self, plan)

    def plan(self, layers: Sequence[DiabloLayer], names: tuple[str, ...] | None = None, bare: bool = False) -> Plan:
        """What a pass of some layers uses and writes, as things are now.

        Plans are kept, and made anew where a weight, a parameter or the choice of adapters is another.

        Args:
            layers: the layers inside of a module, in the order of its modules.
            names: the adapters that all of them use; the active ones where None.
            bare: whether the weights are left alone.
        """
        # Modules that have the same layers inside of them are around one another, and plan alike.
        key = (layers[0].number, len(layers), names, bare)
        for plan in self._plans.get(key, ()):
            if (names is not None or plan.is_chosen(layers)) and plan.is_there():
                return plan
        plan = Plan(layers, {layer.number: layer.names_in_use() if names is None else names for layer in layers}, bare)
        with self.lock:
            # Those of weights that are no longer there would keep them alive.
            plans = {other: [old for old in own if old.is_there()] for other, own in self._plans.items()}
            plans[key] = [plan, *plans.get(key, ())][:_MOST_PLANS]
            self._plans = plans
        return plan

    def forget(self) -> None:
        """Drop all plans, and with them the references to weights and the copies of their diagonals."""
        with self.lock:
            self._plans = {}

    def put(self, plan: Plan | None) -> None:
        """Make the weights those of a plan; of the base where it is None.

        Raises:
            RuntimeError: another thread runs a forward that has other blocks in the weights.
        """
        if plan is not None and not plan.writes:
            plan = None
        if self.written is plan:
            return
        if any(thread != get_ident() for thread in self.running):
            raise RuntimeError(
                "Two threads run one model that needs different values in its weights for each: run one after the "
                "other, set in_place=False, or load the adapters for inference, where they stand beside the weights."
            )
        if self.written is not None:
            self.written.sweep.restore()
            self.written = None
        if plan is not None:
            # Before the blocks are written, so that an interruption in between restores them.
            self.written = plan
            plan.sweep.write()

    def settle(self) -> None:
        """Make the weights what they have to be for whoever still runs."""
        current = self.current()
        if current is not None:
            self.put(current.plan)
        elif not self.opened:
            self.put(None)
        elif self.reached is not None:
            self.put(self.reached)

    def reach(self, plan: Plan) -> None:
        """Make the weights, in a backward, those of a plan; the base values are back when the backward has ended."""
        backward = torch._C._current_graph_task_id()
        if backward not in self.backwards:
            self._join(backward)
        self.reached = plan
        if self.written is not plan:
            with self.lock:
                plan.check_unmerged()
                self.put(plan)

    def finish(self, backward: int) -> None:
        """Take leave of a backward."""
        with self.lock:
            if backward in self.backwards:
                self.backwards.remove(backward)
                self.opened -= 1
                if not self.backwards:
                    self.reached = None
                    self._recomputable.clear()
                self.settle()

    def _join(self, backward: int) -> None:
        with self.lock:
            if not self.backwards:
                self._changes_before = self.changes
            self.backwards.add(backward)
            self.opened += 1
            try:
                Variable._execution_engine.queue_callback(_End(self, backward))
            except BaseException:
                self.finish(backward)
                raise

    def _plan_of_backward(self, layers: Sequence[DiabloLayer]) -> Plan:
        if self.reached is not None and self.reached.covers(layers):
            return self.reached
        if len(possible := self._recomputable) > 1:
            # This backward ends here, and the next one is another.
            self._recomputable = set()
            raise RuntimeError(
                "A recomputation under reentrant gradient checkpointing cannot tell whether its forward had the "
                f"adapters {' or '.join(', '.join(names) for names in sorted(possible))}: set "
                "use_reentrant=False, call the whole model and not its parts, or call backward() before set_adapter()."
            )
        return self.plan(layers)


class _End:
    """What autograd's engine calls when a backward has ended, or drops, uncalled, when it has failed."""

    def __init__(self, passes: Passes, backward: int) -> None:
        self._passes, self._backward = passes, backward

    def __call__(self) -> None:
        self._passes.finish(self._backward)

    def __del__(self) -> None:
        self._passes.finish(self._backward)


def _any_requires_grad(inputs: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(inputs))
