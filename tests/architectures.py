"""Every architecture that the conformance suite looks at: a tiny random denoiser of each class."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """A denoiser of diffusers', small; what it is called with; what must be found in it.

    `digits`: to which part of the largest output masked and sliced must agree, and why not closer.
    `dtype`: float64, unless the class cannot.
    """

    cls: str
    config: dict
    given: Callable[[], dict]
    kinds: set[str]
    digits: tuple[float, str] = (1e-10, "")
    dtype: torch.dtype = torch.float64


ACROSS = (1e-6, "diffusers' RMS norm takes its mean in float32")
ROPE = (1e-6, "its rotary positions are float32")
SOFTMAX = (1e-6, "its attention's softmax is float32")
BFLOAT16 = (1e-3, "it rotates in bfloat16")


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
ROWS: dict[str, Row] = {
    "PixArt-Sigma": Row(
        "PixArtTransformer2DModel",
        HEADS
        | {"num_layers": 2, "cross_attention_dim": 32, "sample_size": 8, "caption_channels": 16}
        | {"use_additional_conditions": False},
        lambda: latent_and_text(16, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
        {"heads", "ffn"},
    ),
    "DiT": Row(
        "DiTTransformer2DModel",
        HEADS | {"num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 1000},
        lambda: {
            "hidden_states": draw(2, 4, 8, 8),
            "timestep": torch.tensor([3, 500]),
            "class_labels": torch.tensor([1, 2]),
        },
        {"heads", "ffn", "modulation"},
    ),
    "Sana": Row(
        "SanaTransformer2DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "caption_channels": 16, "sample_size": 8}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32},
        lambda: latent_and_text(16),
        {"heads", "conv_ffn"},
    ),
    "AuraFlow": Row(
        "AuraFlowTransformer2DModel",
        HEADS
        | {"num_mmdit_layers": 1, "num_single_dit_layers": 2, "joint_attention_dim": 16, "sample_size": 8}
        | {"caption_projection_dim": 32, "pos_embed_max_size": 16},
        lambda: latent_and_text(16),
        {"heads", "ffn", "modulation"},
    ),
    "Z-Image": Row(
        "ZImageTransformer2DModel",
        {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "in_channels": 4}
        | {"cap_feat_dim": 16, "axes_dims": [4, 2, 2], "axes_lens": [64, 16, 16]},
        lambda: {
            "x": [draw(4, 1, 8, 8)],
            "t": torch.tensor([0.5]).double(),
            "cap_feats": [draw(5, 16)],
        },
        {"heads", "ffn"},
        ROPE,
    ),
    "CogView4": Row(
        "CogView4Transformer2DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "text_embed_dim": 16, "time_embed_dim": 16}
        | {"condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (16, 16)},
        lambda: latent_and_text(
            16,
            **{name: torch.ones(2, 2).double() for name in ("original_size", "target_size", "crop_coords")},
        ),
        {"heads", "ffn", "modulation"},
    ),
    "Lumina 2 (grouped queries)": Row(
        "Lumina2Transformer2DModel",
        {"hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 4}
        | {"num_kv_heads": 2, "multiple_of": 8, "in_channels": 4, "cap_feat_dim": 16, "sample_size": 8}
        | {"axes_dim_rope": (4, 2, 2), "axes_lens": (16, 16, 16)},
        lambda: latent_and_text(16, encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool)),
        {"heads", "ffn"},
        ROPE,
    ),
    "Chroma": Row(
        "ChromaTransformer2DModel",
        HEADS
        | {"num_layers": 1, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 16}
        | {"axes_dims_rope": (2, 2, 4), "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda: tokens_and_text(16, 16, 3),
        {"heads", "ffn"},
    ),
    "FLUX.2 (fused)": Row(
        "Flux2Transformer2DModel",
        HEADS
        | {"num_layers": 1, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 16}
        | {"timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2)},
        lambda: tokens_and_text(16, 16, 4, guidance=torch.tensor([1.0, 4.0]).double()),
        {"heads", "ffn"},
    ),
    "Qwen-Image": Row(
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
        {"heads", "ffn", "modulation"},
        ROPE,
    ),
    "SD 3.5 medium (two attentions)": Row(
        "SD3Transformer2DModel",
        HEADS
        | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16}
        | {"caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8}
        | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        lambda: latent_and_text(16, pooled_projections=draw(2, 16)),
        {"heads", "ffn", "modulation"},
    ),
    "Wan 2.1": Row(
        "WanTransformer3DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16}
        | {"ffn_dim": 48},
        lambda: {
            "hidden_states": draw(1, 4, 2, 8, 8),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": draw(1, 5, 16),
        },
        {"heads", "ffn"},
        ACROSS,
    ),
    "Wan 2.1, image to video": Row(
        "WanTransformer3DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16}
        | {"ffn_dim": 48, "image_dim": 16, "added_kv_proj_dim": 32},
        lambda: {
            "hidden_states": draw(1, 4, 2, 8, 8),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": draw(1, 512, 16),
            "encoder_hidden_states_image": draw(1, 6, 16),
        },
        {"heads", "ffn"},
        ACROSS,
    ),
    "Sana 1.5": Row(
        "SanaTransformer2DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "caption_channels": 16, "sample_size": 8}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
        | {"qk_norm": "rms_norm_across_heads"},
        lambda: latent_and_text(16),
        {"heads", "conv_ffn"},
        ACROSS,
    ),
    "LTX-Video": Row(
        "LTXVideoTransformer3DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32}
        | {"caption_channels": 16},
        lambda: {
            "hidden_states": draw(1, 8, 8),
            "encoder_hidden_states": draw(1, 5, 16),
            "timestep": torch.tensor([500]),
            "encoder_attention_mask": torch.ones(1, 5),
            "num_frames": 2,
            "height": 2,
            "width": 2,
        },
        {"heads", "ffn"},
        ACROSS,
    ),
    "Mochi": Row(
        "MochiTransformer3DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "pooled_projection_dim": 16, "text_embed_dim": 16}
        | {"time_embed_dim": 8, "max_sequence_length": 5},
        lambda: {
            "hidden_states": draw(1, 4, 2, 4, 4),
            "encoder_hidden_states": draw(1, 5, 16),
            "timestep": torch.tensor([500]),
            "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        },
        {"heads", "ffn"},
    ),
    "HiDream-I1 (experts)": Row(
        "HiDreamImageTransformer2DModel",
        HEADS
        | {"patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "text_emb_dim": 16}
        | {"caption_channels": [16, 16], "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8)}
        | {"llama_layers": [0, 1], "force_inference_output": True},
        lambda: {
            "hidden_states": draw(2, 4, 8, 8),
            "timesteps": torch.tensor([500, 500]),
            "encoder_hidden_states_t5": draw(2, 5, 16),
            "encoder_hidden_states_llama3": draw(2, 2, 5, 16),
            "pooled_embeds": draw(2, 16),
        },
        {"heads", "ffn"},
        ACROSS,
    ),
    "Kandinsky 5": Row(
        "Kandinsky5Transformer3DModel",
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16}
        | {"model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 2}
        | {"axes_dims": (4, 2, 2)},
        lambda: {
            "hidden_states": draw(1, 1, 8, 8, 4),
            "encoder_hidden_states": draw(1, 5, 16),
            "timestep": torch.tensor([500.0]),
            "pooled_projections": draw(1, 16),
            "visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(5),
        },
        {"heads", "ffn"},
        BFLOAT16,
        torch.float32,
    ),
    "PRX (fused q, k, v)": Row(
        "PRXTransformer2DModel",
        {"in_channels": 4, "context_in_dim": 16, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 4}
        | {"depth": 2, "axes_dim": [4, 4]},
        lambda: {
            "hidden_states": draw(2, 4, 8, 8),
            "timestep": torch.tensor([0.1, 0.9]).double(),
            "encoder_hidden_states": draw(2, 5, 16),
        },
        {"heads", "ffn"},
    ),
    "JoyImage (fused q, k, v)": Row(
        "JoyImageEditTransformer3DModel",
        {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 4, "text_dim": 16, "num_layers": 2}
        | {"mlp_width_ratio": 2.0, "rope_dim_list": [4, 2, 2]},
        lambda: {
            "hidden_states": draw(1, 1, 4, 1, 8, 8),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": draw(1, 5, 16),
        },
        {"heads", "ffn"},
    ),
    "Krea 2 (gated heads)": Row(
        "Krea2Transformer2DModel",
        {"in_channels": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "intermediate_size": 48, "timestep_embed_dim": 16}
        | {"text_hidden_dim": 32, "text_num_attention_heads": 4, "text_num_key_value_heads": 4}
        | {"text_intermediate_size": 48, "num_text_layers": 2, "axes_dims_rope": (4, 2, 2)}
        | {"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
        lambda: {
            "hidden_states": draw(1, 16, 16),
            "encoder_hidden_states": draw(1, 5, 2, 32),
            "timestep": torch.tensor([0.5]).double(),
            "position_ids": torch.zeros(21, 3),
        },
        {"heads", "ffn"},
    ),
    "Qwen-Image 2.1": Row(
        "QwenImage21Transformer2DModel",
        HEADS
        | {"in_channels": 16, "out_channels": 16, "num_layers": 2, "context_in_dim": 16}
        | {"axes_dims_rope": (4, 2, 2)},
        lambda: {
            "hidden_states": draw(1, 16, 16),
            "encoder_hidden_states": draw(1, 5, 16),
            "timestep": torch.tensor([0.5]).double(),
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.tensor([5 * [False] + 4 * [True]]),
        },
        {"heads", "ffn"},
        ROPE,
    ),
    "HunyuanVideo": Row(
        "HunyuanVideoTransformer3DModel",
        HEADS
        | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1}
        | {"num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 16}
        | {"rope_axes_dim": (4, 2, 2)},
        lambda: {
            "hidden_states": draw(1, 4, 1, 8, 8),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": draw(1, 5, 16),
            "encoder_attention_mask": torch.ones(1, 5, dtype=torch.long),
            "pooled_projections": draw(1, 16),
            "guidance": torch.tensor([6.0]).double(),
        },
        {"heads", "ffn", "modulation"},
    ),
    "HunyuanImage 2.1": Row(
        "HunyuanImageTransformer2DModel",
        HEADS
        | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1}
        | {"num_refiner_layers": 1, "text_embed_dim": 16, "rope_axes_dim": (4, 4)},
        lambda: {
            "hidden_states": draw(1, 4, 8, 8),
            "timestep": torch.tensor([500.0]).double(),
            "encoder_hidden_states": draw(1, 5, 16),
            "encoder_attention_mask": torch.ones(1, 5, dtype=torch.long),
        },
        {"heads", "ffn", "modulation"},
    ),
    "CogVideoX": Row(
        "CogVideoXTransformer3DModel",
        HEADS
        | {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 2}
        | {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 5},
        lambda: {
            "hidden_states": draw(1, 2, 4, 8, 8),
            "encoder_hidden_states": draw(1, 5, 16),
            "timestep": torch.tensor([500]),
        },
        {"heads", "ffn"},
    ),
    "Ovis-Image (gated single blocks)": Row(
        "OvisImageTransformer2DModel",
        HEADS
        | {"in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 2}
        | {"joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)},
        lambda: tokens_and_text(16, 16, 3),
        {"heads", "ffn", "modulation"},
    ),
    "FLUX.3": Row(
        "Flux3Transformer2DModel",
        HEADS
        | {"in_channels": 16, "cond_in_channels": 16, "num_layers": 1, "num_single_layers": 2}
        | {"joint_attention_dim": 16, "timestep_channels": 16, "axes_dims_rope": (2, 2, 2, 2)},
        lambda: tokens_and_text(16, 16, 4),
        {"heads", "ffn"},
    ),
    "ERNIE-Image": Row(
        "ErnieImageTransformer2DModel",
        {"hidden_size": 32, "num_attention_heads": 4, "num_layers": 2, "ffn_hidden_size": 48}
        | {"in_channels": 4, "out_channels": 4, "text_in_dim": 16, "rope_axes_dim": (4, 2, 2)},
        lambda: {
            "hidden_states": draw(1, 4, 4, 4),
            "timestep": torch.tensor([500.0]),
            "text_bth": draw(1, 5, 16),
            "text_lens": torch.tensor([5]),
        },
        {"heads", "ffn"},
    ),
    "Ideogram 4": Row(
        "Ideogram4Transformer2DModel",
        {"in_channels": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4}
        | {"intermediate_size": 48, "adaln_dim": 16, "llm_features_dim": 16, "mrope_section": (2, 1, 1)},
        lambda: {
            "hidden_states": draw(1, 21, 16),
            "timestep": torch.tensor([0.5]).double(),
            "encoder_hidden_states": draw(1, 21, 16),
            "position_ids": torch.zeros(1, 21, 3, dtype=torch.long),
            "segment_ids": torch.zeros(1, 21, dtype=torch.long),
            "indicator": torch.tensor([[3] * 5 + [2] * 16]),
        },
        {"heads", "ffn"},
    ),
    "HunyuanDiT": Row(
        "HunyuanDiT2DModel",
        HEADS
        | {"in_channels": 4, "patch_size": 2, "hidden_size": 32, "num_layers": 2, "sample_size": 8}
        | {"mlp_ratio": 2.0, "cross_attention_dim": 16, "cross_attention_dim_t5": 16, "text_len": 4}
        | {"pooled_projection_dim": 8, "text_len_t5": 4, "use_style_cond_and_image_meta_size": False},
        lambda: {
            "hidden_states": draw(2, 4, 8, 8),
            "timestep": torch.tensor([3.0, 500.0]).double(),
            "encoder_hidden_states": draw(2, 4, 16),
            "text_embedding_mask": torch.ones(2, 4),
            "encoder_hidden_states_t5": draw(2, 4, 16),
            "text_embedding_mask_t5": torch.ones(2, 4),
            "image_rotary_emb": (draw(16, 8), draw(16, 8)),
        },
        {"heads", "ffn"},
    ),
    "DeepFloyd IF": Row(
        "UNet2DConditionModel",
        {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
        | {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}
        | {"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")}
        | {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "cross_attention_dim": 16}
        | {"attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift", "act_fn": "gelu"},
        lambda: {
            "sample": draw(2, 4, 8, 8),
            "timestep": torch.tensor([3, 500]),
            "encoder_hidden_states": draw(2, 5, 16),
        },
        {"heads", "resnet"},
        SOFTMAX,
    ),
}
