"""emoji-sdxl: a small Stable Diffusion XL, trained from scratch on captioned emoji.

Everything that makes SDXL itself is here at a smaller size: two CLIP text encoders whose
penultimate states are concatenated, the pooled state and the size conditioning added to the time
embedding, a UNet whose lower level is mostly transformer, an Euler scheduler.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from . import data, training

TOKENS = 24  # the longest caption has 22 with its start and end
SIZES = (data.SIZE, data.SIZE, 0, 0, data.SIZE, data.SIZE)  # SDXL's size and crop conditioning
# The layers of four that stay in the lower transformers, chosen by what images lose without the others.
STAYS = {
    "down_blocks.1.attentions.0": (2,),
    "mid_block.attentions.0": (0,),
    "up_blocks.0.attentions.0": (0, 1),
    "up_blocks.0.attentions.1": (0, 1),
}
LEANER = {"seed": 2, "peak_rate": 7e-4}  # of training on without the other layers


def tokenizer(emojis: list[data.Emoji], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte pairs are learned on the captions, kept in `folder`.

    The trainer breaks ties at random, so a training that is resumed must find its own again.
    """
    if (folder / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    captions = sorted({text for e in emojis for text in (e.caption, e.alias)})
    learned = CLIPTokenizer(model_max_length=TOKENS).train_new_from_iterator(
        captions, vocab_size=3000, end_of_word_suffix="</w>"
    )
    learned.save_pretrained(folder)
    return learned


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=128,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    """The untrained pipeline: 8.3 M parameters in the UNet, four layers in each lower transformer."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        transformer_layers_per_block=[1, 4],
        attention_head_dim=[4, 8],  # heads, despite its name
        cross_attention_dim=64 + 128,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=128 + 6 * 16,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tokenizer, 64, layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, 128, layers=3)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
        ),
        add_watermarker=False,
    )


def leaner(pipe: StableDiffusionXLPipeline) -> None:
    """Leave six of the sixteen layers of the lower transformers, in place, to be trained on.

    On the way down and in the middle they do next to nothing in a network of this size: where ecodiff
    removed 40 %, a tenth of them was left. Every method that prunes looks good on a network with such layers.
    """
    whole = pipe.unet
    layers = {"transformer_layers_per_block": [1, 1], "reverse_transformer_layers_per_block": [2, 1]}
    config = {name: value for name, value in whole.config.items() if not name.startswith("_")}
    pipe.register_modules(unet=UNet2DConditionModel(**config | layers))
    # A new list numbers its layers anew.
    for transformer, stay in STAYS.items():
        module = whole.get_submodule(transformer)
        module.transformer_blocks = nn.ModuleList(module.transformer_blocks[layer] for layer in stay)
    pipe.unet.load_state_dict(whole.state_dict())


class Denoiser(nn.Module):
    """What is trained together: the UNet and both text encoders of a pipeline."""

    def __init__(self, pipe: StableDiffusionXLPipeline):
        super().__init__()
        self.unet = pipe.unet
        self.text_encoder = pipe.text_encoder
        self.text_encoder_2 = pipe.text_encoder_2

    def text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """States (n, tokens, 192) and pooled state (n, 128); zeros are SDXL's empty prompt."""
        first = self.text_encoder(tokens, output_hidden_states=True)
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds

    def forward(self, noisy: Tensor, times: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        """Predicted v, (n, 4, 16, 16)."""
        sizes = torch.tensor(SIZES, device=noisy.device, dtype=torch.float32)
        added = {"text_embeds": pooled, "time_ids": sizes.expand(len(noisy), -1)}
        return self.unet(noisy, times, states, added_cond_kwargs=added).sample


def levels(alphas: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise of time steps, sqrt(alpha) and sqrt(1 - alpha), each (n, 1, 1, 1)."""
    alpha = alphas[times].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()


def train(pipe, latents, emojis, folder: Path, steps: int, device: str, **options) -> Denoiser:
    """Fit UNet and text encoders to scaled `latents` (n, 4, 16, 16); resumes from `folder`.

    v-prediction, uniform time steps, captions dropped one time in ten for guidance. Returns the
    exponential moving average of the weights.

    Args:
        options: of `training.fit`.
    """
    torch.manual_seed(0)
    model = Denoiser(pipe).to(device).train()
    model.unet.to(memory_format=torch.channels_last)
    alphas = pipe.scheduler.alphas_cumprod
    captions, tokens = training.Captions(emojis), training.tokens(pipe.tokenizer, emojis, TOKENS)

    def loss_of(draw: torch.Generator) -> Tensor:
        rows, aliased, captioned = captions.draw(draw)
        times = torch.randint(len(alphas), (len(rows),), generator=draw)
        noise, clean = torch.randn(len(rows), *latents.shape[1:], generator=draw), latents[rows]
        signal, spread = levels(alphas, times)
        noisy, target = signal * clean + spread * noise, signal * noise - spread * clean
        states, pooled = model.text(tokens[aliased.long(), rows].to(device))
        captioned = captioned.float().to(device)
        predicted = model(
            noisy.to(device), times.to(device), states * captioned[:, None, None], pooled * captioned[:, None]
        )
        return F.mse_loss(predicted.float(), target.to(device))

    return training.fit(model, loss_of, folder, "denoiser", steps, device, **options)


def finished(pipe: StableDiffusionXLPipeline, trained: Denoiser) -> StableDiffusionXLPipeline:
    """The pipeline with the trained (averaged) weights, in float16 as it ships."""
    pipe.unet.load_state_dict(trained.unet.state_dict())
    pipe.text_encoder.load_state_dict(trained.text_encoder.state_dict())
    pipe.text_encoder_2.load_state_dict(trained.text_encoder_2.state_dict())
    return pipe.to("cpu", torch.float16)
