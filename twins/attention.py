"""Attention maps of [CLS], figures of them, and how much the maps of two networks differ.

Letters in shapes:  n images  h heads  y x patch grid  k patches  r runs  s image side
"""

import math
from itertools import combinations

import torch
import torch.nn.functional as F
from einops import rearrange

from twins.datasets import from_bytes, normalise
from twins.errors import UserError
from twins.processes import gather, shard, to_float32

CHUNK = 2**24  # attention weights computed at a time, 64 MiB
NEAR_UNIFORM = 0.1  # bits: in a flatter map, noise determines which patches are largest


@torch.no_grad()
def attend(backbone, images, device, autocast, block=-1):
    """Images uint8 [n 3 s s] -> maps [n h y x], each of sum 1, and each head's mean attention distance [h].

    The distance, in pixels, is between patch centres, weighted by attention and averaged over queries
    (Dosovitskiy et al., 2010.11929, D.8). `block` -1 is the last.
    """
    side = images.shape[-1] // backbone.patch_size
    heads = backbone.blocks[0].attn.heads
    prefix = backbone.num_prefix_tokens
    steps = torch.arange(side, device=device).float()
    centres = backbone.patch_size * torch.cartesian_prod(steps, steps)
    distances = torch.cdist(centres, centres)
    maps = []
    total = torch.zeros(1, heads)
    for chunk in shard(images).split(max(CHUNK // (heads * (side**2 + prefix) ** 2), 1)):
        with autocast:
            attention = backbone.attention(normalise(from_bytes(chunk.to(device))), block)
        attention = to_float32(attention[..., prefix:])
        attention = attention / attention.sum(-1, keepdim=True)
        maps.append(attention[:, :, 0].cpu())
        total += ((attention[:, :, prefix:] * distances).sum((0, 2, 3)) / side**2).cpu()
    maps = rearrange(gather(torch.cat(maps)), "n h (y x) -> n h y x", y=side)
    return maps, gather(total).sum(0) / len(images)


def keep_mass(maps, share):
    """The largest patches of each map [... y x] that together hold `share` of it: bool [... y x]."""
    flat = maps.flatten(-2)
    ordered, order = flat.sort(-1)
    keep = ordered.cumsum(-1) / flat.sum(-1, keepdim=True) > 1 - share
    return torch.zeros_like(keep).scatter(-1, order, keep).view(maps.shape)


def entropy_bits(p):
    """Entropy of distributions p [... k] -> [...]."""
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2)


def near_uniform(maps):
    """Whether the mean entropy of maps [... y x] is within 0.1 bit of uniform attention's."""
    flat = maps.flatten(-2)
    return math.log2(flat.shape[-1]) - entropy_bits(flat).mean() < NEAR_UNIFORM


def divergence(p, q):
    """Jensen-Shannon divergence in bits of distributions p, q [... k] -> [...], from 0 to 1."""
    return (entropy_bits((p + q) / 2) - (entropy_bits(p) + entropy_bits(q)) / 2).clamp(min=0)


def divergences(maps):
    """Mean maps of r runs, a list of [n y x] on any grids -> d [n r r] in bits, on the coarsest grid."""
    side = min(m.shape[-1] for m in maps)
    flat = torch.stack([F.adaptive_avg_pool2d(m, side).flatten(1) for m in maps], 1)
    p = flat / flat.sum(-1, keepdim=True)
    return divergence(p[:, :, None], p[:, None])


def jaccard(keep, masks):
    """DINO's VOC protocol: patches of each head, bool [n h y x], on masks int16 [n s s]: (best head, [h]).

    For each class of an image except background: intersection over union of its pixels and the patches,
    ignoring pixels of class -1. It is averaged over an image's classes, then over images with objects. The
    best head is chosen per image and class. Raises UserError if no mask has an object.
    """
    keep = F.interpolate(keep.float(), size=masks.shape[-2:], mode="nearest").bool()
    total = torch.zeros(len(masks), 1 + keep.shape[1])
    objects = torch.zeros(len(masks))
    for c in masks[masks > 0].unique():
        has_c = (masks == c).flatten(1).any(1)
        truth = (masks[has_c] == c)[:, None]
        counts = (masks[has_c] >= 0)[:, None]
        intersection = (keep[has_c] & truth & counts).sum((2, 3))
        union = ((keep[has_c] | truth) & counts).sum((2, 3))
        iou = intersection / union
        total[has_c] += torch.cat([iou.amax(1, keepdim=True), iou], 1)
        objects[has_c] += 1
    if not objects.any():
        raise UserError("no mask has an object: there is nothing to compare attention with")
    best, *heads = (total / objects[:, None])[objects > 0].mean(0).tolist()
    return best, heads


def figures_on_masks(maps, masks):
    """Maps [n h y x] against the objects of masks int16 [n s s], over images with an object.

    mass_in_mask [h], area_of_mask (its mean share of the image), mass_over_area [h]: 1 for uniform attention.
    jaccard_60 and jaccard_80 {best_head, mean_map, heads [h]}, or None if the mean map's entropy is within
    0.1 bit of uniform. Raises UserError if no mask has an object.
    """
    shares = torch.stack([(masks > 0).float(), (masks >= 0).float()], 1)
    inside, counted = F.adaptive_avg_pool2d(shares, maps.shape[-2:]).split(1, dim=1)  # [n 1 y x]
    has_object = inside.sum((1, 2, 3)) > 0
    if not has_object.any():
        raise UserError("no mask has an object: there is nothing to compare attention with")
    maps, masks, inside, counted = (x[has_object] for x in (maps, masks, inside, counted))
    mass = ((maps * inside).sum((2, 3)) / (maps * counted).sum((2, 3)).clamp(min=1e-9)).mean(0)
    area = (inside.sum((1, 2, 3)) / counted.sum((1, 2, 3))).mean()
    figures = {"mass_in_mask": mass.tolist(), "area_of_mask": area.item()}
    figures["mass_over_area"] = (mass / area).tolist()
    mean_map = maps.mean(1, keepdim=True)
    flat = near_uniform(mean_map)
    for percent in (60, 80):
        figures[f"jaccard_{percent}"] = None
        if not flat:
            best, heads = jaccard(keep_mass(maps, percent / 100), masks)
            mean, _ = jaccard(keep_mass(mean_map, percent / 100), masks)
            figures[f"jaccard_{percent}"] = {"best_head": best, "mean_map": mean, "heads": heads}
    return figures


def attention_figures(maps, distance, masks=None):
    """Figures of one run: maps [n h y x], distance [h], masks [n s s]."""
    flat = maps.flatten(2)
    between_heads = [divergence(flat[:, i], flat[:, j]) for i, j in combinations(range(flat.shape[1]), 2)]
    figures = {
        "entropy_bits": entropy_bits(flat).mean(0).tolist(),
        "entropy_mean_map": entropy_bits(flat.mean(1)).mean().item(),
        "entropy_uniform": math.log2(flat.shape[-1]),
        "distance_pixels": distance.tolist(),
        "head_diversity_bits": torch.stack(between_heads).mean().item() if between_heads else 0.0,
    }
    if masks is not None:
        figures.update(figures_on_masks(maps, masks))
    return figures
