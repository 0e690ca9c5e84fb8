"""Tiny pipelines of further architectures: with those of conftest.py, all that the catalogue names."""

from functools import cache, partial

from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.conftest import randomise, t5, tiny_vae, tokenizer_5
from tests.denoisers import ROWS

TEXT = {
    "vocab_size": 128,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


@cache
def letters() -> PreTrainedTokenizerFast:
    """A token a character, and a chat template of nothing but the words."""
    vocab = {"<pad>": 0, "<unk>": 1} | {chr(code): code for code in range(2, 128)}
    built = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=template,
        model_max_length=64,
    )


def tiny(cls, label: str, **changes):
    """The denoiser of a row of the conformance suite."""
    return randomise(cls(**ROWS[label].config | changes))


def flow(**options) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options)


def pixart() -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        tokenizer=tokenizer_5(),
        text_encoder=randomise(t5()),
        vae=randomise(tiny_vae()),
        transformer=tiny(PixArtTransformer2DModel, "PixArt-Sigma", out_channels=8),
        scheduler=DPMSolverMultistepScheduler(),
    )


def chroma() -> ChromaPipeline:
    return ChromaPipeline(
        scheduler=flow(),
        vae=randomise(tiny_vae(shift_factor=0.0)),
        text_encoder=randomise(t5()),
        tokenizer=tokenizer_5(),
        transformer=tiny(ChromaTransformer2DModel, "Chroma"),
    )


def wan(tokens: bool = False, two: bool = False) -> WanPipeline:
    """Wan 2.1's; with `tokens` Wan 2.2 5B's, which is told the time step of every token; with `two` denoisers
    Wan 2.2 A14B's."""
    config = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return WanPipeline(
        tokenizer=tokenizer_5(),
        text_encoder=randomise(UMT5EncoderModel(UMT5Config(**config))),
        vae=randomise(vae),
        scheduler=flow(),
        transformer=tiny(WanTransformer3DModel, "Wan 2.1"),
        expand_timesteps=tokens,
        transformer_2=tiny(WanTransformer3DModel, "Wan 2.1", num_layers=3) if two else None,
        boundary_ratio=0.7 if two else None,
    )


def qwen() -> QwenImagePipeline:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = TEXT | {"rope_scaling": rope}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return QwenImagePipeline(
        scheduler=flow(),
        vae=randomise(vae),
        text_encoder=randomise(Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=letters(),
        transformer=tiny(QwenImageTransformer2DModel, "Qwen-Image"),
    )


def z_image() -> ZImagePipeline:
    return ZImagePipeline(
        scheduler=flow(),
        vae=randomise(tiny_vae(shift_factor=0.0)),
        text_encoder=randomise(Qwen3Model(Qwen3Config(**TEXT))),
        tokenizer=letters(),
        transformer=tiny(ZImageTransformer2DModel, "Z-Image"),
    )


def klein() -> Flux2KleinPipeline:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
    )
    return Flux2KleinPipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=randomise(vae),
        text_encoder=randomise(Qwen3ForCausalLM(Qwen3Config(**TEXT))),
        tokenizer=letters(),
        transformer=tiny(Flux2Transformer2DModel, "FLUX.2 (fused)", guidance_embeds=False),
        is_distilled=True,
    )


def lumina() -> Lumina2Pipeline:
    vae = randomise(tiny_vae())
    vae.register_to_config(shift_factor=0.1)
    row = "Lumina 2 (grouped queries)"
    return Lumina2Pipeline(
        transformer=tiny(Lumina2Transformer2DModel, row, axes_lens=[64, 64, 64]),
        scheduler=flow(),
        vae=vae,
        text_encoder=randomise(Gemma2Model(Gemma2Config(**TEXT))),
        tokenizer=letters(),
    )


def sana(sprint: bool = False) -> SanaPipeline | SanaSprintPipeline:
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    solver = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return (SanaSprintPipeline if sprint else SanaPipeline)(
        tokenizer=letters(),
        text_encoder=randomise(Gemma2Model(Gemma2Config(**TEXT))),
        vae=randomise(vae),
        transformer=tiny(SanaTransformer2DModel, "Sana Sprint" if sprint else "Sana"),
        scheduler=SCMScheduler() if sprint else DPMSolverMultistepScheduler(**solver),
    )


SANA = {"use_resolution_binning": False, "complex_human_instruction": None, "max_sequence_length": 16}
SANA |= {"clean_caption": False}
BUILDERS = {  # by row of the conformance suite, and the arguments of a short run
    "PixArt-Sigma": (
        pixart,
        16,
        {"use_resolution_binning": False, "max_sequence_length": 16, "clean_caption": False},
    ),
    "Chroma": (chroma, 16, {"max_sequence_length": 16}),
    "Wan 2.1": (wan, 32, {"num_frames": 1, "max_sequence_length": 16}),
    "Qwen-Image": (qwen, 32, {"true_cfg_scale": 4.0, "negative_prompt": " "}),
    "Z-Image": (z_image, 16, {"max_sequence_length": 16}),
    "FLUX.2 (fused)": (klein, 32, {"max_sequence_length": 16, "text_encoder_out_layers": (1,)}),
    "Sana": (sana, 32, SANA),
    "Sana Sprint": (partial(sana, sprint=True), 32, SANA),
    "Wan 2.2 5B": (partial(wan, tokens=True), 32, {"num_frames": 1, "max_sequence_length": 16}),
    "Lumina 2 (grouped queries)": (lumina, 32, {"max_sequence_length": 16}),
}
