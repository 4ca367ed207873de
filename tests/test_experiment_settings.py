"""What an experiment trains each model with: the platform file's settings, an ablation's change, the search's trials."""

from dataclasses import replace

import pytest

from mtmd_assets.contenders import ABLATIONS, CONTENDERS, MODELS, change_of, model_schema, takes_nothing, train_config
from mtmd_assets.platform_file import shipped_platform
from mtmd_assets.platform_parts import Contenders, MMOESettings, PooledSettings
from mtmd_model.config import MTMDConfig
from mtmd_model.contenders.plain import PlainConfig


def test_experiments_may_make_other_passes_than_the_daily_model():
    adworld = shipped_platform("adworld")
    contenders = Contenders(mmoe_dcn=MMOESettings(max_epochs=7))
    for passes, expected in ((None, adworld.training.max_epochs), (5, 5)):
        changed = {"max_epochs": passes, "contenders": contenders}
        platform = adworld.model_copy(update={"experiments": adworld.experiments.model_copy(update=changed)})
        found = {model: train_config(platform, change_of(platform, model)).max_epochs for model in MODELS}
        assert found.pop("mmoe_dcn") == 7
        assert set(found.values()) == {expected}
        assert train_config(platform).max_epochs == adworld.training.max_epochs


def test_a_contender_may_have_another_warm_up_and_clip():
    adworld = shipped_platform("adworld")
    changed = {"contenders": Contenders(mmoe_dcn=MMOESettings(warmup_share=0.3, gradient_clip=0.4))}
    platform = adworld.model_copy(
        update={
            "training": adworld.training.model_copy(update={"warmup_share": 0.2, "gradient_clip": 0.5}),
            "experiments": adworld.experiments.model_copy(update=changed),
        }
    )
    configs = {m: train_config(platform, change_of(platform, m)) for m in MODELS}
    found = {m: (config.optimiser.warmup_share, config.gradient_clip) for m, config in configs.items()}
    assert found.pop("mmoe_dcn") == (0.3, 0.4)
    assert set(found.values()) == {(0.2, 0.5)}


def test_experiments_may_have_a_larger_mtmd_than_the_daily_model():
    adworld = shipped_platform("adworld")
    training = adworld.training.model_copy(update={"preset": "small", "deviation": 0.1})
    own = PooledSettings(preset="half", learning_rate=0.007, max_epochs=9, deviation=0.4)
    larger = adworld.experiments.model_copy(update={"max_epochs": 5, "mtmd": own, "contenders": Contenders()})
    platform = adworld.model_copy(update={"training": training, "experiments": larger})

    daily, here, without, pooled = (
        train_config(platform, change and change_of(platform, change))
        for change in (None, "mtmd", "unpooled", "pooled_towers")
    )
    small, half = (MTMDConfig.preset(name) for name in ("small", "half"))
    assert (daily.model, daily.max_epochs) == (small, training.max_epochs)
    assert (here.model, here.max_epochs) == (half, 9)
    assert (here.optimiser.learning_rate, here.optimiser.deviation) == (0.007, 0.4)
    assert without == replace(here, optimiser=replace(here.optimiser, deviation=None))
    assert (pooled.model, pooled.max_epochs) == (PlainConfig.preset("small"), 5)
    assert pooled.optimiser == daily.optimiser


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_one_thing_that_it_is_named_after(name):
    adworld = shipped_platform("adworld")
    training = adworld.training.model_copy(update={"main_effects": True, "averaged_passes": 2.0})
    binned = [f.model_copy(update={"bins": 8, "width": 4}) if f.kind == "dense" else f for f in adworld.features]
    platform = adworld.model_copy(update={"training": training, "features": binned})
    assert not takes_nothing(platform, name)
    one_domain = platform.model_copy(update={"surfaces": platform.surfaces[:1], "products": platform.products[:1]})
    assert takes_nothing(one_domain, name) == (name in ("no_domain_norm", "one_model_a_product"))
    alike = [task.model_copy(update={"given": None, "width": 48}) for task in platform.tasks]
    assert takes_nothing(platform.model_copy(update={"tasks": alike}), name) == (name in ("unconstrained", "width_48"))
    one_task = platform.model_copy(update={"tasks": platform.tasks[:1]})
    assert takes_nothing(one_task, name) == (name in ("no_task_shared", "unconstrained"))
    bare = adworld.training.model_copy(update={"main_effects": False, "averaged_passes": 0.0})
    nothing_taken = name in ("no_main_effects", "last_step", "no_bins")
    assert takes_nothing(adworld.model_copy(update={"training": bare}), name) == nothing_taken
    whole = train_config(platform, change_of(platform, "mtmd"), 0).to_dict()
    without = train_config(platform, change_of(platform, name), 0).to_dict()
    flat = {
        f"{a}.{b}" if isinstance(v, dict) else a: w
        for a, v in whole.items()
        for b, w in (v.items() if isinstance(v, dict) else [("", v)])
    }
    changed = {
        f"{a}.{b}" if isinstance(v, dict) else a: w
        for a, v in without.items()
        for b, w in (v.items() if isinstance(v, dict) else [("", v)])
    }
    different = {k for k in flat if flat[k] != changed[k]}
    expected = {"no_domain_adaptation": 2, "no_bins": 0}.get(name, 1)
    assert len(different) == expected, different
    read = model_schema(platform, change_of(platform, name)).features
    unread = set(platform.model_schema.features) - {*read}
    assert {f.name for f in unread} == (
        {f"{f.name} in bins" for f in binned if f.kind == "dense"} if name == "no_bins" else set()
    )


def test_models_are_known_by_one_name():
    assert len(set(MODELS)) == len(MODELS)
    with pytest.raises(ValueError, match="must be one of"):
        change_of(None, "transformer")
    assert CONTENDERS == ("slice_towers", "pooled_towers", "mmoe_dcn", "soft_slice_towers")
