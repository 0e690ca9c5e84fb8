from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

import ecodiff
from ecodiff.config import CompensateConfig
from ecodiff.errors import BudgetError
from ecodiff.learning import calibration
from ecodiff.learning.calibration import Calibration, Statistics, missing, record
from ecodiff.learning.compensate import solve
from ecodiff.pipelines import denoiser_of
from ecodiff.pruning.scores import Scores
from ecodiff.units import PRESET_KINDS
from tests.conftest import PROMPT, short

CONFIG = CompensateConfig(trajectories=6, heldout=2, batch=2, calls=2, inference_steps=3)
PROMPTS = [PROMPT, "cat", "rocket"]


def statistics(x, y):
    made = Statistics()
    for rows in zip(x.split(50), y.split(50), strict=True):
        made.add(rows[1], rows[0])
    return made


def test_solve_is_least_squares():
    """Against numpy's way of saying it: lstsq on the rows, with a column of ones for the bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    y = x @ torch.randn(6, 3, dtype=torch.float64) + torch.randn(400, 3, generator=generator).double() + 2
    kept = torch.tensor([True, True, False, True, True, True])
    weight, bias = solve(
        statistics(x, y).of(kept), torch.zeros(3, 5).double(), torch.zeros(3).double(), damping=0.0
    )
    wanted = torch.linalg.lstsq(torch.cat([x[:, kept], torch.ones(400, 1).double()], 1), y).solution.T
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], 1), wanted)
    weight, bias = solve(statistics(x, y).of(kept), torch.zeros(3, 5).double(), None, damping=0.0)
    torch.testing.assert_close(weight, torch.linalg.lstsq(x[:, kept], y).solution.T)
    assert bias is None


def test_error_is_the_mean_over_rows():
    x, y = torch.randn(200, 4).double(), torch.randn(200, 3).double()
    made, bias = statistics(x, y), torch.randn(3).double()
    weights = torch.randn(2, 3, 4).double()
    errors = [((x @ w.T + bias - y) ** 2).sum(1).mean() for w in weights]
    difference = made.error(weights[0], bias) - made.error(weights[1], bias)
    torch.testing.assert_close(torch.tensor(difference).double(), errors[0] - errors[1])


def test_heavy_damping_leaves_what_slicing_left():
    weight = torch.randn(3, 4)
    found, _ = solve(statistics(torch.randn(100, 4), torch.randn(100, 3)), weight, None, damping=1e8)
    torch.testing.assert_close(found, weight, atol=1e-4, rtol=1e-4)


def ranked(pipe):
    generator = torch.Generator().manual_seed(1)
    groups = ecodiff.find_groups(denoiser_of(pipe), PRESET_KINDS)
    return Scores.of(denoiser_of(pipe), {g.name: torch.rand(g.size, generator=generator) for g in groups})


def test_layers_come_closer_and_the_dense_model_stays(pipe):
    dense = denoiser_of(pipe)
    before = {name: p.clone() for name, p in dense.named_parameters()}
    small = ecodiff.variant(pipe, ranked(pipe).plan(ratio=0.3))
    updated = ecodiff.compensate_(small, pipe, PROMPTS, replace(CONFIG, extra=short(pipe)))
    assert sum(updated.values()) > len(updated) / 2, "random weights leave much to repair"
    assert all(torch.equal(p, before[name]) for name, p in dense.named_parameters())
    plain = denoiser_of(ecodiff.variant(pipe, ranked(pipe).plan(ratio=0.3)))
    for name, module in denoiser_of(small).named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            same = torch.equal(module.weight, plain.get_submodule(name).weight)
            assert same == (not updated.get(name, False)), name


def test_one_calibration_serves_every_size(tiny_sdxl):
    calibration = Calibration(tiny_sdxl, PROMPTS, CONFIG)
    for ratio in (0.2, 0.4):
        small, again = (ecodiff.variant(tiny_sdxl, ranked(tiny_sdxl).plan(ratio=ratio)) for _ in range(2))
        ecodiff.compensate_(small, tiny_sdxl, calibration=calibration)
        ecodiff.compensate_(again, tiny_sdxl, PROMPTS, CONFIG)
        for name, parameter in small.unet.named_parameters():
            torch.testing.assert_close(parameter, again.unet.get_parameter(name))


def test_little_memory_gives_the_same_weights(tiny_sdxl):
    """One layer's statistics at a time."""
    plan = ranked(tiny_sdxl).plan(ratio=0.3)
    found = []
    for memory in (CONFIG.memory, 1):
        small = ecodiff.variant(tiny_sdxl, plan)
        ecodiff.compensate_(small, tiny_sdxl, PROMPTS, replace(CONFIG, memory=memory))
        found.append(small.unet.state_dict())
    for name, parameter in found[0].items():
        torch.testing.assert_close(parameter, found[1][name])


def test_a_layer_without_units_becomes_its_mean(tiny_sdxl):
    group = ecodiff.find_groups(tiny_sdxl.unet, ("ffn",))[0]
    small = ecodiff.variant(tiny_sdxl, {group.name: torch.zeros(group.size, dtype=torch.bool)})
    updated = ecodiff.compensate_(small, tiny_sdxl, PROMPTS, CONFIG)
    assert updated == {f"{group.name}.net.2": True}


def test_it_says_what_it_needs(tiny_sdxl):
    small = ecodiff.variant(tiny_sdxl, {})
    with pytest.raises(BudgetError, match="prompts"):
        ecodiff.compensate_(small, tiny_sdxl, [])
    with pytest.raises(BudgetError, match="holds out"):
        ecodiff.compensate_(small, tiny_sdxl, PROMPTS, CompensateConfig(trajectories=4, heldout=4))


def test_calls_that_were_kept_are_as_good_as_drawn(pipe, tmp_path, monkeypatch):
    config = replace(CONFIG, extra=short(pipe))
    drawn = [call for batch in record(pipe, PROMPTS, config) for call in batch]
    assert missing(config, tmp_path)
    first = next(record(pipe, PROMPTS, config, tmp_path))  # a worker whose time was up
    assert missing(config, tmp_path)
    list(record(pipe, PROMPTS, config, tmp_path))
    assert not missing(config, tmp_path)
    (tmp_path / "2.safetensors").write_bytes(b"half a file")
    list(record(pipe, PROMPTS, config, tmp_path))
    monkeypatch.setattr(calibration, "denoiser_calls", None)  # nothing may be drawn from here on
    kept = [call for batch in record(pipe, PROMPTS, config, tmp_path) for call in batch]
    assert len(kept) == len(drawn) == 6 and len(first) == 2
    for a, b in zip(kept, drawn, strict=True):
        assert a.heldout == b.heldout
        (leaves, spec), (others, other) = tree_flatten((a.args, a.kwargs)), tree_flatten((b.args, b.kwargs))
        assert spec == other
        for leaf, wanted in zip(leaves, others, strict=True):
            assert torch.equal(leaf, wanted) if isinstance(leaf, torch.Tensor) else leaf == wanted
