"""The command line, `python -m ecodiff`: every other module of this package is a command.

A command's module says its arguments and does its work. What is heavy is imported when the work begins, so
`--help` answers at once.
"""

import argparse
import sys
from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from ..errors import EcodiffError, memory_advice

EXAMPLES = """examples:
  python -m ecodiff prune emoji-sdxl --ratio 0.2 --preset fast --out small
  python -m ecodiff prune RUN --ratio 0.3 --out smaller      another size, without learning again
  python -m ecodiff generate small "a red apple" --seed 7
  python -m ecodiff compare small "a red apple" --seed 7
  python -m ecodiff import sdxl heads.pt ffn.pt --run RUN    EcoDiff's masks, then: prune RUN --ratio 0.2
  python -m ecodiff heal small --out healed --steps 200      a short distillation, resumable
  python -m ecodiff lora small pixel-art.safetensors --out small-pixel-art.safetensors
  python -m ecodiff export small --format dense --out filled for tools that know the dense shapes only
  python -m ecodiff push small my-small-model                to the Hugging Face Hub; --plan: no weights
  python -m ecodiff info stabilityai/stable-diffusion-xl-base-1.0
  accelerate launch -m ecodiff prune sdxl --out small        each GPU takes its share of every batch

MODEL is an embedded model's name (emoji-sdxl), a diffusers folder, a Hub id, or a .safetensors file
in the layout of the original authors.
exit codes: 0 done, 1 failed (the reason is on stderr), 2 wrong usage, 130 stopped by Ctrl-C.
"""


def commands() -> dict[str, ModuleType]:
    """Every command by its name: a module with HELP, `arguments(parser)` and `run(options)`."""
    found = {}
    for module in iter_modules(__path__):
        if not module.name.startswith("_"):
            found[module.name.rstrip("_")] = import_module(f"{__name__}.{module.name}")
    return found


COMMANDS = commands()


def parser(found: Mapping[str, ModuleType] = COMMANDS) -> argparse.ArgumentParser:
    """The arguments of every command."""
    shown: dict[str, Any] = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    root = argparse.ArgumentParser(
        prog="python -m ecodiff",
        description="Make diffusion models smaller by learning which heads and neurons matter.",
        **shown,
    )
    choices = root.add_subparsers(dest="command", required=True)
    for name, module in found.items():
        aliases = getattr(module, "ALIASES", ())
        sub = choices.add_parser(name, help=module.HELP, description=module.HELP, aliases=aliases, **shown)
        sub.add_argument("--json", action="store_true", help="print one JSON object as last line")
        module.arguments(sub)
        sub.set_defaults(run_command=module.run)
    return root


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    options = parser().parse_args(arguments)
    from ..learning import distributed
    from ..machine import be_quiet

    be_quiet()
    try:
        distributed.join()
        with memory_advice("Take a smaller model or image, or a device with more memory."):
            return options.run_command(options)
    except EcodiffError as error:
        print(f"ecodiff: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        distributed.leave()
