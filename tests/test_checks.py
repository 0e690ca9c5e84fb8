"""What a pipeline carries is refused in words before anything is learned or cut, or it is followed."""

import pytest
import torch

import ecodiff
from ecodiff import cli
from ecodiff.checks import check_class, needs_an_image
from ecodiff.errors import BudgetError, UnsupportedModelError
from ecodiff.pipelines import denoiser_of
from tests.checkpoints.test_folders import some_plan
from tests.conftest import PIPELINES, PROMPT, latents

CONFIG = ecodiff.LearnConfig(warm_steps=1, steps=0, batch=1, trajectories=1, inference_steps=2, size=16)


def lora(pipe):
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def torchao(pipe):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.unet, Int8WeightOnlyConfig())


def quanto(pipe):
    from optimum.quanto import freeze, qint8, quantize

    quantize(pipe.unet, weights=qint8)
    freeze(pipe.unet)


def ip_adapter(pipe):
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    attention = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2"))
    attention.set_processor(IPAdapterAttnProcessor2_0(attention.to_q.out_features, 32))


def casting(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def deep_cache(pipe):
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()


@pytest.mark.parametrize(
    ("carried", "words"),
    [
        (lora, "Unload it first"),
        (torchao, "quantised"),
        (quanto, "quantised"),
        (ip_adapter, "unload_ip_adapter"),
        (casting, "layerwise_casting"),
        (deep_cache, "DeepCache"),
    ],
)
def test_what_is_carried_is_refused_by_its_name(tiny_sdxl, carried, words):
    plan = some_plan(tiny_sdxl)
    carried(tiny_sdxl)
    for act in (
        lambda: ecodiff.variant(tiny_sdxl, plan),
        lambda: ecodiff.learn_masks(tiny_sdxl, [PROMPT], CONFIG),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            act()


def test_a_compiled_model_is_cut_under_its_wrapper(tiny_sdxl, tmp_path):
    plain = ecodiff.variant(tiny_sdxl, plan := some_plan(tiny_sdxl))
    before, dense = latents(plain), tiny_sdxl.unet
    tiny_sdxl.unet = torch.compile(dense, backend="eager")
    assert [g.name for g in ecodiff.find_groups(tiny_sdxl.unet)] == [
        g.name for g in ecodiff.find_groups(dense)
    ]
    small = ecodiff.variant(tiny_sdxl, plan)
    assert torch.equal(latents(small), before)
    again = ecodiff.load(ecodiff.save(small, tmp_path / "small"))
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(latents(again), before, rtol=1e-3, atol=1e-3)
    with pytest.raises(UnsupportedModelError, match=r"torch\.compile"):
        ecodiff.learn_masks(tiny_sdxl, [PROMPT], CONFIG)


def test_pipelines_that_need_an_image():
    import diffusers

    for name in ("StableDiffusionInpaintPipeline", "FluxImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"):
        with pytest.raises(UnsupportedModelError, match="needs an image"):
            check_class(getattr(diffusers, name))
    for build in PIPELINES.values():
        assert not needs_an_image(type(build()))


@pytest.mark.parametrize(
    "more", [{"size": 60}, {"extra": {"num_images_per_prompt": 2}}, {"extra": {"prompt_2": "photo"}}]
)
def test_what_a_pipeline_refuses_is_told_before_learning(tiny_sdxl, more):
    config = ecodiff.LearnConfig(**vars(CONFIG) | {"batch": 2, "trajectories": 2} | more)
    with pytest.raises(BudgetError):
        ecodiff.learn_masks(tiny_sdxl, [PROMPT, "cat"], config)


def test_two_threads_draw_at_once(tiny_sdxl):
    small = ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl))
    assert small.tokenizer is not tiny_sdxl.tokenizer and small.scheduler is not tiny_sdxl.scheduler
    assert small.vae is tiny_sdxl.vae and small.text_encoder is tiny_sdxl.text_encoder
    assert denoiser_of(small) is not denoiser_of(tiny_sdxl)


def test_info_says_so_too(tmp_path, capsys):
    from diffusers import StableDiffusionInpaintPipeline

    parts = PIPELINES["sd-1.5"]().components
    parts.pop("image_encoder", None)
    made = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    made.save_pretrained(tmp_path / "inpaint")
    assert cli.main(["info", str(tmp_path / "inpaint")]) == 0
    assert "needs an image" in capsys.readouterr().out
    out = ["--out", str(tmp_path / "out"), "--run", str(tmp_path / "run")]
    assert cli.main(["prune", str(tmp_path / "inpaint"), *out]) == 1
    assert "needs an image" in capsys.readouterr().err and not (tmp_path / "run").exists()
