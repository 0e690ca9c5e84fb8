"""`export`: write a pruned model in another format."""

import argparse
from pathlib import Path

from ._common import lean_argument, report, without_unused

HELP = "write a pruned model in another format"
ALIASES = ("fill",)


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="a pruned folder")
    names = "comfyui, dense (default), diffusers, fp8, gguf-q8_0, gguf-q5_0, gguf-q4_0, int8 or nf4"
    parser.add_argument("--format", default="dense", metavar="NAME", help=names)
    lean_argument(parser)
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="a new folder, or a .safetensors or .gguf file"
    )


def run(options: argparse.Namespace) -> int:
    """A pruned folder in another format."""
    from ..checkpoints.formats import find_format
    from ..checkpoints.loading import disk_dtype, load

    chosen = find_format(options.format)
    small = load(options.model)
    if options.drop_unused:
        small = without_unused(small, options.model)
    out = chosen.write(small, Path(options.out), disk_dtype(options.model))
    report(options, [("saved in", str(out)), ("note", chosen.words)], {"out": str(out)})
    return 0
