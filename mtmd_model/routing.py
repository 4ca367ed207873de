"""Which experts a model uses: the routing layer's weights, averaged.

Shapes: T tasks of a domain, B rows, E experts.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mtmd_model.batch import Batch
from mtmd_model.towers import Tower


def routing_summary(query_tower: Tower, item_tower: Tower, batches: Iterable[Batch]) -> list[dict[str, Any]]:
    """One entry a tower, domain, task and expert, of the domains that have rows.

    Keys: tower, domain, task, expert, rows, mean_gate; max_gate_share, the share of the rows in which this
    expert has the largest weight; entropy, the mean over rows of the entropy of a row's weights, and
    entropy_of_mean, that of the mean weights, both in nats (ln 3 = 1.099 is uniform). A router that gives
    every row the same weights has equal entropies; one that has collapsed has both near zero. The towers are to
    be in evaluation mode.
    """
    sums: dict[tuple[str, str], list[Tensor]] = {}
    device = next(query_tower.parameters()).device
    with torch.inference_mode():
        for batch in batches:
            batch = batch.to(device)
            for tower, x in ((query_tower, batch.query), (item_tower, batch.item)):
                for domain, gates_TBE in tower(x).gates.items():
                    new, old = _sums(gates_TBE.cpu().double()), sums.get((tower.side, domain))
                    total = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
                    sums[tower.side, domain] = total

    out = []
    for (side, domain), (rows, gate_TE, first_TE, entropy_T) in sums.items():
        tasks = (query_tower if side == "query" else item_tower).tasks[domain]
        for t, task in enumerate(tasks):
            mean_E = gate_TE[t] / rows
            for e, expert in enumerate(query_tower.mixed):
                out.append(
                    {
                        "tower": side,
                        "domain": domain,
                        "task": task,
                        "expert": expert,
                        "rows": int(rows),
                        "mean_gate": mean_E[e].item(),
                        "max_gate_share": (first_TE[t, e] / rows).item(),
                        "entropy": (entropy_T[t] / rows).item(),
                        "entropy_of_mean": torch.special.entr(mean_E).sum().item(),
                    }
                )
    return out


def _sums(gates_TBE: Tensor) -> list[Tensor]:
    """Rows, sum of gates, how often each is the largest, sum of entropies."""
    first_TBE = torch.nn.functional.one_hot(gates_TBE.argmax(-1), gates_TBE.shape[-1])
    rows = torch.tensor(float(gates_TBE.shape[1]))
    return [rows, gates_TBE.sum(1), first_TBE.double().sum(1), torch.special.entr(gates_TBE).sum((1, 2))]
