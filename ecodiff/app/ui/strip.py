"""A run's pictures as HTML: dense above pruned, what each size costs, and the curve of it."""

from collections.abc import Sequence
from html import escape
from statistics import fmean, median

from .show import closeness, latent_error

CURVE_WIDTH, CURVE_HEIGHT, MARGIN = 360, 132, 34  # of the drawing's own units


def strip(found: dict, asked: Sequence[float], steps: int = 0) -> str:
    """Rows of images: the dense model's, and one for each size.

    Args:
        found: as `service.pictures` returns it.
        asked: ratios that are shown, if they were drawn.
        steps: of the run; a size that was drawn before the last one says so.
    """
    rows = [row for row in found.get("sizes", []) if _is(row, asked)]
    if not rows and not (steps and found.get("dense")):
        return ""
    prompts = found["prompts"]
    words = "the original" if rows else "the original; pruned images come once the units are ranked"
    inner = _row("Dense", words, found["dense"], prompts, prompts)
    for row in rows:
        notes = [f"{psnr:.0f} dB" for psnr in row["psnr"]]
        inner += _row(f"−{row['ratio']:.0%}", _cost(row, steps), row["images"], prompts, notes)
    return f'<div class="eco-strip">{inner}</div>'


def cards(found: dict, asked: Sequence[float], title: str) -> str:
    """The dense model's images and those of each size, as cards side by side.

    Args:
        found, asked: as of `strip`.
        title: HTML above them.
    """
    prompts = found["prompts"]
    sizes = [row for row in found["sizes"] if _is(row, asked)]
    every = [("Dense", "the original", found["dense"])]
    every += [(f"−{row['ratio']:.0%}", closeness(median(row["psnr"])), row["images"]) for row in sizes]
    inner = "".join(
        f'<div class="eco-card"><div class="head"><b>{name}</b> {words}</div><div class="images">'
        + "".join(_image(image, prompt, name) for image, prompt in zip(images, prompts, strict=False))
        + "</div></div>"
        for name, words, images in every
    )
    return f'{title}<div class="eco-cards">{inner}</div>'


def _image(image: str, prompt: str, name: str) -> str:
    return f'<img src="{escape(image)}" alt="{escape(prompt)}, {escape(name)}" title="{escape(prompt)}">'


def _is(row: dict, asked: Sequence[float]) -> bool:
    return any(abs(row["asked"] - ratio) < 5e-3 for ratio in asked)


def drawn(found: dict, ratio: float) -> bool:
    """True if a size was drawn."""
    return any(_is(row, [ratio]) for row in found.get("sizes", []))


def missing(found: dict, ratio: float) -> str:
    """That a size was not drawn, and which were."""
    there = ", ".join(f"−{row['ratio']:.0%}" for row in found.get("sizes", []))
    words = f"Drawn so far: {there}." if there else "Nothing was drawn yet."
    return f'<p class="eco-notes">No pictures at −{ratio:.0%} yet. {words}</p>'


def _cost(row: dict, steps: int) -> str:
    psnr, error = median(row["psnr"]), fmean(row["latent_error"])
    if not row["repaired"]:
        of = f" of {steps}" if steps else ""
        at = f"after {row['step']}{of} steps, weights not repaired yet"
        return f"{closeness(psnr)} <small>{at}</small>"
    figures = f"PSNR {psnr:.1f} dB, latent error {latent_error(error)}"
    return f"{closeness(psnr)} <small>{figures}</small>"


def _row(name: str, words: str, images: Sequence[str], prompts: Sequence[str], notes: Sequence[str]) -> str:
    cells = "".join(
        f"<figure>{_image(image, prompt, name)}<figcaption>{escape(note)}</figcaption></figure>"
        for image, prompt, note in zip(images, prompts, notes, strict=False)
    )
    return f'<div class="head"><b>{name}</b> {words}</div><div class="images">{cells}</div>'


def curve(found: dict, asked: float = -1.0) -> str:
    """Mean latent error against the size, as a drawing; the size that is asked for is filled.

    A point that is pressed sets the size (`theme.JS`), so its images are shown. Sizes that were not drawn
    with repaired weights are left out.
    """
    rows = [row for row in found.get("sizes", []) if row["repaired"]]
    if len(rows) < 2:
        return ""
    most = max(fmean(row["latent_error"]) for row in rows) or 1.0
    right = max(row["ratio"] for row in rows)

    def at(row: dict) -> tuple[float, float]:
        across = row["ratio"] / right * (CURVE_WIDTH - 2 * MARGIN)
        down = fmean(row["latent_error"]) / most * (CURVE_HEIGHT - 2 * MARGIN)
        return MARGIN + across, CURVE_HEIGHT - MARGIN - down

    points = [at(row) for row in rows]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(MARGIN, CURVE_HEIGHT - MARGIN), *points])
    marks = "".join(
        f'<g role="button" tabindex="0" data-percent="{100 * row["asked"]:.0f}" '
        f'aria-label="Show −{row["ratio"]:.0%}: latent error {latent_error(fmean(row["latent_error"]))}">'
        f'<circle class="touch" cx="{x:.1f}" cy="{y:.1f}" r="16"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{"here" if _is(row, [asked]) else ""}"/></g>'
        f'<text x="{x:.1f}" y="{CURVE_HEIGHT - MARGIN + 15}">−{row["ratio"]:.0%}</text>'
        f'<text x="{x:.1f}" y="{y - 8:.1f}">{latent_error(fmean(row["latent_error"]))}</text>'
        for row, (x, y) in zip(rows, points, strict=True)
    )
    return (
        f'<figure class="eco-curve"><svg viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" role="group" '
        'aria-label="Latent error by size">'
        f'<polyline points="{line}"/>{marks}</svg>'
        f"<figcaption>Latent error by size, repaired: {len(found['prompts'])} prompts that nothing was "
        "learned on; 0 is identical, 1 is unrelated. Choose a point to see its images.</figcaption></figure>"
    )
