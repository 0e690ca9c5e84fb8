from dataclasses import replace

import pytest
import torch

import ecodiff
from ecodiff.learning import scoring
from ecodiff.learning.budget import Budget
from ecodiff.learning.learn import learn
from ecodiff.learning.methods import METHODS
from ecodiff.learning.state import LearnState
from ecodiff.pipelines import denoiser_of, stream
from ecodiff.pruning import masking
from ecodiff.units import ALL_KINDS
from tests.conftest import PROMPT, short

CALL = {"prompt": [PROMPT, "cat"], "num_inference_steps": 3}


def call(seed=0):
    return CALL | {"generator": [torch.Generator().manual_seed(seed + i) for i in range(2)]}


def test_a_mask_a_sample_is_each_samples_own(tiny_sdxl):
    """Two rows with two masks are what each of them is alone, guidance included."""
    group = ecodiff.find_groups(tiny_sdxl.unet)[0]
    masks = torch.stack([torch.ones(group.size), torch.zeros(group.size)])

    def run(mask):
        with torch.no_grad(), masking.masked(tiny_sdxl.unet, {group.name: mask}):
            return tiny_sdxl(**call(), output_type="latent").images

    both = run(masks)
    torch.testing.assert_close(both[0], run(masks[0])[0])
    torch.testing.assert_close(both[1], run(masks[1])[1])
    assert not torch.allclose(both[1], run(masks[0])[1])


def test_gauss_newton_is_the_norm_of_the_jacobian(tiny_sdxl):
    """Many random projections against finite differences of z_0 in one gate."""
    group = ecodiff.find_groups(tiny_sdxl.unet)[1]

    def z0(gate):
        mask = torch.ones(group.size)
        mask[0] = gate
        with torch.no_grad(), masking.masked(tiny_sdxl.unet, {group.name: mask}):
            return tiny_sdxl(**call(), output_type="latent").images

    dense, step = z0(1.0), 1e-2
    slope = ((z0(1 + step) - z0(1 - step)) / (2 * step)).flatten(1)
    wanted = float((slope.square().sum(1) / dense.flatten(1).var(1) / slope.shape[1]).mean())
    draws = [
        scoring.gauss_newton_sample(tiny_sdxl, [group], call(), stream("probe", seed)) for seed in range(60)
    ]
    found = float(torch.stack([draw[group.name][0] for draw in draws]).mean())
    assert found == pytest.approx(wanted, rel=0.4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ranks_every_unit(pipe, name):
    found = METHODS[name]
    values = found.score(pipe, [call() | short(pipe)], 0)
    groups = ecodiff.find_groups(denoiser_of(pipe), ALL_KINDS)
    assert {name: len(v) for name, v in values.items()} == {g.name: g.size for g in groups}
    assert all(v.isfinite().all() and (v >= 0).all() for v in values.values())
    assert torch.cat(list(values.values())).std() > 0
    assert found.source and found.cost >= 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_preset_of_one_step(tiny_sdxl, name):
    config = replace(ecodiff.LearnConfig.preset(name), warm_steps=1, batch=1, inference_steps=2)
    states = []
    scores = ecodiff.learn_masks(tiny_sdxl, [PROMPT], config, states.append)
    assert len(states) == config.total_steps == 1
    assert scores.metadata["method"] == name and scores.plan(ratio=0.2).metadata["ratio"] > 0.15


def test_learning_takes_all_kinds_and_reports_the_gap(pipe):
    config = ecodiff.LearnConfig(
        ratio=0.3, warm_steps=1, steps=2, batch=2, inference_steps=3, kinds=ALL_KINDS
    )
    config = replace(config, extra=short(pipe))
    states = []
    scores = ecodiff.learn_masks(pipe, [PROMPT, "cat"], config, states.append)
    present = {group.kind for group in ecodiff.find_groups(denoiser_of(pipe), ALL_KINDS)}
    assert set(scores.kinds.values()) == present
    assert states[-1].history[-1]["relaxed"] > 0 and states[-1].history[-1]["hardened"] > 0
    again = ecodiff.learn_masks(pipe, [PROMPT, "cat"], config)
    assert again.plan(ratio=0.3).digest == scores.plan(ratio=0.3).digest


def test_learning_can_steer_to_macs(tiny_sdxl):
    config = ecodiff.LearnConfig(ratio=0.3, warm_steps=1, steps=2, batch=2, inference_steps=3, cost="macs")
    scores = ecodiff.learn_masks(tiny_sdxl, [PROMPT], config)
    plan = scores.plan(macs=round(0.7 * scores.total_macs))
    assert abs(plan.metadata["macs_pruned"] / scores.total_macs - 0.7) < 0.02


def test_learning_can_steer_to_milliseconds(tiny_sdxl):
    ratio = 0.02  # how much of the time is the units' depends on the machine
    config = ecodiff.LearnConfig(ratio=ratio, warm_steps=1, steps=1, batch=1, inference_steps=2, cost="ms")
    states = []
    scores = ecodiff.learn_masks(tiny_sdxl, [PROMPT], config, states.append)
    assert states[-1].history[-1]["expected"] == pytest.approx(ratio, abs=0.02)
    assert scores.plan(ratio=0.2).metadata["params_pruned"] < scores.total


def test_the_published_method_starts_from_a_constant(tiny_sdxl):
    preset = vars(ecodiff.LearnConfig.preset("ecodiff")) | {"steps": 2, "batch": 1, "inference_steps": 3}
    states = []
    scores = ecodiff.learn_masks(tiny_sdxl, [PROMPT], ecodiff.LearnConfig(**preset), states.append)
    first = states[0].vectors["log_alpha"]
    assert (first - 3.0).abs().max() <= 0.1 + 1e-6, "one Adam step from 3"
    assert scores.metadata["method"] == "ecodiff, as published" and set(scores.kinds.values()) == {
        "heads",
        "ffn",
    }


def test_what_is_beyond_reach_of_learning_keeps_its_order(tiny_sdxl):
    """Worths over thirty orders of magnitude: no ties, whatever size is cut."""
    config = ecodiff.LearnConfig(ratio=0.3, warm_steps=1, steps=1, batch=1, inference_steps=2)
    groups = ecodiff.find_groups(tiny_sdxl.unet, config.kinds)
    budget = Budget(tiny_sdxl, config, groups, {})
    units = sum(budget.sizes)
    state = LearnState.start(units)
    state.vectors["saliency"] = budget.shares * torch.logspace(-15, 15, units)
    state.step = 1
    prior, state.multiplier = budget.prior(budget.worth(state.vectors["saliency"]))
    state.vectors["log_alpha"] = budget.start(prior)
    ((state, scores),) = learn(tiny_sdxl, [PROMPT], config, state)
    values = torch.cat(list(scores.values.values()))
    assert len(values.unique()) == len(values)
    for end in (values[:20], values[-20:]):  # up to what one Adam step of 0.05 may have moved
        assert (end.log().diff() > -0.1).all() and end[-1] > end[0]
