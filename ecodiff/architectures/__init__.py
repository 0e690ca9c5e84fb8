"""All that knows how diffusers builds its denoisers: which units a layer has, and where they run.

Every module beside this one registers its `@adapter` functions by being imported.
"""

from importlib import import_module
from pkgutil import iter_modules

from .registry import adapter, blocks, find_groups, unit_parameters, unrecognised

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["adapter", "blocks", "find_groups", "unit_parameters", "unrecognised"]
