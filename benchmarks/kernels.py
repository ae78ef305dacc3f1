"""Speed and correctness of the Triton kernels on a GPU. Requires only torch and triton.

    python -m benchmarks.kernels [--rehearse] [--skip-compiled] [--write docs/gpu-kernels.md]

Every kernel is first compared with float64 on fresh random inputs, while uninitialized memory holds NaN. Then come its
speed, its share of the ceiling measured in the same run (BF16 products of 8,192 x 8,192 matrices, or a copy of 1 GiB),
and the ratio to PyTorch's operators and to ``torch.compile`` of these. Takes under 8 minutes: after 5, nothing more is
passed to ``torch.compile``. Exits with status 1 after a wrong result.

``--rehearse`` runs the same script in Triton's interpreter with tiny sizes on a CPU. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from benchmarks.lib.harness import Result, make_parser, run_benchmark, run_main
from benchmarks.lib.kernel_case import TINY, Case, Sizes
from benchmarks.lib.kernel_cases import cases
from benchmarks.lib.report import table
from kernels.triton_support.platform import architecture, is_installed, is_interpreting
from model.errors import FiftyfoldError

_COMPILE_SECONDS = 300
_ROUNDS = 10


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that is allocated without a value with NaN, or with 255 for bytes, so that a kernel that leaves out
    part of its output is noticed."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*arguments, **options):
            out = allocate(*arguments, **options)
            return out.fill_(float("nan") if out.is_floating_point() else 255 if out.dtype == torch.uint8 else -7)

        return allocated

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield


def error_of(case: Case) -> float:
    """Return the largest relative error of a case's results, in the norm. NaN counts as infinite."""
    with poisoned():
        found = case.run()
    pairs = zip(_tensors(found), _tensors(case.exact()), strict=True)
    errors = []
    for x, y in pairs:
        if x.shape != y.shape:
            raise FiftyfoldError(f"{case.name}: found shape {list(x.shape)}, expected {list(y.shape)}")
        same = x.double() == y.double()  # also equal infinities
        difference = torch.where(same, 0.0, x.double() - y.double())
        reference = y.double().masked_fill(y.double().isinf(), 0.0)
        errors.append(float(difference.norm() / reference.norm().clamp(min=1e-30)))
    return max(float("inf") if error != error else error for error in errors)


def _tensors(found: object) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)  # type: ignore[arg-type]


class Clock:
    """Times calls on a device, as the median over rounds after a warm-up."""

    def __init__(self, device: torch.device):
        self.device, self.started = device, time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the median seconds of a call. The second-level cache is overwritten before each on a GPU."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        run()
        run()
        scratch = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)
        times = []
        for _ in range(_ROUNDS):
            scratch.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)


def ceilings(clock: Clock, size: int, nbytes: int) -> tuple[float, float]:
    """Return the measured ceilings: BF16 products in FLOP/s, and a copy in bytes per second, reads and writes."""
    left, right = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
    products = 2.0 * size**3 / clock.seconds(lambda: left @ right)
    source = torch.zeros(nbytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return products, 2.0 * nbytes / clock.seconds(lambda: target.copy_(source))


def row(case: Case, error: float, clock: Clock, ceiling: tuple[float, float], compiles: bool) -> list[str]:
    """Time a case and return its row of the table."""
    seconds = clock.seconds(case.run)
    if case.flops:
        speed, share = f"{case.flops / seconds / 1e12:.3g} TFLOP/s", case.flops / seconds / ceiling[0]
    else:
        speed, share = f"{case.nbytes / seconds / 1e9:.4g} GB/s", case.nbytes / seconds / ceiling[1]
    plain = clock.seconds(case.reference) * case.share
    compiled = "not measured"
    if compiles and clock.elapsed < _COMPILE_SECONDS:
        try:
            compiled = f"{clock.seconds(torch.compile(case.reference)) * case.share / seconds:.3g}"
        except Exception as error:  # a compiler that refuses the reference is a result
            compiled = f"fails ({type(error).__name__})"
    return [
        case.name, f"{error:.1e}", f"{1e3 * seconds:.3g}", speed, f"{share:.0%}", case.target,
        f"{plain / seconds:.3g}", compiled,
    ]  # fmt: skip


def measure(options: argparse.Namespace) -> Result:
    device = torch.device("cpu" if options.rehearse else "cuda")
    _require(options.rehearse, device)
    sizes, dtype = (TINY, torch.float32) if options.rehearse else (Sizes(), torch.bfloat16)
    torch.manual_seed(time.time_ns() % (1 << 31))
    clock = Clock(device)
    errors, wrong = {}, []
    for case in cases(sizes.checked(), device, dtype):
        errors[case.name] = error = error_of(case)
        if not error <= case.tolerance:
            wrong.append(f"{case.name}: relative error {error:.1e}, at most {case.tolerance:.0e} expected")
        print(f"{case.name}: relative error {error:.1e}", file=sys.stderr)
    if wrong:
        raise FiftyfoldError("; ".join(wrong))
    ceiling = ceilings(clock, *((64, 1 << 16) if options.rehearse else (8192, 1 << 30)))
    rows = []
    for case in cases(sizes, device, dtype):
        rows.append(row(case, errors[case.name], clock, ceiling, not options.rehearse and not options.skip_compiled))
        print(*rows[-1], sep=" | ", file=sys.stderr)
    header = ["kernel", "error", "ms", "speed", "of the ceiling", "target", "times PyTorch", "times torch.compile"]
    text = f"Ceilings: {ceiling[0] / 1e12:.3g} TFLOP/s of BF16 products, {ceiling[1] / 1e9:.4g} GB/s.\n\n"
    if options.rehearse:
        text = f"Rehearsal in the interpreter with tiny sizes: times mean nothing.\n\n{text}"
    return Result(f"{text}{table(header, rows)}\n{clock.elapsed:.0f} s in all.")


def _require(rehearse: bool, device: torch.device) -> None:
    if not is_installed():
        raise FiftyfoldError("the triton package is not installed")
    if rehearse != is_interpreting():
        raise FiftyfoldError("--rehearse requires TRITON_INTERPRET=1, and a GPU requires it to be unset")
    if not rehearse and not torch.cuda.is_available():
        raise FiftyfoldError("torch finds no GPU on this machine; --rehearse runs without one")
    if not rehearse and architecture(device) is None:
        raise FiftyfoldError(f"no kernel settings for {torch.cuda.get_device_name()}")


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in Triton's interpreter on a CPU")
    parser.add_argument("--skip-compiled", action="store_true", help="do not compare with torch.compile")
    parser.set_defaults(device="cpu" if "--rehearse" in (arguments or sys.argv) else "cuda")
    if "--rehearse" in (arguments or sys.argv):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
