"""SD 3, Qwen-Image and Z-Image as ComfyUI builds them, written here so that the node can be tested alone.

The same checks against the real ComfyUI: integrations/comfyui/check.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tests.original_layout import attend, sinusoid

HEAD = 64


class RMS(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x, shift, scale):
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def two(first, second, op):
    return nn.Sequential(op.Linear(first, second), nn.SiLU(), op.Linear(second, second))


class Mlp(nn.Module):
    def __init__(self, width, op):
        super().__init__()
        self.fc1, self.fc2 = op.Linear(width, 4 * width), op.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SelfAttention(nn.Module):
    def __init__(self, width, last, op):
        super().__init__()
        self.num_heads = width // HEAD
        self.qkv = op.Linear(width, 3 * width)
        self.ln_q, self.ln_k = RMS(HEAD), RMS(HEAD)
        if not last:
            self.proj = op.Linear(width, width)

    def before(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD)).unbind(2)
        return self.ln_q(q), self.ln_k(k), v


def attended(parts):
    return attend(*(part.transpose(1, 2) for part in parts))


def angles(places, axes, theta):
    """Cosines and sines of rotary positions (tokens, axes), for (count, tokens, heads, features)."""
    each = [places[:, i, None] / theta ** (torch.arange(0, axis, 2) / axis) for i, axis in enumerate(axes)]
    found = torch.cat(each, 1)[None, :, None]
    return found.cos(), found.sin()


def turned(x, rotary):
    cos, sin = rotary
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Stream(nn.Module):
    def __init__(self, width, op, last=False, second=False):
        super().__init__()
        self.last, self.second = last, second
        self.attn = SelfAttention(width, last, op)
        if second:
            self.attn2 = SelfAttention(width, False, op)
        if not last:
            self.mlp = Mlp(width, op)
        self.count = 2 if last else 9 if second else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), op.Linear(width, self.count * width))

    def after(self, x, attended, parts, other):
        x = x + parts[2][:, None] * self.attn.proj(attended) + other
        return x + parts[5][:, None] * self.mlp(modulate(x, *parts[3:5]))


class JointBlock(nn.Module):
    def __init__(self, width, op, last, second):
        super().__init__()
        self.context_block = Stream(width, op, last)
        self.x_block = Stream(width, op, second=second)

    def forward(self, context, x, c):
        streams, values = (self.context_block, self.x_block), (context, x)
        parts = [stream.adaLN_modulation(c).chunk(stream.count, dim=1) for stream in streams]
        qkv = [s.attn.before(modulate(v, *p[:2])) for s, v, p in zip(streams, values, parts, strict=True)]
        text, image = attended([torch.cat(pair, 1) for pair in zip(*qkv, strict=True)]).split(
            [context.shape[1], x.shape[1]], 1
        )
        other = torch.zeros(())
        if self.x_block.second:
            second = self.x_block.attn2
            other = parts[1][8][:, None] * second.proj(attended(second.before(modulate(x, *parts[1][6:8]))))
        if not self.context_block.last:
            context = self.context_block.after(context, text, parts[0], torch.zeros(()))
        return context, self.x_block.after(x, image, parts[1], other)


class MMDiT(nn.Module):
    def __init__(self, config, op):
        super().__init__()
        width, count = HEAD * config["depth"], config["num_blocks"]
        self.patch, self.side = config["patch_size"], config["pos_embed_max_size"]
        self.x_embedder = nn.Module()
        self.x_embedder.proj = op.Conv2d(config["in_channels"], width, self.patch, self.patch)
        self.t_embedder, self.y_embedder = nn.Module(), nn.Module()
        self.t_embedder.mlp = two(256, width, op)
        self.y_embedder.mlp = two(config["adm_in_channels"], width, op)
        self.context_embedder = op.Linear(**config["context_embedder_config"]["params"])
        self.register_buffer("pos_embed", torch.empty(1, config["num_patches"], width))
        second = config["x_block_self_attn_layers"]
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, op, i == count - 1, i in second) for i in range(count)
        )
        self.final_layer = nn.Module()
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), op.Linear(width, 2 * width))
        self.final_layer.linear = op.Linear(width, self.patch**2 * config["out_channels"])

    def forward(self, x, timestep, context, y):
        x = self.x_embedder.proj(x)
        height, width = x.shape[-2:]
        top, left = (self.side - height) // 2, (self.side - width) // 2
        places = self.pos_embed.unflatten(1, (self.side, self.side))[:, top : top + height]
        x = x.flatten(2).mT + places[:, :, left : left + width].flatten(1, 2)
        c = self.t_embedder.mlp(sinusoid(timestep, 256)) + self.y_embedder.mlp(y)
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            context, x = block(context, x, c)
        x = self.final_layer.linear(modulate(x, *self.final_layer.adaLN_modulation(c).chunk(2, dim=1)))
        x = x.view(len(x), height, width, self.patch, self.patch, -1)
        return torch.einsum("nhwpqc->nchpwq", x).flatten(4, 5).flatten(2, 3)


class Attention(nn.Module):
    def __init__(self, width, heads, op):
        super().__init__()
        self.heads = heads
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            setattr(self, name, op.Linear(width, width))
        self.to_out = nn.ModuleList([op.Linear(width, width)])
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, RMS(width // heads))

    def forward(self, hidden_states, encoder_hidden_states, image_rotary_emb):
        parts = []
        for x, names, norms in (
            (
                encoder_hidden_states,
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("norm_added_q", "norm_added_k"),
            ),
            (hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
        ):
            q, k, v = (getattr(self, name)(x).unflatten(-1, (self.heads, -1)) for name in names)
            parts.append((getattr(self, norms[0])(q), getattr(self, norms[1])(k), v))
        q, k, v = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))
        out = attended([turned(q, image_rotary_emb), turned(k, image_rotary_emb), v])
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return self.to_out[0](image), self.to_add_out(text)


class GELU(nn.Module):
    def __init__(self, width, op):
        super().__init__()
        self.proj = op.Linear(width, 4 * width)

    def forward(self, x):
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, width, op):
        super().__init__()
        self.net = nn.Sequential(GELU(width, op), nn.Identity(), op.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class QwenBlock(nn.Module):
    def __init__(self, width, heads, op):
        super().__init__()
        for name in ("img", "txt"):
            setattr(self, f"{name}_mod", nn.Sequential(nn.SiLU(), op.Linear(width, 6 * width)))
            setattr(self, f"{name}_mlp", FeedForward(width, op))
        self.attn = Attention(width, heads, op)

    def forward(self, image, text, c, rotary):
        parts = [mod(c).chunk(6, dim=-1) for mod in (self.img_mod, self.txt_mod)]
        streams = (image, text)
        given = [modulate(x, *p[:2]) for x, p in zip(streams, parts, strict=True)]
        attended = self.attn(hidden_states=given[0], encoder_hidden_states=given[1], image_rotary_emb=rotary)
        done = []
        for x, out, p, mlp in zip(streams, attended, parts, (self.img_mlp, self.txt_mlp), strict=True):
            x = x + p[2][:, None] * out
            done.append(x + p[5][:, None] * mlp(modulate(x, *p[3:5])))
        return done


class QwenImage(nn.Module):
    def __init__(self, config, op):
        super().__init__()
        width = config["num_attention_heads"] * config["attention_head_dim"]
        self.axes = config["axes_dims_rope"]
        self.time_text_embed = nn.Module()
        embedder = nn.Module()
        embedder.linear_1, embedder.linear_2 = op.Linear(256, width), op.Linear(width, width)
        self.time_text_embed.timestep_embedder = embedder
        self.txt_norm = RMS(config["joint_attention_dim"])
        self.img_in = op.Linear(config["in_channels"], width)
        self.txt_in = op.Linear(config["joint_attention_dim"], width)
        heads = config["num_attention_heads"]
        self.transformer_blocks = nn.ModuleList(
            QwenBlock(width, heads, op) for _ in range(config["num_layers"])
        )
        self.norm_out = nn.Module()
        self.norm_out.linear = op.Linear(width, 2 * width)
        self.proj_out = op.Linear(width, 4 * config["out_channels"])

    def rotary(self, height, width, tokens):
        start = max(height // 2, width // 2)
        rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
        image = torch.stack([torch.zeros(height, width), *torch.meshgrid(rows, columns, indexing="ij")], -1)
        text = torch.arange(start, start + tokens)[:, None].expand(-1, 3)
        places = torch.cat([text, image.flatten(0, 1)]).float()
        return angles(places, self.axes, 10000)

    def forward(self, x, timestep, context):
        (count, channels, _, height, width), shape = x.shape, x.shape
        x = x.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        image = self.img_in(x.reshape(count, height * width // 4, -1))
        text = self.txt_in(self.txt_norm(context))
        embedder = self.time_text_embed.timestep_embedder
        c = embedder.linear_2(F.silu(embedder.linear_1(sinusoid(timestep, 256, 1000.0))))
        rotary = self.rotary(height // 2, width // 2, context.shape[1])
        for block in self.transformer_blocks:
            image, text = block(image, text, c, rotary)
        scale, shift = self.norm_out.linear(F.silu(c)).chunk(2, dim=1)
        out = self.proj_out(modulate(image, shift, scale))
        out = out.view(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(shape)


class JointAttention(nn.Module):
    def __init__(self, width, heads, op):
        super().__init__()
        self.n_local_heads = self.n_local_kv_heads = self.n_kv_heads = heads
        self.head_dim = width // heads
        self.qkv, self.out = op.Linear(width, 3 * width, bias=False), op.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = RMS(self.head_dim, 1e-5), RMS(self.head_dim, 1e-5)

    def forward(self, x, rotary):
        parts = self.qkv(x).split(self.n_local_heads * self.head_dim, dim=-1)
        q, k, v = (part.unflatten(-1, (self.n_local_heads, self.head_dim)) for part in parts)
        return self.out(attended([turned(self.q_norm(q), rotary), turned(self.k_norm(k), rotary), v]))


class GatedFeedForward(nn.Module):
    def __init__(self, width, hidden, op):
        super().__init__()
        self.w1, self.w3 = (op.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = op.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ZImageBlock(nn.Module):
    def __init__(self, width, heads, hidden, op, modulated=True):
        super().__init__()
        self.attention = JointAttention(width, heads, op)
        self.feed_forward = GatedFeedForward(width, hidden, op)
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            setattr(self, name, RMS(width, 1e-5))
        if modulated:
            self.adaLN_modulation = nn.Sequential(op.Linear(256, 4 * width))

    def forward(self, x, rotary, c=None):
        scale, gate, scale_2, gate_2 = (1.0,) * 4
        if c is not None:
            parts = self.adaLN_modulation(c)[:, None].chunk(4, dim=-1)
            scale, gate, scale_2, gate_2 = 1 + parts[0], parts[1].tanh(), 1 + parts[2], parts[3].tanh()
        x = x + gate * self.attention_norm2(self.attention(self.attention_norm1(x) * scale, rotary))
        return x + gate_2 * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * scale_2))


class NextDiT(nn.Module):
    """Z-Image, as ComfyUI builds it of Lumina 2's layers."""

    def __init__(self, config, op):
        super().__init__()
        width, self.axes, self.theta = config["dim"], config["axes_dims"], config["rope_theta"]
        self.time_scale, self.multiple = config["time_scale"], config["pad_tokens_multiple"]
        hidden = -(-int(config["ffn_dim_multiplier"] * width) // 256) * 256
        sizes = width, config["n_heads"], hidden, op
        self.x_embedder = op.Linear(4 * config["in_channels"], width)
        self.t_embedder = nn.Module()
        middle = min(width, 1024)
        self.t_embedder.mlp = nn.Sequential(op.Linear(256, middle), nn.SiLU(), op.Linear(middle, 256))
        text = config["cap_feat_dim"]
        self.cap_embedder = nn.Sequential(RMS(text, 1e-5), op.Linear(text, width))
        few, many = range(config["n_refiner_layers"]), range(config["n_layers"])
        self.noise_refiner = nn.ModuleList(ZImageBlock(*sizes) for _ in few)
        self.context_refiner = nn.ModuleList(ZImageBlock(*sizes, modulated=False) for _ in few)
        self.layers = nn.ModuleList(ZImageBlock(*sizes) for _ in many)
        self.final_layer = nn.Module()
        self.final_layer.linear = op.Linear(width, 4 * config["in_channels"])
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), op.Linear(256, width))
        self.x_pad_token, self.cap_pad_token = (nn.Parameter(torch.empty(1, width)) for _ in range(2))

    def padded(self, x, token, places):
        missing = -x.shape[1] % self.multiple
        x = torch.cat([x, token.expand(len(x), missing, -1)], 1)
        return x, torch.cat([places, places.new_zeros(x.shape[1] - len(places), 3)])

    def forward(self, x, timestep, context):
        count, height, width = len(x), x.shape[-2] // 2, x.shape[-1] // 2
        c = self.t_embedder.mlp(sinusoid(1 - timestep, 256, self.time_scale))
        text, _ = self.padded(self.cap_embedder(context), self.cap_pad_token, torch.zeros(0, 3))
        places = torch.zeros(text.shape[1], 3)
        places[:, 0] = torch.arange(text.shape[1]) + 1
        x = x.view(count, -1, height, 2, width, 2).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        at = torch.stack([torch.full((height, width), text.shape[1] + 1), *grid], -1).flatten(0, 1).float()
        tokens = height * width
        x, at = self.padded(self.x_embedder(x), self.x_pad_token, at)
        own, other = (angles(p, self.axes, self.theta) for p in (at, places))
        for block in self.noise_refiner:
            x = block(x, own, c)
        for block in self.context_refiner:
            text = block(text, other)
        both, every = torch.cat([text, x], 1), angles(torch.cat([places, at]), self.axes, self.theta)
        for block in self.layers:
            both = block(both, every, c)
        x = norm(both[:, text.shape[1] :][:, :tokens])
        x = self.final_layer.linear(x * (1 + self.final_layer.adaLN_modulation(c)[:, None]))
        x = x.view(count, height, width, 2, 2, -1)
        return -torch.einsum("nhwpqc->nchpwq", x).flatten(4, 5).flatten(2, 3)
