"""Modules of ecodiff 0.1 under their old names: what they held is looked up where it lives now.

Importing one warns. To be removed in 0.3.
"""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED: dict[str, tuple[str, ...]] = {
    "arguments": ("cli",),
    "backends": ("machine",),
    "checkpoint": ("checkpoints.loading", "checkpoints.saving", "checkpoints.card", "pruning.plan"),
    "compensate": ("learning.compensate", "learning.calibration", "config"),
    "ecodiff_sliced_v1": ("pruning.ecodiff_sliced_v1",),
    "encodings": ("learning.encodings",),
    "fidelity": ("metrics.fidelity",),
    "filling": ("checkpoints.formats",),
    "gates": ("pruning.gates", "pruning.masking"),
    "groups": ("architectures", "pipelines", "units"),
    "hub": ("checkpoints.hub",),
    "imports": ("checkpoints.importers",),
    "learn": ("learning.learn",),
    "lora": ("checkpoints.lora", "checkpoints.lora_saving"),
    "measure": ("metrics.cost", "machine"),
    "memory": ("learning.memory", "machine"),
    "plan": ("pruning.plan", "storage"),
    "recording": ("learning.calibration", "config"),
    "saliency": ("learning.scoring",),
    "scores": ("pruning.scores",),
    "service": ("app.service",),
    "slicing": ("pruning.slicing",),
    "state": ("config", "learning.state"),
    "trajectory": ("learning.trajectory", "learning.checkpointing", "pipelines"),
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        known = package == "ecodiff" and name in MOVED
        return ModuleSpec(fullname, self) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        homes = MOVED[spec.name.partition(".")[2]]

        def find(name: str):
            for home in homes:
                found = import_module(f"ecodiff.{home}")
                if hasattr(found, name):
                    return getattr(found, name)
            raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        new = " or ".join(f"ecodiff.{home}" for home in MOVED[module.__name__.partition(".")[2]])
        warnings.warn(f"{module.__name__} has moved to {new}.", DeprecationWarning, stacklevel=2)


sys.meta_path.append(_Finder())
