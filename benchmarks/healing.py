"""What healing brings, by minutes: a cut model repaired on more trajectories, then trained for a while.

    python benchmarks/healing.py [--model emoji-flux] [--ratios 0.2 0.4 0.5 0.6]
    python benchmarks/healing.py --figure                only draws the figure again

Cut by `surgeon`'s order at each size and compensated; then `heal` with its defaults. Errors of held-out pairs
as in fidelity.py, after compensation, after the repair, and after so many steps of training, with the seconds
of healing until then (measuring left out).
"""

import json
import time
from pathlib import Path

from fidelity import Recognition, arguments, draw, measure, opened, results_file

import ecodiff
from ecodiff.learning.heal import heal


def figure(found: dict, path: Path) -> None:
    """Latent error against minutes of healing, a line for every size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, panels = pyplot.subplots(1, 2, figsize=(12, 4.5), dpi=150)
    kinds = {"latent_error": "mean latent error", "latent_error_median": "median latent error"}
    for axes, (kind, words) in zip(panels, kinds.items(), strict=True):
        for ratio in dict.fromkeys(row["ratio"] for row in found["rows"]):
            rows = [row for row in found["rows"] if row["ratio"] == ratio]
            x, y = [row["seconds"] / 60 for row in rows], [row[kind][0] for row in rows]
            axes.plot(x, y, "o-", label=f"{ratio:.0%} removed")
        axes.set(yscale="log", xlabel="minutes of healing", ylabel=words)
        axes.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=8)
    drawing.suptitle(f"{found['model']}, {found['pairs']} held-out pairs: compensated, repaired, trained")
    drawing.tight_layout()
    drawing.savefig(path)


def main() -> None:
    parser = arguments(__doc__, [0.2, 0.4, 0.5, 0.6], 64)
    parser.set_defaults(model="emoji-flux")
    parser.add_argument("--repair", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100])
    options = parser.parse_args()
    out = results_file("healing", options)
    if options.figure:
        figure(json.loads(out.read_text()), out.with_suffix(".png"))
        return
    model, pipe = opened(options)
    prompts, judged = model.prompts("calibration"), model.prompts("heldout")[: options.pairs]
    dense, recognised = draw(pipe, model, judged), Recognition(judged)
    scores = ecodiff.learn_masks(pipe, prompts, model.learn_config("surgeon", options.learn_ratio))
    found = {"model": options.model, "pairs": len(judged), "repair": options.repair, "rows": []}
    for ratio in options.ratios:
        small = ecodiff.variant(pipe, scores.plan(ratio=ratio))
        ecodiff.compensate_(small, pipe, prompts, model.compensation())
        config = model.heal_config(repair=options.repair, steps=max(options.steps))
        at = {config.batches + steps: f"{steps} steps" for steps in options.steps}
        at |= {0: "compensated", config.batches: "repaired"}

        def note(done: int, spent: float, small=small, ratio=ratio, at=at) -> None:
            if done in at:
                row = {"ratio": ratio, "after": at[done], "seconds": spent}
                found["rows"].append(row | measure(dense, draw(small, model, judged), recognised))
                error, median = (found["rows"][-1][n][0] for n in ("latent_error", "latent_error_median"))
                print(row, f"{error:.4f} ({median:.4f})", flush=True)
                out.write_text(json.dumps(found, indent=1) + "\n")

        note(0, spent := 0.0)
        begun = time.perf_counter()
        for done, _ in heal(small, pipe, prompts, config):
            spent += time.perf_counter() - begun
            note(done, spent)
            begun = time.perf_counter()
    figure(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
