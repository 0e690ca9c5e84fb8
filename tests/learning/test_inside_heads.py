"""Directions inside heads: an exact basis, an order in which heads hold theirs, sizes that add up."""

from dataclasses import replace

import pytest
import torch

import ecodiff
from ecodiff.errors import BudgetError
from ecodiff.learning import learn as learning
from ecodiff.learning import surgeon
from ecodiff.learning.candidates import Consumer
from ecodiff.learning.inside_heads import Compared, basis, turns
from ecodiff.learning.learn import learn
from ecodiff.metrics.cost import parameters
from ecodiff.pipelines import denoiser_of
from ecodiff.pruning import cutting
from ecodiff.pruning.slicing import plan_of
from ecodiff.units import PruneGroup, Slot, units
from tests.conftest import flux, latents, short

PROMPTS = ["red apple", "cat face", "rocket"]
FIRST = replace(ecodiff.LearnConfig.preset("surgeon"), warm_steps=1, batch=2, inference_steps=2)


@pytest.fixture
def ranked(pipe, monkeypatch):
    monkeypatch.setattr(learning, "measured", lambda *given: {})  # no other order is chosen
    config = replace(FIRST, extra=short(pipe))
    return pipe, list(learn(pipe, PROMPTS, config))[-1][1]


def test_the_basis_decorrelates_a_heads_features_and_prices_each_alone():
    generator = torch.Generator().manual_seed(0)
    heads, width, out = 3, 4, 6
    features = units(heads * width)
    x = torch.randn(500, heads * width, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight, root = torch.randn(out, 12, generator=generator), torch.randn(out, out, generator=generator)
    moment, metric = x.T @ x / len(x), root @ root.T
    reader = Consumer(weight, torch.linalg.inv(moment), metric @ weight, moment, 1)
    group = PruneGroup(
        "a.values", "value_directions", 12, (Slot("o", "in", features),), (), inside="a", width=4
    )
    z, y = basis(group, [(reader, features)])
    reader.turn(features, z, y)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        torch.testing.assert_close(z[own] @ y[own].T, torch.eye(width), atol=1e-3, rtol=0)
        found = reader.moment[own, own]
        torch.testing.assert_close(found, torch.eye(width), atol=2e-3, rtol=0)
        price = reader.weight[:, own].T @ reader.metric_weight[:, own]
        off = price - price.diag().diag()
        assert off.abs().max() < 2e-3 * price.diag().max(), "each direction costs what it costs alone"
    torch.testing.assert_close(reader.inverse @ reader.moment, torch.eye(12), atol=1e-2, rtol=0)


def test_queries_and_keys_are_turned_exactly_and_each_direction_costs_what_it_costs_alone():
    generator = torch.Generator().manual_seed(0)
    heads, width = 3, 4
    q, k, g = (torch.randn(500, heads * width, generator=generator) * torch.arange(1, 13) for _ in range(3))
    own = units(heads * width)
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(12, 12, bias=False)})
    model["q"].weight.data = torch.eye(12)
    compared = Slot("k", "out", own), Slot("q", "out", own)
    group = PruneGroup(
        "a.queries", "query_directions", 12, compared[:1], compared[1:], inside="a", width=width
    )
    with (sums := Compared(model, [group])):
        (model["q"](q.view(5, 100, 12)) * g.view(5, 100, 12)).sum().backward()
    moment, metric = sums.found(trajectories=5)["a.queries"]
    z, y, costs = turns(moment, metric)
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        torch.testing.assert_close(moment[head], q[:, at].T @ q[:, at] / 500)
        torch.testing.assert_close(metric[head], g[:, at].T @ g[:, at] / 5)
        torch.testing.assert_close(
            (q[:, at] @ z[at].T) @ (k[:, at] @ y[at].T).T, q[:, at] @ k[:, at].T, rtol=1e-3, atol=1e-1
        )
        torch.testing.assert_close(z[at] @ moment[head] @ z[at].T, torch.eye(width), atol=2e-3, rtol=0)
        for j in range(width):  # all but direction j of the queries stays
            lost = torch.outer(y[at][j], z[at][j])
            alone = torch.trace(metric[head] @ lost @ moment[head] @ lost.T)
            torch.testing.assert_close(costs[at][j], alone, rtol=1e-2, atol=1e-3 * float(costs[at].max()))


def test_every_size_counts_to_the_parameter_and_no_head_is_left_without_a_direction(ranked):
    pipe, scores = ranked
    held = {group.kind for group in ecodiff.find_groups(denoiser_of(pipe), surgeon.SURGEON_KINDS)}
    assert set(scores.kinds.values()) == held and "value_directions" in held
    assert ("query_directions" in held) == hasattr(pipe, "unet")
    for ratio in (0.1, 0.3, 0.5, 0.8):
        plan = scores.plan(ratio=ratio * scores.ceiling)
        small = ecodiff.variant(pipe, plan)
        assert parameters(denoiser_of(small)) == plan.metadata["params_pruned"], ratio
        for name, heads in scores.inside.items():
            each = plan[name].view(len(plan[heads]), -1).sum(1)
            assert (each[plan[heads]] > 0).all(), name
            gone = int((~plan[name]).sum())
            assert not gone or gone >= len(plan[name]) / cutting.FEWEST or not plan[heads].all(), name
    smallest = scores.plan(ratio=scores.ceiling)
    assert smallest.metadata["ratio"] == pytest.approx(scores.ceiling, abs=0.01)


@torch.no_grad()
def test_the_plan_is_masked_sliced_saved_and_kept_by_what_it_cut(ranked, tmp_path):
    pipe, scores = ranked
    plan = ecodiff.Scores.load(scores.save(tmp_path / "scores.safetensors")).plan(ratio=0.4 * scores.ceiling)
    assert any(not plan[name].all() for name in scores.inside)
    small = ecodiff.variant(pipe, ecodiff.PrunePlan.load(plan.save(tmp_path / "plan.safetensors")))
    with ecodiff.masked(denoiser_of(pipe), plan):
        masked = latents(pipe)
    torch.testing.assert_close(latents(small), masked, rtol=1e-3, atol=1e-3 * float(masked.abs().max()))
    known = plan_of(denoiser_of(ecodiff.load(ecodiff.save(small, tmp_path / "small"))))
    assert known.digest == plan.digest
    again = ecodiff.variant(pipe, known)
    torch.testing.assert_close(latents(again), masked, rtol=1e-3, atol=2e-3 * float(masked.abs().max()))


def test_what_cannot_rank_them_says_so():
    with pytest.raises(BudgetError, match="ranked together with heads"):
        ecodiff.LearnConfig(kinds=("value_directions",), method="surgeon")
    with pytest.raises(BudgetError, match="by a scoring method"):
        ecodiff.LearnConfig(kinds=("heads", "value_directions"))


def test_a_method_that_does_not_rank_them_is_named(tiny_sdxl):
    kinds = ("heads", "value_directions")
    config = ecodiff.LearnConfig.preset("gauss-newton", kinds=kinds, ratio=0.05, warm_steps=1)
    config = replace(config, batch=1, inference_steps=2, extra=short(tiny_sdxl))
    with pytest.raises(BudgetError, match="gauss-newton does not rank directions inside heads"):
        list(learn(tiny_sdxl, PROMPTS, config))


def test_layers_ordered_in_turns_give_the_same_ranking(monkeypatch):
    pipe = flux()
    config = replace(FIRST, extra=short(pipe))
    whole = list(learn(pipe, PROMPTS, config))[-1][1]
    monkeypatch.setattr(surgeon, "TURN", 1)  # one cluster at a time
    parts = list(learn(pipe, PROMPTS, config))[-1][1]
    assert all(torch.equal(parts.values[name], values) for name, values in whole.values.items())
    assert all(torch.equal(parts.bases[name][0], z) for name, (z, _) in whole.bases.items())
