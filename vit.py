"""A Vision Transformer from scratch, with einops and timm's parameter names. Needs no other file here.

An image is cut into patches of p x p pixels, each a token; a [CLS] token and registers, if any, come before
them; `depth` pre-norm blocks of attention and MLP follow (Dosovitskiy et al., 2010.11929). As in DINO (Caron
et al., 2104.14294): LayerNorm eps 1e-6, qkv bias, trunc-normal .02, positions interpolated (bicubic) for
crops of other sizes, drop path rising linearly with depth. Registers are those of 2309.16588.

Letters in shapes:  b images  n tokens  d width  h heads  c width of a head  y x patch grid  p q sides of a
patch
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

# Up to this many tokens, two matrix products are faster on a CPU than its fused attention kernel.
FEW_TOKENS = {torch.bfloat16: 300, torch.float32: 32, torch.float64: 32}


def check_size(size, patch_size):
    """Raises ValueError, naming the nearest sizes that work, unless patch_size divides size."""
    if size % patch_size or size < patch_size:
        lower = size // patch_size * patch_size
        near = " or ".join(str(s) for s in (lower, lower + patch_size) if s)
        raise ValueError(f"an image size of {size} is not a multiple of patch_size={patch_size}: try {near}")


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x, n_queries=None):
        """x [b n d] -> queries (of the first `n_queries` tokens, if given), keys and values, [b h n c]."""
        if n_queries is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            weight, bias, dim = self.qkv.weight, self.qkv.bias, x.shape[-1]
            q = F.linear(x[:, :n_queries], weight[:dim], bias[:dim])
            k, v = F.linear(x, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        return [rearrange(tokens, "b n (h c) -> b h n c", h=self.heads) for tokens in (q, k, v)]

    def forward(self, x, n_queries=None):
        q, k, v = self.project(x, n_queries)
        if x.device.type == "cpu" and x.shape[1] <= FEW_TOKENS.get(q.dtype, 0):
            out = attention_weights(q, k).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out, "b h n c -> b n (h c)"))


def attention_weights(q, k):
    """softmax(q k^T / sqrt(c)): q [b h i c], k [b h j c] -> [b h i j]."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = drop_path

    def forward(self, x, noise=None, n_queries=None):
        """x [b n d] -> [b n d], or [b n_queries d]: the outputs of the first `n_queries` tokens alone.

        noise: uniform random numbers [2 b] for drop path, which leaves a residual branch out for a whole
        image with probability `drop_path` (Huang et al., 1603.09382); None: nothing is left out.
        """
        y = self.attn(self.norm1(x), n_queries)
        x = x if n_queries is None else x[:, :n_queries]
        x = x + (y if noise is None else y * self.keep(noise[0]))
        y = self.mlp(self.norm2(x))
        return x + (y if noise is None else y * self.keep(noise[1]))

    def keep(self, noise):
        """Uniform random numbers [b] -> a residual branch's factor [b 1 1]: 0 or 1 / (1 - drop_path)."""
        return rearrange((noise >= self.drop_path) / (1 - self.drop_path), "b -> b 1 1")


class PatchEmbed(nn.Module):
    """Images [b 3 H W] -> tokens [b n d]. timm's convolution by name and shape, computed as one product."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x):
        patches = rearrange(x, "b rgb (y p) (x q) -> b (y x) (rgb p q)", p=self.patch_size, q=self.patch_size)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ViT(nn.Module):
    """ViT-Ti/4 for 32-pixel images by default: 192 wide, 12 deep, 3 heads, 5.4 M parameters.

    `num_prefix_tokens` (timm's name) precede the patches: [CLS], then registers. `args` holds the
    arguments, so that type(vit)(**vit.args) builds the same network. Raises ValueError when `patch_size` does
    not divide an image's side, or `heads` does not divide `dim`.
    """

    def __init__(self, image_size=32, patch_size=4, dim=192, depth=12, heads=3, drop_path=0.0, registers=0):
        super().__init__()
        self.args = dict(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads)
        self.args.update(drop_path=drop_path, registers=registers)
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} cannot be split into heads={heads} equal parts")
        if not 1 <= depth <= 1000:
            raise ValueError(f"depth={depth} must be from 1 to 1000")
        check_size(image_size, patch_size)
        self.patch_size, self.dim, self.drop_path = patch_size, dim, drop_path
        self.num_prefix_tokens = 1 + registers
        n_tokens = self.num_prefix_tokens + (image_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, n_tokens, dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        for tokens in (self.cls_token, self.pos_embed, self.reg_token):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)

    def timm_args(self):
        """What timm's VisionTransformer(**timm_args) needs to build the same network."""
        args = {"img_size": self.args["image_size"], "patch_size": self.patch_size, "num_classes": 0}
        args.update(embed_dim=self.dim, depth=len(self.blocks), num_heads=self.args["heads"])
        return {**args, "reg_tokens": self.args["registers"]}

    def positions(self, y, x):
        """Position embeddings of [CLS], registers and a grid of y x x patches: [1 n d]."""
        prefix, grid = self.pos_embed.tensor_split([self.num_prefix_tokens], dim=1)
        side = int(grid.shape[1] ** 0.5)
        if (y, x) == (side, side):
            return self.pos_embed
        grid = rearrange(grid, "1 (y x) d -> 1 d y x", y=side)
        scale = ((y + 0.1) / side, (x + 0.1) / side)  # as in official DINO
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([prefix, rearrange(grid, "1 d y x -> 1 (y x) d")], dim=1)

    def tokens(self, images):
        """Images [b 3 H W] -> the first block's input [b n d]: [CLS], registers, patches."""
        for side in images.shape[-2:]:
            check_size(side, self.patch_size)
        y, x = (side // self.patch_size for side in images.shape[-2:])
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = [repeat(token, "1 n d -> b n d", b=len(images)) for token in prefix]
        return torch.cat([*prefix, self.patch_embed(images)], dim=1) + self.positions(y, x)

    def forward(self, images, noise=None):
        """Images [b 3 H W] -> [CLS] features of the last block [b d].

        noise: uniform random numbers [2*depth b] for drop path in training; None: it draws them itself.
        """
        x = self.tokens(images)
        block_noise = [None] * len(self.blocks)
        if self.training and self.drop_path:
            if noise is None:
                noise = torch.rand(2 * len(self.blocks), len(images), device=images.device)
            block_noise = list(rearrange(noise, "(depth two) b -> depth two b", two=2))
        for block, its_noise in zip(self.blocks[:-1], block_noise[:-1], strict=True):
            x = block(x, its_noise)
        x = self.blocks[-1](x, block_noise[-1], n_queries=1)  # only [CLS] of the last block is used
        return self.norm(x)[:, 0]

    def layers(self, images, last=1):
        """Normalised outputs [b n d] of the last `last` blocks, in order; without drop path."""
        x = self.tokens(images)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return [self.norm(x) for x in outputs[-last:]]

    def attention(self, images, block=-1):
        """Attention of one block [b h n n]; `[:, :, 0, num_prefix_tokens:]` is where [CLS] looks."""
        x = self.tokens(images)
        block = range(len(self.blocks))[block]
        for earlier in self.blocks[:block]:
            x = earlier(x)
        q, k, _ = self.blocks[block].attn.project(self.blocks[block].norm1(x))
        return attention_weights(q, k)


def init_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
