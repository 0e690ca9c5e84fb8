import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

import ecodiff
from ecodiff.errors import UnsupportedModelError
from ecodiff.groups import ALL_KINDS, blocks, unit_parameters, unrecognised
from ecodiff.measure import parameters
from ecodiff.scores import Scores

SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FLUX_DEV = {"guidance_embeds": True}
SD_1_5 = {"sample_size": 64, "cross_attention_dim": 768}

# parameters, heads, neurons: published sizes; counts of units as in shared/notes/architectures.md
FULL_SIZE = {
    "sdxl": (UNet2DConditionModel, SDXL, 2_567_463_684, 2_600, 332_800),
    "sd-1.5": (UNet2DConditionModel, SD_1_5, 859_520_964, 256, 49_920),
    "flux.1-dev": (FluxTransformer2DModel, FLUX_DEV, 11_901_408_320, 1_368, 933_888),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_on_meta(name):
    cls, config, total, heads, neurons = FULL_SIZE[name]
    with init_empty_weights():
        unet = cls(**config)
    groups = ecodiff.find_groups(unet)
    assert parameters(unet) == total
    assert sum(g.size for g in groups if g.kind == "heads") == heads
    assert sum(g.size for g in groups if g.kind == "ffn") == neurons
    generator = torch.Generator().manual_seed(0)
    scores = Scores.of(unet, {g.name: torch.rand(g.size, generator=generator) for g in groups})
    plan = scores.plan(ratio=0.2)
    ecodiff.slice_(unet, plan)
    assert parameters(unet) == plan.metadata["params_pruned"] == total - scores.removed(plan)
    assert abs(parameters(unet) / total - 0.8) < 1e-3


def test_groups_and_the_rest_are_the_whole(tiny_sdxl):
    groups = ecodiff.find_groups(tiny_sdxl.unet)
    held = sum(g.size * unit_parameters(tiny_sdxl.unet, g) for g in groups)
    biases = sum(  # of consumers: they stay when every unit is gone
        tiny_sdxl.unet.get_submodule(slot.module).bias.numel() for g in groups for slot in g.consumers
    )
    rest = sum(unrecognised(tiny_sdxl.unet, groups).values())
    assert held + biases + rest == parameters(tiny_sdxl.unet)


def test_resnets_hold_most_of_what_is_left_of_sd_1_5():
    """Ceilings of shared/notes/architectures.md, section 4."""
    for config, heads_and_ffn, everything in ((SD_1_5, 0.28, 0.88), (SDXL, 0.85, 0.97)):
        with init_empty_weights():
            unet = UNet2DConditionModel(**config)
        assert abs(Scores.unranked(unet, ("heads", "ffn")).ceiling - heads_and_ffn) < 0.01
        assert abs(Scores.unranked(unet).ceiling - everything) < 0.02
        plan = Scores.unranked(unet).plan(ratio=0.5)
        ecodiff.slice_(unet, plan)
        assert parameters(unet) == plan.metadata["params_pruned"]


def test_modulation_holds_a_quarter_of_flux():
    """Ceilings of shared/notes/architectures.md: 72 % with heads and FFN, 99 % with modulation rows."""
    with init_empty_weights():
        transformer = FluxTransformer2DModel(**FLUX_DEV)
    assert abs(Scores.unranked(transformer).ceiling - 0.72) < 0.01
    scores = Scores.unranked(transformer, ALL_KINDS)
    assert abs(scores.ceiling - 0.99) < 0.01
    plan = scores.plan(ratio=0.9)
    ecodiff.slice_(transformer, plan)
    assert parameters(transformer) == plan.metadata["params_pruned"]


def test_blocks_are_what_is_repeated(tiny_sdxl):
    groups = ecodiff.find_groups(tiny_sdxl.unet, ALL_KINDS)
    found = blocks(groups)
    assert len(found) == 2 + 2 * 2 + 2  # down, up (two attentions), mid; two layers each
    for block, names in found.items():
        assert [name.removeprefix(block + ".") for name in names] == ["attn1", "attn2", "ff"]


def test_kinds_are_chosen(tiny_sdxl):
    assert {g.kind for g in ecodiff.find_groups(tiny_sdxl.unet, kinds=("ffn",))} == {"ffn"}


def test_a_model_without_units_is_refused():
    with pytest.raises(UnsupportedModelError, match="no heads or FFN neurons"):
        ecodiff.find_groups(torch.nn.Sequential(torch.nn.Linear(3, 3)))
