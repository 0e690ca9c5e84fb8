"""`env`: what a bug report should say of this machine."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

from ._common import report

HELP = "show versions and devices, for a bug report"
PACKAGES = (
    *("ecodiff", "torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub"),
    *("peft", "gradio", "spaces"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""


def run(options: argparse.Namespace) -> int:
    """Versions, devices and memory."""
    import torch

    from ..machine import capacity, devices, megabytes, together

    facts = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    for device in (device for name in devices() for device in together(name)):
        words = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        facts[str(device)] = f"{words}, {megabytes(capacity(device))}"
    report(options, list(facts.items()), facts)
    return 0
