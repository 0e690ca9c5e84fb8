import threading

import pytest
import torch

import ecodiff
from ecodiff import catalog
from ecodiff.architectures import blocks, unit_parameters, unrecognised
from ecodiff.checkpoints import loading
from ecodiff.errors import UnsupportedModelError
from ecodiff.metrics.cost import parameters
from ecodiff.pruning.scores import Scores
from ecodiff.units import ALL_KINDS, PRESET_KINDS

# parameters, heads (pairs with their queries where those are grouped), neurons or FFN channels: published
# sizes, and units as counted for shared/notes/architectures.md
FULL_SIZE = {
    "sdxl": (2_567_463_684, 2_600, 332_800),
    "sdxl-turbo": (2_567_463_684, 2_600, 332_800),
    "animagine-xl": (2_567_463_684, 2_600, 332_800),
    "noobai-xl": (2_567_463_684, 2_600, 332_800),
    "illustrious-xl": (2_567_463_684, 2_600, 332_800),
    "pony-xl": (2_567_463_684, 2_600, 332_800),
    "sdxl-lightning": (2_567_463_684, 2_600, 332_800),
    "sdxl-hyper": (2_567_463_684, 2_600, 332_800),
    "sdxl-dmd2": (2_567_463_684, 2_600, 332_800),
    "sd-1.5": (859_520_964, 256, 49_920),
    "sd-3-medium": (2_028_328_000, 576, 288_768),
    "sd-3.5-medium": (2_243_171_520, 888, 288_768),
    "sd-3.5-large": (8_056_627_520, 1_444, 729_600),
    "sd-3.5-large-turbo": (8_056_627_520, 1_444, 729_600),
    "flux-dev": (11_901_408_320, 1_368, 933_888),
    "flux-krea": (11_901_408_320, 1_368, 933_888),
    "flux-schnell": (11_891_178_560, 1_368, 933_888),
    "flux-2-dev": (32_223_281_152, 2_688, 1_179_648),
    "flux-2-klein": (3_875_544_576, 600, 276_480),
    "flux-2-klein-base": (3_875_544_576, 600, 276_480),
    "flux-2-klein-9b": (9_078_581_248, 1_024, 491_520),
    "qwen-image": (20_430_401_088, 1_440, 1_474_560),
    "qwen-image-2512": (20_430_401_088, 1_440, 1_474_560),
    "z-image": (6_154_908_736, 1_020, 348_160),
    "z-image-base": (6_154_908_736, 1_020, 348_160),
    "pixart-sigma": (610_856_096, 896, 129_024),
    "sana-1.6b": (1_604_462_752, 1_800, 112_000),
    "sana-1.5": (1_604_641_952, 1_800, 112_000),
    "sana-sprint": (1_610_237_472, 1_800, 112_000),
    "chroma": (8_899_983_424, 1_368, 933_888),
    "lumina-2": (2_609_769_152, 240, 276_480),
    "hidream-i1": (17_105_733_184, 960, 1_609_728),
    "hidream-i1-dev": (17_105_733_184, 960, 1_609_728),
    "hidream-i1-fast": (17_105_733_184, 960, 1_609_728),
    "wan-2.1-1.3b": (1_418_996_800, 720, 268_800),
    "wan-2.1-14b": (14_288_491_584, 3_200, 552_960),
    "wan-2.2-a14b": (14_288_491_584, 3_200, 552_960),
    "wan-2.2-a14b-low-noise": (14_288_491_584, 3_200, 552_960),
    "wan-2.2-5b": (4_999_787_712, 1_440, 430_080),
}


def test_every_full_size_model_of_the_catalogue_is_counted():
    assert {name for name, model in catalog.MODELS.items() if not model.embedded} == set(FULL_SIZE)


def _distinct() -> list[str]:
    """Of models with the same denoiser, one."""
    return list({str(catalog.MODELS[name].denoiser): name for name in reversed(FULL_SIZE)}.values())


def test_models_of_one_architecture_are_as_large():
    for name, size in FULL_SIZE.items():
        alike = [n for n in _distinct() if catalog.MODELS[n].denoiser == catalog.MODELS[name].denoiser]
        assert FULL_SIZE[alike[0]] == size


@pytest.mark.parametrize("name", _distinct())
def test_full_size_on_meta(name):
    total, heads, neurons = FULL_SIZE[name]
    unet = loading.empty_denoiser(name)
    groups = ecodiff.find_groups(unet)
    assert parameters(unet) == total
    assert sum(g.size for g in groups if g.kind == "heads") == heads
    assert sum(g.size for g in groups if g.kind in ("ffn", "conv_ffn")) == neurons
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
    for name, heads_and_ffn, everything in (("sd-1.5", 0.28, 0.88), ("sdxl", 0.85, 0.97)):
        unet = loading.empty_denoiser(name)
        assert abs(Scores.unranked(unet, ("heads", "ffn")).ceiling - heads_and_ffn) < 0.01
        assert abs(Scores.unranked(unet).ceiling - everything) < 0.02
        plan = Scores.unranked(unet).plan(ratio=0.5)
        ecodiff.slice_(unet, plan)
        assert parameters(unet) == plan.metadata["params_pruned"]


def test_modulation_holds_a_quarter_of_flux():
    """Ceilings of shared/notes/architectures.md: 72 % with heads and FFN, 99 % with modulation."""
    transformer = loading.empty_denoiser("flux-dev")
    assert abs(Scores.unranked(transformer).ceiling - 0.72) < 0.01
    assert abs(Scores.unranked(transformer, (*PRESET_KINDS, "modulation")).ceiling - 0.99) < 0.01
    scores = Scores.unranked(
        transformer, ALL_KINDS
    )  # directions stand for rows: they are the same parameters
    assert "modulation" not in scores.kinds.values() and abs(scores.ceiling - 0.99) < 0.01
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


def test_counting_a_model_leaves_other_threads_alone():
    """What another thread makes meanwhile has weights: accelerate's init_empty_weights would take them."""
    counting = threading.Thread(target=loading.empty_denoiser, args=("sdxl",))
    counting.start()
    made = set()
    while counting.is_alive():
        made.add(torch.nn.Linear(2, 2).weight.device.type)
    assert made == {"cpu"}
