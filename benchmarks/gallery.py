"""What it looks like: the first held-out prompts, whatever comes of them, by every method at one size.

    python benchmarks/gallery.py                   benchmarks/gallery.png
    python benchmarks/gallery.py --model emoji-flux

Prompts, seeds, scores and compensation are those of benchmarks/fidelity.py; all are compensated.
"""

import argparse
from pathlib import Path

import fidelity
from PIL import Image, ImageDraw, ImageFont

import ecodiff
from ecodiff import catalog
from ecodiff.learning.calibration import Calibration

ROWS = (
    ("surgeon", 0.2, "ecodiff"),
    ("surgeon", 0.4, "ecodiff"),
    ("obs-diff", 0.4, "OBS-Diff"),
    ("wanda", 0.4, "Wanda"),
    ("ecodiff", 0.4, "EcoDiff as published"),
)
TILE, MARGIN, HEAD = 112, 176, 34  # pixels


def drawn(pipe, model: catalog.Model, prompts: list[str]) -> list[tuple[str, list[Image.Image]]]:
    """Rows of (what it is, images), the dense model's first."""
    found = [("dense", [sample.image for sample in fidelity.draw(pipe, model, prompts)])]
    calibration = Calibration(pipe, model.prompts("calibration"), model.compensation())
    for method in dict.fromkeys(method for method, *_ in ROWS):
        wanted = {ratio: title for name, ratio, title in ROWS if name == method}
        every = fidelity.variants(method, pipe, model, list(wanted), 0.3, calibration)
        for label, ratio, small, *_ in every:
            if label.endswith("+"):
                images = [sample.image for sample in fidelity.draw(small, model, prompts)]
                found.append((f"{wanted[ratio]}\n{ratio:.0%} removed", images))
                print(found[-1][0].replace("\n", ", "), flush=True)
    return found


def sheet(prompts: list[str], rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Rows under the prompts' words."""
    page = Image.new("RGB", (MARGIN + TILE * len(prompts), HEAD + TILE * len(rows)), "white")
    pen, font, small = ImageDraw.Draw(page), ImageFont.load_default(15), ImageFont.load_default(11)
    for column, prompt in enumerate(prompts):
        words = prompt if len(prompt) <= 18 else prompt[:17] + "…"
        pen.text(
            (MARGIN + TILE * column + TILE // 2, HEAD // 2), words, fill="#334155", font=small, anchor="mm"
        )
    for row, (title, images) in enumerate(rows):
        top = HEAD + TILE * row
        pen.multiline_text((12, top + TILE // 2), title, fill="#0f172a", font=font, anchor="lm", spacing=6)
        for column, image in enumerate(images):
            tile = image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
            page.paste(tile, (MARGIN + TILE * column, top))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emoji-sdxl")
    options = parser.parse_args()
    of_model = "" if options.model == "emoji-sdxl" else f"-{options.model}"
    out = Path(__file__).with_name(f"gallery{of_model}.png")
    model, pipe = catalog.find(options.model), ecodiff.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    prompts = model.prompts("heldout")[:8]
    sheet(prompts, drawn(pipe, model, prompts)).save(out, optimize=True)


if __name__ == "__main__":
    main()
