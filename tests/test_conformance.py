"""Bare denoisers of architectures whose pipelines are not built here: a tiny random one of each class.

What is asked of a row: groups are found, masked equals sliced (float64, partly, one unit, none left), and
with the mask on, what gets no gradient is exactly what slicing removes.
"""

import diffusers
import pytest
import torch

import ecodiff
from ecodiff.groups import ALL_KINDS, KINDS
from ecodiff.measure import parameters

from .conftest import randomise


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def latent_and_text(width: int, **more) -> dict:
    given = {"hidden_states": draw(2, 4, 8, 8), "encoder_hidden_states": draw(2, 5, width)}
    return given | {"timestep": torch.tensor([3.0, 500.0]).double()} | more


def tokens_and_text(channels: int, width: int, axes: int, **more) -> dict:
    ids = {"img_ids": draw(16, axes).abs(), "txt_ids": torch.zeros(5, axes).double()}
    given = {"hidden_states": draw(2, 16, channels), "encoder_hidden_states": draw(2, 5, width)}
    return given | ids | {"timestep": torch.tensor([0.1, 0.9]).double()} | more


HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}
DENOISERS = {
    "PixArt-Sigma": (
        "PixArtTransformer2DModel",
        HEADS
        | {"num_layers": 2, "cross_attention_dim": 32, "sample_size": 8, "caption_channels": 16}
        | {"use_additional_conditions": False},
        lambda: latent_and_text(16, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
        {"heads", "ffn"},
    ),
    "DiT": (
        "DiTTransformer2DModel",
        HEADS | {"num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 1000},
        lambda: {
            "hidden_states": draw(2, 4, 8, 8),
            "timestep": torch.tensor([3, 500]),
            "class_labels": torch.tensor([1, 2]),
        },
        {"heads", "ffn", "modulation"},
    ),
    "Sana": (
        "SanaTransformer2DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "caption_channels": 16, "sample_size": 8}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32},
        lambda: latent_and_text(16),
        {"heads", "conv_ffn"},
    ),
    "AuraFlow": (
        "AuraFlowTransformer2DModel",
        HEADS
        | {"num_mmdit_layers": 1, "num_single_dit_layers": 2, "joint_attention_dim": 16, "sample_size": 8}
        | {"caption_projection_dim": 32, "pos_embed_max_size": 16},
        lambda: latent_and_text(16),
        {"heads", "ffn", "modulation"},
    ),
    "Z-Image": (
        "ZImageTransformer2DModel",
        {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "in_channels": 4}
        | {"cap_feat_dim": 16, "axes_dims": [4, 2, 2], "axes_lens": [64, 16, 16]},
        lambda: {
            "x": [draw(4, 1, 8, 8)],
            "t": torch.tensor([0.5]).double(),
            "cap_feats": [draw(5, 16)],
        },
        {"heads", "ffn"},
    ),
    "CogView4": (
        "CogView4Transformer2DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "text_embed_dim": 16, "time_embed_dim": 16}
        | {"condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (16, 16)},
        lambda: latent_and_text(
            16,
            **{name: torch.ones(2, 2).double() for name in ("original_size", "target_size", "crop_coords")},
        ),
        {"heads", "ffn"},
    ),
    "Lumina 2 (grouped queries)": (
        "Lumina2Transformer2DModel",
        {"hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 4}
        | {"num_kv_heads": 2, "multiple_of": 8, "in_channels": 4, "cap_feat_dim": 16, "sample_size": 8}
        | {"axes_dim_rope": (4, 2, 2), "axes_lens": (16, 16, 16)},
        lambda: latent_and_text(16, encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool)),
        {"heads", "ffn"},
    ),
    "Chroma": (
        "ChromaTransformer2DModel",
        HEADS
        | {"num_layers": 1, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 16}
        | {"axes_dims_rope": (2, 2, 4), "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda: tokens_and_text(16, 16, 3),
        {"heads", "ffn"},
    ),
    "FLUX.2 (fused)": (
        "Flux2Transformer2DModel",
        HEADS
        | {"num_layers": 1, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 16}
        | {"timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2)},
        lambda: tokens_and_text(16, 16, 4, guidance=torch.tensor([1.0, 4.0]).double()),
        {"heads", "ffn"},
    ),
    "Qwen-Image": (
        "QwenImageTransformer2DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 16}
        | {"axes_dims_rope": (2, 2, 4)},
        lambda: {
            "hidden_states": draw(2, 16, 16),
            "encoder_hidden_states": draw(2, 5, 16),
            "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.long),
            "timestep": torch.tensor([0.1, 0.9]).double(),
            "img_shapes": [[(1, 4, 4)]] * 2,
        },
        {"heads", "ffn"},
    ),
    "Wan (norms across heads: FFN only)": (
        "WanTransformer3DModel",
        HEADS
        | {
            "num_layers": 2,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 48,
        },
        lambda: {
            "hidden_states": draw(1, 4, 2, 8, 8),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": draw(1, 5, 16),
        },
        {"ffn"},
    ),
}


def run(denoiser, given) -> torch.Tensor:
    out = denoiser(**given)
    out = out[0] if isinstance(out, tuple) else out.sample
    return torch.stack(out) if isinstance(out, list) else out


def kept(cut: str, group, generator) -> torch.Tensor:
    if cut == "partial":
        keep = torch.rand(group.size, generator=generator) > 0.4
        keep[0] = True
        return keep
    return torch.arange(group.size) < (1 if cut == "one unit left" else group.floor)


@pytest.fixture(params=DENOISERS)
def row(request):
    name, config, given, kinds = DENOISERS[request.param]
    denoiser = randomise(getattr(diffusers, name)(**config)).double()
    return denoiser, given(), kinds


@pytest.mark.parametrize("cut", ["partial", "one unit left", "none left"])
@torch.no_grad()
def test_masked_equals_sliced_and_reloaded(row, cut, tmp_path):
    denoiser, given, kinds = row
    groups = ecodiff.find_groups(denoiser, ALL_KINDS)
    assert {group.kind for group in groups} == kinds
    generator = torch.Generator().manual_seed(0)
    groups = [group for group in groups if cut == "partial" or group.kind in KINDS]
    plan = ecodiff.PrunePlan({group.name: kept(cut, group, generator) for group in groups})
    dense, before = run(denoiser, given), parameters(denoiser)
    with ecodiff.masked(denoiser, plan):
        masked = run(denoiser, given)
    ecodiff.slice_(denoiser, plan)
    scale = float(masked.abs().max())
    sliced = run(denoiser, given)
    torch.testing.assert_close(sliced / scale, masked / scale, atol=1e-6, rtol=0)
    denoiser.save_pretrained(tmp_path)
    again = type(denoiser).from_pretrained(tmp_path).double()
    torch.testing.assert_close(run(again, given), sliced, rtol=1e-9, atol=1e-9)
    assert (dense - masked).abs().max() > 1e-3 * scale, "the mask did nothing"
    assert parameters(denoiser) < before


def test_dead_parameters_are_exactly_the_removed_ones(row):
    denoiser, given, _ = row
    denoiser.requires_grad_(True)
    groups, generator = ecodiff.find_groups(denoiser), torch.Generator().manual_seed(1)
    plan = ecodiff.PrunePlan({group.name: kept("partial", group, generator) for group in groups})

    def dead() -> dict[str, int]:
        denoiser.zero_grad()
        out = run(denoiser, given)
        (out * torch.randn_like(out)).sum().backward()
        grads = {name: p.grad for name, p in denoiser.named_parameters()}
        sizes = {name: p.numel() for name, p in denoiser.named_parameters()}
        return {name: sizes[name] if g is None else int((g == 0).sum()) for name, g in grads.items()}

    # Idle in the dense model too: what nothing reads, and biases of keys, which move all scores alike.
    idle = {name for name, count in dead().items() if count or name.endswith("to_k.bias")}
    with ecodiff.masked(denoiser, plan):
        found = dead()
    sizes = {name: p.numel() for name, p in denoiser.named_parameters()}
    ecodiff.slice_(denoiser, plan)
    removed = {name: sizes[name] - p.numel() for name, p in denoiser.named_parameters()}
    assert {n: c for n, c in found.items() if n not in idle} == {
        n: c for n, c in removed.items() if n not in idle
    }
    assert sum(removed.values()) > 0
