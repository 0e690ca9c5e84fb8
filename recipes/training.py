"""The training loop that the embedded models share: AdamW, an average of the weights, resumable."""

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import data, state

BATCH = 32
PEAK_RATE = 1e-3
DROPPED = 0.1  # captions that are left out, for guidance


def rate(step: int, steps: int, peak: float = PEAK_RATE) -> float:
    """Learning rate: a short warm-up, constant, and down to zero over the last 40 %."""
    return peak * min((step + 1) / 200, 1.0, (steps - step) / (0.4 * steps))


class Captions:
    """Draws the images and captions of a step."""

    def __init__(self, emojis: list[data.Emoji]):
        self.weights = data.sampling_weights(emojis)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Image numbers, which of them go by their alias, which keep their caption; each (BATCH,)."""
        rows = torch.multinomial(self.weights, BATCH, replacement=True, generator=generator)
        aliased = torch.rand(BATCH, generator=generator) < 0.25
        captioned = torch.rand(BATCH, generator=generator) >= DROPPED
        return rows, aliased, captioned


def tokens(tokenizer, emojis: list[data.Emoji], length: int) -> Tensor:
    """Token ids of every caption and every alias, int64 (2, emojis, length)."""
    texts = [[getattr(e, field) for e in emojis] for field in ("caption", "alias")]
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return torch.stack([tokenizer(text, **options).input_ids for text in texts])


def fit(
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    folder: Path,
    name: str,
    steps: int,
    device: str,
    seed: int = 0,
    peak_rate: float = PEAK_RATE,
) -> nn.Module:
    """Minimise `loss_of(generator)` over what `model` trains; resumes from `folder`/`name`.safetensors.

    Every step draws from a generator of its own, so a resumed training sees what an unbroken one
    would. Returns the exponential moving average of the weights, in eval mode.
    """
    average = copy.deepcopy(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    averaged = [p for p, q in zip(average.parameters(), model.parameters(), strict=True) if q.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    modules = {"model": model, "average": average}
    start = state.load(folder / f"{name}.safetensors", modules, optimizer)
    # On a CPU the fused kernel's backward pass costs more than all the rest of the network.
    kernels = [SDPBackend.MATH] if device == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    clock, total = time.monotonic(), 0.0
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak_rate)
        optimizer.zero_grad(set_to_none=True)
        with sdpa_kernel(kernels):
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(torch.Generator().manual_seed(seed * 1_000_003 + step))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - decay)
        total += loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - clock
            state.log(folder / f"{name}.jsonl", step=step + 1, loss=total / 100, seconds=seconds)
            total = 0.0
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state.save(folder / f"{name}.safetensors", step + 1, modules, optimizer)
    return average.eval()
