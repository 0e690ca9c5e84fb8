"""Tiny pipelines of the real classes, with random weights, built without a network."""

import os
import tempfile
from functools import cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core each: before torch counts them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ecodiff.catalog import EMBEDDED

PROMPT = "red apple"
# What keeps a run tiny, by pipeline.
SHORT = {
    FluxPipeline: {"max_sequence_length": 16, "height": 16, "width": 16},
    StableDiffusion3Pipeline: {"max_sequence_length": 16},
}


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """No weight is zero: a mask that does nothing would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (not name.endswith("bias")))
    return module.eval()


def tiny_vae(**changes) -> AutoencoderKL:
    return AutoencoderKL(
        **changes,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )


def text_config(width: int, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=3000,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(EMBEDDED / "emoji-sdxl" / "tokenizer")


def tiny_unet(**changes) -> UNet2DConditionModel:
    options = {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(options | changes))


def sdxl() -> StableDiffusionXLPipeline:
    unet = tiny_unet(
        transformer_layers_per_block=[1, 2],
        attention_head_dim=[2, 4],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=randomise(tiny_vae()),
        text_encoder=randomise(CLIPTextModel(text_config(16))),
        text_encoder_2=randomise(CLIPTextModelWithProjection(text_config(16))),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=randomise(unet),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def stable_diffusion(**unet) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=randomise(tiny_vae()),
        text_encoder=randomise(CLIPTextModel(text_config(32))),
        tokenizer=tokenizer(),
        unet=randomise(tiny_unet(**unet)),
        scheduler=PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@cache
def tokenizer_5() -> T5Tokenizer:
    """Of single characters: enough for any prompt, and nothing to download."""
    with tempfile.TemporaryDirectory() as folder:
        letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
        letters += [(chr(code), -3.0) for code in range(ord("a"), ord("z") + 1)]
        T5Tokenizer(vocab=letters, extra_ids=0).save_pretrained(folder)
        return T5Tokenizer.from_pretrained(folder)


def t5(width: int = 16) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def flux(**changes) -> FluxPipeline:
    options = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (2, 2, 4),
    }
    return FluxPipeline(
        vae=randomise(tiny_vae(shift_factor=0.0)),
        text_encoder=randomise(CLIPTextModel(text_config(16))),
        text_encoder_2=randomise(t5()),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer_5(),
        transformer=randomise(FluxTransformer2DModel(**(options | changes))),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def sd3(qk_norm: str | None = "rms_norm") -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        qk_norm=qk_norm,
        dual_attention_layers=(0,),
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        vae=randomise(tiny_vae(shift_factor=0.0)),
        text_encoder=randomise(CLIPTextModelWithProjection(text_config(16))),
        text_encoder_2=randomise(CLIPTextModelWithProjection(text_config(16))),
        text_encoder_3=randomise(t5(32)),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer_5(),
        transformer=randomise(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


PIPELINES = {
    "sdxl": sdxl,
    "sd-1.5": stable_diffusion,
    "flux-dev": lambda: flux(guidance_embeds=True),
    "flux-schnell": flux,
    "sd3.5": sd3,
    "sd-2": lambda: stable_diffusion(attention_head_dim=[2, 4], use_linear_projection=True),
}


@pytest.fixture(params=PIPELINES)
def pipe(request):
    built = PIPELINES[request.param]()
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture
def tiny_sdxl():
    built = sdxl()
    built.set_progress_bar_config(disable=True)
    return built


def short(pipe) -> dict:
    """Arguments of the pipeline's call that keep a run tiny."""
    return SHORT.get(type(pipe), {})


def latents(pipe, steps: int = 3, **options) -> torch.Tensor:
    """The final latents of one run."""
    with torch.no_grad():
        return pipe(
            PROMPT,
            **short(pipe),
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        ).images


# Files that take minutes: they begin, so that no worker is left with one at the end.
SLOW = ("test_elsewhere", "test_browser", "test_zerogpu", "test_devices", "test_endpoints", "test_gpu")
SLOW += ("test_runs", "test_folders", "test_report", "test_comfyui")


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Beside a browser test's failure: what the open pages say."""
    report = yield
    if report.failed and "browser" in item.funcargs:
        for context in reversed(item.funcargs["browser"].contexts):  # the test's own page comes first
            report.sections += [(page.url, page.inner_text("body")) for page in context.pages]
    return report
