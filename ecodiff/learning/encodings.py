"""Prompts are encoded once; where memory is short, text encoders are away while the denoiser works."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..pipelines import denoiser_of, moved


def text_encoders(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Components that only `encode_prompt` needs, by name."""
    if not hasattr(pipe, "encode_prompt"):
        return {}
    named = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    return {name: part for name, part in named.items() if isinstance(part, PreTrainedModel)}


class Encodings:
    """What `encode_prompt` of a pipeline gave, by its arguments, on the CPU."""

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe, self.encoders = pipe, text_encoders(pipe)
        self._known: dict[str, tuple] = {}

    @property
    def bytes(self) -> int:
        """Weights of the text encoders."""
        parameters = (p for encoder in self.encoders.values() for p in encoder.parameters())
        return sum(p.numel() * p.element_size() for p in parameters)

    @contextmanager
    def used(self, alone: bool = False) -> Iterator[None]:
        """Let the pipeline's calls find what was encoded before.

        Args:
            alone: the text encoders are on the CPU, and no components of the pipeline, unless a prompt
                is new. Pipelines of diffusers do without them when prompts are encoded already.
        """
        if not self.encoders:
            yield
            return
        pipe, encode, device = self.pipe, self.pipe.encode_prompt, denoiser_of(self.pipe).device

        def encoded(*args, **kwargs):
            if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))):
                return encode(*args, **kwargs)  # embeddings of the caller's own: nothing to encode
            key = repr((args, kwargs))
            if key not in self._known:
                if alone:
                    self._put_back(device)
                with torch.no_grad():
                    self._known[key] = moved(encode(*args, **kwargs), "cpu")
                if alone:
                    self._put_away()
            return moved(self._known[key], device)

        pipe.encode_prompt = encoded
        try:
            if alone:
                self._put_away()
            yield
        finally:
            del pipe.encode_prompt
            if alone:
                self._put_back(device)

    def _put_away(self) -> None:
        for name, encoder in self.encoders.items():
            encoder.to("cpu")
            self._set(name, None)

    def _put_back(self, device: torch.device) -> None:
        for name, encoder in self.encoders.items():
            self._set(name, encoder.to(device))

    def _set(self, name: str, encoder: nn.Module | None) -> None:
        object.__setattr__(self.pipe, name, encoder)  # the pipeline's own would write it to its config
