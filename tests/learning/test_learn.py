"""Learning: what it steers to, and what it yields."""

from dataclasses import replace

import diffusers
import pytest
import torch

import ecodiff
from ecodiff.errors import LearningError
from ecodiff.learning.budget import Budget
from ecodiff.learning.learn import learn
from ecodiff.learning.methods import METHODS
from ecodiff.learning.state import LearnState
from ecodiff.pipelines import denoiser_of
from ecodiff.units import ALL_KINDS
from tests.conftest import PROMPT, randomise, short, tiny_vae
from tests.pipelines import TEXT, letters

# Modulation by rows or by directions: not both. Directions inside heads are ranked in one step only.
LEARNED = tuple(kind for kind in ALL_KINDS if not kind.endswith("directions"))
CALL = {"prompt": [PROMPT, "cat"], "num_inference_steps": 3}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_preset_of_one_step(tiny_sdxl, name):
    config = replace(ecodiff.LearnConfig.preset(name), warm_steps=1, batch=1, inference_steps=2)
    states = []
    scores = ecodiff.learn_masks(tiny_sdxl, [PROMPT], config, states.append)
    assert len(states) == config.total_steps == 1
    assert scores.metadata["method"] == name and scores.plan(ratio=0.2).metadata["ratio"] > 0.15


def test_learning_takes_all_kinds_and_reports_the_gap(pipe):
    config = ecodiff.LearnConfig(ratio=0.3, warm_steps=1, steps=2, batch=2, inference_steps=3, kinds=LEARNED)
    config = replace(config, extra=short(pipe))
    states = []
    scores = ecodiff.learn_masks(pipe, [PROMPT, "cat"], config, states.append)
    present = {group.kind for group in ecodiff.find_groups(denoiser_of(pipe), LEARNED)}
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


def test_a_dense_model_that_gives_no_numbers_is_named_as_the_cause():
    """Lumina-Next divides by the number of its negative prompt's tokens: none, without a BOS token."""
    from transformers import GemmaConfig, GemmaForCausalLM

    text = GemmaConfig(**TEXT)
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4, in_channels=4, hidden_size=32, num_layers=1, num_attention_heads=2, num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=16,
    )  # fmt: skip
    pipe = diffusers.LuminaPipeline(
        transformer=randomise(transformer),
        vae=randomise(tiny_vae()),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=randomise(GemmaForCausalLM(text)),
        tokenizer=letters(),
    )
    pipe.set_progress_bar_config(disable=True)
    config = ecodiff.LearnConfig(warm_steps=1, steps=0, inference_steps=2, size=16, batch=1)
    with pytest.raises(LearningError, match="dense model itself"):
        ecodiff.learn_masks(pipe, ["a cat"], config)
    guided = replace(config, guidance_scale=1.0)  # without a negative prompt it is a model as others are
    assert ecodiff.learn_masks(pipe, ["a cat"], guided).removable > 0
