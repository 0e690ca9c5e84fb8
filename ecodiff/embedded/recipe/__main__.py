"""Train an embedded model from nothing: `python -m ecodiff.embedded.recipe --help`."""

import argparse
from pathlib import Path

import torch

from . import data, evaluate, sdxl, vae

HERE = Path(__file__).parent.parent
CACHE = Path.home() / ".cache" / "ecodiff"


def main() -> None:
    """Train what is not trained yet, then write the model and its report."""
    parser = argparse.ArgumentParser(
        prog="python -m ecodiff.embedded.recipe",
        description="Download the emoji, train emoji-sdxl, write the weights that ship and their "
        "report. Killed, it goes on from the last 250 steps. Needs npm for the download.",
    )
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=9000, help="UNet and text encoders")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=CACHE / "train-sdxl", help="training state")
    parser.add_argument("--data", type=Path, default=CACHE / "data", help="downloaded images")
    parser.add_argument("--out", type=Path, default=HERE / "emoji-sdxl", help="the model")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)

    emojis, images = data.load(options.data)
    autoencoder = vae.train(images, options.work, options.vae_steps, options.device)
    latents = vae.encode(autoencoder, images)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=1.0)
    scaled = (latents - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1)

    torch.manual_seed(0)
    pipe = sdxl.new_pipeline(autoencoder, sdxl.tokenizer(emojis, options.work / "tokenizer"))
    trained = sdxl.train(pipe, scaled, emojis, options.work, options.steps, options.device)
    pipe = sdxl.finished(pipe, trained)
    pipe.save_pretrained(options.out, max_shard_size="9MB")
    trained = {
        "UNet parameters": f"{sum(p.numel() for p in pipe.unet.parameters()):,}",
        "autoencoder": f"{options.vae_steps:,} steps of {vae.BATCH} images",
        "UNet and text encoders": f"{options.steps:,} steps of {sdxl.BATCH} images",
    }
    evaluate.report(pipe, emojis, images, options.out, trained)


if __name__ == "__main__":
    main()
