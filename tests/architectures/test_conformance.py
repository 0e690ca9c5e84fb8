"""The conformance suite: what is asked of every architecture that ecodiff says it supports.

Groups are found; masked equals sliced (partly, one unit, none left), in memory and reloaded; with the
mask on, what gets no gradient is exactly what slicing removes.
"""

import diffusers
import pytest
import torch
from torch.utils._pytree import tree_map

import ecodiff
from ecodiff.config import CompensateConfig, HealConfig
from ecodiff.learning.heal import heal
from ecodiff.learning.learn import learn
from ecodiff.metrics.cost import parameters, unit_macs
from ecodiff.metrics.fidelity import generate
from ecodiff.pipelines import denoiser_name, denoiser_of, prompt_rows
from ecodiff.pruning.scores import Scores
from ecodiff.units import ALL_KINDS, PRESET_KINDS, PUBLISHED_KINDS
from tests.conftest import randomise
from tests.denoisers import ROWS
from tests.loop import LoopPipeline
from tests.pipelines import BUILDERS


def run(denoiser, given) -> torch.Tensor:
    out = denoiser(**given, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def kept(cut: str, group, generator) -> torch.Tensor:
    if cut == "partial":
        keep = torch.rand(group.size, generator=generator) > 0.4
        keep[0] = True
        return keep
    return torch.arange(group.size) < (1 if cut == "one unit left" else group.floor)


def basis(group, keep, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of some basis, (Z, Y), of each head or of all features together."""
    width = group.width if group.inside else group.size
    z = torch.linalg.qr(torch.randn(group.size // width, width, width, generator=generator).double())[0]
    z = z * torch.linspace(0.5, 2, width)[:, None]
    return z.flatten(0, 1)[keep], torch.linalg.inv(z).mT.flatten(0, 1)[keep].T


@pytest.fixture(params=ROWS)
def row(request):
    row = ROWS[request.param]
    denoiser = randomise(getattr(diffusers, row.cls)(**row.config)).to(row.dtype)
    return row, denoiser, tree_map(lambda leaf: _cast(leaf, row.dtype), row.given())


def _cast(leaf, dtype):
    return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 else leaf


@pytest.mark.parametrize("cut", ["partial", "one unit left", "none left"])
@torch.no_grad()
def test_masked_equals_sliced_and_reloaded(row, cut, tmp_path):
    row, denoiser, given = row
    groups = ecodiff.find_groups(denoiser, ALL_KINDS)
    assert {group.kind for group in groups} == row.kinds
    generator = torch.Generator().manual_seed(0)
    groups = [group for group in groups if cut == "partial" or group.kind in PUBLISHED_KINDS]
    plan = ecodiff.PrunePlan({group.name: kept(cut, group, generator) for group in groups})
    for group in groups:
        if group.activations or group.inside:  # in any basis of what they read, or of what a head gives
            plan.bases[group.name] = basis(group, plan[group.name], generator)
    dense, before = run(denoiser, given), parameters(denoiser)
    with ecodiff.masked(denoiser, plan):
        masked = run(denoiser, given)
    ecodiff.slice_(denoiser, plan)
    scale = float(masked.abs().max())
    sliced = run(denoiser, given)
    torch.testing.assert_close(sliced / scale, masked / scale, atol=row.digits[0], rtol=0)
    if plan.bases:  # products are not float32, which from_pretrained opens them in
        for parameter in denoiser.parameters():
            parameter.data = parameter.data.float().to(parameter.dtype)
        sliced = run(denoiser, given)
    denoiser.save_pretrained(tmp_path)
    again = type(denoiser).from_pretrained(tmp_path).to(row.dtype)
    torch.testing.assert_close(run(again, given), sliced, rtol=row.digits[0], atol=row.digits[0] * scale)
    assert (dense - masked).abs().max() > 1e-3 * scale, "the mask did nothing"
    assert parameters(denoiser) < before


def test_dead_parameters_are_exactly_the_removed_ones(row):
    row, denoiser, given = row
    denoiser.requires_grad_(True)
    for module in denoiser.modules():
        if hasattr(module, "moe_infer"):  # HiDream: experts have gradients in training mode only
            module.training, module._force_inference_output = True, False
    groups, generator = ecodiff.find_groups(denoiser), torch.Generator().manual_seed(1)
    plan = ecodiff.PrunePlan({group.name: kept("partial", group, generator) for group in groups})

    def gradients() -> dict[str, torch.Tensor]:
        denoiser.zero_grad()
        out = run(denoiser, given)
        (out * torch.randn_like(out)).sum().backward()
        named = denoiser.named_parameters()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}

    # Idle in the dense model too: what nothing reads, and biases of keys, which move all scores alike.
    whole = gradients()
    noise = 1e3 * torch.finfo(row.dtype).eps * max(float(g.abs().max()) for g in whole.values())
    idle = {name for name, g in whole.items() if (g.abs() < noise).any()}
    with ecodiff.masked(denoiser, plan):
        found = {name: int((g == 0).sum()) for name, g in gradients().items()}
    sizes = {name: p.numel() for name, p in denoiser.named_parameters()}
    ecodiff.slice_(denoiser, plan)
    removed = {name: sizes[name] - p.numel() for name, p in denoiser.named_parameters()}
    assert {n: c for n, c in found.items() if n not in idle} == {
        n: c for n, c in removed.items() if n not in idle
    }
    assert any(count for name, count in removed.items() if name not in idle)


def assert_seen(state, scores, idle):
    """A gradient reached every group through the trajectory."""
    parts = state.vectors["saliency"].split([len(values) for values in scores.values.values()])
    blind = [group for group, part in zip(scores.values, parts, strict=True) if part.max() == 0]
    assert all(any(part in group for part in idle) for group in blind), f"no gradient reaches {blind}"


@pytest.mark.parametrize("name", [name for name in ROWS if name not in BUILDERS])
def test_two_steps_are_learned_through_a_pipeline_never_seen(name):
    row = ROWS[name]
    pipe = LoopPipeline.of(row, randomise(getattr(diffusers, row.cls)(**row.config)))
    ratio, batch = Scores.unranked(denoiser_of(pipe)).ceiling / 2, pipe.batch
    config = ecodiff.LearnConfig(
        ratio=ratio, warm_steps=1, steps=1, batch=batch, trajectories=batch, inference_steps=2
    )
    state, scores = list(learn(pipe, ["red apple", "blue whale"], config))[-1]
    assert state.step == 2
    assert_seen(state, scores, row.idle)
    plan = scores.plan(ratio=ratio)
    small = ecodiff.variant(pipe, plan)
    assert parameters(denoiser_of(small)) == plan.metadata["params_pruned"]
    small.given = pipe.given

    def draw(pipe):
        return pipe([""] * batch, [torch.Generator().manual_seed(row) for row in range(batch)])[0]

    with torch.no_grad(), ecodiff.masked(denoiser_of(pipe), plan):
        masked = draw(pipe)
    with torch.no_grad():
        sliced = draw(small)
    torch.testing.assert_close(sliced, masked, atol=1e-4 * float(masked.abs().max()), rtol=0)
    few = CompensateConfig(trajectories=2 * batch, heldout=batch, batch=batch, inference_steps=2)
    assert ecodiff.compensate_(small, pipe, ["red apple"], few)
    groups, generator = ecodiff.find_groups(denoiser_of(pipe)), torch.Generator().manual_seed(1)
    small = ecodiff.variant(pipe, ecodiff.PrunePlan({g.name: kept("partial", g, generator) for g in groups}))
    small.given = pipe.given
    once = HealConfig(repair=0, steps=1, batch=batch, trajectories=batch, rank=2, inference_steps=2)
    done = [step for step, _ in heal(small, pipe, ["red apple"], once)]
    assert done == [0, 1, 1], "a check, a step, a check"
    by_unit, total = unit_macs(pipe, prompt_rows(["red apple"], range(batch), 0, {}))
    assert 0 < sum(by_unit[name] * len(keep) for name, keep in plan.items()) <= total
    removed = sum(by_unit[name] * int((~keep).sum()) for name, keep in plan.items())
    cut = ecodiff.variant(pipe, plan)
    cut.given = pipe.given
    left = unit_macs(cut, prompt_rows(["red apple"], range(batch), 0, {}))[1]
    assert left == pytest.approx(total - removed, rel=0.05, abs=0.005 * total), "the cut model's, counted"


@pytest.mark.parametrize("name", BUILDERS)
def test_the_whole_job_through_the_pipeline(name, tmp_path):
    build, size, extra = BUILDERS[name]
    built = build()
    built.set_progress_bar_config(disable=True)
    built.save_pretrained(tmp_path / "dense")
    pipe = built.from_pretrained(tmp_path / "dense", **built.components)  # as loaded, with its tokenizer
    pipe.set_progress_bar_config(disable=True)
    short = {"inference_steps": 2, "size": size, "extra": extra}
    ratio = Scores.unranked(denoiser_of(pipe)).ceiling / 2
    config = ecodiff.LearnConfig(ratio=ratio, warm_steps=1, steps=1, batch=2, trajectories=4, **short)
    state, scores = list(learn(pipe, ["red apple", "blue whale"], config))[-1]
    assert set(scores.kinds.values()) == ROWS[name].kinds & set(PRESET_KINDS)
    assert_seen(state, scores, ROWS[name].idle)
    plan = scores.plan(ratio=ratio)
    small = ecodiff.variant(pipe, plan)
    assert parameters(denoiser_of(small)) == plan.metadata["params_pruned"]

    def sample(pipe, **more):
        return generate(pipe, "red apple", seed=0, steps=2, size=size, extra=extra | more)

    with ecodiff.masked(denoiser_of(pipe), plan):
        masked = sample(pipe).latents
    sliced = sample(small)
    torch.testing.assert_close(sliced.latents, masked, atol=1e-4 * float(masked.abs().max()), rtol=0)
    assert sliced.image.width >= 8
    few = CompensateConfig(trajectories=4, heldout=2, batch=2, **short)
    assert any(ecodiff.compensate_(small, pipe, ["red apple"], few).values())
    once = HealConfig(repair=0, steps=1, batch=2, trajectories=2, rank=2, **short)
    done = [step for step, _ in heal(small, pipe, ["red apple"], once)]
    assert done == [0, 1, 1], "a check, a step, a check"
    folder = ecodiff.save(small, tmp_path / "small")
    plain = type(denoiser_of(small)).from_pretrained(folder / denoiser_name(small))
    weights = denoiser_of(small).state_dict()
    assert weights.keys() == plain.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in plain.state_dict().items())
    again = denoiser_of(ecodiff.load(folder))
    assert type(again) is type(plain) and again.state_dict().keys() == weights.keys()
