"""The process that measures. ``python -m benchmarks.gpu`` starts it, with a JSON object that says what to do."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import kernels, layers, memory, steps, switching
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.sizes import FULL, TINY


def describe_device(device: torch.device) -> dict[str, Any]:
    """The device's name and properties, and the versions of torch, Triton and CUDA."""
    try:
        import triton

        of_triton = triton.__version__
    except ImportError:
        of_triton = None
    found: dict[str, Any] = {"torch": torch.__version__, "triton": of_triton, "device_name": "CPU"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device_name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def main() -> None:
    """Measure the parts that the command asks for, without the rows that are measured already."""
    task = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    device = torch.device(task["device"])
    if task["tiny"]:
        # Products as small as these gain nothing from more threads, and threads wait for each other on shared cores.
        torch.set_num_threads(1)
    sizes = TINY if task["tiny"] else FULL
    recorder = Recorder(Path(task["rows"]), task["deadline"], set(task["done"]), device)
    # The objects that the imports have made stay for ever. Without this, the garbage collector would look through them
    # after every row, which would take longer than the row.
    gc.collect()
    gc.freeze()
    recorder.write({"event": "device", "device": describe_device(device)})
    shared = steps.Steps(sizes, device)
    parts = {
        "layers": partial(layers.measure, recorder, sizes, device),
        "kernels": partial(kernels.measure, recorder, sizes, device),
        "steps": partial(steps.steps, recorder, shared),
        "memory": partial(memory.measure, recorder, sizes, device),
        "switching": partial(switching.measure, recorder, sizes, device),
        "compiled": partial(steps.compiled, recorder, shared),
        "others": partial(steps.others, recorder, shared),
    }
    for part in task["parts"]:
        recorder.run_part(part, parts[part])


if __name__ == "__main__":
    main()
