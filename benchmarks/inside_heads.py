"""What directions inside heads cost and save in time, at the true width of FLUX.1 and SDXL; random weights.

    python benchmarks/inside_heads.py

One double and one single block of FLUX.1 (1,024 image tokens and 512 of text), or one transformer block of
SDXL's widest level (1,024 tokens and 77 of text), dense and with half of the directions of every head gone
(of its values; of queries and keys, which FLUX.1 rotates; of all), called in turn. Prints MACs and time of
a call, both relative to the dense model.
"""

import argparse
import json
import statistics
import time

import torch
from common import device_name
from diffusers import FluxTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

import ecodiff
from ecodiff.machine import wait_for
from ecodiff.metrics.cost import module_macs
from ecodiff.pruning.slicing import shared_copy

TOKENS, TEXT = 1024, 512
VALUES, QUERIES = "value_directions", "query_directions"


class Blocks(nn.Module):
    """A transformer block of SDXL by itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([BasicTransformerBlock(1280, 20, 64, cross_attention_dim=2048)])

    def forward(self, x, text):
        return self.blocks[0](x, encoder_hidden_states=text)


def flux(device: str, dtype: torch.dtype):
    """A FLUX.1 of two blocks, and what it is called with."""
    with torch.device(device):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    ids = torch.zeros(TOKENS, 3, device=device), torch.zeros(TEXT, 3, device=device)
    given = {"hidden_states": (1, TOKENS, 64), "encoder_hidden_states": (1, TEXT, 4096)}
    given |= {"pooled_projections": (1, 768), "timestep": (1,), "guidance": (1,)}
    drawn = {name: torch.rand(shape, device=device, dtype=dtype) for name, shape in given.items()}
    return model.to(dtype), drawn | {"img_ids": ids[0], "txt_ids": ids[1]}


def sdxl(device: str, dtype: torch.dtype):
    """A block of SDXL, and what it is called with."""
    given = {"x": (2, TOKENS, 1280), "text": (2, 77, 2048)}
    drawn = {name: torch.rand(shape, device=device, dtype=dtype) for name, shape in given.items()}
    return Blocks().to(device, dtype), drawn


@torch.no_grad()
def compared(model: nn.Module, given: dict, pairs: int, kinds: tuple[str, ...]) -> dict:
    """MACs and time of a call with half of all directions of these kinds, relative to the dense call."""
    groups = ecodiff.find_groups(model, kinds)
    small = ecodiff.slice_(shared_copy(model), {g.name: torch.arange(g.size) % 2 > 0 for g in groups})
    macs = [module_macs(each, (), given)[""] for each in (model, small)]
    device, ratios = next(model.parameters()).device, []
    for _ in range(pairs + 1):
        spent = []
        for each in (model, small):
            start = time.perf_counter()
            each(**given)
            wait_for(device)
            spent.append(time.perf_counter() - start)
        ratios.append(spent[1] / spent[0])
    spread = 1.96 * statistics.stdev(ratios[1:]) / pairs**0.5  # the first is the warm-up
    return {"macs": macs[1] / macs[0], "time": statistics.fmean(ratios[1:]), "interval": spread}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=12)
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    cases = [("FLUX.1", flux, (VALUES,))]
    cases += [("SDXL", sdxl, kinds) for kinds in ((VALUES,), (QUERIES,), (VALUES, QUERIES))]
    for name, build, kinds in cases:
        found = compared(*build(options.device, dtype), options.pairs, kinds)
        rounded = {key: round(value, 3) for key, value in found.items()}
        about = {"model": name, "kinds": kinds, "device": device_name()}
        print(json.dumps(about | rounded), flush=True)


if __name__ == "__main__":
    main()
