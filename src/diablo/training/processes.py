"""A run in several processes: they train together, and only the main process writes."""

from __future__ import annotations

import io
import os
from contextlib import AbstractContextManager

import torch
from accelerate import PartialState
from rich.console import Console

from diablo.devices import choose_device
from diablo.errors import UserError
from diablo.training.engines import DeepSpeed, launched_engine


class Processes:
    """The processes of a run, as torchrun or ``accelerate launch`` has started them; otherwise one process.

    Scores and the losses on held-out rows are computed by every process for itself. So no process waits for another one
    so long that their connection times out.

    Attributes:
        count: number of processes.
        is_main: whether this is the process that writes.
        engine: how the processes hold the model.

    Raises:
        UserError: the processes were launched to shard the model, and cannot do that here.
    """

    def __init__(self) -> None:
        self.engine = launched_engine()
        device = choose_device()
        on_cpu = device.type == "cpu"
        if device.type == "mps" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "Several processes were launched on MPS, which is one device and has no way to connect them: start "
                "diablo without torchrun and accelerate launch."
            )
        # PartialState also chooses the GPU of this process; from then on, "cuda" means that GPU. With cpu=True,
        # accelerate would not set up DeepSpeed, although DeepSpeed works on CPUs too.
        self._state = (
            PartialState(cpu=False, backend="gloo")
            if on_cpu and isinstance(self.engine, DeepSpeed)
            else PartialState(cpu=on_cpu)
        )
        self.engine.check(self._state.distributed_type)
        self.count: int = self._state.num_processes
        self.is_main: bool = self._state.is_main_process

    def total(self, count: int) -> int:
        """The sum of a number over all processes."""
        if self.count == 1:
            return count
        values = torch.tensor(count, device=self._state.device)
        torch.distributed.all_reduce(values)
        return int(values)

    def wait(self) -> None:
        """Wait until every process has called this."""
        self._state.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[None]:
        """A context that the main process of each machine goes through before the others, which then find it done."""
        return self._state.local_main_process_first()

    def console(self, console: Console) -> Console:
        """The console itself on the main process, and on the others a console that shows nothing."""
        return console if self.is_main else Console(file=io.StringIO())
