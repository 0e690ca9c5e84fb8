import pytest
import torch

import ecodiff
from ecodiff.errors import PlanError
from ecodiff.measure import parameters
from ecodiff.plan import Scores
from ecodiff.slicing import plan_of

from .conftest import latents

GENERATOR = torch.Generator().manual_seed(3)


def some(size):
    keep = torch.rand(size, generator=GENERATOR) > 0.4
    keep[0] = True
    return keep


CUTS = {
    "partial": some,
    "one unit left": lambda size: torch.arange(size) == size // 2,
    "none left": lambda size: torch.zeros(size, dtype=torch.bool),
}


@pytest.mark.parametrize("cut", CUTS)
def test_masked_equals_sliced(pipe, cut):
    plan = ecodiff.PrunePlan({g.name: CUTS[cut](g.size) for g in ecodiff.find_groups(pipe.unet)})
    dense = latents(pipe)
    with ecodiff.masked(pipe.unet, plan):
        masked = latents(pipe)
    small = ecodiff.variant(pipe, plan)
    scale = float(masked.abs().max())
    torch.testing.assert_close(latents(small) / scale, masked / scale, atol=1e-5, rtol=0)
    assert (masked - dense).abs().max() > 1e-3 * scale, "the mask did nothing"
    assert parameters(small.unet) < parameters(pipe.unet)
    assert torch.equal(latents(pipe), dense), "the dense pipeline was changed"


@pytest.mark.parametrize("left", [0, 1])
def test_each_group_alone(tiny_sdxl, left):
    for group in ecodiff.find_groups(tiny_sdxl.unet):
        plan = ecodiff.PrunePlan({group.name: torch.arange(group.size) < left})
        with ecodiff.masked(tiny_sdxl.unet, plan):
            masked = latents(tiny_sdxl, steps=1)
        sliced = latents(ecodiff.variant(tiny_sdxl, plan), steps=1)
        scale = float(masked.abs().max())
        torch.testing.assert_close(sliced / scale, masked / scale, atol=1e-5, rtol=0)


def test_dead_parameters_are_exactly_the_removed_ones(pipe):
    """With the mask on, what gets no gradient must be what slicing removes: no more, no less."""
    unet = pipe.unet.double().requires_grad_(True)
    groups = ecodiff.find_groups(unet)
    plan = ecodiff.PrunePlan({g.name: some(g.size) for g in groups})
    extra = {}
    if unet.config.addition_embed_type:
        extra = {"text_embeds": torch.randn(2, 16).double(), "time_ids": torch.rand(2, 6).double()}
    with ecodiff.masked(unet, plan):
        out = unet(
            torch.randn(2, 4, 8, 8).double(),
            torch.tensor([10, 500]),
            torch.randn(2, 5, 32).double(),
            added_cond_kwargs=extra or None,
        ).sample
        (out * torch.randn_like(out)).sum().backward()
    dead = {
        name: int((p.grad == 0).sum()) if p.grad is not None else p.numel()
        for name, p in unet.named_parameters()
    }
    sizes = {name: p.numel() for name, p in unet.named_parameters()}
    ecodiff.slice_(unet, plan)
    removed = {name: sizes[name] - p.numel() for name, p in unet.named_parameters()}
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


def test_slicing_twice_is_slicing_once(tiny_sdxl):
    groups = ecodiff.find_groups(tiny_sdxl.unet)
    scores = Scores.of(tiny_sdxl.unet, {g.name: torch.rand(g.size, generator=GENERATOR) for g in groups})
    first, both = scores.plan(ratio=0.1, align=False), scores.plan(ratio=0.3, align=False)
    small = ecodiff.variant(tiny_sdxl, first)
    second = {name: keep[first[name]] for name, keep in both.items() if first[name].any()}
    twice = ecodiff.variant(small, second)
    once = ecodiff.variant(tiny_sdxl, both)
    assert torch.equal(latents(twice), latents(once))
    assert plan_of(twice.unet).digest == plan_of(once.unet).digest == both.digest


def test_a_plan_of_another_model_is_refused(tiny_sdxl):
    name = ecodiff.find_groups(tiny_sdxl.unet)[0].name
    for plan in ({name: torch.ones(99, dtype=torch.bool)}, {"other": torch.ones(4, dtype=torch.bool)}):
        with pytest.raises(PlanError, match="does not fit"):
            ecodiff.variant(tiny_sdxl, plan)
