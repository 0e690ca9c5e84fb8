"""Captioned emoji images: Microsoft Fluent Emoji 3D (MIT) named by emoji-datasource-google.

Both come from the npm registry, as published packages of fixed versions:

    @lobehub/fluent-emoji-3d 1.1.0      256x256 renderings, one file per code point sequence
    emoji-datasource-google 16.0.0      emoji.json: names, categories, skin tone variations
"""

import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emoji-datasource-google@16.0.0")
SIZE = 64

SKIN_TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
MAN, WOMAN, PERSON = "1f468", "1f469", "1f9d1"
MALE_SIGN, FEMALE_SIGN, JOINER = "2642", "2640", "200d"


@dataclass(frozen=True)
class Emoji:
    """One captioned image. `family` is shared by all skin tones and genders of one emoji."""

    code: str
    caption: str
    alias: str
    category: str
    family: str


def code_of(sequence: str) -> str:
    """Canonical code point sequence: lower case, no leading zeros, no variation selectors."""
    return "-".join(part.lstrip("0") for part in sequence.lower().split("-") if part != "fe0f")


def family_of(code: str) -> str:
    """The sequence without skin tone and gender: all variants of one emoji share it."""
    dropped = {*SKIN_TONES, MALE_SIGN, FEMALE_SIGN, JOINER}
    parts = [part for part in code.split("-") if part not in dropped]
    return "-".join(PERSON if part in (MAN, WOMAN) else part for part in parts)


def read_names(emoji_json: Path) -> dict[str, Emoji]:
    """Every emoji and skin tone variation of `emoji.json`, by canonical code."""
    emojis = {}
    for entry in json.loads(emoji_json.read_text(encoding="utf-8")):
        name = re.sub(r"\s+", " ", entry["name"].lower().replace("-", " ")).strip()
        short = re.sub(r"[_-]", " ", entry["short_name"]).strip()
        alias = short if len(short) > 2 else name
        variations = {"": entry["unified"]}
        variations |= {t: v["unified"] for t, v in entry.get("skin_variations", {}).items()}
        for tones, unified in variations.items():
            words = [SKIN_TONES[t] for t in tones.lower().split("-") if t]
            suffix = f", {' and '.join(words)} skin tone" if words else ""
            code = code_of(unified)
            emojis[code] = Emoji(code, name + suffix, alias + suffix, entry["category"], family_of(code))
    return emojis


def fetch(folder: Path) -> None:
    """Download and unpack the two npm packages into `folder`, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        target = folder / package.rpartition("@")[0].replace("/", "-").lstrip("@")
        if (target / "package" / "package.json").exists():
            continue
        packed = subprocess.run(
            ["npm", "pack", "--silent", package],
            cwd=folder,
            check=True,
            text=True,
            capture_output=True,
        )
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            wanted = [m for m in archive if m.name.endswith((".webp", ".json", "LICENSE"))]
            archive.extractall(target, members=wanted, filter="data")


def load(folder: Path) -> tuple[list[Emoji], torch.Tensor]:
    """The captioned emojis and their images, uint8 (n, 3, SIZE, SIZE), on white."""
    fetch(folder)
    names = read_names(folder / "emoji-datasource-google" / "package" / "emoji.json")
    files = {
        code_of(file.stem): file
        for file in (folder / "lobehub-fluent-emoji-3d" / "package" / "assets").glob("*.webp")
    }
    emojis = [names[code] for code in sorted(files.keys() & names.keys())]
    images = np.stack([_on_white(files[emoji.code]) for emoji in emojis])
    return emojis, torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _on_white(file: Path) -> np.ndarray:
    drawn = Image.open(file).convert("RGBA")
    page = Image.new("RGBA", drawn.size, "white")
    page.alpha_composite(drawn)
    return np.asarray(page.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def sampling_weights(emojis: list[Emoji], power: float = -0.5) -> torch.Tensor:
    """Probability of drawing each emoji while training, (n,).

    Over half of the images are skin tones and genders of people. An image weighs a power of its family's
    size: by default each family weighs the square root of its size, so that they do not crowd out the
    things there is one picture of.
    """
    sizes: dict[str, int] = {}
    for emoji in emojis:
        sizes[emoji.family] = sizes.get(emoji.family, 0) + 1
    weights = torch.tensor([sizes[emoji.family] ** power for emoji in emojis])
    return weights / weights.sum()
