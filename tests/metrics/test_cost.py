import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ecodiff
from ecodiff.architectures import find_groups
from ecodiff.metrics import cost
from ecodiff.pipelines import denoiser_calls, denoiser_of, prompt_rows
from ecodiff.units import ALL_KINDS
from tests.checkpoints.test_folders import some_plan
from tests.conftest import PROMPT, short


def test_macs_are_those_that_torch_counts(pipe):
    call = {"prompt": ["red apple", "cat"], "num_inference_steps": 2} | short(pipe)
    _, total = cost.unit_macs(pipe, call)
    args, kwargs = denoiser_calls(pipe, call, limit=1)[0]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser_of(pipe)(*args, **kwargs)
    assert 2 * total == counter.get_total_flops()


def test_latency_is_positive(tiny_sdxl):
    assert cost.latency(tiny_sdxl, {"prompt": "red apple", "num_inference_steps": 2}, repeats=2) > 0


def test_milliseconds_of_units_are_part_of_the_call(tiny_sdxl):
    by_unit, total = cost.unit_milliseconds(tiny_sdxl, {"prompt": "red apple", "num_inference_steps": 2})
    sizes = {group.name: group.size for group in find_groups(tiny_sdxl.unet, ALL_KINDS)}
    assert set(by_unit) == set(sizes) and min(by_unit.values()) > 0
    assert 0 < sum(by_unit[name] * size for name, size in sizes.items()) < 3 * total


def test_speed_is_measured_in_turn(tiny_sdxl, monkeypatch):
    """Whatever slows the machine slows both; what is too noisy is not told."""
    from types import SimpleNamespace

    now = [0.0]
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    small = ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl))
    call = prompt_rows([PROMPT], [0], 0, {"num_inference_steps": 2} | short(tiny_sdxl))

    def slowed(jitter):
        paces, calls = {id(tiny_sdxl.unet): 2.0, id(small.unet): 1.0}, itertools.count()

        def note(module, *_):
            pair, second = divmod(next(calls), 2)
            load = 1 + 4 * (pair % 3)  # both of a pair are as slow
            now[0] += load * paces[id(module)] * (jitter if pair % 3 == second else 1.0)

        hooks = [d.register_forward_pre_hook(note) for d in (tiny_sdxl.unet, small.unet)]
        try:
            return cost.speedup(tiny_sdxl, small, call, seconds=400.0)
        finally:
            for hook in hooks:
                hook.remove()

    low, ratio, high = slowed(1.0)
    assert low == pytest.approx(2.0) and ratio == pytest.approx(2.0) and high == pytest.approx(2.0)
    assert slowed(50.0) is None
