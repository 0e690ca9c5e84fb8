"""`search`: find a model to prune, in the catalogue and on the Hub."""

import argparse

from ._common import report

HELP = "find a model to prune, in the catalogue and on the Hub"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("words", nargs="+", help="words of its name")


def run(options: argparse.Namespace) -> int:
    """Catalogue first, then the Hub by downloads."""
    from .. import catalog
    from ..checkpoints import hub
    from ..errors import EcodiffError

    words = " ".join(options.words)
    known, error = catalog.search(words), ""
    try:
        found = [row for row in hub.search(words) if row["id"] not in {model.source for model in known}]
    except EcodiffError as failed:
        found, error = [], str(failed)
    rows = [(model.name, model.title) for model in known]
    for row in found:
        gated = f", gated: accept its licence on {row['url']}" if row["gated"] else ""
        rows.append((row["id"], f"{row['downloads']:,} downloads, {row['licence']}{gated}"))
    rows += [("the Hub", error)] if error else []
    result = {"catalogue": [model.name for model in known], "hub": found, "error": error}
    report(options, rows or [("nothing", "no model that ecodiff can prune matches these words")], result)
    return 0
