"""`compare`: measure a pruned model against its dense one."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import EcodiffError
from ._common import drawing_arguments, drawing_of, open_pruned, save_image, say_cut_off
from ._common import report as tell

HELP = "measure a pruned model against its dense one"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="a pruned folder")
    parser.add_argument("prompt", nargs="?", help="one prompt (default: held-out prompts)")
    parser.add_argument("--dense", help="the dense model (default: the one that the plan names)")
    parser.add_argument("--count", type=int, default=16, help="how many held-out prompts")
    parser.add_argument(
        "--report",
        action="store_true",
        help="size, speed and error, also with int8 weights, into its model card",
    )
    drawing_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Dense beside pruned: one prompt, or the held-out prompts of the model."""
    from .. import catalog
    from ..checkpoints.loading import load
    from ..metrics.fidelity import compare, fidelity, generate

    small, base = open_pruned(options)
    pipe = load(base)
    defaults = drawing_of(base, options)
    if options.count < 1:
        raise EcodiffError(f"--count is {options.count}; give at least 1.")
    if options.report:
        return _report(options, pipe, small, base)
    if options.prompt:
        say_cut_off(pipe, options.prompt)
        dense, pruned = (generate(p, options.prompt, options.seed, **defaults) for p in (pipe, small))
        out = Path(options.out or f"ecodiff-compare-{options.seed}.png")
        pair = dense.image.copy().resize((2 * dense.image.width, dense.image.height))
        pair.paste(dense.image, (0, 0))
        pair.paste(pruned.image, (dense.image.width, 0))
        save_image(pair, out)
        values, extra = vars(fidelity(dense, pruned)), [("dense | pruned", str(out))]
        found = {"mean": values, "prompt": options.prompt, "seed": options.seed}
    else:
        prompts = catalog.find(base).prompts("heldout")[: options.count]
        with _one_bar(pipe, small, 2 * len(prompts)) as on_image:
            found = compare(pipe, small, prompts, [options.seed], **defaults, on_image=on_image)
        values, extra = found["mean"], [("prompts", str(len(prompts)))]
    rows = [
        *extra,
        ("latent error", f"{values['latent_error']:.4f}"),
        ("PSNR", f"{values['psnr']:.1f} dB"),
        ("SSIM", f"{values['ssim']:.3f}"),
    ]
    tell(options, rows, found)
    return 0


@contextmanager
def _one_bar(pipe, small, images: int | None = None) -> Iterator[Callable[[], object]]:
    """A progress bar over all images, in place of one an image; yields what advances it."""
    from tqdm import tqdm

    from ..pipelines import quiet

    with quiet(pipe), quiet(small), tqdm(total=images, unit="image") as bar:
        yield bar.update


def _report(options: argparse.Namespace, pipe, small, base: str) -> int:
    """The fixed report, printed and kept in the folder's README.md."""
    from .. import catalog
    from ..metrics.report import into_card, markdown, report
    from ..storage import write_text

    prompts = [options.prompt] if options.prompt else catalog.find(base).prompts("heldout")[: options.count]
    with _one_bar(pipe, small) as on_image:
        found = report(pipe, small, prompts, [options.seed], **drawing_of(base, options), on_image=on_image)
    card = Path(options.model) / "README.md"
    before = card.read_text(encoding="utf-8") if card.is_file() else ""
    write_text(card, into_card(before, markdown(found)))
    rows = []
    for name, row in found["models"].items():
        error = f", latent error {row['error']['mean']:.2g}" if row["error"] else ""
        rows.append((name, f"{row['bytes'] / 1e6:.1f} MB{error}"))
    tell(options, [*rows, ("kept in", str(card))], found)
    return 0
