"""ecodiff beside other tools that remove structures: the same model, prompts, noise and parameters.

    pip install torch-pruning
    python benchmarks/peers.py [--model emoji-flux]

Torch-Pruning (Fang et al. 2023, arXiv 2301.12900; its own code and defaults) scores channels by its
GroupMagnitudeImportance and GroupTaylorImportance over the groups that ecodiff finds: its tracer does not
follow these denoisers' heads, of which each is worth the mean of its channels. Gradients are those of the
training loss at all time steps of dense trajectories. OBS-Diff and EcoDiff are the ports in obs_diff.py and
`ecodiff.learning`. Twice: heads and FFN neurons only, and with every kind of unit that a tool can rank. + is
repaired by ecodiff's compensation, the same for all (OBS-Diff brings its own).
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import obs_diff
import torch
from fidelity import BATCH, CALIBRATION, Recognition, draw, measure
from torch import Tensor, nn

import ecodiff
from ecodiff import catalog
from ecodiff.architectures import find_groups
from ecodiff.learning.calibration import Calibration
from ecodiff.learning.methods import METHODS
from ecodiff.learning.scoring import denoising_losses
from ecodiff.metrics.cost import parameters
from ecodiff.pipelines import call_options, denoiser_of, prompt_rows, stream
from ecodiff.pruning.scores import Scores
from ecodiff.units import PRESET_KINDS, PUBLISHED_KINDS, PruneGroup

RATIOS = (0.2, 0.4)
KINDS = {"heads and FFN": PUBLISHED_KINDS, "all kinds": PRESET_KINDS}


class Item:
    """An entry of a group as Torch-Pruning's importances read it."""

    def __init__(self, dependency, indices: list[int], roots: list[int]):
        self.dependency, self.indices, self.root_idxs = dependency, indices, roots

    def __iter__(self):
        return iter((self.dependency, self.indices))


def items(denoiser: nn.Module, group: PruneGroup) -> tuple[list[Item], int]:
    """A group's layers for Torch-Pruning, and how many channels a unit has."""
    from types import SimpleNamespace

    from torch_pruning import function

    width = min(slot.index.shape[1] for slot in group.slots)
    found, roots = [], list(range(group.size * width))
    for slot in group.slots:
        module = denoiser.get_submodule(slot.module)
        kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
        name = f"prune_{kind}_{'in' if slot.axis == 'in' else 'out'}_channels"
        if isinstance(module, nn.GroupNorm):
            name = "prune_groupnorm_out_channels"
        if slot.bare or not isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm)):
            continue
        prune = getattr(function, name)
        named = {"layer": module, "pruning_fn": prune, "handler": prune}
        dependency = SimpleNamespace(target=SimpleNamespace(module=module), **named)
        for part in slot.index.split(width, dim=1):  # values and gates, stacked
            found.append(Item(dependency, part.flatten().tolist(), roots))
    return found, width


def torch_pruning(importance, pipe, groups: list[PruneGroup]) -> dict[str, Tensor]:
    """Units by one of Torch-Pruning's importances."""
    values = {}
    for group in groups:
        layers, width = items(denoiser_of(pipe), group)
        if layers and (found := importance(layers)) is not None:
            values[group.name] = found.detach().float().view(group.size, width).mean(1)
    return values


def with_gradients(pipe, calls: list[dict]) -> None:
    """Leave the training loss's gradients on the denoiser's weights."""
    for parameter in denoiser_of(pipe).parameters():
        parameter.requires_grad_(True)
    for call in calls:
        for loss in denoising_losses(
            pipe, call, stream("noise", 0), trained=list(denoiser_of(pipe).parameters())
        ):
            loss.backward()


def tools(pipe, model: catalog.Model, kinds: tuple[str, ...], calls: list[dict]):
    """(tool, function that ranks and gives a function from a ratio to a plan) of each tool."""
    import torch_pruning as tp

    denoiser, prompts = denoiser_of(pipe), model.prompts("calibration")
    groups = find_groups(denoiser, kinds)

    def theirs(name: str, importance):
        if name == "taylor":
            with_gradients(pipe, calls)
        found = torch_pruning(importance, pipe, groups)
        for parameter in denoiser.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
        return Scores.of(denoiser, found, method=name).plan

    def one_shot(name: str):
        found = METHODS[name](pipe, calls, 0, prompts)
        return Scores.of(denoiser, {g.name: found[g.name] for g in groups}, method=name).plan

    def learned(preset: str, **changes):
        return ecodiff.learn_masks(pipe, prompts, model.learn_config(preset, 0.3, **changes)).plan

    yield (
        "Torch-Pruning, magnitude",
        partial(theirs, "magnitude", tp.importance.GroupMagnitudeImportance(p=2)),
    )
    yield "Torch-Pruning, taylor", partial(theirs, "taylor", tp.importance.GroupTaylorImportance())
    yield "Diff-Pruning", partial(one_shot, "taylor")
    yield "Wanda", partial(one_shot, "wanda")
    if kinds == PUBLISHED_KINDS:
        yield "EcoDiff, as published", partial(learned, "ecodiff")
    yield "ecodiff", partial(learned, "surgeon", **({"kinds": kinds} if kinds == PUBLISHED_KINDS else {}))


def run(name: str, pairs: int, out: Path) -> dict:
    """{"model", "pairs", "rows": [{"kinds", "tool", "ratio", "removed", "seconds", and measures}]}.

    Rows are in `out` as soon as they are measured; those that are there are not measured again.
    """
    model, pipe = catalog.find(name), ecodiff.load(name)
    pipe.set_progress_bar_config(disable=True)
    prompts, learned_on = model.prompts("heldout")[:pairs], model.prompts("calibration")
    recognised, dense = Recognition(prompts), draw(pipe, model, prompts)
    calibration = Calibration(pipe, learned_on, model.compensation())
    options = call_options(pipe, model.learn_steps, model.guidance_scale, model.size, model.extra)
    calls = [prompt_rows(learned_on, range(n, n + BATCH), 0, options) for n in range(0, CALIBRATION, BATCH)]
    total = parameters(denoiser_of(pipe))
    found = json.loads(out.read_text()) if out.exists() else {"model": name, "pairs": pairs, "rows": []}
    assert found["pairs"] == pairs, f"{out} is about {found['pairs']} pairs"

    def note(tool: str, words: str, ratio: float, small, spent: float) -> None:
        measures = measure(dense, draw(small, model, prompts), recognised)
        removed = 1 - parameters(denoiser_of(small)) / total
        row = {"kinds": words, "tool": tool, "ratio": ratio, "removed": removed, "seconds": round(spent, 1)}
        found["rows"].append(row | measures)
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(words, tool, f"{removed:.1%}", {k: round(v[0], 5) for k, v in measures.items()}, flush=True)

    def left(tool: str, words: str) -> list[float]:
        done = {(row["tool"], row["kinds"], row["ratio"]) for row in found["rows"]}
        return [ratio for ratio in RATIOS if (f"{tool} +", words, ratio) not in done]

    for words, kinds in KINDS.items():
        for tool, rank in tools(pipe, model, kinds, calls):
            begun, plan = time.perf_counter(), None
            for ratio in left(tool, words):
                plan = plan or rank()
                spent = time.perf_counter() - begun
                small = ecodiff.variant(pipe, plan(ratio=ratio))
                note(tool, words, ratio, small, spent)
                ecodiff.compensate_(small, pipe, calibration=calibration)
                note(f"{tool} +", words, ratio, small, spent)
                begun = time.perf_counter() - spent
        for ratio in left("OBS-Diff", words) if kinds == PUBLISHED_KINDS else ():
            begun = time.perf_counter()
            small = obs_diff.prune(pipe, calibration, ratio)
            note("OBS-Diff +", words, ratio, small, time.perf_counter() - begun)
    return found


def figure(found: dict, path: Path) -> None:
    """Latent error against the share of parameters removed, repaired, for each choice of kinds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, panels = pyplot.subplots(1, len(KINDS), figsize=(11, 4.5), dpi=150, sharey=True)
    names = list(dict.fromkeys(row["tool"] for row in found["rows"]))
    for axes, words in zip(panels, KINDS, strict=True):
        mine = [row for row in found["rows"] if row["kinds"] == words and row["tool"].endswith("+")]
        for tool in dict.fromkeys(row["tool"] for row in mine):
            rows = [row for row in mine if row["tool"] == tool]
            x, y = [100 * row["removed"] for row in rows], [row["latent_error"][0] for row in rows]
            width, colour = 2.5 if tool.startswith("ecodiff") else 1.2, f"C{names.index(tool) // 2}"
            axes.plot(x, y, "o-", label=tool, lw=width, ms=4, color=colour)
        ticks = [round(100 * ratio) for ratio in RATIOS]
        axes.set(yscale="log", xlabel="parameters of the denoiser removed, %", title=words, xticks=ticks)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("latent error, repaired")
    drawing.suptitle(f"{found['model']}, {found['pairs']} held-out prompts")
    drawing.tight_layout()
    drawing.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emoji-sdxl")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: beside this script, with the model's name")
    parser.add_argument("--figure", action="store_true", help="only draw the figure again")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    out = asked.out or Path(__file__).with_name(f"peers-{asked.model}.json")
    results = json.loads(out.read_text()) if asked.figure else run(asked.model, asked.pairs, out)
    figure(results, out.with_suffix(".png"))
