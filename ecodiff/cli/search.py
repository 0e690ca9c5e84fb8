"""`search`: find a model to prune, in the catalogue and on the Hub."""

import argparse

from ._common import report

HELP = "find a model to prune, in the catalogue and on the Hub"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("words", nargs="+", help="words of its name")


def run(options: argparse.Namespace) -> int:
    """Catalogue first, then the Hub by downloads."""
    from ..checkpoints.hub import find_models

    found = find_models(" ".join(options.words))
    rows = [(model["name"], model["title"]) for model in found["catalogue"]]
    for row in found["hub"]:
        gated = f", gated: accept its licence on {row['url']}" if row["gated"] else ""
        rows.append((row["id"], f"{row['downloads']:,} downloads, {row['licence']}{gated}"))
    rows += [("the Hub", found["error"])] if found["error"] else []
    report(options, rows or [("nothing", "no model that ecodiff can prune matches these words")], found)
    return 0
