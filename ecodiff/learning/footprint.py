"""What a model takes in memory, to draw with and to learn on: arithmetic on its configuration."""

from dataclasses import dataclass, replace

from diffusers import ModelMixin

from ..architectures import blocks, find_groups
from ..architectures.inputs import meta_call
from .memory import activation_bytes
from .streaming import LARGE

BATCH = 4  # trajectories that are learned on at a time
SLACK = 1.05  # of the weights: buffers and what an allocator wastes
DECODED = 4 * 256  # channels of an image that the autoencoder's last blocks hold at once, at full size
MARGIN = 0.92  # of a GPU's memory: its driver and the screen take the rest


@dataclass(frozen=True)
class Footprint:
    """Bytes, estimated.

    Attributes:
        denoiser, others: weights; others are text encoders and autoencoder.
        call: what one call of the denoiser holds besides, to draw one image.
        decode: the same of the autoencoder.
        learning: of a call with gradients on a batch, blocks recomputed.
        there: weights of the denoiser that are on the device at a time at most, where they come from main
            memory (`learning.streaming`).
    """

    denoiser: int
    others: int
    call: int
    decode: int
    learning: int
    there: int

    def pruned(self, ratio: float) -> "Footprint":
        """Of a model without that fraction of its denoiser. What a call holds is taken as it was."""
        kept = round(self.denoiser * (1 - ratio))
        return replace(self, denoiser=kept)

    @property
    def draw(self) -> int:
        """Everything on the device."""
        return round(SLACK * (self.denoiser + self.others)) + max(self.call, self.decode)

    @property
    def draw_offloaded(self) -> int:
        """One component on the device at a time (diffusers' `enable_model_cpu_offload`)."""
        return max(round(SLACK * self.denoiser) + self.call, round(SLACK * self.others), self.decode)

    @property
    def learn(self) -> int:
        """Text encoders away, as the memory planner does where it must."""
        return round(SLACK * self.denoiser) + self.learning

    @property
    def learn_streamed(self) -> int:
        """Weights in main memory, each on the device only while its layer works."""
        return round(SLACK * self.there) + self.learning

    def learn_least(self, streams: bool) -> int:
        """Of one trajectory at a time; `streams`: weights can wait in main memory."""
        return round(SLACK * (self.there if streams else self.denoiser)) + self.learning // BATCH

    def smallest_cut(self, room: float, ceiling: float) -> float | None:
        """The fraction of the denoiser to remove so that drawing fits whole; None where nothing does."""
        ratio = (self.draw - room) / (SLACK * self.denoiser)
        return max(0.0, ratio) if ratio <= ceiling else None


def footprint(denoiser: ModelMixin, itemsize: int, others: float, size: int, guided: bool) -> Footprint:
    """The footprint of a model.

    What a call keeps is found on the meta device by running it there, for classes whose call is known
    (`architectures.inputs`). For others it is a rule of thumb: for each row one hidden state a block and 34
    more inside one block (Korthikanti et al. 2022, arXiv 2205.05198, eq. 2, without attention scores), of a
    token for 16 x 16 pixels.

    Args:
        denoiser: on the meta device, float32.
        itemsize: bytes of a weight.
        others: parameters of text encoders and autoencoder.
        size: pixels a side.
        guided: guidance takes a second row for each image.
    """
    rows = 2 if guided and not denoiser.config.get("guidance_embeds") else 1
    call = meta_call(denoiser, size, rows)
    if call is not None:
        found = activation_bytes(denoiser, (), call)
        inside, held = found.inside * itemsize // 4, found.by_block * itemsize // 4
    else:
        groups = find_groups(denoiser)
        width = max(g.consumers[0].weight(denoiser).shape[0] for g in groups)
        token = rows * (size // 16) ** 2 * width * itemsize
        inside, held = 34 * token, token * (len(blocks(groups)) + 34)
    weights = sum(parameter.numel() for parameter in denoiser.parameters())
    sizes = {name: p.numel() * itemsize for name, p in denoiser.named_parameters()}
    large = {name: size for name, size in sizes.items() if size >= LARGE}
    inner = [
        sum(s for n, s in large.items() if n.startswith(f"{block}."))
        for block in blocks(find_groups(denoiser))
    ]
    there = sum(sizes.values()) - sum(large.values()) + max([*inner, *large.values()])
    decode = DECODED * size * size * itemsize if size > 256 else 0
    return Footprint(weights * itemsize, round(others * itemsize), inside, decode, BATCH * held, there)


def fits(
    need: Footprint, ratio: float, ceiling: float, room: float, streams: bool = True
) -> dict[str, str | float | None]:
    """What a device with that much memory can do with a model that is pruned to a size.

    Args:
        room: bytes of memory that the device has.
        streams: weights can wait in main memory: it is a GPU with a memory of its own.

    Returns:
        {"draw": "whole", "offloaded", "groups" (a few layers at a time) or "no", "dense": the same of the
        dense model, "learn": "whole", "streamed" (weights in main memory) or "no", "cut": the ratio from
        which it is drawn whole, or None}
    """
    usable = MARGIN * room
    small = need.pruned(ratio)

    def way(of: Footprint) -> str:
        if of.draw <= usable:
            return "whole"
        if of.draw_offloaded <= usable:
            return "offloaded"
        return "groups" if of.call <= 0.5 * usable else "no"  # the autoencoder can work in tiles

    streamed = streams and need.learn_streamed <= usable
    learn = "whole" if need.learn <= usable else "streamed" if streamed else "no"
    return {
        "draw": way(small),
        "dense": way(need),
        "learn": learn,
        "cut": need.smallest_cut(usable, ceiling),
    }
