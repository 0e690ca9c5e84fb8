"""Directions of what a model's AdaLN layers read: a basis in which dropping one costs as little as it can.

All of a model's AdaLN Linears read one vector, s = silu(embedding of time, guidance and pooled text). With
C = E[s s^T] over prompts and time steps, M = sum over those Linears of E[h h^T], h the gradient of a random
projection of z_0 with respect to the s that the Linear reads (summed over the steps of a trajectory: the
Gauss-Newton metric of the objective), and

    U S^2 U^T = M^1/2 C M^1/2,    Z = U^T M^1/2,    Y = M^-1/2 U,

Y Z = 1, so W s = (W Y) (Z s) changes nothing; the features of Z s are uncorrelated, so W Y without some of
its columns is already the least squares repair; and dropping feature j costs S_j^2. (Of all projections of
a rank, the one that loses least in the metric M: a weighted PCA, as in SliceGPT and ASVD for other layers.)

C needs many prompts, or the pooled text of new ones lies outside what it has seen: besides those that
there are, prompts are put together of halves of two. Only the text encoder and the embeddings before the
first block run for them. M is an estimate of few gradients, so some of the identity is added to it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..pipelines import denoiser_calls, denoiser_of, prompt_rows, stream
from ..units import PruneGroup
from .calibration import Call, seen
from .progress import SUMS, Progress

DAMPING = 0.1  # of M, as a fraction of its mean diagonal
PROMPTS = 1024  # that C is gathered over
BATCH = 16  # prompts at a time
MEMORY = 1 << 30  # bytes of what is kept of single trajectories
LIMIT = 2.0  # what a batch counts for at most, in medians of what batches cost
COSTS = "costs"  # of the batches, in what is kept of sums
WINDOW = 6  # coherence is smoothed over a sixth of all directions


class Sums:
    """Sums of what each batch adds to some tensors, where none counts for more than `LIMIT` usual ones.

    A trajectory that turns off into another image at the least touch has gradients that no cut can heed: of
    192 of emoji-flux the squares of one were a thousand times the median, a third of a plain sum.

    Args:
        added: by name, what a batch adds to; zeros at the beginning, and between batches.
    """

    def __init__(self, added: Mapping[str, Tensor]):
        self.added, self.costs = added, list[float]()
        self.totals = {name: torch.zeros_like(tensor) for name, tensor in added.items()}

    def add(self, cost: float) -> float:
        """A batch is done, whose gates cost so much in all; returns its weight, by the batches so far."""
        self.costs.append(cost)
        most = LIMIT * median(self.costs)
        weight = most / cost if cost > most > 0 else 1.0
        for name, tensor in self.added.items():
            self.totals[name].add_(tensor, alpha=weight)
            tensor.zero_()
        return weight

    def close(self) -> None:
        """Put the sums into the tensors."""
        for name, tensor in self.added.items():
            tensor.copy_(self.totals.pop(name))


class Gradients:
    """While it is open, sums up M of what the consumers of a group read, and sum s h^T of each trajectory."""

    def __init__(self, denoiser: nn.Module, group: PruneGroup):
        self.layers = [denoiser.get_submodule(slot.module) for slot in group.consumers]
        self.metric = torch.zeros(group.size, group.size)
        self.products: list[Tensor] = []  # one of shape (features, features) a trajectory
        self.weights: list[float] = []  # of each of them, in squares
        self.count = 0

    def of(self, count: int) -> "Gradients":
        """For a batch of `count` trajectories."""
        self.count = count
        room = MEMORY // (4 * self.metric.numel()) - len(self.products)
        self.products += [torch.zeros_like(self.metric) for _ in range(count if count <= room else 0)]
        self.full = count > room
        self.weights += [1.0] * (len(self.products) - len(self.weights))
        return self

    def weigh(self, weight: float) -> None:
        """What the batch counted, whose gradients were seen last."""
        new = 0 if self.full else self.count
        self.weights[len(self.weights) - new :] = [weight] * new

    def __enter__(self) -> "Gradients":
        self.handles = [layer.register_forward_hook(self._see) for layer in self.layers]
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, module: nn.Module, given: tuple, output: Tensor) -> None:
        if given[0].requires_grad:  # it does once gates multiply it
            given[0].register_hook(partial(self._add, given[0].detach()))

    def _add(self, s: Tensor, gradient: Tensor) -> None:
        h = gradient.detach().float()
        rows = h.flatten(0, -2)
        self.metric += (rows.T @ rows).cpu()
        for row in range(0 if self.full else len(h)):  # guidance stacks the whole batch again
            product = s[row].float().reshape(-1, h.shape[-1]).T @ h[row].reshape(-1, h.shape[-1])
            self.products[len(self.products) - self.count + row % self.count] += product.cpu()

    def coherence(self, z: Tensor, y: Tensor, costs: Tensor) -> Tensor:
        """By how much each direction costs more than `costs` say, (features,), smoothed along them.

        Those take errors of layers and steps for independent. The exact gradient of a direction's gate, of
        d/dm of s + (m - 1) y (z s), is z (sum s h^T) y for each trajectory; its mean square is noisy.
        """
        if not self.products:  # a single one is larger than what may be kept
            return torch.ones_like(costs)
        exact = torch.stack([(z @ product * y.T).sum(1).square() for product in self.products])
        weights = torch.tensor(self.weights)[:, None]
        exact = (weights * exact).mean(0)
        window = len(costs) // WINDOW // 2 * 2 + 1
        padded = torch.nn.functional.pad((exact / costs)[None], (window // 2,) * 2, mode="replicate")[0]
        return padded.unfold(0, window, 1).mean(1)


def sampled(
    pipe: DiffusionPipeline,
    groups: Sequence[PruneGroup],
    calls: Sequence[dict],
    prompts: Sequence[str],
    seed: int,
    sample: Callable[[int, dict], Mapping[str, Tensor]],
    kept: Progress | None = None,
    more: Mapping[str, Tensor] | None = None,
    again: Callable[[int, dict], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Mean squared gradients of all gates (see `Sums`), and of groups of directions (Z, Y) and costs.

    Args:
        prompts: what directions are found from; none: they are the features themselves.
        sample: (number, call) to the squared gradients of one batch, by a backward pass under gates.
        kept: where sums are kept between batches, then bases, and where they go on.
        more: other sums that `sample` adds to.
        again: called in place of `sample` with number and call of a batch that was kept.

    Raises:
        Paused: the time of this call is up.
    """
    shared = {g.name: Gradients(denoiser_of(pipe), g) for g in groups if g.activations and prompts}
    costs = {group.name: torch.zeros(group.size) for group in groups}
    kept = kept or Progress()
    added = {f"cost|{name}": cost for name, cost in costs.items()}
    added |= {f"more|{name}": other for name, other in (more or {}).items()}
    sums = Sums(added | {f"metric|{name}": watch.metric for name, watch in shared.items()})
    done = _restored(kept, sums, shared)
    for index, call in enumerate(calls):
        if index < done:
            if again is not None:
                again(index, call)
            continue
        with ExitStack() as watching:
            for watch in shared.values():
                watching.enter_context(watch.of(len(call["prompt"])))
            squares = sample(index, call)
        for name, square in squares.items():
            costs[name] += square / len(calls)
        weight = sums.add(sum(float(square.sum()) for square in squares.values()))
        for watch in shared.values():
            watch.weigh(weight)
        kept.note(index + 1, partial(_state, sums, shared))
    sums.close()
    trajectories, bases = sum(len(call["prompt"]) for call in calls), {}
    for group in groups:
        if (seen_of := shared.get(group.name)) is not None:
            _, found = kept.load(f"basis-{group.name}")
            if not found:
                moment = second_moment(pipe, group, prompts, calls[0], seed)
                z, y, each = basis(moment, seen_of.metric / trajectories)
                found = {"z": z, "y": y, "costs": each * seen_of.coherence(z, y, each)}
                kept.keep(f"basis-{group.name}", found)
            bases[group.name], costs[group.name] = (found["z"], found["y"]), found["costs"]
    return costs, bases


def _state(sums: Sums, shared: Mapping[str, Gradients]) -> dict[str, Tensor]:
    """All that is summed up, by name."""
    found = sums.totals | {COSTS: torch.tensor(sums.costs, dtype=torch.float64)}
    for name, watch in shared.items():
        found[f"weights|{name}"] = torch.tensor(watch.weights, dtype=torch.float64)
        found |= {f"product|{name}|{index}": product for index, product in enumerate(watch.products)}
    return found


def _restored(kept: Progress, sums: Sums, shared: Mapping[str, Gradients]) -> int:
    """Let sums that begin now go on from those that were kept; of how many batches those are.

    Sums of another version of ecodiff, with other names or shapes, are left alone.
    """
    done, found = kept.load(SUMS)
    if COSTS not in found or any(
        name not in found or found[name].shape != total.shape for name, total in sums.totals.items()
    ):
        return 0
    sums.costs = found[COSTS].tolist()
    for name, total in sums.totals.items():
        total.copy_(found[name])
    for name, watch in shared.items():
        watch.weights = found[f"weights|{name}"].tolist()
        products = [key for key in found if key.startswith(f"product|{name}|")]
        watch.products = [found[f"product|{name}|{index}"] for index in range(len(products))]
    return done


@torch.no_grad()
def second_moment(
    pipe: DiffusionPipeline, group: PruneGroup, prompts: Sequence[str], call: dict, seed: int
) -> Tensor:
    """C, float32 (features, features), over all prompts at all time steps of `call`.

    Args:
        call: the pipeline's arguments; its prompts and generators are replaced.
    """
    denoiser, total, rows = denoiser_of(pipe), torch.zeros(group.size, group.size), 0
    first_read = group.consumers[0].module  # nothing behind it runs
    times = [kwargs.get("timestep") for _, kwargs in denoiser_calls(pipe, call)]
    prompts = recombined(prompts, PROMPTS, seed)
    options = {name: value for name, value in call.items() if name not in ("prompt", "generator")}
    if isinstance(options.get("negative_prompt"), list):
        options["negative_prompt"] = options["negative_prompt"][0]
    for first in range(0, len(prompts), BATCH):
        part = range(first, min(first + BATCH, len(prompts)))
        args, kwargs = denoiser_calls(pipe, prompt_rows(prompts, part, seed, options), limit=1)[0]
        for time in times:
            if time is not None:
                own = kwargs["timestep"]
                kwargs["timestep"] = time.flatten()[0].expand(own.shape).to(own.dtype)
            s, _ = seen(denoiser, Call(args, kwargs, False), [first_read])[first_read]
            total += (s.T @ s).cpu()
            rows += len(s)
            if time is None:
                break
    return total / max(1, rows)


def recombined(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """The prompts, and as many of the first half of one and the second half of another as make `count`."""
    words = [prompt.split() for prompt in prompts]
    pairs = torch.randint(len(words), (max(0, count - len(words)), 2), generator=stream("recombined", seed))
    halves = (
        (words[a][: (len(words[a]) + 1) // 2], words[b][len(words[b]) // 2 :]) for a, b in pairs.tolist()
    )
    return [*prompts, *(" ".join(first + second) for first, second in halves)]


def basis(moment: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Z, Y, each (features, features), and what dropping each direction costs, (features,).

    Args:
        moment, metric: C and M, (features, features).
    """
    features = len(metric)
    damped = metric.double() + DAMPING * metric.diagonal().mean().double() * torch.eye(features)
    values, vectors = torch.linalg.eigh(damped)
    root = values.clamp_min(values.max() * 1e-12).sqrt()
    half, inverse = vectors * root @ vectors.T, vectors / root @ vectors.T
    costs, turned = torch.linalg.eigh(half @ moment.double() @ half)
    z, y = turned.T @ half, inverse @ turned
    return z.float(), y.float(), costs.clamp_min(costs.max() * 1e-12).float()
