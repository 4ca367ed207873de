"""`torch.compile` for the parts of a model that hold its arithmetic; without a compiler the model stays as it is.

A domain's rows differ in number from batch to batch, so shapes are dynamic and each part is compiled by itself: the
sorting by domain around them works on the host's numbers.
"""

import warnings

import torch
from torch import Tensor, nn

from mtmd_model.domain_expert import DomainExpert
from mtmd_model.ffn import FFN

PARTS = (DomainExpert, FFN)
BACKEND = "inductor"


def compile_parts(model: nn.Module, device: torch.device) -> bool:
    """Compile a model's experts in place, to be built at their first batch; says whether they are.

    Warns once, and leaves the model alone, where torch finds no compiler for the device: g++ or clang for a CPU, Triton
    for a GPU.
    """
    try:
        torch.compile(_probe, backend=BACKEND)(torch.ones(2, device=device))
    except Exception as e:  # torch._inductor has a class of error for each thing that may be missing
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        warnings.warn(f"torch.compile does not work here, training goes on without it: {reason}", stacklevel=2)
        return False
    for module in model.modules():
        if isinstance(module, PARTS):
            module.compile(dynamic=True, backend=BACKEND)
    return True


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1
