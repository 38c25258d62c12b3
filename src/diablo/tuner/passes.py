"""The pass: a weight holds blocks while a forward or a backward of its model runs, and at no other time.

A forward of an adapted model, or of any module in it that has adapted layers inside, writes the blocks of all these
layers into their weights when it begins and takes them out when it ends, by return or by exception. A backward does the
same around itself: it writes when the first adapted layer's gradient is asked for, and restores when autograd's engine
has finished. Whoever looks at a weight at any other time sees the base's, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter, getitem, is_, methodcaller
from threading import RLock, get_ident
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch.autograd.variable import Variable
from torch.utils._pytree import tree_leaves

from diablo.layout import Layout
from diablo.ops.sweep import DiagonalSweep

_CHOICE = attrgetter("_active_adapter", "_disable_adapters", "merged_adapters")
_ADDRESS = torch.Tensor.data_ptr
_REQUIRES_GRAD = attrgetter("requires_grad")
_HAS_FORWARD = methodcaller("__contains__", "forward")
_MOST_PLANS = 4
_TWO_THREADS = (
    "Two threads run one model that needs different values in its weights for each: run one after the other, set "
    "in_place=False, or load the adapters for inference, where they stand beside the weights."
)


class Watched(NamedTuple):
    """What a layer's part in a pass hangs on, as it is found again in each pass.

    Attributes:
        places: tensors and modules, each by torch's table of them and its key there.
        hooks: tables of hooks that are empty, or are not.
        namespaces: attributes of modules, among which there is a forward of their own, or is not.
    """

    places: Sequence[tuple[dict[str, Any], str]] = ()
    hooks: Sequence[Mapping[int, Any]] = ()
    namespaces: Sequence[dict[str, Any]] = ()


class Member(Protocol):
    """What a pass asks of a layer; :class:`diablo.tuner.layers.DiabloLayer` answers.

    Attributes:
        number: the layer's number in ``LAYERS``.
        merged_adapters: names of the adapters that are merged into its weights.
        passes: the passes of the model that it is part of.
    """

    number: int
    merged_adapters: list[str]
    passes: Passes

    @property
    def disable_adapters(self) -> bool:
        """Whether all adapters are switched off."""

    @property
    def active_adapters(self) -> Sequence[str]:
        """Names of the active adapters, which need not all be on this layer."""

    def names_in_use(self) -> tuple[str, ...]:
        """The adapters of this layer that a pass would use now."""

    def part(self, names: tuple[str, ...]) -> tuple[Any, bool]:
        """What the layer computes with in a pass of these adapters, and whether their blocks stand in its weights."""

    def diagonals_of(self, names: Sequence[str]) -> list[tuple[torch.Tensor, dict[Layout, list[torch.Tensor]]]]:
        """The weights that a pass with these adapters in them writes to, and what it adds to them."""

    def watched(self, names: tuple[str, ...]) -> Watched:
        """What the layer's part in a pass with these adapters hangs on, besides the choice of adapters."""

    def take_blocks_back(self) -> None:
        """Have the blocks at hand, where accelerate has offloaded them."""


LAYERS: WeakValueDictionary[int, Member] = WeakValueDictionary()
"""The adapted layers by number, for those who must not keep them alive: plans, which graphs hold, and operators."""


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

    def __init__(self, layers: Sequence[Member], names: Mapping[int, tuple[str, ...]], bare: bool) -> None:
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
        self._namespaces = [namespace for own in watched for namespace in own.namespaces]
        self._overridden = list(map(_HAS_FORWARD, self._namespaces))
        # Modules alone: a tensor of another class is another object.
        self._modules = [found for found in self._found if isinstance(found, torch.nn.Module)]
        self._types = list(map(type, self._modules))

    def is_there(self) -> bool:
        """Whether the weights and parameters are still the same ones, where they were."""
        try:
            if not all(map(is_, map(getitem, self._tables, self._keys), self._found)):
                return False
        except KeyError:
            return False
        return list(map(_ADDRESS, self._parameters)) == self._addresses

    def is_chosen(self, layers: Sequence[Member]) -> bool:
        """Whether the adapters are chosen, trained and frozen as they were, and the base layers compute as they did."""
        return (
            list(map(_CHOICE, layers)) == self._choices
            and list(map(_REQUIRES_GRAD, self._parameters)) == self._trained
            and list(map(bool, self._hooks)) == self._hooked
            and list(map(_HAS_FORWARD, self._namespaces)) == self._overridden
            and list(map(type, self._modules)) == self._types
        )

    def covers(self, layers: Sequence[Member]) -> bool:
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
        changes: how often the choice of adapters had changed when it began.
        is_claimed: whether a module has taken it on itself to mark what the forward returns.
    """

    def __init__(self, passes: Passes, plan: Plan) -> None:
        self._passes, self.plan = passes, plan
        self.changes = passes.changes
        self.is_claimed = False
        self._outer: Pass | None = None
        self._thread = get_ident()

    def __enter__(self) -> Pass:
        passes = self._passes
        try:
            with passes.lock:
                passes.check_no_other_backward(self.plan)
                self._outer = passes.running.get(self._thread)
                passes.running[self._thread] = self
                passes.put(self.plan)
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._close()
        except BaseException:
            # Ctrl-C comes between any two lines. What was done can be done again.
            self._close()
            raise

    def _close(self) -> None:
        passes = self._passes
        with passes.lock:
            inner = passes.running.get(self._thread)
            if inner is self and self._outer is not None:
                passes.running[self._thread] = self._outer
            elif inner is self:
                del passes.running[self._thread]
            # Generators may leave their contexts in another order.
            while inner is not None and inner is not self:
                if inner._outer is self:
                    inner._outer = self._outer
                inner = inner._outer
            passes.settle()

    def reach(self) -> None:
        """Make the weights, in a backward, what they were in this pass."""
        # Every layer asks, and the first of them has done it.
        passes = self._passes
        if passes.reached is not self.plan or passes.reached_in != torch._C._current_graph_task_id():
            passes.reach(self.plan)

    def mark(self, result: Any, before: Callable[[], None] | None = None) -> None:
        """See to it that a backward from tensors comes through :meth:`reach` first.

        Marked are the outputs of a forward, so that a recomputation under checkpointing uses the adapters of this pass,
        whichever are active by that time, and the outputs of what reads weights in a backward of its own.

        Args:
            result: tensors, in whatever they are put into.
            before: called in place of :meth:`reach`.
        """
        if torch.is_grad_enabled():
            before = before or self.reach
            for output in tree_leaves(result):
                node: Any = output.grad_fn if isinstance(output, torch.Tensor) else None
                # A module may return what it was given, which is another pass's.
                if node is not None and "diablo" not in node.metadata:
                    node.metadata["diablo"] = "marked"
                    node.register_prehook(lambda _: before())


@contextmanager
def left(opened: Pass) -> Iterator[Pass]:
    """A pass that is left even where Ctrl-C comes as it is being entered or left: twice does no harm."""
    try:
        with opened:
            yield opened
    except BaseException:
        opened.__exit__()
        raise


class Passes:
    """The passes of a model: which run, and what stands in the weights. All adapted layers of a model share one.

    It refers to no module, so that a model is freed as soon as nobody refers to it.

    Attributes:
        running: the innermost forward of each thread.
        written: the plan whose blocks stand in the weights; None for the base values.
        lock: held while any of these changes.
        changes: how often the choice of adapters has changed.
        backwards: the backwards that run, by the number that autograd's engine gives them.
        reached: the plan whose gradients a backward has come to last.
        reached_in: the number of that backward.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.running: dict[int, Pass] = {}
        self.written: Plan | None = None
        self.changes = 0
        self._plans: dict[Hashable, list[Plan]] = {}
        # The engine holds them: one that it has dropped is no longer among these.
        self.backwards: WeakValueDictionary[int, _End] = WeakValueDictionary()
        self.reached: Plan | None = None
        self.reached_in = -1
        self._changes_before = 0
        self._recomputable: set[tuple[str, ...]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a model, or what was pickled, has passes of its own.
        return Passes, ()

    def current(self) -> Pass | None:
        """The forward that runs in this thread."""
        return self.running.get(get_ident())

    def begin(self, layers: Sequence[Member], inputs: Any = (), bare: bool = False) -> Pass:
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

    def plan(self, layers: Sequence[Member], names: tuple[str, ...] | None = None, bare: bool = False) -> Plan:
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
        for layer in layers:
            layer.take_blocks_back()
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
            raise RuntimeError(_TWO_THREADS)
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
        elif self.backwards:
            self.put(self.reached)
        elif not self.running:
            self.put(None)

    def reach(self, plan: Plan) -> None:
        """Make the weights, in a backward, those of a plan; the base values are back when the backward has ended."""
        backward = torch._C._current_graph_task_id()
        with self.lock:
            if backward not in self.backwards:
                if not self.backwards:
                    self._changes_before = self.changes
                end = self.backwards[backward] = _End(self, backward)
                Variable._execution_engine.queue_callback(end)
            plan.check_unmerged()
            self.put(plan)
            # Last: threads of other devices go on as soon as they see it.
            self.reached, self.reached_in = plan, backward

    def finish(self, backward: int) -> None:
        """Take leave of a backward; what was done can be done again."""
        with self.lock:
            self.backwards.pop(backward, None)
            if self.reached_in == backward:
                self.reached_in = -1
            if not self.backwards:
                self.reached = None
                self._recomputable.clear()
            self.settle()

    def check_no_other_backward(self, plan: Plan) -> None:
        """Refuse a forward that needs other values in the weights than a backward of another thread.

        Raises:
            RuntimeError: it does.
        """
        wanted = plan if plan.writes else None
        if self.backwards and torch._C._current_graph_task_id() == -1 and self.written is not wanted:
            raise RuntimeError(_TWO_THREADS)

    def _plan_of_backward(self, layers: Sequence[Member]) -> Plan:
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

    _finish: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, passes: Passes, backward: int) -> None:
        self._finish = partial(passes.finish, backward)

    def __call__(self) -> None:
        try:
            self._finish()
        except BaseException:
            # Likewise for Ctrl-C.
            self._finish()
            raise

    def __del__(self) -> None:
        self()


def _any_requires_grad(inputs: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(inputs))
