"""Every architecture that the conformance suite looks at: a tiny random denoiser of each class."""

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch


@dataclass(frozen=True)
class Row:
    """A denoiser of diffusers', small; what it is called with; what must be found in it.

    `digits`: to which part of the largest output masked and sliced must agree, and why not closer.
    `dtype`: float64, unless the class cannot. `idle`: parts that the output does not depend on.
    """

    cls: str
    config: dict
    given: Callable[[], dict]
    kinds: set[str]
    digits: tuple[float, str] = (1e-10, "")
    dtype: torch.dtype = torch.float64
    idle: tuple[str, ...] = ()


ACROSS = (1e-6, "diffusers' RMS norm takes its mean in float32")
ROPE = (1e-6, "its rotary positions are float32")
SOFTMAX = (1e-6, "its attention's softmax is float32")
BFLOAT16 = (1e-3, "it rotates in bfloat16")
FLOAT32 = (1e-5, "its time embedding is float32")


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
WAN = HEADS | {
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 48,
}
ROWS: dict[str, Row] = {
    "PixArt-Sigma": Row(
        "PixArtTransformer2DModel",
        HEADS
        | {"num_layers": 2, "cross_attention_dim": 32, "sample_size": 8, "caption_channels": 16}
        | {"use_additional_conditions": False},
        lambda: latent_and_text(16, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
        {"heads", "ffn", "value_directions", "query_directions"},
    ),
    "DiT": Row(
        "DiTTransformer2DModel",
        HEADS | {"num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 1000},
        lambda: {
            "hidden_states": draw(2, 4, 8, 8),
            "timestep": torch.tensor([3, 500]),
            "class_labels": torch.tensor([1, 2]),
        },
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions", "query_directions"},
    ),
    "Sana": Row(
        "SanaTransformer2DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "caption_channels": 16, "sample_size": 8}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32},
        lambda: latent_and_text(16),
        {"heads", "conv_ffn", "value_directions", "query_directions"},
        (1e-6, "its linear attention is float32"),
    ),
    "AuraFlow": Row(
        "AuraFlowTransformer2DModel",
        HEADS
        | {"num_mmdit_layers": 1, "num_single_dit_layers": 2, "joint_attention_dim": 16, "sample_size": 8}
        | {"caption_projection_dim": 32, "pos_embed_max_size": 16},
        lambda: latent_and_text(16),
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions"},
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
        {"heads", "ffn", "value_directions"},
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
        {"heads", "ffn", "modulation", "value_directions"},
    ),
    "Lumina 2 (grouped queries)": Row(
        "Lumina2Transformer2DModel",
        {"hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 4}
        | {"num_kv_heads": 2, "multiple_of": 8, "in_channels": 4, "cap_feat_dim": 16, "sample_size": 8}
        | {"axes_dim_rope": (4, 2, 2), "axes_lens": (16, 16, 16)},
        lambda: latent_and_text(16, encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool)),
        {"heads", "ffn", "modulation_directions", "value_directions"},
        ROPE,
    ),
    "Chroma": Row(
        "ChromaTransformer2DModel",
        HEADS
        | {"num_layers": 1, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 16}
        | {"axes_dims_rope": (2, 2, 4), "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda: tokens_and_text(16, 16, 3),
        {"heads", "ffn", "value_directions"},
    ),
    "FLUX.2 (fused)": Row(
        "Flux2Transformer2DModel",
        HEADS
        | {"num_layers": 1, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 16}
        | {"timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2)},
        lambda: tokens_and_text(16, 16, 4, guidance=torch.tensor([1.0, 4.0]).double()),
        {"heads", "ffn", "value_directions"},
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
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions"},
        ROPE,
        idle=("blocks.1.txt_mlp",),
    ),
    "SD 3.5 medium (two attentions)": Row(
        "SD3Transformer2DModel",
        HEADS
        | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16}
        | {"caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8}
        | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        lambda: latent_and_text(16, pooled_projections=draw(2, 16)),
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions"},
    ),
    "Wan 2.1": Row(
        "WanTransformer3DModel",
        WAN,
        lambda: {
            "hidden_states": draw(1, 4, 2, 8, 8),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": draw(1, 5, 16),
        },
        {"heads", "ffn", "value_directions"},
        ACROSS,
    ),
    "Wan 2.1, image to video": Row(
        "WanTransformer3DModel",
        WAN | {"image_dim": 16, "added_kv_proj_dim": 32},
        lambda: {
            "hidden_states": draw(1, 4, 2, 8, 8),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": draw(1, 512, 16),
            "encoder_hidden_states_image": draw(1, 6, 16),
        },
        {"heads", "ffn", "value_directions"},
        ACROSS,
    ),
    "Sana 1.5": Row(
        "SanaTransformer2DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "caption_channels": 16, "sample_size": 8}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
        | {"qk_norm": "rms_norm_across_heads"},
        lambda: latent_and_text(16),
        {"heads", "conv_ffn", "value_directions"},
        ACROSS,
    ),
    "Sana Sprint": Row(
        "SanaTransformer2DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "caption_channels": 16, "sample_size": 8}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
        | {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
        lambda: latent_and_text(16, guidance=torch.tensor([0.45, 0.45]).double()),
        {"heads", "conv_ffn", "value_directions"},
        ACROSS,
    ),
    "Wan 2.2 5B": Row(
        "WanTransformer3DModel",
        WAN,
        lambda: {
            "hidden_states": draw(1, 4, 2, 8, 8),
            "timestep": torch.full((1, 32), 500),
            "encoder_hidden_states": draw(1, 5, 16),
        },
        {"heads", "ffn", "value_directions"},
        ACROSS,
    ),
    "LTX-Video": Row(
        "LTXVideoTransformer3DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32}
        | {"caption_channels": 16},
        lambda: {  # as many tokens as heads: its positions are told apart by their width
            "hidden_states": draw(1, 4, 8),
            "encoder_hidden_states": draw(1, 5, 16),
            "timestep": torch.tensor([500]),
            "encoder_attention_mask": torch.ones(1, 5),
            "num_frames": 1,
            "height": 2,
            "width": 2,
        },
        {"heads", "ffn", "value_directions"},
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
        {"heads", "ffn", "modulation_directions", "value_directions"},
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
        {"heads", "ffn", "value_directions"},
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
        {"heads", "ffn", "value_directions"},
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
        idle=("blocks.1.txt_mlp",),
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
        {"heads", "ffn", "value_directions"},
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
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions", "query_directions"},
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
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions", "query_directions"},
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
        {"heads", "ffn", "modulation_directions", "value_directions"},
    ),
    "Ovis-Image (gated single blocks)": Row(
        "OvisImageTransformer2DModel",
        HEADS
        | {"in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 2}
        | {"joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)},
        lambda: tokens_and_text(16, 16, 3),
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions"},
    ),
    "FLUX.3": Row(
        "Flux3Transformer2DModel",
        HEADS
        | {"in_channels": 16, "cond_in_channels": 16, "num_layers": 1, "num_single_layers": 2}
        | {"joint_attention_dim": 16, "timestep_channels": 16, "axes_dims_rope": (2, 2, 2, 2)},
        lambda: tokens_and_text(16, 16, 4),
        {"heads", "ffn", "value_directions"},
        idle=("mode_blocks.image_cond.0",),
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
        {"heads", "ffn", "value_directions"},
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
        {"heads", "ffn", "value_directions"},
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
        {"heads", "ffn", "value_directions"},
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
        {"heads", "resnet", "value_directions", "query_directions"},
        SOFTMAX,
    ),
    "LongCat-Image": Row(
        "LongCatImageTransformer2DModel",
        HEADS
        | {"num_layers": 1, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 16}
        | {"axes_dims_rope": [2, 2, 4]},
        lambda: tokens_and_text(16, 16, 3),
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions"},
    ),
    "Bria 3.2": Row(
        "BriaTransformer2DModel",
        HEADS
        | {"num_layers": 1, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 16}
        | {"axes_dims_rope": [2, 2, 4]},
        lambda: tokens_and_text(16, 16, 3),
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions"},
    ),
    "Bria FIBO": Row(
        "BriaFiboTransformer2DModel",
        HEADS
        | {"num_layers": 1, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 16}
        | {"axes_dims_rope": [2, 2, 4], "text_encoder_dim": 16},
        lambda: tokens_and_text(16, 16, 3, text_encoder_layers=[draw(2, 5, 16)] * 3),
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions"},
    ),
    "Bria FIBO 2": Row(
        "BriaFibo2Transformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4}
        | {"cap_feat_dim": 16, "injection_layer_ids": (1,), "perceiver_num_layers": 1}
        | {"min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 4, "gist_min_text_len": 4}
        | {"gist_max_text_len": 16, "axes_dims": (4, 2, 2), "axes_lens": (64, 16, 16)},
        lambda: (
            {"hidden_states": draw(1, 4, 8, 8), "timestep": torch.tensor([0.5]).double()}
            | {"encoder_hidden_states": draw(1, 2, 8, 16)}
        ),
        {"heads", "ffn", "value_directions"},
        ROPE,
    ),
    "CogView3+": Row(
        "CogView3PlusTransformer2DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "text_embed_dim": 16}
        | {"time_embed_dim": 16, "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8},
        lambda: latent_and_text(
            16, **{n: torch.ones(2, 2).double() for n in ("original_size", "target_size", "crop_coords")}
        ),
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions"},
    ),
    "GLM-Image": Row(
        "GlmImageTransformer2DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "text_embed_dim": 16}
        | {"time_embed_dim": 16, "condition_dim": 8, "prior_vq_quantizer_codebook_size": 8},
        lambda: latent_and_text(
            16,
            prior_token_id=torch.zeros(2, 16, dtype=torch.long),
            prior_token_drop=torch.zeros(2, dtype=torch.bool),
            **{n: torch.ones(2, 2).double() for n in ("target_size", "crop_coords")},
        ),
        {"heads", "ffn", "modulation", "value_directions"},
    ),
    "Lumina-Next": Row(
        "LuminaNextDiT2DModel",
        {"sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4}
        | {"num_kv_heads": 2, "multiple_of": 8, "cross_attention_dim": 16, "learn_sigma": False},
        lambda: (
            {"hidden_states": draw(2, 4, 8, 8), "timestep": torch.tensor([0.1, 0.9]).double()}
            | {"encoder_hidden_states": draw(2, 5, 16)}
            | {"encoder_mask": torch.ones(2, 5, dtype=torch.bool)}
            | {"image_rotary_emb": torch.polar(torch.ones(8, 8, 4), draw(8, 8, 4).float())}
            | {"cross_attention_kwargs": {}}
        ),
        {"heads", "ffn", "modulation_directions"},
        ROPE,
    ),
    "Nucleus-Image (packed experts)": Row(
        "NucleusMoEImageTransformer2DModel",
        HEADS
        | {"in_channels": 16, "out_channels": 4, "num_layers": 2, "num_key_value_heads": 2}
        | {"joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)}
        | {"dense_moe_strategy": "leave_first_block_dense", "num_experts": 4}
        | {"moe_intermediate_dim": 24, "mlp_ratio": 6.0, "capacity_factors": 2.0},
        lambda: (
            {"hidden_states": draw(2, 16, 16), "img_shapes": [(1, 4, 4)] * 2}
            | {"encoder_hidden_states": draw(2, 5, 16)}
            | {"encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.long)}
            | {"timestep": torch.tensor([0.1, 0.9]).double()}
        ),
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions"},
        ROPE,
    ),
    "OmniGen": Row(
        "OmniGenTransformer2DModel",
        {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
        | {"intermediate_size": 48, "num_layers": 2, "pad_token_id": 0, "vocab_size": 32}
        | {"pos_embed_max_size": 8, "time_step_dim": 16}
        | {"rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4}},
        lambda: (
            {"hidden_states": draw(2, 4, 8, 8), "timestep": torch.tensor([0.1, 0.9]).double()}
            | {"input_ids": torch.arange(5).repeat(2, 1), "input_img_latents": []}
            | {"input_image_sizes": {}, "attention_mask": torch.ones(2, 22, 22).double()}
            | {"position_ids": torch.arange(22).repeat(2, 1)}
        ),
        {"heads", "ffn", "value_directions"},
        ROPE,
    ),
    "Kandinsky 3": Row(
        "Kandinsky3UNet",
        {"groups": 4, "attention_head_dim": 4, "layers_per_block": 2}
        | {"block_out_channels": (16, 16, 32, 32), "cross_attention_dim": 16, "encoder_hid_dim": 16}
        | {"time_embedding_dim": 16},
        lambda: (
            {"sample": draw(2, 4, 16, 16), "timestep": torch.tensor([3.0, 500.0])}
            | {"encoder_hidden_states": draw(2, 5, 16), "encoder_attention_mask": torch.ones(2, 5)}
        ),
        {"heads", "conv_ffn", "resnet", "value_directions", "query_directions"},
    ),
    "Stable Cascade": Row(
        "StableCascadeUNet",
        {"in_channels": 4, "out_channels": 4, "conditioning_dim": 16, "block_out_channels": (16, 32)}
        | {"num_attention_heads": (2, 4), "down_num_layers_per_block": (1, 1)}
        | {"up_num_layers_per_block": (1, 1), "clip_text_pooled_in_channels": 16, "dropout": (0.0, 0.0)},
        lambda: (
            {"sample": draw(2, 4, 8, 8), "timestep_ratio": torch.tensor([0.1, 0.9]).double()}
            | {"clip_text_pooled": draw(2, 1, 16)}
        ),
        {"heads", "value_directions", "query_directions"},
    ),
    "DreamLite": Row(
        "DreamLiteUNetModel",
        {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 16, 32)}
        | {"norm_num_groups": 8, "cross_attention_dim": 16, "attention_head_dim": 8, "ff_mult": 2},
        lambda: (
            {"sample": draw(2, 4, 8, 8), "timestep": torch.tensor([3, 500])}
            | {"encoder_hidden_states": draw(2, 5, 16)}
        ),
        {"heads", "ffn", "resnet", "value_directions"},
    ),
    "HunyuanVideo 1.5": Row(
        "HunyuanVideo15Transformer3DModel",
        HEADS
        | {"in_channels": 9, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1}
        | {"text_embed_dim": 16, "text_embed_2_dim": 16, "image_embed_dim": 16}
        | {"rope_axes_dim": (4, 2, 2), "task_type": "t2v"},
        lambda: (
            {"hidden_states": draw(1, 9, 1, 8, 8), "timestep": torch.tensor([500.0]).double()}
            | {"encoder_hidden_states": draw(1, 5, 16), "encoder_attention_mask": torch.ones(1, 5)}
            | {"encoder_hidden_states_2": draw(1, 5, 16)}
            | {"encoder_attention_mask_2": torch.ones(1, 5)}
            | {"image_embeds": torch.zeros(1, 3, 16).double()}
        ),
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions", "query_directions"},
        idle=("blocks.1.ff_context",),
    ),
    "Motif-Video": Row(
        "MotifVideoTransformer3DModel",
        HEADS
        | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 2}
        | {"text_embed_dim": 16, "rope_axes_dim": (4, 2, 2)},
        lambda: (
            {"hidden_states": draw(1, 4, 1, 8, 8), "timestep": torch.tensor([500.0]).double()}
            | {"encoder_hidden_states": draw(1, 5, 16), "encoder_attention_mask": torch.ones(1, 5)}
        ),
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions"},
        FLOAT32,
        torch.float32,
    ),
    "Allegro": Row(
        "AllegroTransformer3DModel",
        {"num_attention_heads": 4, "attention_head_dim": 6, "num_layers": 2}
        | {"cross_attention_dim": 24, "sample_height": 8, "sample_width": 8, "sample_frames": 2}
        | {"caption_channels": 16},
        lambda: (
            {"hidden_states": draw(1, 4, 2, 8, 8), "encoder_hidden_states": draw(1, 1, 5, 16)}
            | {"timestep": torch.tensor([500]), "attention_mask": torch.ones(1, 2, 8, 8)}
            | {"encoder_attention_mask": torch.ones(1, 1, 5)}
            | {"image_rotary_emb": (((draw(4, 2), draw(4, 2)),) * 3, (torch.arange(32)[None] % 4,) * 3)}
        ),
        {"heads", "ffn", "value_directions"},
    ),
    "Latte": Row(
        "LatteTransformer3DModel",
        HEADS
        | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "cross_attention_dim": 32}
        | {"sample_size": 8, "patch_size": 2, "activation_fn": "gelu-approximate"}
        | {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single"}
        | {"norm_elementwise_affine": False, "caption_channels": 16, "video_length": 2},
        lambda: (
            {"hidden_states": draw(1, 4, 2, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": draw(1, 5, 16)}
        ),
        {"heads", "ffn", "value_directions", "query_directions"},
    ),
    "EasyAnimate": Row(
        "EasyAnimateTransformer3DModel",
        {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
        | {"num_layers": 2, "mmdit_layers": 2, "patch_size": 2, "sample_width": 8, "sample_height": 8}
        | {"time_embed_dim": 16, "text_embed_dim": 16, "add_noise_in_inpaint_model": False},
        lambda: (
            {"hidden_states": draw(1, 4, 2, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": draw(1, 5, 16)}
        ),
        {"heads", "ffn", "modulation_directions", "value_directions"},
        idle=("blocks.1.txt_ff",),
    ),
    "ConsisID": Row(
        "ConsisIDTransformer3DModel",
        HEADS
        | {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 16}
        | {"num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5}
        | {"max_text_seq_length": 5, "is_train_face": False},
        lambda: (
            {"hidden_states": draw(1, 2, 4, 8, 8), "encoder_hidden_states": draw(1, 5, 16)}
            | {"timestep": torch.tensor([500])}
        ),
        {"heads", "ffn", "modulation_directions", "value_directions"},
    ),
    "Cosmos": Row(
        "CosmosTransformer3DModel",
        {"num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4}
        | {"num_layers": 2, "mlp_ratio": 2.0, "text_embed_dim": 16, "adaln_lora_dim": 8}
        | {"max_size": (4, 16, 16), "concat_padding_mask": False, "extra_pos_embed_type": None},
        lambda: (
            {"hidden_states": draw(1, 4, 1, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": draw(1, 5, 16)}
        ),
        {"heads", "ffn", "value_directions"},
    ),
    "Cosmos 2.5 (image context)": Row(
        "CosmosTransformer3DModel",
        {"num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4}
        | {"num_layers": 2, "mlp_ratio": 2.0, "text_embed_dim": 16, "adaln_lora_dim": 8}
        | {"max_size": (4, 16, 16), "concat_padding_mask": False, "extra_pos_embed_type": None}
        | {"img_context_dim_in": 16, "img_context_num_tokens": 3, "img_context_dim_out": 96},
        lambda: (
            {"hidden_states": draw(1, 4, 1, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": (draw(1, 5, 16), draw(1, 3, 16))}
        ),
        {"heads", "ffn", "value_directions"},
    ),
    "Wan VACE": Row(
        "WanVACETransformer3DModel",
        WAN | {"vace_layers": [0], "vace_in_channels": 8},
        lambda: (
            {"hidden_states": draw(1, 4, 2, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": draw(1, 5, 16)}
            | {"control_hidden_states": draw(1, 8, 2, 8, 8)}
        ),
        {"heads", "ffn", "value_directions"},
        ACROSS,
    ),
    "SkyReels V2": Row(
        "SkyReelsV2Transformer3DModel",
        WAN,
        lambda: (
            {"hidden_states": draw(1, 4, 2, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": draw(1, 5, 16)}
        ),
        {"heads", "ffn", "value_directions"},
        ACROSS,
    ),
    "ChronoEdit": Row(
        "ChronoEditTransformer3DModel",
        WAN | {"image_dim": 16, "added_kv_proj_dim": 32, "rope_temporal_skip_len": 2},
        lambda: (
            {"hidden_states": draw(1, 4, 2, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": draw(1, 512, 16)}
            | {"encoder_hidden_states_image": draw(1, 6, 16)}
        ),
        {"heads", "ffn", "value_directions"},
        ACROSS,
    ),
    "Helios (scaled keys)": Row(
        "HeliosTransformer3DModel",
        WAN | {"rope_dim": (4, 2, 2), "is_amplify_history": True, "has_multi_term_memory_patch": True},
        lambda: (
            {"hidden_states": draw(1, 4, 2, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": draw(1, 5, 16)}
            | {"indices_hidden_states": torch.arange(3, 5)[None]}
            | {"indices_latents_history_short": torch.arange(2, 3)[None]}
            | {"indices_latents_history_mid": torch.arange(1, 2)[None]}
            | {"indices_latents_history_long": torch.arange(0, 1)[None]}
            | {"latents_history_short": draw(1, 4, 1, 8, 8)}
            | {"latents_history_mid": draw(1, 4, 2, 8, 8)}
            | {"latents_history_long": draw(1, 4, 4, 8, 8)}
        ),
        {"heads", "ffn", "value_directions"},
        ACROSS,
    ),
    "AnyFlow": Row(
        "AnyFlowTransformer3DModel",
        WAN,
        lambda: (
            {"hidden_states": draw(1, 2, 4, 8, 8), "timestep": torch.tensor([[500, 500]])}
            | {"r_timestep": torch.tensor([[400, 400]]), "encoder_hidden_states": draw(1, 5, 16)}
        ),
        {"heads", "ffn", "value_directions"},
        ACROSS,
    ),
    "LTX-2 (gated heads, sound)": Row(
        "LTX2VideoTransformer3DModel",
        HEADS
        | {"in_channels": 8, "out_channels": 8, "num_layers": 2, "cross_attention_dim": 32}
        | {"gated_attn": True, "audio_in_channels": 4, "audio_out_channels": 4}
        | {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8}
        | {"audio_cross_attention_dim": 16, "audio_gated_attn": True, "caption_channels": 16},
        lambda: (
            {"hidden_states": draw(1, 8, 8), "audio_hidden_states": draw(1, 6, 4)}
            | {"encoder_hidden_states": draw(1, 5, 16)}
            | {"audio_encoder_hidden_states": draw(1, 5, 16), "timestep": torch.tensor([500])}
            | {"encoder_attention_mask": torch.ones(1, 5)}
            | {"audio_encoder_attention_mask": torch.ones(1, 5), "num_frames": 2, "height": 2}
            | {"width": 2, "audio_num_frames": 6}
        ),
        {"heads", "ffn", "modulation_directions", "value_directions"},
        ACROSS,
        idle=("blocks.1.video_to_audio_attn", "blocks.1.audio_ff"),
    ),
    "Kandinsky 6": Row(
        "Kandinsky6Transformer3DModel",
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16}
        | {"time_dim": 16, "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 2}
        | {"axes_dims": (4, 2, 2), "visual_cond": False},
        lambda: (
            {"hidden_states": draw(1, 1, 8, 8, 4), "encoder_hidden_states": draw(1, 5, 16)}
            | {"pooled_projections": draw(1, 16), "timestep": torch.tensor([500.0])}
            | {"visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)]}
        ),
        {"heads", "ffn", "value_directions"},
        BFLOAT16,
        torch.float32,
        idle=("audio", "va_cross", "av_cross"),
    ),
    "Stable Video Diffusion": Row(
        "UNetSpatioTemporalConditionModel",
        {"sample_size": 8, "in_channels": 4, "block_out_channels": (32, 64)}
        | {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
        | {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")}
        | {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24}
        | {"layers_per_block": 1, "cross_attention_dim": 16, "num_attention_heads": (2, 4)}
        | {"num_frames": 2},
        lambda: (
            {"sample": draw(1, 2, 4, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": draw(1, 1, 16), "added_time_ids": draw(1, 3)}
        ),
        {"heads", "ffn", "resnet", "value_directions", "query_directions"},
    ),
    "AnimateDiff": Row(
        "UNetMotionModel",
        {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 8}
        | {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")}
        | {"up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "layers_per_block": 1}
        | {"cross_attention_dim": 16, "num_attention_heads": 2, "motion_num_attention_heads": 2},
        lambda: (
            {"sample": draw(1, 4, 2, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": draw(2, 5, 16)}
        ),
        {"heads", "ffn", "resnet", "value_directions", "query_directions"},
    ),
    "ModelScope (3-D UNet)": Row(
        "UNet3DConditionModel",
        {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 8}
        | {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")}
        | {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "layers_per_block": 1}
        | {"cross_attention_dim": 16, "attention_head_dim": 4},
        lambda: (
            {"sample": draw(1, 4, 2, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": draw(1, 5, 16)}
        ),
        {"heads", "ffn", "resnet", "value_directions", "query_directions"},
    ),
    "Sana Video": Row(
        "SanaVideoTransformer3DModel",
        HEADS
        | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2}
        | {"cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 16}
        | {"sample_size": 8},
        lambda: (
            {"hidden_states": draw(1, 4, 2, 8, 8), "encoder_hidden_states": draw(1, 5, 16)}
            | {"timestep": torch.tensor([500])}
        ),
        {"heads", "conv_ffn", "value_directions"},
        ACROSS,
    ),
    "HunyuanVideo Framepack": Row(
        "HunyuanVideoFramepackTransformer3DModel",
        HEADS
        | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1}
        | {"num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 16}
        | {"rope_axes_dim": (4, 2, 2), "image_condition_type": None, "has_image_proj": True}
        | {"image_proj_dim": 16, "has_clean_x_embedder": True},
        lambda: (
            {"hidden_states": draw(1, 4, 2, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": draw(1, 5, 16)}
            | {"encoder_attention_mask": torch.ones(1, 5, dtype=torch.long)}
            | {"pooled_projections": draw(1, 16), "image_embeds": draw(1, 3, 16)}
            | {"indices_latents": torch.arange(2), "latents_clean": draw(1, 4, 1, 8, 8)}
            | {"indices_latents_clean": torch.arange(1), "latents_history_2x": draw(1, 4, 2, 8, 8)}
            | {"indices_latents_history_2x": torch.arange(2)}
            | {"latents_history_4x": draw(1, 4, 4, 8, 8)}
            | {"indices_latents_history_4x": torch.arange(4)}
            | {"guidance": torch.tensor([6.0]).double()}
        ),
        {"heads", "ffn", "modulation", "modulation_directions", "value_directions", "query_directions"},
    ),
    "Wan Animate": Row(
        "WanAnimateTransformer3DModel",
        HEADS
        | {"num_layers": 2, "in_channels": 12, "latent_channels": 4, "out_channels": 4, "text_dim": 16}
        | {"freq_dim": 16, "ffn_dim": 48, "image_dim": 16, "added_kv_proj_dim": 32}
        | {"motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16}
        | {"motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16}
        | {"face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2},
        lambda: (
            {"hidden_states": draw(1, 12, 3, 8, 8), "timestep": torch.tensor([500])}
            | {"encoder_hidden_states": draw(1, 512, 16)}
            | {"encoder_hidden_states_image": draw(1, 6, 16)}
            | {"pose_hidden_states": draw(1, 4, 2, 8, 8)}
            | {"face_pixel_values": draw(1, 3, 9, 16, 16)}
        ),
        {"heads", "ffn", "value_directions"},
        ACROSS,
    ),
}

# Of the newest diffusers that the tests ran with; an older one, as Python 3.10 gets it, has not all of them.
MISSING = {name for name, row in ROWS.items() if not hasattr(diffusers, row.cls)}
ROWS = {name: row for name, row in ROWS.items() if name not in MISSING}
