import pytest
import torch

from ecodiff.errors import PlanError
from ecodiff.pruning import gates, masking


def test_open_probability_is_what_sampling_gives():
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    noise = torch.rand(200_000, 5, generator=torch.Generator().manual_seed(0))
    drawn = gates.sample(log_alpha, noise)
    opened = (drawn > 0).float().mean(0)
    torch.testing.assert_close(opened, gates.open_probability(log_alpha), atol=5e-3, rtol=0)
    assert drawn.min() == 0 and drawn.max() == 1, "hard concrete gates reach both ends"


def test_hard_gates_are_monotone_and_clipped():
    values = gates.hard(torch.linspace(-9, 9, 50))
    assert values[0] == 0 and values[-1] == 1
    assert (values.diff() >= 0).all()


def test_gradient_flows_through_an_open_gate_only():
    log_alpha = torch.tensor([-9.0, 0.0, 9.0], requires_grad=True)
    gates.sample(log_alpha, torch.full((3,), 0.5)).sum().backward()
    assert log_alpha.grad[1] > 0 and log_alpha.grad[0] == 0 and log_alpha.grad[2] == 0


def test_masks_that_do_not_fit_are_refused(tiny_sdxl):
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    with pytest.raises(PlanError, match="4 units"), masking.masked(tiny_sdxl.unet, {name: torch.ones(5)}):
        pass
    with (
        pytest.raises(PlanError, match="no group named"),
        masking.masked(tiny_sdxl.unet, {"nothing": torch.ones(4)}),
    ):
        pass
