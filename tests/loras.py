"""LoRAs in the namings that people have, for tiny models: each is written, and what it does to each layer.

docs/checkpoints.md has a table of them, written by `python -m tests.support`; test_lora.py tries every row.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ecodiff
from ecodiff.checkpoints.comfyui.layouts import layout_of
from ecodiff.checkpoints.lora import translate_lora
from ecodiff.pipelines import denoiser_name, denoiser_of
from ecodiff.pruning.slicing import kept_features
from ecodiff.units import BASIS
from tests.checkpoints.test_folders import some_plan
from tests.conftest import PIPELINES

TARGETS = (
    "to_q",
    "to_v",
    "to_out.0",
    "proj",
    "net.2",
    "proj_mlp",
    "proj_out",
    "conv1",
    "time_emb_proj",
    "norm1.linear",
)


def layers(pipe):
    """Linears and convolutions that LoRAs are usually made for, also such that no unit runs through."""
    for name, module in denoiser_of(pipe).named_modules():
        if name.endswith(TARGETS) and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and "." in name:
            yield name, module


def matrices(pipe, rank=3):
    generator = torch.Generator().manual_seed(0)
    for name, module in layers(pipe):
        kernel = module.weight.shape[2:]
        down = torch.randn(rank, module.weight.shape[1], *kernel, generator=generator)
        up = torch.randn(len(module.weight), rank, *(1 for _ in kernel), generator=generator)
        yield name, 0.3 * down / down[0].numel() ** 0.5, 0.3 * up


def peft_file(pipe, path, alpha=None):
    prefix, tensors = denoiser_name(pipe), {}
    for name, down, up in matrices(pipe):
        tensors[f"{prefix}.{name}.lora_A.weight"], tensors[f"{prefix}.{name}.lora_B.weight"] = down, up
    save_file(tensors, path)
    return path


def kohya_file(pipe, path, alpha=1.5):
    tensors = {}
    for name, down, up in matrices(pipe):
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def dora_file(pipe, path, naming):
    """A DoRA that makes rows between half and one and a half times as long."""
    prefix, tensors = denoiser_name(pipe), {}
    generator = torch.Generator().manual_seed(1)
    for name, down, up in matrices(pipe):
        weight = denoiser_of(pipe).get_submodule(name).weight.detach()
        long = (weight.flatten(1) + up.flatten(1) @ down.flatten(1)).norm(dim=1)
        long = long * (0.5 + torch.rand(len(long), generator=generator))
        if naming == "peft":
            shape = (1, -1, 1, 1) if weight.ndim == 4 else (-1,)
            found = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": long.reshape(shape)}
            tensors |= {f"{prefix}.{name}.{part}": tensor for part, tensor in found.items()}
        else:
            found = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": long[:, None]}
            found["alpha"] = torch.tensor(float(len(down)))
            flat = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{flat}.{part}": tensor for part, tensor in found.items()}
    save_file(tensors, path)
    return path


def original_names(pipe):
    """{layer of the original authors: (diffusers' layers)} of those that `matrices` are about."""
    known = layout_of(denoiser_of(pipe)).layers(denoiser_of(pipe))
    wanted = {name for name, _, _ in matrices(pipe)}
    return {new: olds for new, olds in known.items() if wanted & set(olds)}


def original_file(pipe, path, naming):
    """A LoRA as trainers of the original code write it: q, k and v in one pair."""
    tensors, noise = {}, torch.Generator().manual_seed(0)
    modules = dict(denoiser_of(pipe).named_modules())
    for new, olds in original_names(pipe).items():
        weights = [modules[old].weight for old in olds]
        rows, kernel = sum(len(w) for w in weights), weights[0].shape[2:]
        down = (
            0.3 * torch.randn(3, weights[0].shape[1], *kernel, generator=noise) / weights[0].shape[1] ** 0.5
        )
        up = torch.randn(rows, 3, *(1 for _ in kernel), generator=noise)
        if naming == "kohya":
            flat = f"lora_unet_{new.replace('.', '_')}"
            tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": 2 * up}
            tensors[f"{flat}.alpha"] = torch.tensor(1.5)
        else:
            tensors |= {f"{naming}{new}.lora_A.weight": down, f"{naming}{new}.lora_B.weight": up}
    save_file(tensors, path)
    return path


def product(up: Tensor, down: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


def diffusers_layers(pipe, path: Path, flat: str = "", alpha: float = 3.0) -> dict[str, Tensor]:
    """A pair a layer of diffusers; `flat`: what underscored names begin with, "": PEFT's own names."""
    tensors, update = {}, {}
    for name, down, up in matrices(pipe):
        if flat:
            key = f"{flat}{name.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up.contiguous()}
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        else:
            key = f"{denoiser_name(pipe)}.{name}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up.contiguous()}
        update[name] = product(up, down) * (alpha / 3)
    save_file(tensors, path)
    return update


def original_layers(pipe, path: Path, naming: str) -> dict[str, Tensor]:
    """A pair a layer of the original authors, as `original_file` writes it."""
    original_file(pipe, path, naming)
    stored, modules, update = load_file(path), dict(denoiser_of(pipe).named_modules()), {}
    for new, olds in original_names(pipe).items():
        key = f"lora_unet_{new.replace('.', '_')}.lora_" if naming == "kohya" else f"{naming}{new}.lora_"
        down, up = (stored[f"{key}{side}.weight"] for side in (("down", "up") if naming == "kohya" else "AB"))
        whole = product(up, down) * (0.5 if naming == "kohya" else 1)
        update |= dict(zip(olds, whole.split([len(modules[old].weight) for old in olds]), strict=True))
    return update


def factorised(pipe, path: Path, kind: str) -> dict[str, Tensor]:
    """LyCORIS' LoHa and LoKr."""
    tensors, update, noise = {}, {}, torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=noise)

    for name, module in layers(pipe):
        weight = module.weight
        out, features = len(weight), weight[0].numel()
        flat = f"lora_unet_{name.replace('.', '_')}"
        if kind == "loha":
            parts = {"hada_w1_a": random(out, 2), "hada_w1_b": random(2, features)}
            parts |= {"hada_w2_a": random(out, 2), "hada_w2_b": random(2, features)}
            whole = (
                (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]) * 0.5
            )
        else:
            inner = 4 if weight.shape[1] % 4 == 0 else 1
            first = random(4 if out % 4 == 0 else 1, inner)
            a, b = random(out // len(first), 2), random(2, features // inner)
            second = {"lokr_w2": a @ b} if kind == "lokr-whole" else {"lokr_w2_a": a, "lokr_w2_b": b}
            parts = {"lokr_w1": first} | second
            shape = (len(a), weight.shape[1] // inner, *weight.shape[2:])
            whole = torch.kron(first.view(*first.shape, *(1 for _ in weight.shape[2:])), (a @ b).view(shape))
            whole = whole * (1.0 if kind == "lokr-whole" else 0.5)
        parts["alpha"] = torch.tensor(1.0)
        tensors |= {f"{flat}.{part}": value for part, value in parts.items()}
        update[name] = whole.view(weight.shape)
    save_file(tensors, path)
    return update


def measured(naming: str, kind: str, folder: Path) -> tuple[int, float]:
    """(layers that were compared, largest error): a translated LoRA's update of each layer of a pruned model
    against the rows and columns of what the file says, relative to its largest value."""
    pipe = PIPELINES[kind]()
    file = folder / "lora.safetensors"
    update = NAMINGS[naming][1](pipe, file)
    plan = some_plan(pipe)
    plan.bases = {name: basis for name, basis in plan.bases.items() if name == BASIS}  # rows and columns
    tensors, _ = translate_lora(file, ecodiff.variant(pipe, plan), plan, dense=denoiser_of(pipe))
    kept = kept_features(denoiser_of(pipe), plan)
    checked, worst = 0, 0.0
    for layer, whole in update.items():
        at = f"{denoiser_name(pipe)}.{layer}"
        if f"{at}.lora_A.weight" not in tensors or ".norm" in layer:
            continue
        down, up = (tensors[f"{at}.lora_{side}.weight"].flatten(1) for side in "AB")
        rows, columns = kept.get((layer, "out")), kept.get((layer, "in"))
        whole = whole if rows is None else whole[rows]
        whole = whole if columns is None else whole[:, columns]
        expected = whole.flatten(1)
        error = (up @ down - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        checked, worst = checked + 1, max(worst, float(error))
    return checked, worst


ALL = ("sdxl", "sd-1.5", "flux-dev", "sd3.5")
# {naming: (tiny models, function that writes a file and gives each layer's update)}
NAMINGS: dict[str, tuple[tuple[str, ...], Callable[..., dict[str, Tensor]]]] = {
    "PEFT, diffusers: `unet.…lora_A`, `transformer.…lora_A`": (ALL, diffusers_layers),
    "kohya, of diffusers' layers: `lora_unet_mid_block_…`": (
        ALL,
        partial(diffusers_layers, flat="lora_unet_", alpha=1.5),
    ),
    "kohya, of the authors' layers: `lora_unet_double_blocks_0_img_attn_qkv`": (
        ALL,
        partial(original_layers, naming="kohya"),
    ),
    "`diffusion_model.…lora_A`": (ALL, partial(original_layers, naming="diffusion_model.")),
    "`base_model.model.…lora_A`": (ALL, partial(original_layers, naming="base_model.model.")),
    "`model.diffusion_model.…lora_A`": (ALL, partial(original_layers, naming="model.diffusion_model.")),
    "OneTrainer: `lora_transformer_…`": (
        ("flux-dev",),
        partial(diffusers_layers, flat="lora_transformer_"),
    ),
    "`lycoris_…`": (("flux-dev",), partial(diffusers_layers, flat="lycoris_")),
    "LoHa": (("sdxl",), partial(factorised, kind="loha")),
    "LoKr": (("sdxl",), partial(factorised, kind="lokr")),
    "LoKr, second factor whole": (("sdxl",), partial(factorised, kind="lokr-whole")),
}


def table() -> str:
    """The table in docs/checkpoints.md."""
    lines = ["| naming | tried on tiny | largest error |", "|---|---|---|"]
    for naming, (kinds, _) in NAMINGS.items():
        with TemporaryDirectory() as folder:
            worst = max(measured(naming, kind, Path(folder))[1] for kind in kinds)
        lines.append(f"| {naming} | {', '.join(kinds)} | {f'{worst:.0e}' if worst else 0} |")
    return "\n".join(lines) + "\n"
