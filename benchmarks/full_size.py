"""SDXL at its true size on a CPU, with random weights: every step of the main job once.

    python benchmarks/full_size.py        about 11 GB of memory and 10 GB of disk

The UNet is the published one (2,567,463,684 parameters, bfloat16); the text encoders have its widths
but one layer each, and the autoencoder is tiny: neither is pruned. Latents are 16x16, two time steps.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import ecodiff
from ecodiff import checkpoint
from ecodiff.catalog import EMBEDDED
from ecodiff.measure import parameters


def random_unet() -> UNet2DConditionModel:
    """The UNet in bfloat16, every weight random, none in float32 on the way."""
    unet = (
        checkpoint.empty_denoiser("sdxl")
        .to(torch.bfloat16)
        .to_empty(device="cpu")
        .eval()
        .requires_grad_(False)
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(float(not name.endswith("bias")))
    return unet


def pipeline() -> StableDiffusionXLPipeline:
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "emoji-sdxl" / "tokenizer")

    def text(cls, width):
        shape = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": width // 64}
        more = {"projection_dim": 1280, "num_hidden_layers": 1, "max_position_embeddings": 24}
        return cls(CLIPTextConfig(vocab_size=len(tokenizer), **shape, **more)).to(torch.bfloat16).eval()

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    return StableDiffusionXLPipeline(
        vae=vae.to(torch.bfloat16).eval(),
        text_encoder=text(CLIPTextModel, 768),
        text_encoder_2=text(CLIPTextModelWithProjection, 1280),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=random_unet(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def checksums(module: torch.nn.Module) -> dict[str, int]:
    """Of the bits of every bfloat16 weight."""
    return {name: int(p.view(torch.int16).long().sum()) for name, p in module.named_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    took: dict[str, dict] = {}

    @contextmanager
    def step(name: str):
        start = time.perf_counter()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        took[name] = {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(peak, 2)}
        print(f"{name:<22}{took[name]['seconds']:>8.1f} s   peak {peak:.1f} GB", flush=True)

    drawing = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    folder = Path(tempfile.mkdtemp())
    try:
        with step("build"):
            pipe = pipeline()
        dense = parameters(pipe.unet)
        with step("find groups"):
            groups = ecodiff.find_groups(pipe.unet, ecodiff.LearnConfig().kinds)
        with step("warm start, 1 batch"):
            config = ecodiff.LearnConfig(warm_steps=1, steps=1, batch=1, inference_steps=2, size=32)
            steps = ecodiff.learn.learn(pipe, ["red apple"], config)
            next(steps)
        with step("learning step"):
            _, scores = next(steps)
        with step("plan"):
            plan = scores.plan(ratio=0.2)
        with step("slice"):
            ecodiff.slice_(pipe.unet, plan)
        with step("draw"), torch.no_grad():
            before = pipe("red apple", generator=torch.Generator().manual_seed(0), **drawing).images
        with step("save"):
            ecodiff.save(pipe, folder / "small")
        pruned, expected = parameters(pipe.unet), plan.metadata["params_pruned"]
        assert pruned == expected, (pruned, expected)
        sums = checksums(pipe.unet)
        del pipe
        with step("reload"):
            small = ecodiff.load(folder / "small", dtype=torch.bfloat16)
        assert checksums(small.unet) == sums, "reloaded weights differ"
        with step("draw again"), torch.no_grad():
            after = small("red apple", generator=torch.Generator().manual_seed(0), **drawing).images
        # Same bits at other addresses: bfloat16 sums come in another order, 70 random layers deep.
        close = float((before.float() - after.float()).abs().max() / before.float().abs().max())
        found = {"dense": dense, "pruned": pruned, "groups": len(groups), "difference": close, "took": took}
        print(json.dumps(found | {"took": None}))
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
