import pytest
import torch
from torch.utils._pytree import tree_map

import ecodiff
from ecodiff.errors import PlanError, UnsupportedModelError
from ecodiff.metrics.cost import parameters
from ecodiff.pipelines import denoiser_calls, denoiser_of
from ecodiff.pruning.heads import left
from ecodiff.pruning.scores import Scores
from ecodiff.pruning.slicing import plan_of
from ecodiff.units import ALL_KINDS, KINDS, PRESET_KINDS
from tests.checkpoints.test_folders import some_plan
from tests.conftest import PROMPT, latents, sd3, short

GENERATOR = torch.Generator().manual_seed(3)


def some(group):
    keep = torch.rand(group.size, generator=GENERATOR) > 0.4
    keep[0] = True
    return keep


CUTS = {
    "partial": some,
    "one unit left": lambda group: torch.arange(group.size) == group.size // 2,
    "none left": lambda group: torch.arange(group.size) < KINDS[group.kind].floor,
}


@pytest.mark.parametrize("cut", CUTS)
def test_masked_equals_sliced(pipe, cut):
    # Without any modulation no branch is open, and nothing else would matter.
    kinds = ALL_KINDS if cut == "partial" else PRESET_KINDS
    plan = ecodiff.PrunePlan({g.name: CUTS[cut](g) for g in ecodiff.find_groups(denoiser_of(pipe), kinds)})
    dense = latents(pipe)
    with ecodiff.masked(denoiser_of(pipe), plan):
        masked = latents(pipe)
    small = ecodiff.variant(pipe, plan)
    scale = float(masked.abs().max())
    torch.testing.assert_close(latents(small) / scale, masked / scale, atol=1e-5, rtol=0)
    assert (masked - dense).abs().max() > 1e-3 * scale, "the mask did nothing"
    assert parameters(denoiser_of(small)) < parameters(denoiser_of(pipe))
    assert torch.equal(latents(pipe), dense), "the dense pipeline was changed"


@pytest.mark.parametrize("left", [0, 1])
def test_each_group_alone(tiny_sdxl, left):
    for group in ecodiff.find_groups(tiny_sdxl.unet, ALL_KINDS):
        plan = ecodiff.PrunePlan({group.name: torch.arange(group.size) < max(left, group.floor)})
        with ecodiff.masked(tiny_sdxl.unet, plan):
            masked = latents(tiny_sdxl, steps=1)
        sliced = latents(ecodiff.variant(tiny_sdxl, plan), steps=1)
        scale = float(masked.abs().max())
        torch.testing.assert_close(sliced / scale, masked / scale, atol=1e-5, rtol=0)


def is_float(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def test_dead_parameters_are_exactly_the_removed_ones(pipe):
    """With the mask on, what gets no gradient must be what slicing removes: no more, no less."""
    denoiser = denoiser_of(pipe.to(torch.float64)).requires_grad_(True)
    # Modulation aside: without a gate, all of a branch behind it is dead, and rightly stays.
    groups = ecodiff.find_groups(denoiser, PRESET_KINDS)
    plan = ecodiff.PrunePlan({g.name: some(g) for g in groups})
    call = denoiser_calls(pipe, {"prompt": [PROMPT] * 2, "num_inference_steps": 2} | short(pipe))[0]
    jitter = lambda leaf: leaf + torch.rand_like(leaf) if is_float(leaf) else leaf  # noqa: E731 - no zeros
    args, kwargs = tree_map(jitter, call)
    with ecodiff.masked(denoiser, plan):
        out = denoiser(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out.sample
        (out * torch.randn_like(out)).sum().backward()
    dead = {
        name: int((p.grad == 0).sum()) if p.grad is not None else p.numel()
        for name, p in denoiser.named_parameters()
    }
    sizes = {name: p.numel() for name, p in denoiser.named_parameters()}
    ecodiff.slice_(denoiser, plan)
    removed = {name: sizes[name] - p.numel() for name, p in denoiser.named_parameters()}
    # Nothing reads what the text of a last block attends to (SD3): dead in the dense model too.
    unread = [n for n, m in denoiser.named_modules() if getattr(m, "context_pre_only", None) is True]
    idle = [f"{name}.{part}" for name in unread for part in ("add_q_proj", "norm_added_q")]
    dead, removed = (
        {name: n for name, n in counts.items() if not name.startswith(tuple(idle) or ("-",))}
        for counts in (dead, removed)
    )
    # A key's bias moves all scores of a query alike, so softmax gives it no gradient; diffusers'
    # keys have none here, and every dead element is one that slicing removes.
    assert dead == removed


def test_what_is_not_cut_is_shared(tiny_sdxl):
    group = ecodiff.find_groups(tiny_sdxl.unet)[0]
    small = ecodiff.variant(tiny_sdxl, {group.name: torch.arange(group.size) > 0})
    dense = dict(tiny_sdxl.unet.named_parameters())
    cut = {slot.module for slot in group.slots}
    for name, parameter in small.unet.named_parameters():
        shared = parameter.data_ptr() == dense[name].data_ptr()
        assert shared == (name.rpartition(".")[0] not in cut or dense[name].shape == parameter.shape)
    assert small.vae is tiny_sdxl.vae and small.text_encoder is tiny_sdxl.text_encoder
    assert small.scheduler is not tiny_sdxl.scheduler, "schedulers have state"


def test_a_resnet_keeps_a_norm_group(tiny_sdxl):
    group = ecodiff.find_groups(tiny_sdxl.unet, ("resnet",))[0]
    with pytest.raises(PlanError, match="at least 1"):
        ecodiff.variant(tiny_sdxl, {group.name: torch.zeros(group.size, dtype=torch.bool)})


def test_slicing_twice_is_slicing_once(pipe):
    groups = ecodiff.find_groups(denoiser_of(pipe), ALL_KINDS)
    scores = Scores.of(denoiser_of(pipe), {g.name: torch.rand(g.size, generator=GENERATOR) for g in groups})
    first, both = (scores.plan(ratio=ratio, align=False) for ratio in (0.1, 0.3))
    # What is cut inside its heads is not cut there again.
    inside = {group.name for group in groups if group.inside}
    first = ecodiff.PrunePlan({n: keep for n, keep in first.items() if n not in inside}, first.metadata)
    small = ecodiff.variant(pipe, first)
    alive = {group.name: left(group, first) for group in groups}
    second = {name: keep[alive[name]] for name, keep in both.items() if alive[name].any()}
    twice = ecodiff.variant(small, second)
    once = ecodiff.variant(pipe, both)
    assert torch.equal(latents(twice), latents(once))
    again, wanted = (plan_of(denoiser_of(each)) for each in (twice, once))
    assert wanted.digest == both.digest
    assert all(torch.equal(left(group, again), left(group, wanted)) for group in groups)


@torch.no_grad()
def test_queries_and_keys_of_image_and_text_lose_the_same_directions_and_none_behind_norms(tmp_path):
    pipe = sd3(qk_norm=None)
    pipe.set_progress_bar_config(disable=True)
    groups = ecodiff.find_groups(denoiser_of(pipe), ["query_directions"])
    assert {slot.module.rpartition(".")[2] for g in groups for slot in g.producers} == {"to_q", "add_q_proj"}
    plan = some_plan(pipe)
    small = ecodiff.variant(pipe, ecodiff.PrunePlan({g.name: plan[g.name] for g in groups}, {}, plan.bases))
    with ecodiff.masked(denoiser_of(pipe), plan_of(denoiser_of(small))):
        masked = latents(pipe)
    torch.testing.assert_close(latents(small), masked, rtol=1e-3, atol=1e-3 * float(masked.abs().max()))
    loaded = ecodiff.load(ecodiff.save(small, tmp_path / "small"))
    torch.testing.assert_close(latents(loaded), latents(small), rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModelError):
        ecodiff.find_groups(denoiser_of(sd3()), ["query_directions"])


def test_an_attention_that_was_cut_inside_its_heads_is_left_alone_after_that(pipe):
    groups = ecodiff.find_groups(denoiser_of(pipe), ["value_directions"])
    small = ecodiff.variant(pipe, {g.name: torch.arange(g.size) % 3 > 0 for g in groups})
    names = {group.name for group in ecodiff.find_groups(denoiser_of(small), ALL_KINDS)}
    assert not names & {name for group in groups for name in (group.name, group.inside)}
    rest = Scores.unranked(denoiser_of(small), ["ffn"])
    smaller = ecodiff.variant(small, plan := rest.plan(ratio=rest.ceiling / 2))
    with torch.no_grad(), ecodiff.masked(denoiser_of(small), plan):
        masked = latents(small)
    torch.testing.assert_close(latents(smaller), masked, rtol=1e-3, atol=1e-3)


def test_a_plan_of_another_model_is_refused(tiny_sdxl):
    name = ecodiff.find_groups(tiny_sdxl.unet)[0].name
    for plan in ({name: torch.ones(99, dtype=torch.bool)}, {"other": torch.ones(4, dtype=torch.bool)}):
        with pytest.raises(PlanError, match="does not fit"):
            ecodiff.variant(tiny_sdxl, plan)


def test_a_model_with_emptied_layers_is_cut_again(pipe):
    """All feed-forwards gone, then heads: what was emptied has no units, and nothing divides by it."""
    groups = ecodiff.find_groups(denoiser_of(pipe))
    gone = {g.name: torch.zeros(g.size, dtype=torch.bool) for g in groups if g.kind == "ffn"}
    small = ecodiff.variant(pipe, gone)
    left = ecodiff.find_groups(denoiser_of(small))
    assert {g.name for g in left} == {g.name for g in groups} - set(gone)
    half = {g.name: torch.arange(g.size) >= g.size // 2 for g in left}
    with torch.no_grad(), ecodiff.masked(denoiser_of(small), {n: k.float() for n, k in half.items()}):
        masked = latents(small)
    torch.testing.assert_close(latents(ecodiff.variant(small, half)), masked, rtol=1e-3, atol=1e-3)
