"""Networks that share no parameter, on a CPU two at a time: a thread and half of the cores each, forward and backward.

Most of a tower's operations are too small to be worth two cores, and every one of them would end with a meeting of the
threads. Two networks keep two cores busy without.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A network to run, with its inputs."""

    network: Callable[..., Sequence[Tensor]]
    """Inputs to outputs; the parameters that it reads are its own."""
    inputs: tuple[Tensor, ...] = ()
    """Passed to it; gradients go back to them, and to nothing else that other jobs computed."""
    cost: float = 1.0
    """What it takes, beside the others."""


def side_by_side(jobs: Sequence[Job]) -> list[list[Tensor]]:
    """Each job's outputs, computed in two threads in a way that gradients go back through both at once.

    The numbers are those that half of the threads give. None may draw random numbers, for the order of jobs in
    different threads is open.
    """
    sizes: list[int] = []
    # autograd goes back through a function only if an input wants a gradient
    anchor = torch.empty(0, requires_grad=True)
    outputs = iter(_SideBySide.apply(jobs, sizes, anchor, *(x for job in jobs for x in job.inputs)))
    return [list(islice(outputs, size)) for size in sizes]


class _SideBySide(torch.autograd.Function):
    """Each job has a graph of its own."""

    @staticmethod
    def forward(ctx: Any, jobs: Sequence[Job], sizes: list[int], anchor: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.halves = _halves([job.cost for job in jobs])
        ctx.inputs = [[x.detach().requires_grad_(x.requires_grad) for x in job.inputs] for job in jobs]

        def run(n: int) -> list[Tensor]:
            with torch.enable_grad():
                return list(jobs[n].network(*ctx.inputs[n]))

        ctx.outputs = _each(ctx.halves, run)
        sizes.extend(map(len, ctx.outputs))
        return tuple(out.detach() for outputs in ctx.outputs for out in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = iter(gradients)
        pairs = [list(zip(outputs, islice(rest, len(outputs)), strict=True)) for outputs in ctx.outputs]

        def run(n: int) -> None:
            wanted = [(out, g) for out, g in pairs[n] if g is not None and out.requires_grad]
            if wanted:
                torch.autograd.backward([out for out, _ in wanted], [g for _, g in wanted])

        _each(ctx.halves, run)
        return None, None, None, *(_taken(x) for inputs in ctx.inputs for x in inputs)


def _taken(x: Tensor) -> Tensor | None:
    """Its gradient, which it no longer has."""
    gradient, x.grad = x.grad, None
    return gradient


def _halves(costs: Sequence[float]) -> tuple[list[int], list[int]]:
    """The numbers of the jobs in two parts of about the same cost: the dearest first, each to the part that has less.

    The dearer part comes first: the other thread begins later, when a core has done with waiting for more work of the
    operation before.
    """
    halves: list[list[int]] = [[], []]

    def cost(half: list[int]) -> float:
        return sum(costs[n] for n in half)

    for n in sorted(range(len(costs)), key=lambda n: -costs[n]):
        min(halves, key=cost).append(n)
    first, second = sorted(halves, key=cost, reverse=True)
    return first, second


def _each(halves: tuple[list[int], list[int]], run: Callable[[int], T]) -> list[T]:
    """What `run` returns for each number, in their order; the second half is run in another thread."""
    first, second = halves
    found = both(lambda: list(map(run, first)), lambda: list(map(run, second)))
    of = dict(zip(chain(*halves), chain(*found), strict=True))
    return [of[n] for n in sorted(of)]


def both(first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
    """What two functions return, the first called here and the second in another thread, with half of the cores each."""
    threads = torch.get_num_threads()
    half = threads // 2
    dtype, autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

    def there() -> T:
        torch.set_num_threads(half)
        with torch.autocast("cpu", dtype, enabled=autocast):
            return second()

    future = _other().submit(there)
    try:
        torch.set_num_threads(threads - half)
        mine = first()
    finally:
        future.exception()  # waits, so that nothing runs on behind an error
        torch.set_num_threads(threads)
    return mine, future.result()


@cache
def _other() -> ThreadPoolExecutor:
    """One thread that stays: OpenMP keeps a team of its own for each."""
    return ThreadPoolExecutor(1, "side_by_side")
