"""What the commands take."""

import argparse
from collections.abc import Callable, Mapping

from ..config import HEAL_RATE, PRESETS
from ..units import ALL_KINDS

EXAMPLES = """examples:
  python -m ecodiff prune emoji-sdxl --ratio 0.2 --preset fast --out small
  python -m ecodiff prune RUN --ratio 0.3 --out smaller      another size, without learning again
  python -m ecodiff generate small "a red apple" --seed 7
  python -m ecodiff compare small "a red apple" --seed 7
  python -m ecodiff bring sdxl heads.pt ffn.pt --run RUN     EcoDiff's masks, then: prune RUN --ratio 0.2
  python -m ecodiff heal small --out healed --steps 200      a short distillation, resumable
  python -m ecodiff lora small pixel-art.safetensors --out small-pixel-art.safetensors
  python -m ecodiff push small my-small-model                to the Hugging Face Hub; --plan: no weights
  python -m ecodiff info stabilityai/stable-diffusion-xl-base-1.0
  accelerate launch -m ecodiff prune sdxl --out small        each GPU takes its share of every batch

MODEL is an embedded model's name (emoji-sdxl), a diffusers folder, a Hub id, or a .safetensors file
in the layout of the original authors.
exit codes: 0 done, 1 failed (the reason is on stderr), 2 wrong usage, 130 stopped by Ctrl-C.
"""


def _command(commands, name: str, text: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object as last line")
    return sub


def _drawing(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--steps", type=int, help="time steps (default: the model's)")
    sub.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    sub.add_argument("--out", metavar="PNG", help="where to save the image")


def _pruning(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--ratio", type=float, default=0.2, help="fraction of the denoiser's parameters to remove"
    )
    sub.add_argument("--preset", choices=list(PRESETS), default="balanced")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder of the pruned pipeline")
    sub.add_argument("--run", metavar="DIR", help="the run's folder; an unfinished one is resumed")
    sub.add_argument("--kinds", nargs="+", choices=ALL_KINDS, help="what may go (default: heads ffn resnet)")
    sub.add_argument("--seed", type=int, help="of prompts, noise and gates")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")
    sub.add_argument(
        "--no-compensate",
        dest="compensate",
        action="store_false",
        help="leave the weights that stay as they are",
    )
    sub.add_argument("--layers", action="store_true", help="list what every layer became")


def parser(functions: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """The arguments of every command; `functions` run them."""
    root = argparse.ArgumentParser(
        prog="python -m ecodiff",
        description="Make diffusion models smaller by learning which heads and neurons matter.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True)

    sub = _command(commands, "prune", "learn which units matter, remove the rest, save the model")
    sub.add_argument("model", help="MODEL, or the folder of a finished run")
    _pruning(sub)

    sub = _command(commands, "bring", "make a run of what was learned elsewhere, to prune by")
    sub.add_argument("model", help="MODEL, the dense one")
    sub.add_argument(
        "files",
        nargs="+",
        help="a plan, the zip of a pruned model, EcoDiff's .pt masks, or USER/NAME on the Hub",
    )
    sub.add_argument("--run", required=True, metavar="DIR", help="a new folder; `prune DIR` cuts by it")

    sub = _command(commands, "generate", "generate an image")
    sub.add_argument("model", help="MODEL or a pruned folder")
    sub.add_argument("prompt")
    _drawing(sub)

    sub = _command(commands, "compare", "measure a pruned model against its dense one")
    sub.add_argument("model", help="a pruned folder")
    sub.add_argument("prompt", nargs="?", help="one prompt (default: held-out prompts)")
    sub.add_argument("--dense", help="the dense model (default: the one that the plan names)")
    sub.add_argument("--count", type=int, default=16, help="how many held-out prompts")
    _drawing(sub)

    sub = _command(commands, "heal", "train what is left towards the dense model for a while (LoRA, merged)")
    sub.add_argument("model", help="a pruned folder")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder of the healed pipeline")
    sub.add_argument("--steps", type=int, default=100)
    sub.add_argument("--rank", type=int, default=16, help="of the updates")
    sub.add_argument("--rate", type=float, default=HEAL_RATE, help="peak learning rate")
    sub.add_argument("--dense", help="the dense model (default: the one that the plan names)")
    sub.add_argument("--run", metavar="DIR", help="where its state is kept (default: OUT.heal)")
    sub.add_argument("--count", type=int, default=8, help="held-out prompts to judge by")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")

    sub = _command(commands, "lora", "cut a LoRA of the dense model to fit a pruned one")
    sub.add_argument("model", help="a pruned folder")
    sub.add_argument("lora", help="a .safetensors file in diffusers', PEFT's or kohya's naming")
    sub.add_argument("--out", required=True, metavar="FILE", help="the translated LoRA, .safetensors")

    sub = _command(commands, "fill", "write a pruned model in the dense shapes, zeros where units were")
    sub.add_argument("model", help="a pruned folder")
    sub.add_argument("--out", required=True, metavar="PATH", help="a new folder, or a .safetensors file")

    sub = _command(commands, "push", "upload a pruned model, or its plan, to the Hugging Face Hub")
    sub.add_argument("model", help="a pruned folder")
    sub.add_argument("repo", help="NAME, or USER/NAME; made if it is not there")
    sub.add_argument("--plan", action="store_true", help="the plan alone, without weights")
    sub.add_argument("--public", action="store_true", help="a new repository is private otherwise")
    sub.add_argument("--token", help="default: $HF_TOKEN, or that of `hf auth login`")

    sub = _command(commands, "info", "show what can be pruned, without downloading weights")
    sub.add_argument("model", help="MODEL or a pruned folder")
    for name, sub in commands.choices.items():
        sub.set_defaults(function=functions[name])
    return root
