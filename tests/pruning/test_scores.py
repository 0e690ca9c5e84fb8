"""Scores: cut at a size, in whatever it is given."""

import pytest
import torch

import ecodiff
from ecodiff.errors import BudgetError
from ecodiff.metrics import cost
from ecodiff.metrics.cost import parameters
from ecodiff.pruning.scores import Scores


@pytest.fixture
def scores(tiny_sdxl):
    generator = torch.Generator().manual_seed(0)
    groups = ecodiff.find_groups(tiny_sdxl.unet)
    return Scores.of(tiny_sdxl.unet, {g.name: torch.rand(g.size, generator=generator) for g in groups})


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.45])
def test_the_size_is_what_was_asked_and_what_was_predicted(tiny_sdxl, scores, ratio):
    plan = scores.plan(ratio=ratio)
    small = ecodiff.variant(tiny_sdxl, plan)
    assert parameters(small.unet) == plan.metadata["params_pruned"]
    largest = max(cost * 8 for cost in scores.costs.values())
    assert abs(parameters(small.unet) - (1 - ratio) * scores.total) <= largest


def test_params_is_the_same_budget(scores):
    assert scores.plan(params=round(0.7 * scores.total)).digest == scores.plan(ratio=0.3).digest


def test_bytes_and_macs_are_budgets_too(tiny_sdxl, scores):
    assert scores.plan(bytes=round(0.7 * 4 * scores.total)).digest == scores.plan(ratio=0.3).digest
    call = {"prompt": "red apple", "num_inference_steps": 2}
    by_unit, total = cost.unit_macs(tiny_sdxl, call)
    counted = Scores.of(tiny_sdxl.unet, scores.values, (by_unit, total))
    plan = counted.plan(macs=round(0.75 * total))
    left = cost.unit_macs(ecodiff.variant(tiny_sdxl, plan), call)[1]
    assert left == plan.metadata["macs_pruned"] and abs(left / total - 0.75) < 0.02
    with pytest.raises(BudgetError, match="do not know the MACs"):
        scores.plan(macs=1)


def test_milliseconds_are_a_budget(scores):
    size = lambda plan: plan.metadata["params_pruned"] / scores.total  # noqa: E731 - stands in for a clock
    plan = scores.plan(latency_ms=0.8, measured=size)
    assert 0.78 <= size(plan) <= 0.8
    with pytest.raises(BudgetError, match="smallest"):
        scores.plan(latency_ms=1e-6, measured=size)


def test_larger_plans_remove_what_smaller_ones_do(scores):
    small, large = scores.plan(ratio=0.2), scores.plan(ratio=0.4)
    assert all((large[name] <= small[name]).all() for name in small)


def test_the_lowest_scores_go(scores):
    plan = scores.plan(ratio=0.3, align=False)
    gone = max(float(scores.values[n][~k].max()) for n, k in plan.items() if not k.all())
    kept = min(float(scores.values[n][k].min()) for n, k in plan.items() if k.any())
    assert gone <= kept


def test_neurons_are_kept_in_multiples(scores):
    plan = scores.plan(ratio=0.3)
    widths = {int(keep.sum()) for name, keep in plan.items() if scores.kinds[name] == "ffn"}
    assert len(widths) > 1 and all(width % 8 == 0 for width in widths)


@pytest.mark.parametrize("ratio", [-0.1, 1.5, "half", float("nan")])
def test_a_ratio_that_is_none(scores, ratio):
    with pytest.raises(BudgetError, match="ratio"):
        scores.plan(ratio=ratio)


def test_more_than_the_ceiling_names_it(scores):
    with pytest.raises(BudgetError, match=f"{scores.ceiling:.1%}"):
        scores.plan(ratio=scores.ceiling + 0.01)
    everything = scores.plan(ratio=scores.ceiling)
    assert not any(keep.any() for keep in everything.values())


def test_files_round_trip(scores, tmp_path):
    plan = scores.plan(ratio=0.3)
    again = ecodiff.PrunePlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert again.digest == plan.digest and again.metadata == plan.metadata
    assert all(torch.equal(again[name], keep) for name, keep in plan.items())
    loaded = Scores.load(scores.save(tmp_path / "scores.safetensors"))
    assert loaded.plan(ratio=0.3).digest == plan.digest


def test_the_digest_is_of_the_cut(scores):
    plan = scores.plan(ratio=0.3)
    assert (
        ecodiff.PrunePlan({name: plan[name] for name in reversed(list(plan))}, {"other": 1}).digest
        == plan.digest
    )
    assert scores.plan(ratio=0.31).digest != plan.digest


@pytest.mark.parametrize("kind", ["ffn", "conv_ffn"])
@pytest.mark.parametrize("size", [40, 768, 1024, 1100])
def test_what_stays_is_a_multiple_of_what_hardware_likes(kind, size):
    """A floor of one unit is not left out of the count: widths would be 1 modulo 64."""
    scores = Scores({"a": torch.rand(size)}, {"a": kind}, {"a": 10}, 20 * size)
    width = 64 if size >= 1024 else 8
    for ratio in (0.05, 0.1, 0.2, 0.3, 0.4):
        kept = int(scores.plan(ratio=ratio)["a"].sum())
        assert kept % width == 0 or kept == size
    assert int(scores.plan(ratio=scores.ceiling)["a"].sum()) == (1 if kind == "conv_ffn" else 0)


def test_a_ratio_can_be_of_any_cost(scores):
    """A budget in milliseconds is cut by milliseconds."""
    slow = next(iter(scores.values))
    costs = {name: 100.0 if name == slow else 1.0 for name in scores.values}
    total = 2.0 * sum(costs[name] * len(values) for name, values in scores.values.items())
    plan = scores.plan(ratio=0.25, costs=(costs, total), align=False)
    gone = sum(costs[name] * int((~keep).sum()) for name, keep in plan.items())
    assert gone / total == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("align", [True, 128, 256])
def test_wide_layers_keep_multiples_of_what_is_asked(align):
    values = {
        name: torch.rand(4096, generator=torch.Generator().manual_seed(n)) for n, name in enumerate("ab")
    }
    scores = Scores(values, dict.fromkeys("ab", "ffn"), dict.fromkeys("ab", 10), total=100_000)
    plan = scores.plan(ratio=0.2, align=align)
    for keep in plan.values():
        assert int(keep.sum()) % (64 if align is True else align) == 0
    assert abs(plan.metadata["ratio"] - 0.2) < 0.02
    with pytest.raises(BudgetError, match="multiples"):
        scores.plan(ratio=0.2, align=-8)
