"""`push`: upload a pruned model, or its plan, to the Hugging Face Hub."""

import argparse
from pathlib import Path

from ._common import report

HELP = "upload a pruned model, or its plan, to the Hugging Face Hub"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="a pruned folder")
    parser.add_argument("repo", help="NAME, or USER/NAME; made if it is not there")
    parser.add_argument("--plan", action="store_true", help="the plan alone, without weights")
    parser.add_argument("--public", action="store_true", help="a new repository is private otherwise")
    parser.add_argument("--token", help="default: $HF_TOKEN, or that of `hf auth login`")


def run(options: argparse.Namespace) -> int:
    """Upload a pruned folder, or its plan."""
    from ..checkpoints import hub
    from ..pruning.plan import PLAN_FILE, PrunePlan

    asked = (options.repo, options.token, not options.public)
    if options.plan:
        url = hub.push_plan(PrunePlan.load(Path(options.model) / PLAN_FILE), *asked)
    else:
        url = hub.push(options.model, *asked)
    report(options, [("uploaded to", url)], {"url": url})
    return 0
