"""Embedding tables: what training has not met counts as unknown."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtmd_model.architectures import build
from mtmd_model.batch import Batch
from mtmd_model.config import MTMDConfig
from mtmd_model.embeddings import FeatureEmbeddings
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.mmoe_dcn import MMOEConfig
from mtmd_model.plain import PlainConfig
from mtmd_model.schema import Feature
from mtmd_model.train import TrainConfig, train
from mtmd_model.two_tower import count_parameters
from mtmd_model.vocabulary import MISSING, UNKNOWN
from tests.mtmd_model.sample import examples, platform

PLAIN = PlainConfig(widths=(12, 8), width_divisor=8)
MTMD = MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=8)
CONFIGS: dict[str, Any] = {
    "mtmd": MTMD,
    "pooled_towers": PLAIN,
    "mmoe_dcn": MMOEConfig(widths=(12, 8), width_divisor=8, experts=3, gate=(6,)),
    "slice_towers": PLAIN,
    "soft_slice_towers": PLAIN,
    "product_mtmd": MTMD,
}
USER = 2
"""The column of user_id among the query's categorical features."""


@pytest.fixture(scope="module")
def encoder(write) -> Encoder:
    return fit_encoder(platform(), [write(examples(300))])


def two_features() -> FeatureEmbeddings:
    wide = Feature("wide", "query", "categorical", ("a", "b"), width=3, buckets=4)
    narrow = Feature("narrow", "query", "categorical", ("a",), width=2, buckets=3)
    return FeatureEmbeddings([narrow, wide], {"wide": 6, "narrow": 5}, ("a", "b"), std=1.0)


def test_a_known_value_is_unknown_until_training_meets_it():
    embeddings = two_features()
    with torch.no_grad():
        for table in embeddings.tables.values():
            table.normal_()
    ids, domain = torch.tensor([[3, 4], [3, 5], [MISSING, 4]]), torch.tensor([0, 0, 1])
    every = embeddings.eval()(ids, domain)
    unknown = embeddings(torch.tensor([[UNKNOWN, UNKNOWN]]), torch.tensor([0]))[0]

    embeddings.meet_nothing()
    torch.testing.assert_close(embeddings(ids, domain)[0], unknown)
    torch.testing.assert_close(embeddings.train()(ids[:1], domain[:1]), every[:1])
    after = embeddings.eval()(ids, domain)
    torch.testing.assert_close(after[0], every[0])
    # wide's columns come last: value 5 of it was not met, value 3 of narrow was
    torch.testing.assert_close(after[1], torch.cat([every[1, :2], unknown[2:]]))
    # what is missing stays missing, in a domain that training has not met too, and domains share what they know
    torch.testing.assert_close(after[2], every[2])


def test_parameters_of_rows_that_training_has_met_are_counted():
    embeddings = two_features()
    # a missing vector a domain, the unknown, and four and three values
    assert embeddings.trained_parameters() == 3 * (3 + 4) + 2 * (3 + 3)
    embeddings.meet_nothing()
    assert embeddings.trained_parameters() == 0
    embeddings.train()(torch.tensor([[2, 2], [2, 3], [MISSING, MISSING]]), torch.tensor([0, 0, 1]))
    assert embeddings.trained_parameters() == 3 * (2 + 1) + 2 * (1 + 1)


def with_user(batch: Batch, user: int) -> Batch:
    ids = batch.query.ids.clone()
    ids[:, USER] = user
    return replace(batch, query=replace(batch.query, ids=ids))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_id_that_only_another_slice_has_is_unknown_to_models_that_share_nothing(encoder: Encoder, name: str):
    """Two slices of different surfaces and products, one user each."""
    torch.manual_seed(0)
    model = build(name, encoder, CONFIGS[name])
    batch = encoder.encode(examples(500))
    first, second = (
        batch.select(((batch.query.domain == n) & (batch.item.domain == n)).nonzero()[:, 0]) for n in (0, 1)
    )
    mine, other = 7, 9
    model.begin_training()
    model.train()(with_user(first, mine))
    model(with_user(second, other))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.eval()
    unknown = model(with_user(first, UNKNOWN))
    assert not torch.equal(model(with_user(first, mine)), unknown)
    apart = name in ("slice_towers", "product_mtmd")
    assert torch.equal(model(with_user(first, other)), unknown) == apart
    if name != "soft_slice_towers":  # whose common part reads every row
        assert torch.equal(model(with_user(first, 11)), unknown), "a user whom nobody has met"


def test_a_trained_model_knows_what_its_rows_had(write, tmp_path: Path):
    table = examples(400)
    without = table.filter([user != 7 for user in table["user_id"].to_pylist()])
    config = TrainConfig("slice_towers", PLAIN, batch_size=100, max_epochs=1, accelerator="cpu")
    result = train(platform(), [write(without)], [], config, tmp_path / "v")
    model = result.predictor.model
    met = sum(e.met.sum().item() for e in model.feature_embeddings())
    assert 0 < met < sum(len(e.met) for e in model.feature_embeddings())
    assert result.manifest["params"] == count_parameters(model)
    allocated = sum(p.numel() for p in model.embedding_tables())
    assert 0 < count_parameters(model)["embedding"] < allocated


def test_a_model_stored_without_knowing_what_it_has_met_has_met_all(encoder: Encoder):
    model = build("mtmd", encoder, MTMD)
    model.begin_training()
    old = {name: value for name, value in model.state_dict().items() if not name.endswith(".met")}
    assert len(old) == len(model.state_dict()) - 2
    model.load_state_dict(old)
    assert all(e.met.all() for e in model.feature_embeddings())
