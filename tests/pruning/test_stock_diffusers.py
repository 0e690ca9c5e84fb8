"""Pruned pipelines under what people call next in stock diffusers."""

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import ecodiff
from ecodiff.errors import PlanError
from ecodiff.pipelines import denoiser_of
from tests.checkpoints.test_folders import some_plan
from tests.conftest import PIPELINES, PROMPT, flux, latents, randomise, stable_diffusion

CALLS = {
    "enable_attention_slicing": lambda p: p.enable_attention_slicing(),
    "enable_attention_slicing(max)": lambda p: p.enable_attention_slicing("max"),
    "slicing on and off": lambda p: (p.enable_attention_slicing(), p.disable_attention_slicing()),
    "set_default_attn_processor": lambda p: p.unet.set_default_attn_processor(),
    "set_attn_processor": lambda p: p.unet.set_attn_processor(AttnProcessor2_0()),
    "set_attn_processor, plain": lambda p: p.unet.set_attn_processor(AttnProcessor()),
    "the same processors": lambda p: p.unet.set_attn_processor(p.unet.attn_processors),
    "fuse_qkv_projections": lambda p: p.fuse_qkv_projections(),
    "fuse and unfuse": lambda p: (p.fuse_qkv_projections(), p.unfuse_qkv_projections()),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_emptied_attention_stays_what_it_is(tiny_sdxl, call):
    plan = dict(some_plan(tiny_sdxl))
    for name in [n for n in plan if "attn" in n][:2]:
        plan[name][:] = False
    small = ecodiff.variant(tiny_sdxl, plan)
    before = latents(small)
    CALLS[call](small)
    torch.testing.assert_close(latents(small), before, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
        ("sdxl", "StableDiffusionXLInpaintPipeline"),
        ("flux-dev", "FluxImg2ImgPipeline"),
        ("sd3.5", "StableDiffusion3Img2ImgPipeline"),
    ],
)
def test_from_pipe_takes_the_pruned_model_over(build, name):
    pipe = PIPELINES[build]()
    small = ecodiff.variant(pipe, some_plan(pipe))
    made = getattr(diffusers, name).from_pipe(small)
    assert denoiser_of(made) is denoiser_of(small)
    dense, pruned = type(denoiser_of(pipe)), type(denoiser_of(small))
    assert pruned == dense and pruned is not dense


def test_what_is_built_of_a_dense_unet_is_cut_like_the_pruned_one():
    """AnimateDiff's UNet, and a ControlNet to be trained: with the weights of the pruned (repaired) UNet."""
    pipe = stable_diffusion()
    small = ecodiff.variant(pipe, some_plan(pipe))
    with torch.no_grad():
        for parameter in small.unet.parameters():
            parameter.mul_(1.01)  # as if it were repaired
    adapter = randomise(
        diffusers.MotionAdapter(
            block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4,
            motion_num_attention_heads=4, use_motion_mid_block=False,
        )
    )  # fmt: skip
    for build in (
        lambda unet: diffusers.UNetMotionModel.from_unet2d(unet, adapter),
        diffusers.ControlNetModel.from_unet,
    ):
        made = ecodiff.slice_like_(build(pipe.unet), small.unet)
        pruned, whole = small.unet.state_dict(), build(pipe.unet).state_dict()
        own = {name for name in pruned if name in whole}
        assert len(own) > len(pruned) / 3 and any(pruned[n].shape != whole[n].shape for n in own)
        assert all(torch.equal(made.state_dict()[name], pruned[name]) for name in own)
        assert any("motion" in name or "controlnet" in name for name in made.state_dict())
    motion = ecodiff.slice_like_(diffusers.UNetMotionModel.from_unet2d(pipe.unet, adapter), small.unet)
    shared = {name: getattr(small, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    drawn = diffusers.AnimateDiffPipeline(**shared, unet=motion, motion_adapter=adapter)
    drawn.set_progress_bar_config(disable=True)
    frames = drawn(PROMPT, num_frames=3, num_inference_steps=2, output_type="latent").frames
    assert frames.shape[2] == 3 and frames.isfinite().all()


def test_a_model_of_other_layers_is_not_cut(tiny_sdxl):
    small = ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl))
    with pytest.raises(PlanError, match="none of the layers"):
        ecodiff.slice_like_(flux().transformer, small.unet)
    with pytest.raises(PlanError, match="not pruned"):
        ecodiff.slice_like_(small.unet, tiny_sdxl.unet)


def test_variant_and_shards_are_written_as_asked(tiny_sdxl, tmp_path):
    small = ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl))
    small.save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    files = [file.name for file in (tmp_path / "unet").glob("*.safetensors")]
    assert len(files) > 1 and all(".fp16" in file for file in files)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    small.set_progress_bar_config(disable=True)
    torch.testing.assert_close(latents(again), latents(small), rtol=1e-3, atol=1e-3)


def test_adapters_are_scaled_and_fit_where_rows_are_scattered():
    from peft import LoraConfig

    pipe = flux(guidance_embeds=True)
    pipe.set_progress_bar_config(disable=True)
    small = ecodiff.variant(pipe, some_plan(pipe))
    small.transformer.add_adapter(
        LoraConfig(r=2, target_modules=["norm1.linear", "to_q"], init_lora_weights=False), "style"
    )
    whole = latents(small)
    small.transformer.set_adapters("style", 0.0)
    assert not torch.equal(latents(small), whole)


def test_an_ip_adapter_of_the_dense_model_is_refused_in_words(tiny_sdxl):
    small = ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl))
    with pytest.raises(ValueError, match="pruned: an IP-Adapter of the dense model"):
        small.unet._load_ip_adapter_weights([{}])


def test_a_prior_keeps_its_heads_and_runs():
    torch.manual_seed(0)
    prior = diffusers.PriorTransformer(
        num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=7,
        additional_embeddings=4,
    ).eval()  # fmt: skip
    groups = ecodiff.find_groups(prior)
    assert {group.kind for group in groups} == {"ffn"}
    given = {"timestep": 1, "proj_embedding": torch.randn(2, 16), "attention_mask": torch.ones(2, 7)}
    given |= {"hidden_states": torch.randn(2, 16), "encoder_hidden_states": torch.randn(2, 7, 16)}
    plan = ecodiff.PrunePlan({g.name: torch.arange(g.size) >= g.size // 2 for g in groups})
    with torch.no_grad(), ecodiff.masked(prior, plan):
        masked = prior(**given, return_dict=False)[0]
    with torch.no_grad():
        sliced = ecodiff.slice_(prior, plan)(**given, return_dict=False)[0]
    torch.testing.assert_close(sliced, masked, rtol=1e-4, atol=1e-5)
