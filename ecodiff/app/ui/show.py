"""Results as HTML: figures, progress, the picture of what each layer keeps."""

from collections.abc import Iterable
from html import escape
from math import ceil, inf, nan

from ...units import KINDS
from ..service import megabytes

STAGES = {
    "queued": "Waiting",
    "loading": "Loading the model",
    "learning": "Learning",
    "calibrating": "Preparing the repair",
    "finished": "Finished",
    "stopped": "Stopped",
    "failed": "Failed",
    "interrupted": "Interrupted",
}


def millions(count: float) -> str:
    """Parameters for people."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def duration(seconds: float) -> str:
    """Time left, rounded up: "45 s", "3 min", "2.5 h"."""
    if seconds < 60:
        return f"{ceil(seconds)} s"
    return f"{ceil(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def figures(rows: Iterable[tuple[str, str, str]]) -> str:
    """Cards of (label, value, small print)."""
    cards = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)} <small>{escape(note)}</small></dd></div>"
        for label, value, note in rows
    )
    return f'<dl class="eco-figures">{cards}</dl>'


def table(rows: list[dict[str, str]], label: str) -> str:
    """Rows of the same columns; on a narrow screen it scrolls by itself."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(v)}</td>' for v in row.values())}</tr>" for row in rows)
    scroll = f'class="eco-table" tabindex="0" role="region" aria-label="{escape(label)}"'
    return f"<div {scroll}><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def failure(message: str) -> str:
    """What went wrong."""
    return f'<p class="eco-error" role="alert">{escape(message)}</p>'


def heading(name: str, status: dict) -> str:
    """Which run it is."""
    size = f"−{status['size'] or status['ratio']:.0%}"
    errors = status["orders"]
    best = " · ".join(f"{escape(name)} {errors[name]:.2g}" for name in sorted(errors, key=errors.__getitem__))
    why = "Typical latent error of each order, repaired, on held-out trajectories: the first was taken."
    orders = f' · <span title="{why}">orders measured: {best}</span>' if errors else ""
    return f'<p class="eco-run"><b>{escape(name)}</b> · learned for {size}{orders}</p>'


def progress(status: dict) -> str:
    """Stage, step, loss, size, time left and a bar."""
    stage, step, steps = status["stage"], status["step"], status["steps"]
    words = [f"<b>{STAGES[stage]}</b>"]
    if stage == "queued" and status["ahead"]:
        words.append(f"{status['ahead']} run(s) before this one")
    if stage == "learning" and step < status["warm_steps"] and status["share"] is None:
        words.append("finding a start")
    if status["share"] is None:
        words.append(f"step {step} of {steps}")
    elif stage == "learning":
        words.append("gathering statistics" if status["share"] < 1 else "ordering units")
    learned = [row for row in status["history"] if "loss" in row]
    if learned:
        words.append(f"loss {learned[-1]['loss']:.4f}")
        words.append(f"{learned[-1]['expected']:.1%} removed")
    if status["seconds_left"] is not None:
        words.append(f"about {duration(status['seconds_left'])} left")
    share = 100 * (step / max(1, steps) if status["share"] is None else status["share"])
    if status["memory"] and stage == "learning":
        words.append(f"memory: {escape(status['memory'])}")
    failed = failure(status["error"]) if status["error"] else ""
    note = ""
    if stage in ("stopped", "failed", "interrupted"):
        note = "<p>Nothing is lost: <b>Resume</b> goes on from the last step.</p>"
    return (
        f'<div class="eco-status" role="status">{" · ".join(words)}'
        f'<div class="eco-progress" role="progressbar" aria-label="Learning" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{share:.0f}"><div style="width:{share:.1f}%"></div></div>'
        f"{failed}{note}</div>"
    )


def size(facts: dict) -> str:
    """What a cut leaves, counted."""
    return figures(
        [
            (
                "Parameters of the denoiser",
                millions(facts["params_pruned"]),
                f"of {millions(facts['params_dense'])}, −{facts['ratio']:.1%}",
            ),
            *_encoders(facts["text_encoders"]),
            (
                "Weights on disk",
                megabytes(facts["bytes_pruned"]),
                f"dense {megabytes(facts['bytes_dense'])}",
            ),
            (
                "Units removed",
                f"{facts['units_removed']:,}",
                f"of {facts['units']:,}",
            ),
        ]
    )


def _encoders(facts: dict) -> list[tuple[str, str, str]]:
    """A card for text encoders that are smaller, if they are."""
    dense, pruned = facts["params_dense"], facts["params_pruned"]
    if dense == pruned:
        return []
    return [("Text encoders", millions(pruned), f"of {millions(dense)}, −{1 - pruned / dense:.1%}")]


def drawing(what: str) -> str:
    """What is being drawn now."""
    return f'<p class="eco-notes" role="status">Drawing {what} …</p>'


def comparison(facts: dict, link: str, title: str, suggested: list[str]) -> str:
    """Speed, size and fidelity of one pair of images, and where to find it again.

    Args:
        suggested: prompts that the model knows, if it does not know this one.
    """
    low, faster, high = facts["speedup"] or (0.0, 0.0, 0.0)
    rows = [
        ("Parameters", millions(facts["params_pruned"]), f"dense {millions(facts['params_dense'])}"),
        (
            "Weights",
            megabytes(facts["bytes_pruned"]),
            f"dense {megabytes(facts['bytes_dense'])}",
        ),
        (
            "Speed of a step",
            f"{faster:.2f}×" if faster else "not measured",
            f"of the dense model's; {low:.2f} to {high:.2f} (95 %)" if faster else "the machine is busy",
        ),
        ("Latent error", latent_error(facts["latent_error"]), "0 is identical"),
        ("PSNR", f"{facts['psnr']:.1f} dB", closeness(facts["psnr"])),
        ("SSIM", f"{facts['ssim']:.3f}", "1 is identical"),
    ]
    if facts["peak_pruned"] is not None:
        peak, dense = (megabytes(facts[f"peak_{name}"]) for name in ("pruned", "dense"))
        rows.insert(3, ("GPU memory at most", peak, f"dense {dense}"))
    return (
        f'<p class="eco-notes"><b>{escape(title)}</b>{_known(suggested)}</p>{figures(rows)}'
        f'<p class="eco-notes"><a href="{escape(link)}">Link to this comparison</a> with its '
        "run, size, prompt, seed and settings. Whoever has it can use the run.</p>"
    )


def _known(suggested: list[str]) -> str:
    if not suggested:
        return ""
    words = ", ".join(f"“{escape(prompt)}”" for prompt in suggested)
    return f". This small model knows emoji by their names only. Try {words}."


# What people see, by PSNR of their images: bounds set by eye on the strips of the embedded models' examples.
WORDS = (
    (35.0, "hard to tell apart"),
    (25.0, "small differences"),
    (15.0, "visibly different"),
    (0.0, "another image"),
)


def closeness(psnr: float) -> str:
    """A PSNR in words."""
    return next((word for least, word in WORDS if psnr >= least), WORDS[-1][1])


def surveyed(means: list[dict], count: int, done: int = 0) -> str:
    """What several sizes cost, on average over the prompts that were drawn so far."""
    status = f"Loading and cutting; {count} prompts to draw." if not done else f"{done} of {count} prompts."
    if done == count:
        status = f"Averages over {count} prompts; below, the prompts that suffer most come first."
    cards = [
        (
            f"−{m['ratio']:.0%}",
            closeness(m["psnr"]),
            f"PSNR {m['psnr']:.1f} dB, error {latent_error(m['latent_error'])}",
        )
        for m in means
    ]
    return f'{figures(cards)}<p class="eco-notes" role="status">{status}</p>'


def layers(kept: dict[str, float], kinds: dict[str, str]) -> str:
    """One cell a layer, filled as far as it is kept; a row for each kind of unit.

    Args:
        kept, kinds: of each group.
    """
    rows: dict[str, dict[str, float]] = {}
    for kind, unit in KINDS.items():
        word = unit.word[0].upper() + unit.word[1:]
        found = {name: share for name, share in kept.items() if kinds[name] == kind}
        crossed = {name: share for name, share in found.items() if name.endswith("attn2")}
        rows[word] = {name: share for name, share in found.items() if name not in crossed}
        rows[f"{word}, cross-attention"] = crossed
    lines = ""
    for label, cells in rows.items():
        if not cells:
            continue
        mean = sum(cells.values()) / len(cells)
        inner = "".join(
            f'<div class="cell" title="{escape(name)}: {share:.0%} kept">'
            f'<div style="height:{100 * share:.0f}%"></div></div>'
            for name, share in cells.items()
        )
        lines += (
            f'<div class="row"><span>{label}<br>{mean:.0%} kept</span>'
            f'<div class="cells" role="img" aria-label="{label}: {mean:.0%} kept on average over '
            f'{len(cells)} layers">{inner}</div></div>'
        )
    return f'<div class="eco-layers">{lines}</div>'


def measured(found: dict) -> list[dict[str, str]]:
    """What benchmarks/fidelity.py measured, a row a method: latent error by size, mean (and median).

    Methods whose units do not hold a size have none there, and come first: they are sorted by the largest.
    """
    ratios = sorted({row["ratio"] for row in found["rows"]})
    cells = {(row["method"], row["ratio"]): row for row in found["rows"]}
    worst = {"latent_error": [inf]}
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    methods.sort(key=lambda method: -cells.get((method, ratios[-1]), worst)["latent_error"][0])
    return [
        {"method": method}
        | {
            f"{ratio:.0%}": mean_and_median(cells[method, ratio]) if (method, ratio) in cells else "–"
            for ratio in ratios
        }
        | {"top-1 at 40 %": f"{cells.get((method, 0.4), {}).get('top1', [nan])[0]:.2f}".replace("nan", "–")}
        | {"trajectories": str(next(r["trajectories"] for r in found["rows"] if r["method"] == method))}
        for method in methods
    ]


def mean_and_median(row: dict) -> str:
    """A measured latent error: "mean (median)", or the mean where only that was measured."""
    mean = latent_error(row["latent_error"][0])
    return f"{mean} ({latent_error(row['latent_error_median'][0])})" if "latent_error_median" in row else mean


def benchmark(found: dict) -> str:
    """The same as Markdown."""
    rows = measured(found)
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row.values())} |" for row in rows)])


def latent_error(value: float) -> str:
    """Two digits, and no exponent."""
    if value >= 1e-4:
        return f"{value:.3f}" if value >= 0.1 else f"{value:.2g}"
    return f"{value:.6f}" if 0 < value < 1e-5 else f"{value:.5f}"


def healing(found: dict) -> str:
    """Where healing is, in words."""
    if found["stage"] == "healed":
        return (
            f"**Closer.** Latent error of held-out prompts (geometric mean): {found['before']:.4f} before, "
            f"{found['after']:.4f} now. Images and downloads of this size are the healed model's."
        )
    if found["stage"] == "unchanged":
        return (
            f"It did not get closer ({found['before']:.4f} before, {found['after']:.4f} after), so nothing "
            "was changed."
        )
    where = f"Step {found['step']} of {found['steps']}"
    if found["stage"] == "stopped":
        return f"Stopped at step {found['step']}. Nothing is lost: with the same settings it goes on."
    if found["loss"] is not None:
        where += f" · loss {found['loss']:.4f}"
    elif found["step"]:
        where += " · measuring, not training"
    return where + (f" · {duration(found['seconds_left'])} left" if found["seconds_left"] else "")
