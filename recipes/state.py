"""Training state on disk: safetensors only, replaced atomically, so that a kill loses nothing."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def save(path: Path, step: int, modules: dict[str, nn.Module], optimizer) -> None:
    """Write weights, Adam moments and the step to `path` (one safetensors file)."""
    tensors = {"step": torch.tensor(step)}
    for name, module in modules.items():
        tensors |= {f"{name}|{key}": value for key, value in module.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer|{index}|{key}": value for key, value in moments.items()}
    partial = path.with_suffix(".partial")
    save_file({key: value.cpu().clone().contiguous() for key, value in tensors.items()}, partial)
    partial.replace(path)


def load(path: Path, modules: dict[str, nn.Module], optimizer) -> int:
    """Restore what `save` wrote and return the step; 0 if there is nothing yet."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    for name, module in modules.items():
        prefix = f"{name}|"
        module.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
    saved = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimizer|"):
            _, index, name = key.split("|")
            saved["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(saved)
    return int(tensors["step"])


def log(path: Path, **values) -> None:
    """Print one line of progress and append it to a JSON-lines file."""
    print(
        "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()),
        flush=True,
    )
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
