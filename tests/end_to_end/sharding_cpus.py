"""The command line where accelerate shards by FSDP over CPUs too, which by itself it does over GPUs alone.

All it takes is that accelerate counts the processes as ones with GPUs; what it then does, it does with them. DeepSpeed
leaves out the collectives of its own, which it would compile for a minute, and takes torch's.
"""

import os
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

import diablo_cli

_start = PartialState.__init__


def _start_as_with_gpus(self: PartialState, *arguments: Any, **options: Any) -> None:
    _start(self, *arguments, **options)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = _start_as_with_gpus
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        from deepspeed import ops

        ops.__compatible_ops__ = {}
    diablo_cli.main()
