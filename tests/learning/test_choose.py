"""Orders that share their statistics are measured, and the better one is kept."""

from dataclasses import replace

import pytest
import torch

import ecodiff
from ecodiff.learning import choose, learn
from ecodiff.learning.methods import METHODS
from ecodiff.learning.objective import Objective
from ecodiff.pipelines import denoiser_of
from ecodiff.pruning.heads import left
from tests.conftest import flux, short

PROMPTS = ["red apple", "cat face", "rocket"]


@pytest.fixture
def pipe():
    return flux()


@pytest.fixture
def config(pipe):
    preset = ecodiff.LearnConfig.preset("surgeon", ratio=0.2)
    return replace(preset, warm_steps=1, batch=2, inference_steps=2, extra=short(pipe))


def orders(pipe, config) -> dict:
    """What the run's method gives, by hand."""
    found = METHODS["surgeon"](
        pipe, [Objective(pipe, PROMPTS, config).call(0)], 0, Objective(pipe, PROMPTS, config).prompts
    )
    return {"surgeon": found} | dict(found.others)


def test_both_orders_are_measured_and_the_better_is_the_ranking(pipe, config):
    state, scores = list(learn.learn(pipe, PROMPTS, config))[-1]
    errors = scores.metadata["orders"]
    assert set(errors) == {"surgeon", "gauss-newton"} and all(error > 0 for error in errors.values())
    assert scores.metadata["method"] == min(errors, key=errors.get)
    assert {f"error of {name}": error for name, error in errors.items()}.items() <= state.history[-1].items()
    wanted = orders(pipe, config)[scores.metadata["method"]]
    assert all(
        torch.equal(scores.values[name], values) for name, values in wanted.items() if name in scores.values
    )


def test_another_order_than_the_first_can_win(pipe, config, monkeypatch):
    monkeypatch.setattr(
        learn, "measured", lambda objective, plans, kept: {"surgeon": 0.2, "gauss-newton": 0.1}
    )
    _, scores = list(learn.learn(pipe, PROMPTS, config))[-1]
    assert scores.metadata["method"] == "gauss-newton"
    wanted = orders(pipe, config)["gauss-newton"]
    assert all(torch.equal(scores.values[name], wanted[name]) for name in scores.values)
    # The diagonal does not rank what is inside heads: it stays as long as its head.
    plan = scores.plan(ratio=0.4)
    for group in ecodiff.find_groups(denoiser_of(pipe), ["value_directions"]):
        assert torch.equal(left(group, plan), plan[group.inside].repeat_interleave(group.width))


def test_the_error_rises_with_what_is_removed(pipe, config):
    _, scores = list(learn.learn(pipe, PROMPTS, config))[-1]
    plans = {str(ratio): scores.plan(ratio=ratio) for ratio in (0.02, 0.3, 0.6)}
    errors = list(choose.measured(Objective(pipe, PROMPTS, config), plans).values())
    assert errors == sorted(errors) and errors[0] < 0.5 * errors[2]


def test_without_memory_for_a_pruned_model_the_method_that_was_asked_for_is_kept(pipe, config, monkeypatch):
    def none(*args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(choose, "variant", none)
    _, scores = list(learn.learn(pipe, PROMPTS, config))[-1]
    assert scores.metadata["method"] == "surgeon" and "orders" not in scores.metadata


def test_a_budget_of_macs_is_met_by_what_costs_macs(pipe, config):
    """The surgeon's values are what units cost, so they can be counted per multiply-accumulate."""
    _, scores = list(learn.learn(pipe, PROMPTS, replace(config, cost="macs", ratio=0.15)))[-1]
    plan, other = scores.plan(macs=round(0.85 * scores.total_macs)), scores.plan(ratio=0.15)
    removed = [1 - p.metadata["macs_pruned"] / p.metadata["macs_dense"] for p in (plan, other)]
    assert removed[0] == pytest.approx(0.15, abs=0.02) and removed[1] < removed[0]
    assert removed[0] / plan.metadata["ratio"] > removed[1] / other.metadata["ratio"]


def test_the_card_says_what_was_measured(pipe, config, tmp_path):
    _, scores = list(learn.learn(pipe, PROMPTS, config))[-1]
    small = ecodiff.variant(pipe, scores.plan(ratio=0.2))
    card = (ecodiff.save(small, tmp_path / "small") / "README.md").read_text()
    best, other = sorted(scores.metadata["orders"].items(), key=lambda item: item[1])
    assert f"| {best[0]} {best[1]:.2g}, {other[0]} {other[1]:.2g} (typical latent error, held out) |" in card
