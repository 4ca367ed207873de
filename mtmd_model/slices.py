"""Which task exists where. A slice is surface x product, the paper's "ad domain" (section 2.1.1)."""

import torch
from torch import Tensor

from mtmd_model.schema import Schema, Side, Task


def tasks_of(schema: Schema, side: Side, domain: str) -> tuple[Task, ...]:
    """The tasks that exist in some slice of a surface or product."""
    place = 0 if side == "query" else 1
    return tuple(t for t in schema.tasks if any(s[place] == domain for s in t.slices))


def existing_slices(schema: Schema) -> Tensor:
    """(T, S, P) bool: whether the task exists in the slice.

    Raises:
        ValueError: a task exists where its parent does not, comes before it, or a domain has no task.
    """
    exists = torch.zeros(len(schema.tasks), len(schema.surfaces), len(schema.products), dtype=torch.bool)
    seen: dict[str, Task] = {}
    for t, task in enumerate(schema.tasks):
        if task.given is not None:
            if task.given not in seen:
                raise ValueError(f"task {task.name!r} must come after its parent {task.given!r}")
            orphans = set(task.slices) - set(seen[task.given].slices)
            if orphans:
                raise ValueError(f"task {task.name!r} exists in {sorted(orphans)}, its parent {task.given!r} does not")
        seen[task.name] = task
        for surface, product in task.slices:
            exists[t, schema.surfaces.index(surface), schema.products.index(product)] = True
    for side, without in (("surface", ~exists.any(2).any(0)), ("product", ~exists.any(1).any(0))):
        domains = schema.surfaces if side == "surface" else schema.products
        if without.any():
            raise ValueError(f"{side} {domains[int(without.int().argmax())]!r} has no task")
    return exists
