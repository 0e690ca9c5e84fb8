import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ecodiff import measure
from ecodiff.groups import denoiser_of
from ecodiff.trajectory import denoiser_calls

from .conftest import short


def test_macs_are_those_that_torch_counts(pipe):
    call = {"prompt": ["red apple", "cat"], "num_inference_steps": 2} | short(pipe)
    _, total = measure.unit_macs(pipe, call)
    args, kwargs = denoiser_calls(pipe, call, limit=1)[0]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser_of(pipe)(*args, **kwargs)
    assert 2 * total == counter.get_total_flops()


def test_latency_is_positive(tiny_sdxl):
    assert measure.latency(tiny_sdxl, {"prompt": "red apple", "num_inference_steps": 2}, repeats=2) > 0
