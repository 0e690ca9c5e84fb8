"""`heal`: repair what is left on more trajectories, then train it for a while (LoRA, merged)."""

import argparse
import sys
from pathlib import Path

from ..config import HEAL_RATE, HEAL_REPAIR
from ..errors import EcodiffError
from ._common import open_pruned, report

HELP = "repair what is left on more trajectories, then train it for a while (LoRA, merged)"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="a pruned folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the healed pipeline")
    parser.add_argument(
        "--repair",
        type=int,
        default=HEAL_REPAIR,
        metavar="N",
        help=f"dense trajectories to repair weights by first (default: {HEAL_REPAIR}; 0: none)",
    )
    parser.add_argument("--steps", type=int, default=100, help="of training (default: 100; 0: none)")
    parser.add_argument("--rank", type=int, default=16, help="of the updates")
    parser.add_argument("--rate", type=float, default=HEAL_RATE, help="peak learning rate")
    parser.add_argument("--dense", help="the dense model (default: the one that the plan names)")
    parser.add_argument("--run", metavar="DIR", help="where its state is kept (default: OUT.heal)")
    parser.add_argument("--prompts", metavar="FILE", help="prompts to heal on, one a line; a fifth judges")
    parser.add_argument("--count", type=int, default=8, help="held-out prompts to judge by")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    """Distil a pruned model for a while; fidelity before and after."""
    from tqdm import tqdm

    from .. import catalog
    from ..checkpoints.card import model_card
    from ..checkpoints.loading import disk_dtype, load
    from ..checkpoints.saving import save
    from ..learning.heal import facts, heal, judged
    from ..metrics.fidelity import compare
    from ..pipelines import quiet
    from ..runs.prompts import read, set_aside

    if options.count < 1:
        raise EcodiffError(f"--count is {options.count}; give at least 1.")
    small, base = open_pruned(options)
    known = catalog.find(base)
    pipe = load(known)
    folder = Path(options.run or f"{options.out}.heal")
    asked = {name: getattr(options, name) for name in ("repair", "steps", "rank", "rate")}
    config = known.heal_config(**asked)
    own, heldout = set_aside(read(options.prompts)) if options.prompts else ([], [])
    prompts = (heldout or known.prompts("heldout"))[: options.count]

    def judge() -> dict[str, float]:
        with quiet(pipe), quiet(small):  # one bar, that of healing, in place of one an image
            return judged(compare(pipe, small, prompts, **known.drawing()))

    before = judge()
    with tqdm(total=config.total_steps, unit="step", disable=options.quiet) as bar:
        try:
            for step, loss in heal(small, pipe, own or known.prompts("calibration"), config, folder):
                bar.update(step - bar.n)
                bar.set_postfix({} if loss is None else {"loss": f"{loss:.4f}"})
        except KeyboardInterrupt:
            print(f"Stopped. The same command goes on from {folder}.", file=sys.stderr)
            return 130
    after = judge()
    text = model_card(small, facts(config, before, after, len(prompts)))
    out = save(small, options.out, disk_dtype(known), text)
    rows = [
        ("latent error, geometric mean", f"{before['latent_error']:.4f} -> {after['latent_error']:.4f}"),
        ("PSNR", f"{before['psnr']:.1f} -> {after['psnr']:.1f} dB"),
        ("prompts", f"{len(prompts)} that nothing was learned on"),
        ("saved in", str(out)),
    ]
    if not after["latent_error"] < before["latent_error"]:
        rows.append(("not closer", f"{options.model} is nearer to the dense model; more --steps go on"))
    report(options, rows, {"out": str(out), "before": before, "after": after})
    return 0
