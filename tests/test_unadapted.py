"""`benchmarks/unadapted.py` at a small size."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks.unadapted import ARCHITECTURE, NAME, AsItIs, compare, report
from mtmd_assets.faults import UsageError
from mtmd_model import checkpoint
from mtmd_model.architectures import ARCHITECTURES
from mtmd_model.domain_norm import DomainNorm
from mtmd_model.squeeze_excitation import SqueezeExcitation
from tests.studied import DAYS
from tests.worlds import copy_of


def test_numbers_stay_and_missing_ones_are_0():
    given = torch.tensor([[3.0, math.nan], [-250.0, 0.5]])
    assert AsItIs()(given).tolist() == [[3.0, 0.0], [-250.0, 0.5]]


def test_it_is_trained_and_compared_as_an_ablation_is(studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ARCHITECTURES, NAME, ARCHITECTURE)  # other tests do not know it
    site = copy_of(studied, tmp_path).site
    table = compare(site, DAYS[1], 1)
    cells = table.drop_nulls(["surface", "product"])
    assert set(cells["seeds"]) == {1}
    assert len(cells.filter(cells["bucket"].is_null())) == 18
    assert report(table).count("[") == 1 + len(site.platform.tasks)
    folders = [f for f in site.experiments.iterdir() if f.is_dir() and f"-{NAME}-" in f.name]
    assert len(folders) == 1
    parts = list(checkpoint.load(folders[0]).model.modules())
    assert not [part for part in parts if isinstance(part, DomainNorm | SqueezeExcitation)]


def test_seeds_that_are_not_published_are_named(studied, tmp_path: Path):
    with pytest.raises(UsageError, match="has not 3 seeds of mtmd published"):
        compare(copy_of(studied, tmp_path).site, DAYS[1], 3)
