"""What healing brings, by minutes: a cut model repaired on more trajectories, then trained for a while.

    python benchmarks/healing.py [--model emoji-flux] [--ratios 0.4 0.5]

Cut by `surgeon`'s order at each size and compensated; then `heal` with its defaults. Errors of held-out pairs
as in fidelity.py, after compensation, after the repair, and after so many steps of training, with the seconds
of healing until then (measuring left out).
"""

import json
import time

import torch
from fidelity import Recognition, arguments, draw, measure, results_file

import ecodiff
from ecodiff import catalog
from ecodiff.learning.heal import heal


def main() -> None:
    parser = arguments(__doc__, [0.4, 0.5], 64)
    parser.set_defaults(model="emoji-flux")
    parser.add_argument("--repair", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100])
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    out = results_file("healing", options)
    model, pipe = catalog.find(options.model), ecodiff.load(options.model)
    pipe.set_progress_bar_config(disable=True)
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


if __name__ == "__main__":
    main()
