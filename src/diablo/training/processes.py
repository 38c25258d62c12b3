"""A run in several processes: each computes the same, and the main one writes."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager

import torch
from accelerate import PartialState
from rich.console import Console

from diablo.training.engines import DeepSpeed, launched_engine


class Processes:
    """The processes of a run, as torchrun or ``accelerate launch`` has started them; one where neither has.

    What is scored, and the losses on held-out rows, every process computes for itself: none waits for another so long
    that the connection between them times out.

    Attributes:
        count: how many there are.
        is_main: whether this is the one that writes.
        engine: how they hold the model.

    Raises:
        UserError: they were launched to shard the model, which they cannot.
    """

    def __init__(self) -> None:
        self.engine = launched_engine()
        on_cpu = not torch.cuda.is_available()
        # It also chooses each process's own GPU, which "cuda" means from then on. With cpu=True it would forget
        # DeepSpeed, which can do with CPUs.
        self._state = (
            PartialState(cpu=False, backend="gloo")
            if on_cpu and isinstance(self.engine, DeepSpeed)
            else PartialState(cpu=on_cpu)
        )
        self.engine.check(self._state.distributed_type)
        self.count: int = self._state.num_processes
        self.is_main: bool = self._state.is_main_process

    def total(self, count: int) -> int:
        """The sum of a number over the processes."""
        if self.count == 1:
            return count
        values = torch.tensor(count, device=self._state.device)
        torch.distributed.all_reduce(values)
        return int(values)

    def wait(self) -> None:
        """Wait until every process is here."""
        self._state.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[None]:
        """What is inside, the main process of each machine does before the others: they find it done."""
        return self._state.local_main_process_first()

    def console(self, console: Console) -> Console:
        """The console on the main process, and one that shows nothing on the others."""
        return console if self.is_main else Console(file=io.StringIO())
