"""What a pipeline never reads of its text encoders, left out: the images are the same, bit for bit.

A text encoder is often a language model that is read in its middle: FLUX.2 takes hidden states of layers 10,
20 and 30 of 40. No pipeline reads the head that predicts words, nor, drawing from text, a vision tower.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import catalog
from ..pipelines import call_options, denoiser_calls
from ..pruning.components import forget_layers_
from ..pruning.slicing import shared_copy

_COUNTS = ("num_hidden_layers", "num_layers", "depth")  # as configs of transformers call them


def without_unused(
    pipe: DiffusionPipeline, calls: Sequence[dict]
) -> tuple[DiffusionPipeline, dict[str, int]]:
    """A pipeline without what it never reads of its text encoders; the parameters of each left out.

    Stacks of layers are cut behind the last one that is read, and a head that predicts words is tied to the
    embeddings, so that plain diffusers and transformers open what is saved. Each cut is tried: it stays only
    if the denoiser is given the same as before, bit for bit. What is used otherwise (a head to write better
    prompts, a vision tower to edit images) is gone with it.

    Args:
        pipe: is not changed; the result shares its weights.
        calls: arguments of the pipeline to try it by: of several prompts, with guidance as it is drawn with.
    """
    expected = [_given(pipe, call) for call in calls]

    def same(changed: DiffusionPipeline) -> bool:
        try:
            return all(map(_equal, [_given(changed, call) for call in calls], expected))
        except (IndexError, RuntimeError, ValueError, TypeError, AttributeError):
            return False  # it is read, by its place

    saved: dict[str, int] = {}
    for name, part in pipe.components.items():
        if not name.startswith("text_encoder") or not isinstance(part, nn.Module):
            continue
        before = _parameters(part)
        part = shared_copy(part)
        changed = copy.copy(pipe)
        changed.register_modules(**{name: part})
        unread = partial(same, changed)
        _tie_head(part, unread)
        for path, layers in _stacks(part):
            _shorten(part, path, layers, unread)
        forget_layers_(part)
        if (less := before - _parameters(part)) > 0:
            saved[name], pipe = less, changed
    return pipe, saved


def lean(pipe: DiffusionPipeline, known: catalog.Model) -> tuple[DiffusionPipeline, dict[str, int]]:
    """As `without_unused`, tried by prompts of the model and an empty one, drawn as the model draws."""
    options = call_options(pipe, **known.drawing())
    prompts = [*known.prompts("calibration")[:3], ""]
    return without_unused(pipe, [options | {"prompt": prompt} for prompt in prompts])


def in_words(saved: dict[str, int]) -> str:
    """What was left out, for a person."""
    words = ", ".join(f"{count:,} parameters of {name}" for name, count in saved.items())
    return f"left out, never read: {words or 'nothing'}"


def _given(pipe: DiffusionPipeline, call: dict) -> list[Tensor]:
    """What the denoiser is given first, from the same noise each time."""
    call = call | {"generator": torch.Generator().manual_seed(0)}
    return [leaf for leaf in tree_leaves(denoiser_calls(pipe, call, limit=1)[0]) if isinstance(leaf, Tensor)]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _parameters(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def _tie_head(part: nn.Module, unread: Callable[[], bool]) -> None:
    """Let the head that predicts words, if there is one, share the embeddings' weights."""
    head, embeddings = (
        getattr(part, f"get_{which}_embeddings", lambda: None)() for which in ("output", "input")
    )
    if head is None or embeddings is None or head.weight is embeddings.weight:
        return
    if head.weight.shape != embeddings.weight.shape:
        return
    weight, configs = head.weight, [c for c in _configs(part) if hasattr(c, "tie_word_embeddings")]
    before = [config.tie_word_embeddings for config in configs]
    head.weight = embeddings.weight
    for config in configs:
        config.tie_word_embeddings = True
    if not unread():
        head.weight = weight
        for config, tied in zip(configs, before, strict=True):
            config.tie_word_embeddings = tied


def _stacks(part: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Stacks of layers whose number a config of their owner says, by path."""
    for path, module in list(part.named_modules()):
        there = isinstance(module, nn.ModuleList) and any(other is module for other in part.modules())
        if there and len(module) and list(_counted(part, path, len(module))):  # it may be cut off by now
            yield path, module


def _counted(part: nn.Module, path: str, count: int) -> Iterator[tuple[object, str]]:
    """(config, name) of whatever says how many layers the stack at `path` has: of its owner's kind."""
    owner = part.get_submodule(path.rpartition(".")[0])
    kind = type(getattr(owner, "config", None))
    for config in _configs(part):
        if type(config) is kind:
            yield from ((config, name) for name in _COUNTS if getattr(config, name, None) == count)


def _configs(part: nn.Module) -> list:
    """Every config of a model, once: its modules' copies of it, and those inside the others."""
    found: dict[int, object] = {}
    waiting = [module.config for module in part.modules() if hasattr(module, "config")]
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, "to_dict"):
            found[id(config)] = config
            waiting += [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return list(found.values())


def _shorten(part: nn.Module, path: str, layers: nn.ModuleList, unread: Callable[[], bool]) -> None:
    """Cut a stack to the fewest layers behind which nothing is read."""
    parent, _, name = path.rpartition(".")
    owner, count = part.get_submodule(parent), len(layers)
    counted = list(_counted(part, path, count))
    lists = {
        (id(config), key): (config, key, list(value))
        for config, _ in counted
        for key, value in vars(config).items()
        if isinstance(value, list) and len(value) == count
    }

    def cut(kept: int) -> None:
        setattr(owner, name, nn.ModuleList(layers[:kept]))
        for config, attribute in counted:
            setattr(config, attribute, kept)
        for config, attribute, whole in lists.values():
            setattr(config, attribute, whole[:kept])

    fewest, enough = 0, count
    while fewest < enough:
        kept = (fewest + enough) // 2
        cut(kept)
        if unread():
            enough = kept
        else:
            fewest = kept + 1
    cut(enough)
