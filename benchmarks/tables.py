"""Tables of benchmarks/README.md, as Markdown, from what the other scripts wrote.

    python benchmarks/tables.py

tests/test_readme.py holds the page to them.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from ecodiff.app.ui.show import mean_and_median

HERE = Path(__file__).parent
ORDERS = {"ecodiff": "ecodiff", "random": "random", "magnitude": "norm of the weights"}


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    first, *rest = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([first, "|---" * (first.count("|") - 1) + "|", *rest])


def peers(found: dict) -> str:
    """What other tools cost, repaired, a row a tool."""
    cells = {(row["tool"], row["kinds"], row["ratio"]): mean_and_median(row) for row in found["rows"]}
    tools = dict.fromkeys(row["tool"] for row in found["rows"] if row["tool"].endswith("+"))
    places = [(kinds, ratio) for kinds in ("heads and FFN", "all kinds") for ratio in (0.2, 0.4)]
    return markdown(
        (found["model"], "heads and FFN, 20 %", "40 %", "all kinds, 20 %", "40 %"),
        [(tool.removesuffix(" +"), *(cells.get((tool, *place), "") for place in places)) for tool in tools],
    )


def quantised(found: dict) -> str:
    """Pruned, quantised and both, a row a model and size."""
    kinds = list(dict.fromkeys(row["kind"] for sizes in found.values() for row in sizes["sizes"]))
    rows = []
    for model, measured in found.items():
        for removed in dict.fromkeys(row["removed"] for row in measured["sizes"]):
            cells = {row["kind"]: row for row in measured["sizes"] if row["removed"] == removed}
            size = f"{100 * removed:.0f} %" if removed else "nothing"
            errors = (
                f"{mean_and_median(cells[k]['interval'])}, {cells[k]['bytes'] / 1e6:.1f} MB" for k in kinds
            )
            rows.append((model, size, *errors))
    return markdown(("model", "removed", *kinds), rows)


def learned_on_rounded(found: dict) -> str:
    """What ranking on rounded weights costs, a row a model and kind of weights."""
    rows = [
        (model, row["kind"], f"{row['spearman']:.2f}", mean_and_median(row["interval"]))
        for model, measured in found.items()
        for row in measured["learning"]
    ]
    return markdown(("model", "weights learned on", "correlation", "latent error, 20 %"), rows)


def text_encoders(found: dict) -> str:
    """What smaller text encoders cost, a row a model and order."""
    rows = []
    for model, measured in found.items():
        for order, word in ORDERS.items():
            for plus in ("", "+"):
                row = [measured[f"{order} {percent}%{plus}"] for percent in (10, 20, 30, 40)]
                hits = f"{row[2]['top1'][0]:.2f}"
                rows.append((model, f"{word} {plus}".strip(), *map(mean_and_median, row), hits))
    return markdown(("model", "order", "10 %", "20 %", "30 %", "40 %", "top-1 at 30 %"), rows)


def healing(found: dict) -> str:
    """What healing brings, a row an order, a size and a moment."""
    head = ("order", "removed", "healed", "seconds", "latent error", "top-1")
    rows = [
        (
            f"`{row['method']}`",
            f"{row['ratio']:.0%}".replace("%", " %"),
            {"compensated": "not yet", "repaired": f"repaired by {row['repair']} trajectories"}.get(
                row["after"], f"and {row['after']}"
            ),
            f"{row['seconds']:.0f}",
            mean_and_median(row),
            f"{row['top1'][0]:.2f}",
        )
        for row in found["rows"]
    ]
    return markdown(head, list(dict.fromkeys(rows)))  # two repairs of the same start from the same


def learned_order(found: dict) -> str:
    """What learning adds to surgeon's order, a row a way, rate and length."""
    words = {"gates": "hard-concrete gates", "hard": "under the hard constraint", "surgeon": "`surgeon`"}
    cells: dict[tuple, dict] = {}
    for row in found["rows"]:
        cells.setdefault((row["way"], row.get("rate", ""), row["steps"]), {})[row["repaired"]] = row
    head = ("order", "rate", "steps", "latent error", "repaired")
    return markdown(
        head,
        [
            (
                words[way],
                str(rate),
                str(steps or ""),
                *(mean_and_median(both[plus]) for plus in (False, True)),
            )
            for (way, rate, steps), both in cells.items()
        ],
    )


def every() -> list[str]:
    """All of them, as the files are now."""
    read = lambda name: json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))  # noqa: E731
    rounded = read("quantised")
    compared = [peers(read(f"peers-{model}")) for model in ("emoji-sdxl", "emoji-flux")]
    return [
        *compared,
        quantised(rounded),
        learned_on_rounded(rounded),
        text_encoders(read("text_encoders")),
        healing(read("healing-emoji-flux")),
        learned_order(read("learned_order-emoji-flux")),
    ]


if __name__ == "__main__":
    print("\n\n".join(every()))
