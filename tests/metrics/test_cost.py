import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ecodiff.architectures import find_groups
from ecodiff.metrics import cost
from ecodiff.pipelines import denoiser_calls, denoiser_of
from ecodiff.units import ALL_KINDS
from tests.conftest import short


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
