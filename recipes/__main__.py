"""Train an embedded model from nothing: `python -m recipes --help`."""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionXLPipeline

from ecodiff.catalog import EMBEDDED

from . import data, evaluate, flux, sdxl, training, turbo, vae

CACHE = Path.home() / ".cache" / "ecodiff"


def train_sdxl(options, emojis, images) -> None:
    """The autoencoder, then emoji-sdxl, and on from there with fewer layers."""
    autoencoder = vae.train(images, options.work, options.vae_steps, options.device)
    latents = vae.encode(autoencoder, images)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=1.0)
    scaled = (latents - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1)
    torch.manual_seed(0)
    pipe = sdxl.new_pipeline(autoencoder, sdxl.tokenizer(emojis, options.work / "tokenizer"))
    whole = sdxl.train(pipe, scaled, emojis, options.work, options.steps, options.device)
    pipe = sdxl.finished(pipe, whole).to(torch.float32)
    sdxl.leaner(pipe)
    (more := options.work / "leaner").mkdir(exist_ok=True)
    trained = sdxl.train(pipe, scaled, emojis, more, options.lean_steps, options.device, **sdxl.LEANER)
    facts = {
        "autoencoder": f"{options.vae_steps:,} steps of {vae.BATCH} images",
        "UNet and text encoders": f"{options.steps:,} steps of {training.BATCH} images",
        "with 6 of 16 layers in the lower transformers, from there": f"{options.lean_steps:,} steps of "
        f"{training.BATCH} images",
    }
    _ship(sdxl.finished(pipe, trained), options, emojis, images, facts)


def train_flux(options, emojis, images) -> None:
    """emoji-flux, on the latents of emoji-sdxl's autoencoder, and its guidance."""
    if options.more:
        _train_flux_on(options, emojis, images)
        return
    autoencoder = AutoencoderKL.from_pretrained(EMBEDDED / "emoji-sdxl" / "vae").to(options.device)
    autoencoder = flux.standardised(autoencoder).eval()
    latents = vae.encode(autoencoder, images)
    torch.manual_seed(0)
    pipe = flux.new_pipeline(autoencoder, emojis, options.work)
    examples = flux.Examples(pipe, latents, emojis, options.device)
    flux.align_text(pipe, examples, options.work, options.text_steps, options.device)
    teacher = flux.train(pipe, examples, options.work, options.steps, options.device)
    trained = flux.distil_guidance(teacher, examples, options.work, options.guidance_steps, options.device)
    facts = {
        "text encoders, contrastive": f"{options.text_steps:,} steps of {flux.CONTRASTED} images",
        "transformer and text encoders": f"{options.steps:,} steps of {training.BATCH} images",
        "guidance distillation": f"{options.guidance_steps:,} steps of {training.BATCH} images",
        "autoencoder": "emoji-sdxl's, its latents standardised",
    }
    _ship(flux.finished(pipe, trained), options, emojis, images, facts)


def _train_flux_on(options, emojis, images) -> None:
    """emoji-flux from the weights that ship, and its guidance anew."""
    shipped = EMBEDDED / "emoji-flux"
    pipe = FluxPipeline.from_pretrained(shipped, dtype=torch.float32)
    latents = vae.encode(pipe.vae.to(options.device), images)
    examples = flux.Examples(pipe, latents, emojis, options.device)
    examples.captions.weights = data.sampling_weights(emojis, flux.MORE_POWER)
    folder = options.work / "more"
    folder.mkdir(exist_ok=True)
    teacher = flux.train(pipe, examples, folder, options.more, options.device, **flux.MORE)
    trained = flux.distil_guidance(teacher, examples, folder, options.guidance_steps, options.device)
    facts = json.loads((shipped / "report.json").read_text(encoding="utf-8"))["trained"] | {
        "trained on from there": f"{options.more:,} steps of {training.BATCH} images, every emoji's family "
        "nearly as often as any other, and guidance distilled again"
    }
    _ship(flux.finished(pipe, trained), options, emojis, images, facts)


def train_turbo(options, emojis, images) -> None:
    """emoji-sdxl in four steps."""
    teacher = StableDiffusionXLPipeline.from_pretrained(EMBEDDED / "emoji-sdxl", dtype=torch.float32)
    mean, std = (torch.tensor(teacher.vae.config[f"latents_{n}"]).view(1, 4, 1, 1) for n in ("mean", "std"))
    scaled = (vae.encode(teacher.vae.to(options.device), images) - mean) / std
    pipe = turbo.new_pipeline(teacher)
    trained = turbo.train(pipe, scaled, emojis, options.work, options.steps, options.device)
    facts = {
        "teacher": f"emoji-sdxl at guidance {turbo.GUIDANCE}",
        "consistency distillation": f"{options.steps:,} steps of {training.BATCH} images",
    }
    _ship(sdxl.finished(pipe, trained), options, emojis, images, facts)


def _ship(pipe, options, emojis, images, facts: dict[str, str]) -> None:
    pipe.save_pretrained(options.out, max_shard_size="9MB")
    # diffusers notes where it opened a part: a folder of this machine.
    for file in options.out.rglob("*.json"):
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.pop("_name_or_path", None):
            file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    evaluate.report(options.model, pipe, emojis, images, options.out, facts)


RECIPES = {  # and steps of the denoiser
    "emoji-sdxl": (train_sdxl, 9000),
    "emoji-flux": (train_flux, 20000),
    "emoji-turbo": (train_turbo, 1600),
}


def main(given: list[str] | None = None) -> None:
    """Train what is not trained yet, then write the model and its report."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes",
        description="Download the emoji, train an embedded model, write the weights that ship and "
        "their report. Killed, it goes on from the last 250 steps. Needs npm for the download.",
    )
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--vae-steps", type=int, default=1600, help="emoji-sdxl's autoencoder")
    parser.add_argument("--steps", type=int, help="denoiser and text encoders (default: as shipped)")
    parser.add_argument("--lean-steps", type=int, default=4500, help="emoji-sdxl, after layers were left out")
    parser.add_argument("--text-steps", type=int, default=1500, help="emoji-flux's text encoders, alone")
    parser.add_argument("--guidance-steps", type=int, default=400, help="emoji-flux's distillation")
    parser.add_argument("--more", type=int, help="emoji-flux: train what ships on for so many steps")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, help="training state (default: in ~/.cache/ecodiff)")
    parser.add_argument("--data", type=Path, default=CACHE / "data", help="downloaded images")
    parser.add_argument("--out", type=Path, help="the model (default: where it ships)")
    options = parser.parse_args(given)
    if options.more and options.model != "emoji-flux":
        parser.error("--more trains emoji-flux on, no other model.")
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe, steps = RECIPES[options.model]
    options.steps = options.steps or steps
    options.work = options.work or CACHE / f"train-{options.model.removeprefix('emoji-')}"
    options.out = options.out or EMBEDDED / options.model
    options.work.mkdir(parents=True, exist_ok=True)
    recipe(options, *data.load(options.data))


if __name__ == "__main__":
    main()
