"""The conformance suite: what is asked of every architecture that ecodiff says it supports.

Groups are found; masked equals sliced (partly, one unit, none left), in memory and reloaded; with the
mask on, what gets no gradient is exactly what slicing removes.
"""

import diffusers
import pytest
import torch
from torch.utils._pytree import tree_map

import ecodiff
from ecodiff.groups import ALL_KINDS, KINDS
from ecodiff.measure import parameters

from .architectures import ROWS
from .conftest import randomise


def run(denoiser, given) -> torch.Tensor:
    out = denoiser(**given)
    out = out[0] if isinstance(out, tuple) else out.sample
    return torch.stack(out) if isinstance(out, list) else out


def kept(cut: str, group, generator) -> torch.Tensor:
    if cut == "partial":
        keep = torch.rand(group.size, generator=generator) > 0.4
        keep[0] = True
        return keep
    return torch.arange(group.size) < (1 if cut == "one unit left" else group.floor)


@pytest.fixture(params=ROWS)
def row(request):
    row = ROWS[request.param]
    denoiser = randomise(getattr(diffusers, row.cls)(**row.config)).to(row.dtype)
    return row, denoiser, tree_map(lambda leaf: _cast(leaf, row.dtype), row.given())


def _cast(leaf, dtype):
    return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 else leaf


@pytest.mark.parametrize("cut", ["partial", "one unit left", "none left"])
@torch.no_grad()
def test_masked_equals_sliced_and_reloaded(row, cut, tmp_path):
    row, denoiser, given = row
    groups = ecodiff.find_groups(denoiser, ALL_KINDS)
    assert {group.kind for group in groups} == row.kinds
    generator = torch.Generator().manual_seed(0)
    groups = [group for group in groups if cut == "partial" or group.kind in KINDS]
    plan = ecodiff.PrunePlan({group.name: kept(cut, group, generator) for group in groups})
    dense, before = run(denoiser, given), parameters(denoiser)
    with ecodiff.masked(denoiser, plan):
        masked = run(denoiser, given)
    ecodiff.slice_(denoiser, plan)
    scale = float(masked.abs().max())
    sliced = run(denoiser, given)
    torch.testing.assert_close(sliced / scale, masked / scale, atol=row.digits[0], rtol=0)
    denoiser.save_pretrained(tmp_path)
    again = type(denoiser).from_pretrained(tmp_path).to(row.dtype)
    torch.testing.assert_close(run(again, given), sliced, rtol=row.digits[0], atol=row.digits[0] * scale)
    assert (dense - masked).abs().max() > 1e-3 * scale, "the mask did nothing"
    assert parameters(denoiser) < before


def test_dead_parameters_are_exactly_the_removed_ones(row):
    row, denoiser, given = row
    denoiser.requires_grad_(True)
    groups, generator = ecodiff.find_groups(denoiser), torch.Generator().manual_seed(1)
    plan = ecodiff.PrunePlan({group.name: kept("partial", group, generator) for group in groups})

    def gradients() -> dict[str, torch.Tensor]:
        denoiser.zero_grad()
        out = run(denoiser, given)
        (out * torch.randn_like(out)).sum().backward()
        named = denoiser.named_parameters()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}

    # Idle in the dense model too: what nothing reads, and biases of keys, which move all scores alike.
    whole = gradients()
    noise = 1e3 * torch.finfo(row.dtype).eps * max(float(g.abs().max()) for g in whole.values())
    idle = {name for name, g in whole.items() if (g.abs() < noise).any()}
    with ecodiff.masked(denoiser, plan):
        found = {name: int((g == 0).sum()) for name, g in gradients().items()}
    sizes = {name: p.numel() for name, p in denoiser.named_parameters()}
    ecodiff.slice_(denoiser, plan)
    removed = {name: sizes[name] - p.numel() for name, p in denoiser.named_parameters()}
    assert {n: c for n, c in found.items() if n not in idle} == {
        n: c for n, c in removed.items() if n not in idle
    }
    assert any(count for name, count in removed.items() if name not in idle)
