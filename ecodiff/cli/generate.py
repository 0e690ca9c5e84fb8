"""`generate`: generate an image."""

import argparse
from pathlib import Path

from ._common import drawing_arguments, drawing_of, report, save_image, say_cut_off

HELP = "generate an image"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="MODEL or a pruned folder")
    parser.add_argument("prompt")
    drawing_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """One image from a dense or a pruned model."""
    from ..checkpoints.loading import load
    from ..metrics.fidelity import generate

    pipe = load(options.model, offload=True)
    say_cut_off(pipe, options.prompt)
    sample = generate(pipe, options.prompt, options.seed, **drawing_of(options.model, options))
    out = Path(options.out or f"ecodiff-{options.seed}.png")
    save_image(sample.image, out)
    rows = [("saved in", str(out)), ("time", f"{sample.milliseconds:.0f} ms")]
    report(options, rows, {"out": str(out), "milliseconds": sample.milliseconds})
    return 0
