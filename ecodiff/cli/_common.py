"""What several commands share."""

import argparse
import json
import sys
from pathlib import Path

from ..errors import EcodiffError, UnsupportedModelError


def drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of commands that generate images."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="PNG", help="where to save the image")
    parser.add_argument("--steps", type=int, help="time steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--size", type=int, help="pixels a side (default: the model's)")


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of commands that learn from trajectories."""
    parser.add_argument("--steps", type=int, help="time steps of a trajectory (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--size", type=int, help="pixels a side (default: the model's)")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts to learn on, one a line; of ten or more, a fifth is set aside to judge by",
    )


def lean_argument(parser: argparse.ArgumentParser) -> None:
    """The option to leave out what is never read of text encoders."""
    parser.add_argument(
        "--drop-unused",
        action="store_true",
        help="leave out layers of text encoders that the pipeline never reads: the same images",
    )


def without_unused(pipe, model):
    """A pipeline without them; what was left out is told on stderr."""
    from .. import catalog
    from ..checkpoints.unused import in_words, lean

    pipe, saved = lean(pipe, catalog.find(model))
    print(in_words(saved), file=sys.stderr)
    return pipe


def say_cut_off(pipe, prompt: str) -> None:
    """Tell on stderr what of a prompt the text encoders do not read."""
    from ..pipelines import cut_off

    if rest := cut_off(pipe, prompt):
        print(f"The prompt is too long: its end, {rest!r}, is cut off and not drawn.", file=sys.stderr)


def report(options: argparse.Namespace, rows: list[tuple[str, str]], result: dict) -> None:
    """Print a table for people and, if asked for, one JSON object."""
    print(table(rows))
    if options.json:
        print(json.dumps(result))


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)


def save_image(image, out: Path) -> None:
    """Write an image. Raises EcodiffError if that fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        image.save(out)
    except (OSError, ValueError) as error:
        raise EcodiffError(f"Could not write the image to {out}: {error}.") from None


def open_pruned(options: argparse.Namespace):
    """A pruned folder's pipeline, and the name of its dense model."""
    from ..checkpoints.loading import load
    from ..pipelines import denoiser_of
    from ..pruning.slicing import plan_of

    small = load(options.model)
    cut = plan_of(denoiser_of(small))
    if cut is None:
        raise UnsupportedModelError(
            f"{options.model} is not pruned; {options.command} takes a pruned folder."
        )
    base = options.dense or cut.metadata.get("model")
    if not base:
        raise EcodiffError("The plan does not name its dense model. Give it with --dense.")
    return small, base


def drawing_of(model: str, options: argparse.Namespace) -> dict:
    """Steps, guidance and size: as asked, else as the catalogue says (of the dense model)."""
    from .. import catalog

    return catalog.find(model).drawing(options.steps, options.guidance, options.size)
