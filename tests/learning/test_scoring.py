from dataclasses import replace

import pytest
import torch

import ecodiff
from ecodiff.architectures import blocks
from ecodiff.learning import scoring
from ecodiff.learning.learn import _Learner
from ecodiff.learning.state import LearnState
from ecodiff.pipelines import denoiser_of
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
    draws = [scoring.gauss_newton_sample(tiny_sdxl, [group], call(), seed) for seed in range(60)]
    found = float(torch.stack([draw[group.name][0] for draw in draws]).mean())
    assert found == pytest.approx(wanted, rel=0.4)


def test_a_blocks_gradient_is_the_sum_of_its_units(tiny_sdxl):
    groups = ecodiff.find_groups(tiny_sdxl.unet)
    found = blocks(groups)
    block, members = next(iter(found.items()))
    draw = scoring.gauss_newton_sample(tiny_sdxl, groups, call(), 0, blocks=found)
    units = sum(float(draw[name].sum()) for name in members)
    assert set(draw) == {g.name for g in groups} | set(found)
    assert 0 < float(draw[block]) <= sum(len(draw[name]) for name in members) * units


@pytest.mark.parametrize("method", ["random", "l1", "l2", "wanda", "taylor", "gauss_newton"])
def test_every_baseline_ranks_every_unit(pipe, method):
    denoiser, calls = denoiser_of(pipe), [call() | short(pipe)]
    values = {
        "random": lambda: scoring.random(denoiser),
        "l1": lambda: scoring.magnitude(denoiser, 1),
        "l2": lambda: scoring.magnitude(denoiser, 2),
        "wanda": lambda: scoring.wanda(pipe, calls),
        "taylor": lambda: scoring.taylor(pipe, calls),
        "gauss_newton": lambda: scoring.gauss_newton(pipe, calls),
    }[method]()
    groups = ecodiff.find_groups(denoiser)
    assert {name: len(v) for name, v in values.items()} == {g.name: g.size for g in groups}
    assert all(v.isfinite().all() and (v >= 0).all() for v in values.values())
    assert torch.cat(list(values.values())).std() > 0


def test_learning_takes_all_kinds_and_reports_the_gap(pipe):
    kinds = (*ALL_KINDS, "blocks")
    config = ecodiff.LearnConfig(ratio=0.3, warm_steps=1, steps=2, batch=2, inference_steps=3, kinds=kinds)
    config = replace(config, extra=short(pipe))
    states = []
    scores = ecodiff.learn_masks(pipe, [PROMPT, "cat"], config, states.append)
    present = {group.kind for group in ecodiff.find_groups(denoiser_of(pipe), ALL_KINDS)}
    assert set(scores.kinds.values()) == present and scores.blocks
    assert states[-1].history[-1]["relaxed"] > 0 and states[-1].history[-1]["hardened"] > 0
    again = ecodiff.learn_masks(pipe, [PROMPT, "cat"], config)
    assert again.plan(ratio=0.3).digest == scores.plan(ratio=0.3).digest


def test_learning_can_steer_to_macs(tiny_sdxl):
    config = ecodiff.LearnConfig(ratio=0.3, warm_steps=1, steps=2, batch=2, inference_steps=3, cost="macs")
    scores = ecodiff.learn_masks(tiny_sdxl, [PROMPT], config)
    plan = scores.plan(macs=round(0.7 * scores.total_macs))
    assert abs(plan.metadata["macs_pruned"] / scores.total_macs - 0.7) < 0.02


@pytest.mark.parametrize("cost", ["bytes", "ms"])
def test_learning_can_steer_to_bytes_and_milliseconds(tiny_sdxl, cost):
    ratio = {"bytes": 0.2, "ms": 0.02}[cost]  # how much of the time is the units' depends on the machine
    config = ecodiff.LearnConfig(ratio=ratio, warm_steps=1, steps=1, batch=1, inference_steps=2, cost=cost)
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
    learner = _Learner(tiny_sdxl, [PROMPT], config, None, None)
    state = LearnState.start(learner.variables)
    state.vectors["saliency"] = learner.shares * torch.logspace(-15, 15, learner.variables)
    state.step = 1
    learner._start_gates(state)
    state = learner.advance(state)
    values = torch.cat(list(learner.scores(state).values.values()))
    assert len(values.unique()) == len(values)
    for end in (values[:20], values[-20:]):  # up to what one Adam step of 0.05 may have moved
        assert (end.log().diff() > -0.1).all() and end[-1] > end[0]
