"""Pruned models are diffusers models: what people put on top of those works on these."""

import pytest
import torch

import ecodiff
from ecodiff.learning import scoring
from ecodiff.pipelines import denoiser_of
from ecodiff.pruning.scores import Scores
from tests.stacking import STACKS, latents


def pruned(dense):
    """A variant without a fifth of its parameters; by magnitude, which is quick."""
    found = scoring.magnitude(dense)
    values = {group.name: found[group.name] for group in ecodiff.find_groups(denoiser_of(dense))}
    return ecodiff.variant(dense, Scores.of(denoiser_of(dense), values).plan(ratio=0.2))


@pytest.mark.parametrize(
    ("model", "stack"), [(model, name) for name, stack in STACKS.items() for model in stack.models]
)
def test_on_top_of_a_pruned_model(model, stack):
    stack, dense = STACKS[stack], ecodiff.load(model)  # a new one: a variant shares its weights
    pipe = pruned(dense)
    plain = latents(model, pipe)
    kept = {name: p.shape for name, p in denoiser_of(pipe).named_parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        top, more = stack.put(pipe, dense)
    drawn = latents(model, top, **more)
    assert {n: p.shape for n, p in denoiser_of(top).named_parameters() if n in kept} == kept
    assert drawn.shape == plain.shape and drawn.isfinite().all() and drawn.std() > 0.1
    difference = float((drawn - plain).abs().max() / plain.abs().max())
    if stack.error is not None:
        assert difference <= stack.error
    assert difference > 0 or not stack.changes, "it did nothing"
