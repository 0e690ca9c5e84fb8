"""`import`: make a run of what was learned elsewhere, to prune by."""

import argparse
from pathlib import Path

from ._common import report

HELP = "make a run of what was learned elsewhere, to prune by"
ALIASES = ("bring",)


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="MODEL, the dense one")
    parser.add_argument(
        "files",
        nargs="+",
        help="a plan, the zip of a pruned model, EcoDiff's .pt masks, or USER/NAME on the Hub",
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="a new folder; `prune DIR` cuts by it")


def run(options: argparse.Namespace) -> int:
    """Make a run of what was learned elsewhere."""
    from .. import catalog
    from ..checkpoints import hub
    from ..runs.importing import import_run

    known = catalog.find(options.model)
    files = [hub.pull_plan(file) if hub.is_repo(file) else file for file in options.files]
    run = import_run(Path(options.run), known.name, known.learn_config("fast", 0.2), files)
    rows = [("run", f"{run.folder}  (python -m ecodiff prune {run.folder} --out DIR)")]
    report(options, rows, {"run": str(run.folder)})
    return 0
