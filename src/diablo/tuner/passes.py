"""The pass: a weight has blocks in it while a forward or a backward of its model runs, and at no other time.

A forward runs on an adapted model, or on any module in it that has adapted layers inside. When it begins, it writes the
blocks of all these layers into their weights. When it ends, by return or by exception, it puts the base weights back. A
backward does the same: it writes the blocks when it comes to the first adapted layer, and puts the base weights back
when autograd's engine has finished. At any other time a weight is the base weight, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock, get_ident
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.autograd.variable import Variable
from torch.utils._pytree import tree_leaves

from diablo.tuner.plans import Member, Plan

_MOST_PLANS = 4
_TWO_THREADS = (
    "Two threads run one model that needs different values in its weights for each: run one thread after the other, "
    "set in_place=False, or load the adapters for inference, so that their blocks stand beside the weights."
)


class Pass:
    """One running forward, as a context.

    Attributes:
        plan: what the pass uses and writes.
        changes: how often the choice of adapters had changed when the pass began.
        is_claimed: whether a module is running that will mark the outputs of this forward (see :meth:`mark`).
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
            # Ctrl-C can come between any two lines. Closing twice does no harm.
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
            # Generators may leave their contexts in another order than that of nesting.
            while inner is not None and inner is not self:
                if inner._outer is self:
                    inner._outer = self._outer
                inner = inner._outer
            passes.settle()

    def reach(self) -> None:
        """In a backward: give the weights the values that they had in this pass."""
        # Every layer calls this, and the first call of a backward does the work.
        passes = self._passes
        if passes.reached is not self.plan or passes.reached_in != torch._C._current_graph_task_id():
            passes.reach(self.plan)

    def mark(self, result: Any, before: Callable[[], None] | None = None) -> None:
        """Mark tensors, so that a backward from them calls :meth:`reach` first.

        Two kinds of tensors are marked. Outputs of a forward are, so that a recomputation under checkpointing uses the
        adapters of this pass, and not those that are active by then. Outputs of functions whose backward reads weights
        are, so that the weights have the right values there.

        Args:
            result: tensors, in any nested containers.
            before: called in place of :meth:`reach`, where given.
        """
        if torch.is_grad_enabled():
            before = before or self.reach
            for output in tree_leaves(result):
                node: Any = output.grad_fn if isinstance(output, torch.Tensor) else None
                # A module may return a tensor that it was given. Another pass has marked that one.
                if node is not None and "diablo" not in node.metadata:
                    node.metadata["diablo"] = "marked"
                    node.register_prehook(lambda _: before())


@contextmanager
def left(opened: Pass) -> Generator[Pass]:
    """A context that leaves a pass even where Ctrl-C comes while it is entered or left. Leaving it twice is safe."""
    try:
        with opened:
            yield opened
    except BaseException:
        opened.__exit__()
        raise


class Passes:
    """The passes of a model: those that run, and what stands in the weights. All adapted layers of a model share it.

    It refers to no module, so that a model is freed as soon as nobody else refers to it.

    Attributes:
        running: the innermost running forward of each thread, by the thread's number.
        written: the plan whose blocks stand in the weights; None where the base values stand there.
        lock: held while any of these changes.
        changes: how often the choice of adapters has changed.
        backwards: the running backwards, by the number that autograd's engine gives to each.
        reached: the plan of the pass whose layers a backward has come to; None while no backward runs.
        reached_in: the number of that backward; -1 where there is none.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.running: dict[int, Pass] = {}
        self.written: Plan | None = None
        self.changes = 0
        self._plans: dict[Hashable, list[Plan]] = {}
        # Only autograd's engine keeps these objects alive. When it drops one, it vanishes here too.
        self.backwards: WeakValueDictionary[int, _End] = WeakValueDictionary()
        self.reached: Plan | None = None
        self.reached_in = -1
        self._changes_before = 0
        self._recomputable: set[tuple[str, ...]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled model gets new passes.
        return Passes, ()

    def current(self) -> Pass | None:
        """The innermost forward that runs in this thread; None where none does."""
        return self.running.get(get_ident())

    def begin(self, layers: Sequence[Member], inputs: Any = (), bare: bool = False) -> Pass:
        """The pass of a forward, to be entered as a context.

        A forward that runs inside a backward is a recomputation. It uses the adapters of the forward that it repeats.

        Args:
            layers: the layers of the forward.
            inputs: the arguments of the forward.
            bare: whether the weights are left alone.

        Raises:
            RuntimeError: ``in_place=True`` has become impossible for a layer, or it cannot be known which adapters a
                recomputation has to use.
        """
        if bare:
            plan = self.plan(layers, bare=True)
        elif torch._C._current_graph_task_id() != -1 and not (self.backwards and self.changes != self._changes_before):
            plan = self._plan_of_backward(layers)
        else:
            plan = self.plan(layers)
            if plan.active is not None and not torch.is_grad_enabled() and _any_requires_grad(inputs):
                # Reentrant checkpointing runs forwards like this one: without gradients, on inputs that require them.
                # No graph is left that could tell a recomputation about the pass, so its adapters are remembered here.
                self._recomputable.add(plan.active)
        return Pass(self, plan)

    def plan(self, layers: Sequence[Member], names: tuple[str, ...] | None = None, bare: bool = False) -> Plan:
        """The plan of a pass of some layers, with their present state.

        A plan is kept and used again. A new one is made where a weight, a parameter or the choice of adapters differs.

        Args:
            layers: the layers inside of a module, in the order of its modules.
            names: the adapters that all of them use; each layer's active ones where None.
            bare: whether the weights are left alone.
        """
        # The first layer and the number of layers identify the layers inside of a module. Modules that agree in both
        # are nested in one another, with the same layers, so that they can share plans.
        key = (layers[0].number, len(layers), names, bare)
        for plan in self._plans.get(key, ()):
            if (names is not None or plan.is_chosen(layers)) and plan.is_there():
                return plan
        for layer in layers:
            layer.take_blocks_back()
        plan = Plan(layers, {layer.number: layer.names_in_use() if names is None else names for layer in layers}, bare)
        with self.lock:
            # Plans whose weights have been replaced are dropped: they would keep the old weights alive.
            plans = {other: [old for old in own if old.is_there()] for other, own in self._plans.items()}
            plans[key] = [plan, *plans.get(key, ())][:_MOST_PLANS]
            self._plans = plans
        return plan

    def forget(self) -> None:
        """Drop all plans, with their references to weights and their copies of base values."""
        with self.lock:
            self._plans = {}

    def put(self, plan: Plan | None) -> None:
        """Write the blocks of a plan into the weights; with None, put the base values back.

        Raises:
            RuntimeError: the weights would change, and another thread runs a forward.
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
            # This comes before the blocks are written, so that the base values are put back after an interruption.
            self.written = plan
            plan.sweep.write()

    def settle(self) -> None:
        """Give the weights the values that the forwards and backwards need that still run; the base values if none."""
        current = self.current()
        if current is not None:
            self.put(current.plan)
        elif self.backwards:
            self.put(self.reached)
        elif not self.running:
            self.put(None)

    def reach(self, plan: Plan) -> None:
        """In a backward: write the blocks of a plan into the weights. When the backward ends, they are taken out.

        Raises:
            RuntimeError: a weight has merged adapters, or another thread runs a forward that needs other values.
        """
        backward = torch._C._current_graph_task_id()
        with self.lock:
            if backward not in self.backwards:
                if not self.backwards:
                    self._changes_before = self.changes
                end = self.backwards[backward] = _End(self, backward)
                Variable._execution_engine.queue_callback(end)
            plan.check_unmerged()
            self.put(plan)
            # This comes last: the backward's threads for other devices read it without the lock, and then go on.
            self.reached, self.reached_in = plan, backward

    def finish(self, backward: int) -> None:
        """Note that a backward has ended, and settle the weights. Calling this twice does no harm."""
        with self.lock:
            self.backwards.pop(backward, None)
            if self.reached_in == backward:
                self.reached_in = -1
            if not self.backwards:
                self.reached = None
                self._recomputable.clear()
            self.settle()

    def check_no_other_backward(self, plan: Plan) -> None:
        """Refuse a forward that needs other values in the weights than a running backward of another thread.

        Raises:
            RuntimeError: the two need different values.
        """
        wanted = plan if plan.writes else None
        if self.backwards and torch._C._current_graph_task_id() == -1 and self.written is not wanted:
            raise RuntimeError(_TWO_THREADS)

    def _plan_of_backward(self, layers: Sequence[Member]) -> Plan:
        if self.reached is not None and self.reached.covers(layers):
            return self.reached
        if len(possible := self._recomputable) > 1:
            # The error ends this backward. The next one starts without these.
            self._recomputable = set()
            raise RuntimeError(
                "A recomputation under reentrant gradient checkpointing cannot tell whether its forward had the "
                f"adapters {' or '.join(', '.join(names) for names in sorted(possible))}: set "
                "use_reentrant=False, call the whole model and not its parts, or call backward() before set_adapter()."
            )
        return self.plan(layers)


class _End:
    """Ends a backward: autograd's engine calls it after the backward, or drops it uncalled if the backward fails."""

    _finish: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, passes: Passes, backward: int) -> None:
        self._finish = partial(passes.finish, backward)

    def __call__(self) -> None:
        try:
            self._finish()
        except BaseException:
            # Ctrl-C may have come in between; see Pass.__exit__.
            self._finish()
            raise

    def __del__(self) -> None:
        self()


def _any_requires_grad(inputs: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(inputs))
