"""emoji-flux: a small FLUX.1-dev, trained from scratch on captioned emoji.

What makes FLUX.1-dev itself is here at a smaller size: T5 tokens and a pooled CLIP vector, double
and twice as many single blocks, 2x2 latent patches with rotary positions, flow matching, and
guidance that is an input of the network, distilled into it after the training proper.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from . import data, training
from .sdxl import tokenizer as clip_tokenizer

TOKENS = 28  # the longest caption has 25
CONTRASTED = 128  # images that a caption is told apart from
GUIDANCE = (1.0, 5.0)  # the range that is distilled
MORE = {"seed": 7, "peak_rate": 7e-4}  # of training on from weights that ship
MORE_POWER = -0.85  # with which families weigh nearly the same (`data.sampling_weights`)


def t5_tokenizer(emojis: list[data.Emoji], folder: Path) -> T5Tokenizer:
    """A T5 tokenizer whose pieces are learned on the captions, kept in `folder`."""
    if not (folder / "tokenizer.json").exists():
        captions = sorted({text for e in emojis for text in (e.caption, e.alias)})
        learned = T5Tokenizer(extra_ids=0).train_new_from_iterator(captions, vocab_size=2000)
        learned.model_max_length = TOKENS
        learned.save_pretrained(folder)
    return T5Tokenizer.from_pretrained(folder)


def standardised(vae: AutoencoderKL) -> AutoencoderKL:
    """The same autoencoder with latents of zero mean and unit variance in every channel.

    FluxPipeline knows one scale and one shift, SDXL's a mean and deviation a channel: they go into
    the 1x1 convolutions on both sides of the latents.
    """
    vae = copy.deepcopy(vae).float()
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]) for name in ("mean", "std"))
    means, logvars = vae.quant_conv.weight.data.chunk(2)[0], vae.quant_conv.bias.data.chunk(2)
    means.div_(std.view(-1, 1, 1, 1))
    logvars[0].sub_(mean).div_(std)
    logvars[1].sub_(2 * std.log())
    vae.post_quant_conv.bias.data += (vae.post_quant_conv.weight.data * mean.view(1, -1, 1, 1)).sum((1, 2, 3))
    vae.post_quant_conv.weight.data *= std.view(1, -1, 1, 1)
    vae.register_to_config(latents_mean=None, latents_std=None, scaling_factor=1.0, shift_factor=0.0)
    return vae


def new_pipeline(vae: AutoencoderKL, emojis: list[data.Emoji], folder: Path) -> FluxPipeline:
    """The untrained pipeline: 3 double and 6 single blocks of width 192."""
    clip, t5 = clip_tokenizer(emojis, folder / "clip"), t5_tokenizer(emojis, folder / "t5")
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=128,
        pooled_projection_dim=96,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    # As DiT's (arXiv 2212.09748), every block begins as the identity.
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for norm in ("norm", "norm1", "norm1_context"):
            if hasattr(block, norm):
                nn.init.zeros_(getattr(block, norm).linear.weight)
                nn.init.zeros_(getattr(block, norm).linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    return FluxPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=96,
                intermediate_size=384,
                num_hidden_layers=2,
                num_attention_heads=3,
                max_position_embeddings=TOKENS,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        ),
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=3,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=t5.pad_token_id,
                eos_token_id=t5.eos_token_id,
            )
        ),
        tokenizer=clip,
        tokenizer_2=t5,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


class Denoiser(nn.Module):
    """What is trained together: the transformer and both text encoders of a pipeline."""

    def __init__(self, pipe: FluxPipeline):
        super().__init__()
        self.transformer = pipe.transformer
        self.text_encoder = pipe.text_encoder
        self.text_encoder_2 = pipe.text_encoder_2

    def text(self, clip: Tensor, t5: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled CLIP states (n, 96) and T5 states (n, tokens, 128)."""
        return self.text_encoder(clip).pooler_output, self.text_encoder_2(t5)[0]

    def forward(self, noisy: Tensor, sigma: Tensor, guidance: Tensor, pooled: Tensor, states: Tensor):
        """Predicted velocity, (n, 64, 16), of packed latents at noise level `sigma` (n,)."""
        side = round(noisy.shape[1] ** 0.5)
        grid = FluxPipeline._prepare_latent_image_ids(len(noisy), side, side, noisy.device, torch.float32)
        return self.transformer(
            noisy,
            states,
            pooled,
            sigma,
            img_ids=grid,
            txt_ids=torch.zeros(states.shape[1], 3, device=noisy.device),
            guidance=guidance,
            return_dict=False,
        )[0]


class Examples:
    """Draws noisy latents, their velocities and captions."""

    def __init__(self, pipe: FluxPipeline, latents: Tensor, emojis: list[data.Emoji], device: str):
        self.latents = FluxPipeline._pack_latents(latents, len(latents), *latents.shape[1:])
        self.captions, self.device = training.Captions(emojis), device
        self.clip = training.tokens(pipe.tokenizer, emojis, TOKENS)
        self.t5 = training.tokens(pipe.tokenizer_2, emojis, TOKENS)
        options = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "pt"}
        self.empty = [t("", **options).input_ids for t in (pipe.tokenizer, pipe.tokenizer_2)]

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        rows, aliased, captioned = self.captions.draw(generator)
        # Noise levels as Stable Diffusion 3: the logistic of a normal (arXiv 2403.03206, section 3.1).
        sigma = torch.randn(len(rows), generator=generator).sigmoid()
        noise = torch.randn(len(rows), *self.latents.shape[1:], generator=generator)
        guidance = torch.empty(len(rows)).uniform_(*GUIDANCE, generator=generator)
        clean, level = self.latents[rows], sigma.view(-1, 1, 1)
        drawn = {
            "noisy": (1 - level) * clean + level * noise,
            "velocity": noise - clean,
            "sigma": sigma,
            "guidance": guidance,
            "captioned": captioned[:, None],
            "clip": self.clip[aliased.long(), rows],
            "t5": self.t5[aliased.long(), rows],
        }
        return {name: value.to(self.device) for name, value in drawn.items()}


class Contrast(nn.Module):
    """Both text encoders beside a small image encoder, with a projection each into one space."""

    def __init__(self, pipe: FluxPipeline, width: int = 128):
        super().__init__()
        self.text_encoder = pipe.text_encoder
        self.text_encoder_2 = pipe.text_encoder_2
        self.image_encoder = nn.Sequential(
            nn.Conv2d(16, 96, 3, padding=1),  # packed latents, (n, 16, 8, 8)
            nn.GELU(),
            nn.Conv2d(96, 192, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(192 * 16, width),
        )
        self.pooled = nn.Linear(pipe.text_encoder.config.hidden_size, width)
        self.states = nn.Linear(pipe.text_encoder_2.config.d_model, width)
        self.scale = nn.Parameter(torch.tensor(2.6))  # log of the inverse temperature

    def forward(self, latents: Tensor, clip: Tensor, t5: Tensor) -> Tensor:
        """The loss of CLIP (arXiv 2103.00020, figure 3), for either text encoder, summed."""
        images = self.image_encoder(latents.transpose(1, 2).unflatten(2, (8, 8))).float()
        texts = (
            self.pooled(self.text_encoder(clip).pooler_output),
            self.states(self.text_encoder_2(t5)[0].mean(1)),
        )
        loss, same = 0.0, torch.arange(len(images), device=images.device)
        for text in texts:
            scores = F.normalize(text.float(), dim=-1) @ F.normalize(images, dim=-1).T * self.scale.exp()
            loss = loss + (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2
        return loss


def align_text(pipe: FluxPipeline, examples: Examples, folder: Path, steps: int, device: str) -> None:
    """Teach the text encoders to tell the images apart, before the transformer learns to draw.

    Left to the flow-matching loss alone they are what learns last: after 7,000 steps the model drew
    the kind of thing that was asked for, in any colour. (The weights that ship had this at step 7,500.)
    """
    model = Contrast(pipe).to(device).train()
    weights = examples.captions.weights

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.multinomial(weights, CONTRASTED, generator=generator)
        aliased = (torch.rand(CONTRASTED, generator=generator) < 0.25).long()
        drawn = examples.latents[rows], examples.clip[aliased, rows], examples.t5[aliased, rows]
        return model(*(value.to(device) for value in drawn))

    aligned = training.fit(model, loss_of, folder, "text", steps, device)
    for name in ("text_encoder", "text_encoder_2"):
        getattr(pipe, name).load_state_dict(getattr(aligned, name).state_dict())


def train(
    pipe: FluxPipeline, examples: Examples, folder: Path, steps: int, device: str, **options
) -> Denoiser:
    """Flow matching: the velocity from data to noise. One caption in ten is the empty one.

    Args:
        options: of `training.fit`.
    """
    model = Denoiser(pipe).to(device).train()

    def loss_of(generator: torch.Generator) -> Tensor:
        drawn = examples.draw(generator)
        clip = torch.where(drawn["captioned"], drawn["clip"], examples.empty[0].to(device))
        t5 = torch.where(drawn["captioned"], drawn["t5"], examples.empty[1].to(device))
        guided = torch.ones_like(drawn["sigma"])
        predicted = model(drawn["noisy"], drawn["sigma"], guided, *model.text(clip, t5))
        return F.mse_loss(predicted.float(), drawn["velocity"])

    return training.fit(model, loss_of, folder, "denoiser", steps, device, **options)


def distil_guidance(teacher: Denoiser, examples: Examples, folder: Path, steps: int, device: str) -> Denoiser:
    """Teach the network to take guidance as an input (Meng et al. 2023, arXiv 2210.03142, stage one).

    The target is what two calls of the teacher give, uncond + g (cond - uncond).
    """
    student = copy.deepcopy(teacher).train()
    student.text_encoder.requires_grad_(False)
    student.text_encoder_2.requires_grad_(False)

    def loss_of(generator: torch.Generator) -> Tensor:
        drawn = examples.draw(generator)
        noisy, sigma, guidance = drawn["noisy"], drawn["sigma"], drawn["guidance"]
        with torch.no_grad():
            text = teacher.text(drawn["clip"], drawn["t5"])
            empty = (e.to(device).expand_as(drawn["clip"]) for e in examples.empty)
            ones = torch.ones_like(sigma)
            cond = teacher(noisy, sigma, ones, *text)
            uncond = teacher(noisy, sigma, ones, *teacher.text(*empty))
            target = uncond + guidance.view(-1, 1, 1) * (cond.float() - uncond)
        return F.mse_loss(student(noisy, sigma, guidance, *text).float(), target.float())

    return training.fit(student, loss_of, folder, "guidance", steps, device)


def finished(pipe: FluxPipeline, trained: Denoiser) -> FluxPipeline:
    """The pipeline with the trained (averaged) weights, in float16 as it ships."""
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        getattr(pipe, name).load_state_dict(getattr(trained, name).state_dict())
    return pipe.to("cpu", torch.float16)
