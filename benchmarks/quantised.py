"""Pruned, quantised, and both: size and error; and what learning on rounded weights costs.

    pip install gguf
    python benchmarks/quantised.py

First, the dense denoiser and 20 and 40 % smaller ones (the model's default preset, repaired), in 16 bits and
in the blocks of llama.cpp that `export --format gguf-...` writes. Bytes: those of the denoiser's weights in
such a file. Then units ranked on a dense model whose weights were rounded to int8 (a scale a row), float8 or
Q4_0: Spearman's correlation with the ranking on full weights (groups that rank the same units in both), and
the error of its plan at 20 %, cut from the full weights and repaired. Prompts, noise and errors are those of
fidelity.py.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from fidelity import draw, measure
from torch import Tensor

import ecodiff
from ecodiff import catalog
from ecodiff.checkpoints.gguf import BLOCK, KINDS, SMALL
from ecodiff.learning.calibration import Calibration
from ecodiff.learning.methods import measured_best
from ecodiff.pipelines import denoiser_name, denoiser_of

# First and last layers and embeddings, by diffusers' names: they stay in 16 bits.
ENDS = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out", "time_embedding")
ENDS = (*ENDS, "add_embedding", "conv_in", "conv_out", "modulation_basis")


def in_blocks(weight: Tensor, kind: str) -> Tensor:
    """A weight as llama.cpp's blocks of 32 keep it."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    flat, how = weight.detach().float().reshape(-1, BLOCK).numpy(), GGMLQuantizationType[kind]
    return torch.from_numpy(dequantize(quantize(flat, how), how).copy()).reshape(weight.shape)


def in_rows(weight: Tensor, kind: str) -> Tensor:
    """A weight in int8, a scale a row, or in float8."""
    if kind == "float8":
        return weight.to(torch.float8_e4m3fn).float()
    rows = weight.flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return ((rows / scale).round() * scale).reshape(weight.shape)


def is_rounded(name: str, weight: Tensor) -> bool:
    whole = weight.numel() > SMALL and weight.numel() % BLOCK == 0
    return weight.ndim > 1 and whole and not name.startswith(ENDS)


@torch.no_grad()
def rounded(pipe, kind: str):
    """(copy of a pipeline whose denoiser's weights are rounded, its denoiser's bytes)."""
    made, denoiser = copy.copy(pipe), copy.deepcopy(denoiser_of(pipe))
    size = 0.0
    for name, weight in denoiser.named_parameters():
        if kind == "16 bits" or not is_rounded(name, weight):
            small = weight.ndim < 2 or weight.numel() <= SMALL
            size += weight.numel() * (4 if small and kind != "16 bits" else 2)
            if kind == "16 bits":
                weight.copy_(weight.bfloat16())
        elif kind in KINDS:
            weight.copy_(in_blocks(weight, kind))
            size += weight.numel() * KINDS[kind] / 8
        else:
            weight.copy_(in_rows(weight, kind))
            size += weight.numel()
    made.register_modules(**{denoiser_name(pipe): denoiser})
    return made, round(size)


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def spearman(ours: ecodiff.Scores, theirs: ecodiff.Scores) -> float:
    """Correlation of the ranks of all units that both order, of groups without a basis of their own."""
    groups = [name for name in ours.values if name in theirs.values and name not in ours.bases]
    pair = [torch.cat([scores.values[name].float() for name in groups]) for scores in (ours, theirs)]
    return float(torch.corrcoef(torch.stack([ranks(values) for values in pair]))[0, 1])


def run(name: str, pairs: int, out: Path) -> None:
    """Write {name: {"preset", "sizes": [rows], "learning": [rows]}} of one model into `out`, by rows."""
    model, pipe = catalog.find(name), ecodiff.load(name)
    pipe.set_progress_bar_config(disable=True)
    prompts, learned_on = model.prompts("heldout")[:pairs], model.prompts("calibration")
    dense = draw(pipe, model, prompts)
    preset = measured_best(denoiser_of(pipe), "balanced")
    calibration = Calibration(pipe, learned_on, model.compensation())
    found: dict = {"preset": preset, "sizes": [], "learning": []}

    def note(where: str, row: dict, drawn) -> None:
        errors = measure(dense, draw(drawn, model, prompts), None)
        found[where].append(row | {key: value[0] for key, value in errors.items()} | {"interval": errors})
        everything = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps(everything | {name: found}, indent=1) + "\n")
        print(name, {k: v for k, v in found[where][-1].items() if k != "interval"}, flush=True)

    def cut(scores: ecodiff.Scores, ratio: float):
        small = ecodiff.variant(pipe, scores.plan(ratio=ratio))
        ecodiff.compensate_(small, pipe, calibration=calibration)
        return small

    config = model.learn_config(preset, 0.2)
    full = ecodiff.learn_masks(pipe, learned_on, config)
    for ratio in (0.0, 0.2, 0.4):
        small = cut(full, ratio) if ratio else pipe
        for kind in ("16 bits", *KINDS):
            other, size = rounded(small, kind)
            note("sizes", {"removed": ratio, "kind": kind, "bytes": size}, other)
    for kind in ("int8", "float8", "Q4_0"):
        scores = ecodiff.learn_masks(rounded(pipe, kind)[0], learned_on, config)
        note("learning", {"kind": kind, "spearman": spearman(full, scores)}, cut(scores, 0.2))
    note("learning", {"kind": "full weights", "spearman": 1.0}, cut(full, 0.2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["emoji-sdxl", "emoji-flux"])
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.models:
        run(name, options.pairs, options.out)
