"""Two networks that share nothing, on a CPU at once: a thread and half of the cores each, forward and backward.

Most of a tower's operations are too small to be worth two cores, and every one of them would end with a meeting of the
threads. Two towers keep two cores busy without.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Network = Callable[[], Sequence[Tensor]]
"""Computes tensors; the parameters that it reads are its own."""
T = TypeVar("T")


def side_by_side(first: Network, second: Network) -> tuple[list[Tensor], list[Tensor]]:
    """What both compute, in a way that gradients go back through both at once.

    The numbers are those that half of the threads give. Neither may draw random numbers, for the order of the two is
    open.
    """
    size: list[int] = []
    # autograd goes back through a function only if an input wants a gradient
    anchor = torch.empty(0, requires_grad=True)
    out: tuple[Tensor, ...] = _SideBySide.apply(anchor, first, second, size)
    return list(out[: size[0]]), list(out[size[0] :])


class _SideBySide(torch.autograd.Function):
    """Each network has a graph of its own, and its own thread goes back through it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, first: Network, second: Network, size: list[int]) -> tuple[Tensor, ...]:
        ctx.graphs = both(torch.enable_grad()(first), torch.enable_grad()(second))
        size.append(len(ctx.graphs[0]))
        return tuple(out.detach() for graph in ctx.graphs for out in graph)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        first, second = ctx.graphs
        split = len(first)
        both(
            lambda: torch.autograd.backward(first, gradients[:split]),
            lambda: torch.autograd.backward(second, gradients[split:]),
        )
        return None, None, None, None


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
