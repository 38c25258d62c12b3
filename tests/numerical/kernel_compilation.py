"""Compiles what a few calls would launch for GPUs that are not there: the interpreter takes more than compilers do.

Run by test_kernels.py in a process in which Triton does not interpret. Nothing is computed.
"""

from __future__ import annotations

import inspect

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diablo import BlockLayout
from diablo.ops import kernels
from diablo.ops.kernels import gradient, table

TARGETS = [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)]
# What a program has of shared memory: on the smaller GPUs of Nvidia's that are supported, and on AMD's.
SHARED = {"cuda": 99 * 1024, "hip": 64 * 1024}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}


class Compiler:
    """Stands in for a kernel, and compiles it with the arguments with which it is launched."""

    def __init__(self, module, name, launched):
        self.kernel = getattr(module, name)
        self.launched = launched
        setattr(module, name, self)

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        names = self.kernel.arg_names
        options = {name: value for name, value in kwargs.items() if name not in names}
        values = inspect.getcallargs(self.kernel.fn, *args, **{n: v for n, v in kwargs.items() if n in names})
        signature, constants, hints = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constants[(index,)] = value
                continue
            signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if type(value) is int and value == 1 and not parameter.do_not_specialize:
                # Triton makes a constant of it at the launch.
                signature[parameter.name] = "constexpr"
                constants[(index,)] = value
                continue
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if number % 16 == 0 and not parameter.do_not_specialize:
                hints[(index,)] = [["tt.divisibility", 16]]
        for target in TARGETS:
            made = (
                dict(options, num_stages=min(options.get("num_stages", 2), 2)) if target.backend == "hip" else options
            )
            compiled = triton.compile(ASTSource(self.kernel, signature, constants, hints), target=target, options=made)
            assert compiled.metadata.shared <= SHARED[target.backend], (self.kernel, target, compiled.metadata.shared)
            # Sums in the order in which programs end would differ from run to run.
            assert "atomic" not in compiled.asm["ttir"], (self.kernel, target)
            self.launched.add((self.kernel.fn.__name__, target.backend, target.arch))


def main():
    assert not kernels.INTERPRETED, "TRITON_INTERPRET is set"
    launched = set()
    for module, names in ((table, ("_write", "_restore")), (gradient, ("_outer_product", "_add_partial"))):
        for name in names:
            Compiler(module, name, launched)
    for size, tokens, dtype in [
        ((128, 448, 2), 600, torch.bfloat16),
        ((144, 48, 16), 64, torch.bfloat16),
        ((128, 448, 2), 64, torch.float32),
        ((1, 1, 1), 600, torch.float32),
    ]:
        x, grad_y = (torch.zeros(tokens, features, dtype=dtype) for features in size[:2])
        kernels.outer_product(x, grad_y, BlockLayout(*size), torch.float32)
    weight = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    diagonals = kernels.DiagonalTable([weight], [weight.float()], [weight.clone()])
    diagonals.write()
    diagonals.restore()
    for entry in sorted(map(str, launched)):
        print(entry)


if __name__ == "__main__":
    main()
