import pytest
import torch

import ecodiff
from ecodiff.learning.gauss_newton import gauss_newton_sample
from ecodiff.learning.methods import METHODS
from ecodiff.pipelines import denoiser_of, stream
from ecodiff.pruning import masking
from ecodiff.units import ALL_KINDS
from tests.conftest import PROMPT, short

CALL = {"prompt": [PROMPT, "cat"], "num_inference_steps": 3}


def call(seed=0):
    return CALL | {"generator": [torch.Generator().manual_seed(seed + i) for i in range(2)]}


def test_a_mask_a_sample_is_each_samples_own(tiny_sdxl):
    """Two rows with two masks are what each of them is alone, guidance included."""
    group = ecodiff.find_groups(tiny_sdxl.unet)[0]
    masks = torch.stack([torch.ones(group.size), torch.zeros(group.size)])

    def run(mask):
        with torch.no_grad(), masking.masked(tiny_sdxl.unet, {group.name: mask}):
            return tiny_sdxl(**call(), output_type="latent").images

    both = run(masks)
    torch.testing.assert_close(both[0], run(masks[0])[0])
    torch.testing.assert_close(both[1], run(masks[1])[1])
    assert not torch.allclose(both[1], run(masks[0])[1])


def test_gauss_newton_is_the_norm_of_the_jacobian(tiny_sdxl):
    """Many random projections against finite differences of z_0 in one gate."""
    group = ecodiff.find_groups(tiny_sdxl.unet)[1]

    def z0(gate):
        mask = torch.ones(group.size)
        mask[0] = gate
        with torch.no_grad(), masking.masked(tiny_sdxl.unet, {group.name: mask}):
            return tiny_sdxl(**call(), output_type="latent").images

    dense, step = z0(1.0), 1e-2
    slope = ((z0(1 + step) - z0(1 - step)) / (2 * step)).flatten(1)
    wanted = float((slope.square().sum(1) / dense.flatten(1).var(1) / slope.shape[1]).mean())
    draws = [gauss_newton_sample(tiny_sdxl, [group], call(), stream("probe", seed)) for seed in range(60)]
    found = float(torch.stack([draw[group.name][0] for draw in draws]).mean())
    assert found == pytest.approx(wanted, rel=0.4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ranks_every_unit(pipe, name):
    found = METHODS[name]
    values = found.score(pipe, [call() | short(pipe)], 0)
    groups = ecodiff.find_groups(denoiser_of(pipe), found.kinds if found.wide else ALL_KINDS)
    assert {name: len(v) for name, v in values.items()} == {g.name: g.size for g in groups}
    assert all(v.isfinite().all() and (v >= 0).all() for v in values.values())
    assert torch.cat(list(values.values())).std() > 0
    assert found.source and found.cost >= 0
