"""Directions of modulation: the basis is the best of its rank, and exact at full rank."""

from dataclasses import replace

import pytest
import torch

import ecodiff
from ecodiff.architectures import find_groups
from ecodiff.errors import BudgetError, CheckpointError
from ecodiff.learning import directions
from ecodiff.learning.gauss_newton import gauss_newton_sample
from ecodiff.learning.learn import learn
from ecodiff.pipelines import denoiser_of, stream
from ecodiff.storage import read_header, write_tensors
from ecodiff.units import BASIS
from tests.conftest import PROMPT, flux, latents, short

PROMPTS = [PROMPT, "cat face", "rocket", "france flag"]


def spd(size: int, seed: int) -> torch.Tensor:
    rows = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed))
    return rows.T @ (rows * torch.linspace(0.1, 2, len(rows))[:, None]) / len(rows)


def test_the_basis_is_exact_and_the_best_of_its_rank():
    moment, metric = spd(24, 0), spd(24, 1)
    z, y, costs = directions.basis(moment, metric)
    torch.testing.assert_close(y @ z, torch.eye(24), atol=1e-4, rtol=0)
    damped = metric + directions.DAMPING * metric.diagonal().mean() * torch.eye(24)

    def lost(project, lift):
        """E[(s - Y Z s)^T M (s - Y Z s)]."""
        gone = torch.eye(24) - lift @ project
        return float((gone.T @ damped @ gone * moment).sum())

    assert costs.equal(costs.sort().values)
    assert lost(z[8:], y[:, 8:]) == pytest.approx(float(costs[:8].sum()), rel=1e-3)
    for seed in range(20):  # any other subspace, with its own best lift, loses more
        other = torch.randn(16, 24, generator=torch.Generator().manual_seed(seed))
        lift = moment @ other.T @ torch.linalg.inv(other @ moment @ other.T)
        assert lost(other, lift) > lost(z[8:], y[:, 8:])


def test_prompts_are_recombined_and_all_there():
    found = directions.recombined(PROMPTS, 20, seed=3)
    assert found[:4] == PROMPTS and len(found) == 20 and found == directions.recombined(PROMPTS, 20, seed=3)
    assert {word for text in found for word in text.split()} <= {w for text in PROMPTS for w in text.split()}
    assert directions.recombined(PROMPTS, 2, seed=3) == PROMPTS


def test_the_second_moment_is_of_what_the_layers_read():
    pipe = flux()
    (group,) = find_groups(denoiser_of(pipe), ["modulation_directions"])
    call = {"prompt": PROMPTS[:2], "num_inference_steps": 3} | short(pipe)
    call["generator"] = [stream("latents", 0, row) for row in range(2)]
    found = directions.second_moment(pipe, group, PROMPTS[:1], call | {}, 0)
    read = []
    layer = denoiser_of(pipe).get_submodule(group.consumers[0].module)
    handle = layer.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    every = directions.recombined(PROMPTS[:1], directions.PROMPTS, 0)
    assert set(every) == {PROMPT}  # one prompt: recombined with itself
    generator = stream("latents", 0, 0)
    with torch.no_grad():
        pipe(PROMPT, num_inference_steps=3, generator=generator, output_type="latent", **short(pipe))
    handle.remove()
    wanted = sum(s.T @ s for s in read) / len(read)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_gates():
    """In the basis of the features themselves, exact costs are the squares that gates have."""
    pipe = flux()
    groups = find_groups(denoiser_of(pipe), ["modulation_directions"])
    watch = directions.Gradients(denoiser_of(pipe), groups[0])
    call = {"prompt": PROMPTS[:2], "num_inference_steps": 3} | short(pipe)
    call["generator"] = [stream("latents", 0, row) for row in range(2)]
    with watch.of(2):
        squares = gauss_newton_sample(pipe, groups, call, stream("probe", 0))[BASIS]
    eye = torch.eye(groups[0].size)
    exact = torch.stack([product.diagonal().square() for product in watch.products]).mean(0)
    torch.testing.assert_close(exact, squares, rtol=1e-3, atol=1e-6 * float(squares.max()))
    ratio = watch.coherence(eye, eye, squares)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module")
def found():
    pipe = flux()
    preset = ecodiff.LearnConfig.preset("surgeon", ratio=0.2)
    config = replace(preset, warm_steps=1, batch=2, inference_steps=3, extra=short(pipe))
    ((state, scores),) = learn(pipe, PROMPTS, config)
    return pipe, config, state, scores


def test_surgeon_finds_directions_and_its_state_keeps_them(found, tmp_path):
    pipe, config, state, scores = found
    z, y = scores.bases[BASIS]
    torch.testing.assert_close(y @ z, torch.eye(len(z)), atol=1e-3, rtol=0)
    state.save(tmp_path / "state.safetensors")
    again = ecodiff.learning.state.LearnState.load(tmp_path / "state.safetensors")
    assert not list(learn(pipe, PROMPTS, config, again))  # finished
    scores.save(tmp_path / "scores.safetensors")
    loaded = ecodiff.Scores.load(tmp_path / "scores.safetensors")
    plan = scores.plan(ratio=0.3)
    assert not plan[BASIS].all() and loaded.plan(ratio=0.3).digest == plan.digest
    _, other = next(learn(pipe, PROMPTS, replace(config, seed=1)))
    assert other.bases[BASIS][0].shape == z.shape and not other.bases[BASIS][0].equal(z)


@torch.no_grad()
def test_a_plan_with_directions_is_masked_sliced_saved_and_cut_again(found, tmp_path):
    pipe, _, _, scores = found
    plan = scores.plan(ratio=0.3)
    small = ecodiff.variant(pipe, plan)
    counted = sum(p.numel() for p in denoiser_of(small).parameters())
    assert counted == plan.metadata["params_pruned"]
    with ecodiff.masked(denoiser_of(pipe), plan):
        masked = latents(pipe)
    torch.testing.assert_close(latents(small), masked, rtol=1e-3, atol=1e-3)
    opened = ecodiff.PrunePlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert opened.digest == plan.digest
    assert all(a.equal(b) for a, b in zip(opened.bases[BASIS], plan.bases[BASIS], strict=True))
    known = ecodiff.pruning.slicing.plan_of(denoiser_of(small))
    assert known.digest == plan.digest
    torch.testing.assert_close(latents(ecodiff.variant(pipe, known)), latents(small), rtol=1e-3, atol=1e-3)
    rest = ecodiff.Scores.unranked(denoiser_of(small), ["modulation_directions"])
    second = rest.plan(ratio=rest.ceiling / 2)
    smaller = ecodiff.variant(small, second)
    whole = ecodiff.pruning.slicing.plan_of(denoiser_of(smaller))
    assert int(whole[BASIS].sum()) == int(second[BASIS].sum()) and whole.digest != plan.digest
    torch.testing.assert_close(latents(ecodiff.variant(pipe, whole)), latents(smaller), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("harm", ["short", "nan", "nameless"])
def test_damaged_directions_are_refused(found, tmp_path, harm):
    file = found[3].plan(ratio=0.3).save(tmp_path / "plan.safetensors")
    from safetensors.torch import load_file

    tensors, header = load_file(file), dict(read_header(file))
    if harm == "short":
        tensors[f"{BASIS}.lift"] = tensors[f"{BASIS}.lift"][:-4]
    elif harm == "nan":
        tensors[f"{BASIS}.lift"] = torch.full_like(tensors[f"{BASIS}.lift"], 255)
    else:
        header["bases"] = '["nothing"]'
    write_tensors(bad := tmp_path / "bad.safetensors", tensors, header)
    with pytest.raises(CheckpointError, match="not a valid plan"):
        ecodiff.PrunePlan.load(bad)


def test_rows_and_directions_are_the_same_parameters():
    with pytest.raises(BudgetError, match="choose one"):
        ecodiff.LearnConfig(kinds=("modulation", "modulation_directions"))


def test_a_batch_that_outweighs_the_others_counts_for_two_of_them():
    tensor = torch.zeros(2)
    sums, weights = directions.Sums({"squares": tensor}), []
    for batch in ([1.0, 3.0], [2.0, 2.0], [3000.0, 1000.0], [3.0, 3.0]):
        tensor += torch.tensor(batch)
        weights.append(sums.add(sum(batch)))
        assert not tensor.any()
    sums.close()
    assert weights == [1, 1, 8 / 4000, 1]
    torch.testing.assert_close(tensor, torch.tensor([1.0 + 2 + 6 + 3, 3.0 + 2 + 2 + 3]))


def test_batches_without_gradients_are_no_fault():
    tensor = torch.zeros(1)
    sums = directions.Sums({"squares": tensor})
    assert sums.add(0.0) == 1
    sums.close()
    assert tensor.equal(torch.zeros(1))
