"""A pytest plugin: diffusers' own tests, on pruned components.

Their test classes make the components of a pipeline in `get_dummy_components`; here its denoiser is pruned
before they get it. Tokenizers and text encoders that they take from the Hub are made here, tiny and random.
With $DENSE=1 nothing is pruned: what fails then has nothing to do with pruning (see `run.py`).
"""

import functools
import inspect
import os

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5Tokenizer,
)

import ecodiff
from ecodiff.units import ALL_KINDS

DENSE = bool(os.environ.get("DENSE"))


def tokenizer() -> CLIPTokenizer:
    """One token a character, the last one for the end: theirs has as few."""
    characters = [chr(code) + end for end in ("", "</w>") for code in range(33, 127)]
    words = [*characters, "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def letters() -> T5Tokenizer:
    """One token a letter."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(chr(n), -1.0) for n in range(32, 127)]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def made_here(cls, name: str):
    """In place of a tiny tokenizer or text encoder of the Hub."""
    if issubclass(cls, PreTrainedTokenizerBase | AutoTokenizer):
        return letters() if "t5" in name else tokenizer()
    torch.manual_seed(0)
    words = len(tokenizer())
    config = T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    if cls is AutoConfig:
        return config
    if "T5" in cls.__name__:
        return cls(config).eval()
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "vocab_size": words}
    ends = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": 1}
    return cls(CLIPTextConfig(hidden_size=32, projection_dim=32, hidden_act="gelu", **layers, **ends)).eval()


def from_here(method):
    """`from_pretrained` that asks the Hub for nothing."""

    @functools.wraps(method.__func__)
    def call(cls, name, *args, **kwargs):
        if "internal-testing" in str(name):
            return made_here(cls, str(name).lower())
        return method.__func__(cls, name, *args, **kwargs)

    return classmethod(call)


def trusting(method):
    """`from_pretrained` with `trust_remote_code`, as the card of a pruned folder says."""

    @functools.wraps(method.__func__)
    def call(cls, *args, **kwargs):
        return method.__func__(cls, *args, **{"trust_remote_code": True} | kwargs)

    return classmethod(call)


def pruned(denoiser: nn.Module) -> nn.Module:
    """Half of all heads, neurons and channels gone, the first layer's all."""
    generator, plan = torch.Generator().manual_seed(0), {}
    for group in ecodiff.find_groups(denoiser, ("heads", "ffn", "resnet")):
        keep = torch.rand(group.size, generator=generator) > 0.5
        keep[: max(1, group.floor)] = True
        plan[group.name] = keep
    return ecodiff.slice_(denoiser, ecodiff.PrunePlan(plan))


def with_pruned(method):
    """`get_dummy_components` of which the denoiser is pruned."""

    @functools.wraps(method)
    def components(self, *args, **kwargs):
        found = method(self, *args, **kwargs)
        parts = found[0] if isinstance(found, tuple) else found
        for name in ("unet", "transformer"):
            if isinstance(parts.get(name), ModelMixin) and ecodiff.find_groups(parts[name], ALL_KINDS):
                parts[name] = pruned(parts[name])
        return found

    return components


def pytest_configure(config):
    for cls in (PreTrainedTokenizerBase, PreTrainedModel, AutoTokenizer, AutoConfig):
        cls.from_pretrained = from_here(cls.__dict__["from_pretrained"])
    for cls in (DiffusionPipeline, ModelMixin):
        cls.from_pretrained = trusting(cls.__dict__["from_pretrained"])


def pytest_collection_modifyitems(items):
    pixels = pytest.mark.skip(reason="compares with pixels of the dense model")
    for item in items:
        if inspect.isfunction(item.function) and "expected_slice" in inspect.getsource(item.function):
            item.add_marker(pixels)
    for cls in {item.cls for item in items if hasattr(getattr(item, "cls", None), "get_dummy_components")}:
        if not DENSE:
            cls.get_dummy_components = with_pruned(cls.get_dummy_components)
