import pytest
import torch
from diffusers import DDIMScheduler

import ecodiff
from ecodiff.learning.checkpointing import gradients
from ecodiff.pipelines import denoiser_of
from ecodiff.pruning import masking
from tests.conftest import PROMPT, latents, short


def gate_gradients(pipe, masks, checkpoint: bool, steps: int = 8):
    with masking.masked(denoiser_of(pipe), masks), ecodiff.trajectory(pipe, checkpoint=checkpoint) as run:
        z0 = run(
            PROMPT,
            **short(pipe),
            num_inference_steps=steps,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
        )
        return z0, torch.autograd.grad(z0.square().mean(), list(masks.values()))


def random_gates(unet, dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.rand(n, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
    return {group.name: draw(group.size) for group in ecodiff.find_groups(unet)}


def test_gradients_of_large_latents_survive_float16():
    gate = torch.full((2**20,), 1e-3, requires_grad=True)
    z0 = (gate * torch.ones(1)).half()
    loss = z0.float().square().mean()
    (plain,) = torch.autograd.grad(loss, gate, retain_graph=True)
    (found,) = gradients(loss, z0, [gate])
    assert not plain.any(), "nothing to test: they survive anyway"
    torch.testing.assert_close(found, 2 * z0.float().detach() / 2**20, rtol=1e-3, atol=0)


def test_gradients_that_are_too_large_for_float16_are_made_again_of_less():
    gate = torch.full((2**12,), 1.0, requires_grad=True)
    z0 = 3e4 * (1e-3 * gate).half()
    loss = z0.float().square().mean()
    (found,) = gradients(loss, z0, [gate])
    expected = torch.full_like(gate, 2 * 30 * 30 / 2**12)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_checkpointed_gradients_equal_plain_backpropagation(pipe):
    pipe.to(torch.float64)
    masks = random_gates(denoiser_of(pipe))
    z_a, checkpointed = gate_gradients(pipe, masks, checkpoint=True)
    z_b, plain = gate_gradients(pipe, masks, checkpoint=False)
    assert z_a.dtype == torch.float64 and torch.equal(z_a, z_b)
    for a, b in zip(checkpointed, plain, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * float(b.abs().max()))


def test_gradients_are_the_slope(tiny_sdxl):
    """Against finite differences: that both ways agree could still mean that both are wrong."""
    tiny_sdxl.to(torch.float64)
    tiny_sdxl.scheduler = DDIMScheduler(clip_sample=False)  # Euler's rounds every latent to float32
    masks = random_gates(tiny_sdxl.unet)
    _, gradients = gate_gradients(tiny_sdxl, masks, checkpoint=True)
    step = 1e-5
    for name, gradient in zip(list(masks)[::4], gradients[::4], strict=True):
        values = []
        for sign in (1, -1):
            moved = {k: v.detach().clone() for k, v in masks.items()}
            moved[name][0] += sign * step
            with masking.masked(tiny_sdxl.unet, moved):
                values.append(latents(tiny_sdxl, steps=8, guidance_scale=5.0).square().mean())
        slope = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(gradient[0], slope, rtol=1e-4, atol=1e-9)


def kept_bytes(pipe, steps: int, checkpoint: bool) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    masks = random_gates(pipe.unet, torch.float32)
    with (
        masking.masked(pipe.unet, masks),
        ecodiff.trajectory(pipe, checkpoint=checkpoint) as run,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        run(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    return sum(size for size, _ in storages.values())


def test_what_is_kept_does_not_grow_with_the_steps(tiny_sdxl):
    latent = latents(tiny_sdxl, steps=2).nbytes
    kept = {steps: kept_bytes(tiny_sdxl, steps, checkpoint=True) for steps in (2, 10, 50)}
    plain = kept_bytes(tiny_sdxl, 10, checkpoint=False)
    print(f"bytes kept for the backward pass: {kept}; without checkpointing, 10 steps: {plain}")
    for steps in (10, 50):
        # the latents themselves: doubled for guidance, scaled, and the scheduler's own
        assert kept[steps] - kept[2] <= (steps - 2) * 8 * latent
    assert kept[50] < plain / 10


def test_everything_is_put_back(tiny_sdxl):
    unet = tiny_sdxl.unet.requires_grad_(True).train()
    before = latents(tiny_sdxl.to("cpu"))
    with pytest.raises(RuntimeError, match="stop"), ecodiff.trajectory(tiny_sdxl) as run:

        def fail(*args):
            raise RuntimeError("stop")

        run(PROMPT, num_inference_steps=2, callback_on_step_end=fail)
    assert "forward" not in vars(unet)
    assert unet.training and all(p.requires_grad for p in unet.parameters())
    assert not any(m._forward_pre_hooks for m in unet.modules())
    assert torch.equal(before, latents(tiny_sdxl))


def test_on_step_can_stop_a_run(tiny_sdxl):
    calls = []

    class Stop(Exception):  # noqa: N818
        pass

    def on_step():
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    with pytest.raises(Stop), ecodiff.trajectory(tiny_sdxl, on_step=on_step) as run:
        run(PROMPT, num_inference_steps=8)
    assert len(calls) == 3
