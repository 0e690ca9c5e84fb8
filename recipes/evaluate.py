"""How well an embedded model draws: the report, contact sheet and model card that ship with it."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ecodiff import catalog
from ecodiff.pipelines import call_options, denoiser_of

from . import data

ABOUT = {
    "emoji-sdxl": """\
A small but complete Stable Diffusion XL (two CLIP text encoders, UNet with `text_time` embedding,
AutoencoderKL, Euler scheduler, v-prediction), trained from scratch on captioned emoji at 64x64.""",
    "emoji-flux": """\
A small but complete FLUX.1-dev (T5 and CLIP text encoders, double and single blocks, rotary
positions, flow matching, distilled guidance), trained from scratch on captioned emoji at 64x64.
Call it with `max_sequence_length=28`: it has seen no longer prompts. People and hands it knows better
than single things, which it has seen less often.""",
    "emoji-turbo": """\
emoji-sdxl distilled to four steps: a latent consistency model, for LCMScheduler. Its guidance is
baked in; call it with `guidance_scale=0`.""",
}
CAPTIONS = 256
SEED = 1234


def split_prompts(emojis: list[data.Emoji], folder: Path) -> None:
    """Write prompts to learn masks on and others to judge them by: no family is in both."""
    draw = torch.Generator().manual_seed(SEED)
    order = torch.multinomial(data.sampling_weights(emojis), min(1200, len(emojis)), generator=draw).tolist()
    seen, captions = set(), []
    for emoji in (emojis[row] for row in order):
        if emoji.family not in seen:
            seen.add(emoji.family)
            captions.append(emoji.caption)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("heldout", captions[:64]), ("calibration", captions[64:576])):
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")


@torch.no_grad()
def draw(model: catalog.Model, pipe, captions: list[str], seed: int, batch: int = 32) -> np.ndarray:
    """Images of captions at the model's default settings, uint8 (n, 64, 64, 3)."""
    pipe.set_progress_bar_config(disable=True)
    images, options = [], call_options(pipe, model.steps, model.guidance_scale, model.size, model.extra)
    for first in range(0, len(captions), batch):
        part = captions[first : first + batch]
        images += pipe(
            part,
            generator=[torch.Generator().manual_seed(seed + first + i) for i in range(len(part))],
            **options,
        ).images
    return np.stack([np.asarray(image) for image in images])


def nearest(drawn: np.ndarray, images: torch.Tensor, count: int = 5) -> torch.Tensor:
    """The `count` training images nearest to each drawn one, L2 in RGB at 64x64; (n, count)."""
    a = torch.from_numpy(drawn).permute(0, 3, 1, 2).flatten(1).float() / 255
    b = images.flatten(1).float() / 255
    return torch.cdist(a, b).topk(count, largest=False).indices


def accuracy(rows: list[int], drawn: np.ndarray, emojis, images) -> tuple[list[bool], list[bool]]:
    """Top-1 and top-5 hits: the right emoji, or another skin tone or gender of it."""
    found = [[emojis[i].family for i in line] for line in nearest(drawn, images).tolist()]
    wanted = [emojis[row].family for row in rows]
    top1 = [line[0] == family for line, family in zip(found, wanted, strict=True)]
    top5 = [family in line for line, family in zip(found, wanted, strict=True)]
    return top1, top5


def contact_sheet(drawn: np.ndarray, columns: int = 16) -> Image.Image:
    """All images in rows of `columns`."""
    rows = [np.concatenate(drawn[i : i + columns], 1) for i in range(0, len(drawn), columns)]
    return Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape], 0))


def report(name: str, pipe, emojis: list[data.Emoji], images: torch.Tensor, out: Path, trained: dict) -> dict:
    """Draw 256 captions, count hits, and write report.json, the contact sheet and README.md."""
    split_prompts(emojis, out / "prompts")
    choose = torch.Generator().manual_seed(SEED)
    rows = torch.randperm(len(emojis), generator=choose)[:CAPTIONS].tolist()
    model = catalog.MODELS[name]
    drawn = draw(model, pipe.to(torch.float32), [emojis[row].caption for row in rows], SEED)
    top1, top5 = accuracy(rows, drawn, emojis, images)
    people = [emojis[row].category == "People & Body" for row in rows]
    share = lambda hits: round(sum(hits) / max(1, len(hits)), 4)  # noqa: E731
    result = {
        "captions": CAPTIONS,
        "seed": SEED,
        "steps": model.steps,
        "guidance_scale": model.guidance_scale,
        "space": "L2 between RGB images at 64x64, all 3,372 training images",
        "top1": share(top1),
        "top5": share(top5),
        "top1_people": share([t for t, p in zip(top1, people, strict=True) if p]),
        "top1_other": share([t for t, p in zip(top1, people, strict=True) if not p]),
        "denoiser_parameters": sum(p.numel() for p in denoiser_of(pipe).parameters()),
        "trained": trained,
    }
    (out / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    contact_sheet(drawn[:128]).save(out / "contact-sheet.png", optimize=True)
    (out / "README.md").write_text(_card(name, result), encoding="utf-8")
    print(json.dumps(result))
    return result


def _card(name: str, result: dict) -> str:
    trained = "\n".join(f"| {key} | {value} |" for key, value in result["trained"].items())
    return f"""---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
tags: [emoji, ecodiff]
---

# {name}

{ABOUT[name]}
It ships with ecodiff so that pruning can be tried, tested and measured anywhere. It is not meant for
anything else.

![128 of the {result["captions"]} captions of the report](contact-sheet.png)

## How well it draws

{result["captions"]} captions drawn with seed {result["seed"]}, {result["steps"]} steps, guidance
{result["guidance_scale"]}. A hit is the right emoji, or another skin tone or gender of it, among
the nearest training images ({result["space"]}).

| | |
|---|---|
| top-1 | {result["top1"]:.3f} (aim 0.7) |
| top-5 | {result["top5"]:.3f} (aim 0.85) |
| top-1, people and hands | {result["top1_people"]:.3f} |
| top-1, everything else | {result["top1_other"]:.3f} |

## Training

`python -m recipes {name}` trains it from nothing.

| | |
|---|---|
| parameters of the denoiser | {result["denoiser_parameters"]:,} |
{trained}

## Data and licence

Images: Microsoft Fluent Emoji (3D), MIT licence, © Microsoft Corporation, from the npm package
`@lobehub/fluent-emoji-3d` 1.1.0. Names, categories and skin tones: `emoji-datasource-google` 16.0.0
(MIT, © Cal Henderson). 3,372 captioned images. The weights are under the MIT licence.
"""
