"""What healing brings, by minutes: a cut model repaired on more trajectories, then trained for a while.

    python benchmarks/healing.py [--model emoji-flux] [--methods surgeon thorough] [--ratios 0.2 0.4 0.5 0.6]
    python benchmarks/healing.py --figure                only draws the figure again

Cut by each order at each size and compensated; then `heal` with its defaults. Errors of held-out pairs as in
fidelity.py, after compensation, after the repair (which `thorough` has already), after half of the steps of
training, and of what is merged at the end, with the seconds of healing until then (measuring left out).
"""

import json
import time
from pathlib import Path

from fidelity import Recognition, arguments, draw, measure, opened, results_file

import ecodiff
from ecodiff.config import HEAL_REPAIR, PRESETS
from ecodiff.learning.heal import heal


def figure(found: dict, path: Path) -> None:
    """Latent error against minutes of healing, a line for every size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, panels = pyplot.subplots(1, 2, figsize=(12, 4.5), dpi=150)
    kinds = {"latent_error": "mean latent error", "latent_error_median": "median latent error"}
    for axes, (kind, words) in zip(panels, kinds.items(), strict=True):
        lines: dict[tuple, list] = {}
        for row in found["rows"]:
            cut = (row["method"], row["ratio"], row["repair"])
            lines.setdefault(cut, []).append((row["seconds"] / 60, row[kind][0]))
        for (method, ratio, repair), points in lines.items():
            x, y = zip(*points, strict=True)
            marker, line = "o" if method == "surgeon" else "s", "-" if repair == HEAL_REPAIR else "--"
            label = f"{ratio:.0%} removed by {method}, repaired by {repair}"
            axes.plot(x, y, line, marker=marker, color=f"C{round(10 * ratio)}", label=label)
        axes.set(yscale="log", xlabel="minutes of healing", ylabel=words)
        axes.grid(alpha=0.3, which="both")
    panels[1].legend(fontsize=8, loc="center", bbox_to_anchor=(0.55, 0.3))
    drawing.suptitle(f"{found['model']}, {found['pairs']} held-out pairs: compensated, repaired, trained")
    drawing.tight_layout()
    drawing.savefig(path)


def main() -> None:
    parser = arguments(__doc__, [0.2, 0.4, 0.5, 0.6], 64)
    parser.set_defaults(model="emoji-flux")
    parser.add_argument("--methods", nargs="+", default=["surgeon", "thorough"], choices=list(PRESETS))
    parser.add_argument("--repair", type=int, default=HEAL_REPAIR)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    out = results_file("healing", options)
    if options.figure:
        figure(json.loads(out.read_text()), out.with_suffix(".png"))
        return
    model, pipe = opened(options)
    prompts, judged = model.prompts("calibration"), model.prompts("heldout")[: options.pairs]
    dense, recognised = draw(pipe, model, judged), Recognition(judged)
    found = {"model": options.model, "pairs": len(judged), "rows": []}
    for method in options.methods:
        scores = ecodiff.learn_masks(pipe, prompts, model.learn_config(method, options.learn_ratio))
        already = PRESETS[method].get("repair")
        compensation = model.compensation().on(already) if already else model.compensation()
        config = model.heal_config(repair=0 if already else options.repair, steps=options.steps)
        for ratio in options.ratios:
            small = ecodiff.variant(pipe, scores.plan(ratio=ratio))
            ecodiff.compensate_(small, pipe, prompts, compensation)
            cut = {"method": method, "ratio": ratio, "repair": already or options.repair}

            def note(after: str, seconds: float, small=small, cut=cut) -> None:
                row = cut | {"after": after, "seconds": seconds}
                row |= measure(dense, draw(small, model, judged), recognised)
                found["rows"].append(row)
                error, median = row["latent_error"][0], row["latent_error_median"][0]
                print(*cut.values(), after, f"{seconds:.0f} s: {error:.4f} ({median:.4f})", flush=True)
                out.write_text(json.dumps(found, indent=1) + "\n")

            note("compensated", spent := 0.0)
            begun, at = time.perf_counter(), {config.batches: "repaired"} if config.repair else {}
            at[config.batches + options.steps // 2] = f"{options.steps // 2} steps"
            for done, _ in heal(small, pipe, prompts, config):
                spent += time.perf_counter() - begun
                if done in at:  # the first time: batches of a check are no steps
                    note(at.pop(done), spent)
                begun = time.perf_counter()
            note(f"{options.steps} steps", spent + time.perf_counter() - begun)
    figure(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
