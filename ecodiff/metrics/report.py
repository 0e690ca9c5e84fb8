"""The fixed report of a pruned model: how far it is from the dense one, how large and how fast it is.

The same lines for every model: the dense one and the pruned one, each as it is, in float8 and in int8, on
the same prompts and noise.
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import BudgetError
from ..pipelines import call_options, denoiser_calls, denoiser_name, denoiser_of, frozen, moved, prompt_rows
from .cost import module_macs, parameters, speedup
from .fidelity import Sample, fidelity, generate

BEGIN, END = "<!-- measured: ecodiff compare --report -->", "<!-- end -->"


def summary(rows: Sequence[dict]) -> dict:
    """Of a measured row a pair: the latent error's mean, standard error, median, 90 % and worst pair.

    Args:
        rows: dicts with "latent_error", "psnr", "ssim", "prompt", "seed".

    Returns:
        {"mean", "stderr" (0 of one pair), "median", "p90", "worst": {"latent_error", "prompt", "seed"},
        "psnr", "ssim": means, "pairs"}
    """
    errors = sorted(row["latent_error"] for row in rows)
    worst = max(rows, key=lambda row: row["latent_error"])
    spread = statistics.stdev(errors) / math.sqrt(len(errors)) if len(errors) > 1 else 0.0
    return {
        "mean": statistics.fmean(errors),
        "stderr": spread,
        "median": statistics.median(errors),
        "p90": errors[min(len(errors) - 1, math.ceil(0.9 * len(errors)) - 1)],
        "worst": {name: worst[name] for name in ("latent_error", "prompt", "seed")},
        "psnr": statistics.fmean(row["psnr"] for row in rows),
        "ssim": statistics.fmean(row["ssim"] for row in rows),
        "pairs": len(rows),
    }


def report(
    pipe: DiffusionPipeline,
    small: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance_scale: float | None = None,
    size: int | None = None,
    extra: dict | None = None,
    on_image: Callable[[], object] = lambda: None,
) -> dict:
    """Measure a pruned pipeline against its dense one, both also in float8, and in int8 (torchao, if there).

    Args:
        steps, guidance_scale, size, extra: as `fidelity.generate` takes them.
        on_image: called after every image.

    Returns:
        {"models": {name: {"params", "macs": of a denoiser call, "bytes": of the denoiser's weights in
        memory, "speedup": of a call, (low, ratio, high) as `cost.speedup`, or None, "error": `summary`, None
        of the dense model}}, "device", "dtype", "pairs"}
    """
    if not prompts or not seeds:
        raise BudgetError("A report needs at least one prompt and one seed.")
    asked = [(prompt, seed) for prompt in prompts for seed in seeds]
    options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "size": size, "extra": extra}

    def drawn(of: DiffusionPipeline) -> Iterator[Sample]:
        for prompt, seed in asked:
            yield generate(of, prompt, seed, **options)
            on_image()

    dense = list(drawn(pipe))
    call = prompt_rows(list(prompts), [0], seeds[0], call_options(pipe, steps, guidance_scale, size, extra))
    found = {"dense": _row(pipe, pipe, call) | {"error": None}}
    for name, other in _models(pipe, small):
        error = summary(_rows(asked, dense, drawn(other)))
        found[name] = _row(pipe, other, call) | {"error": error}
    device = denoiser_of(pipe).device
    known = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    dtype = str(denoiser_of(pipe).dtype).removeprefix("torch.")
    return {"models": found, "device": known, "dtype": dtype, "pairs": len(asked)}


def _models(pipe: DiffusionPipeline, small: DiffusionPipeline):
    """What is measured besides the dense model, one in memory at a time."""
    yield "pruned", small
    yield "dense, fp8", _fp8(pipe)
    yield "pruned, fp8", _fp8(small)
    if find_spec("torchao"):
        yield "dense, int8", _int8(pipe)
        yield "pruned, int8", _int8(small)


def _fp8(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A copy whose denoiser is stored in float8 and computes as before: diffusers' layerwise casting."""
    made, denoiser = copy.copy(pipe), copy.deepcopy(denoiser_of(pipe))
    denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=denoiser.dtype)
    made.register_modules(**{denoiser_name(pipe): denoiser})
    return made


def in_int8(module: nn.Module) -> bool:
    """Whether torchao quantises it: a Linear, but not one that lost all its units, or all inputs but one."""
    if not isinstance(module, nn.Linear):
        return False
    outputs, inputs = module.weight.shape
    return outputs > 0 and inputs > 1


def _int8(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A copy whose denoiser's Linears hold int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    made, denoiser = copy.copy(pipe), copy.deepcopy(denoiser_of(pipe))
    quantize_(denoiser, Int8WeightOnlyConfig(), lambda module, _: in_int8(module))
    made.register_modules(**{denoiser_name(pipe): denoiser})
    return made


def _rows(asked: list[tuple[str, int]], dense: list[Sample], samples) -> list[dict]:
    return [
        {"prompt": prompt, "seed": seed} | asdict(fidelity(a, b))
        for (prompt, seed), a, b in zip(asked, dense, samples, strict=True)
    ]


def _row(pipe: DiffusionPipeline, other: DiffusionPipeline, call: dict) -> dict:
    """Size and speed of a pipeline's denoiser."""
    denoiser = denoiser_of(other)
    args, kwargs = moved(denoiser_calls(other, call, limit=1)[0], denoiser.device)
    with frozen(other), torch.no_grad():
        macs = module_macs(denoiser, args, kwargs)[""]
    return {
        "params": parameters(denoiser),
        "macs": macs,
        "bytes": weight_bytes(denoiser),
        "speedup": None if other is pipe else speedup(pipe, other, call),
    }


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters in memory; of quantised ones, of what they are made of."""
    return sum(_bytes(parameter) for parameter in module.parameters())


def _bytes(tensor: Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def markdown(found: dict) -> str:
    """A report as a section of a model card."""
    names = ["", "parameters", "MACs a step", "weights", "speed of a step", "latent error"]
    names += ["median", "90 %", "worst", "PSNR"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, row in found["models"].items():
        error, faster = row["error"], row["speedup"]
        cells = [name, f"{row['params']:,}", f"{row['macs'] / 1e9:.3g} G", f"{row['bytes'] / 1e6:.1f} MB"]
        low, ratio, high = faster or (0.0, 0.0, 0.0)
        speed = f"{ratio:.2f}× ({low:.2f} to {high:.2f})" if faster else "not measured"
        cells.append("1" if error is None else speed)
        cells += (
            ["0", "0", "0", "0", ""]
            if error is None
            else [
                f"{error['mean']:.2g} ± {error['stderr']:.1g}",
                f"{error['median']:.2g}",
                f"{error['p90']:.2g}",
                f"{error['worst']['latent_error']:.2g}",
                f"{error['psnr']:.1f} dB",
            ]
        )
        lines.append(f"| {' | '.join(cells)} |")
    worst = found["models"]["pruned"]["error"]["worst"]
    text = "\n".join(lines)
    return f"""{BEGIN}
## Measured

{text}

On {found["device"]}, {found["pairs"]} pairs of the same prompt and noise. Weights: those of the denoiser in
memory, in {found["dtype"]}, float8 (layerwise casting) or int8. Latent error: ‖z₀ − z₀'‖² over the variance
of the dense latents, mean ± standard error. Worst pair of the pruned model: “{worst["prompt"]}”, seed
{worst["seed"]}. Speed: called in turn with the dense model, 95 % interval.
{END}
"""


def into_card(card: str, section: str) -> str:
    """A model card with this section in place of the one it has, or at its end."""
    before, begin, rest = card.partition(BEGIN)
    if not begin:
        return f"{card.rstrip()}\n\n{section}"
    _, _, after = rest.partition(END)
    return f"{before}{section.rstrip()}{after}"
