"""Hybrid A: DINO's cross-entropy (CE) and Barlow Twins' cross-correlation (CC) on one projection Z.

X1, X2 are random views of an image, smaller local ones beside them. The student sees all, the teacher the two global ones.
The teacher is the exponential moving average (EMA) of the student and gets no gradient (sg = stop-gradient):

    P_t = softmax((sg Zt - center) / tau_t)    P_s = softmax(Zs / tau_s)    CE = H(P_t, P_s), Caron et al., 2104.14294
    CC = (sum_i (1 - C_ii)^2 + lambd sum_{i != j} C_ij^2) / D    C = z1^T z2 / B, columns of z standardised, Zbontar et al., 2103.03230
    L = CE + alpha CC(Zs, sg Zt), means over pairs of different views; alpha = 0 is dino.py

    python hybrid_a.py --dataset=shapes                        five minutes on two CPU cores
    python hybrid_a.py --batch_size=256 --dataset=cifar100     ViT-Ti/4, 2 x 32 + 6 x 16 pixels

Letters in shapes:  b images  u teacher views  v student views  k prototypes  d width of the ViT
"""

from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import BatchNorm1d, configure, cosine, distributed, float32, global_mean, seed_step, setup
from data import Batches, Crop, load, multi_crop, training_split
from monitor import correlation_meters, crops_picture, entropy, evaluate
from run import Run
from vit import ViT

dataset = "cifar10"  # shapes, cifar10, cifar100, imagenet32, stl10 or folder
data_dir = "data"  # where its files are, or are downloaded to
out_dir = ""  # where the run writes; empty: out/<script>-<dataset>
skip_bad_images = False  # of a folder: leave out what cannot be read, up to 1 %
memory_gib = 8.0  # images up to this size are held on the device, larger sets are read ahead from disk
resume = False  # go on with the run in out_dir
seed = 0  # of weights, order and views
device = "auto"  # cuda, mps or cpu; auto: the first of them that is here
dtype = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 on a GPU that has it
compile = False  # torch.compile: a minute slower to start, faster after
epochs = 100  # passes over the training images
max_steps = 0  # optimizer steps; 0: as many as epochs make
batch_size = 256  # images a step
base_lr = 5e-4  # learning rate at batch_size 256, in proportion to it
min_lr = 1e-6  # learning rate at the end (cosine)
warmup_epochs = 10.0  # of a learning rate rising from 0
wd = 0.04  # weight decay at the start; none on biases and norms
wd_end = 0.4  # weight decay at the end (cosine)
grad_clip = 3.0  # largest gradient norm of each parameter tensor; 0: no clipping
image_size = 32  # pixels, of images and global views
local_size = 16  # pixels, of local views
n_local = 6  # local views an image
global_scale = (0.4, 1.0)  # share of an image's area in a global view
local_scale = (0.1, 0.4)  # share of an image's area in a local view
blur = False  # Gaussian blur in the views: for images larger than 32 pixels
patch_size = 4  # pixels, side of a token
dim = 192  # width of the ViT
depth = 12  # blocks
heads = 3  # attention heads
drop_path = 0.1  # of the student's last block, rising from 0 at the first
knn_bank = 10000  # at most so many images in the k-NN monitor's bank
knn_queries = 1000  # at most so many images it is asked about
eval_every = 1000  # steps between evaluations
save_every = 1000  # steps between checkpoints
log_every = 10  # steps between rows of log.jsonl
logger = ""  # tensorboard or wandb: rows go there too

# --- method
out_dim = 1024  # prototypes k, the width of Z
hidden_dim = 2048  # of the head
bottleneck_dim = 256  # of the head, before the prototypes
head_bn = True  # BatchNorm in the head
l2_bottleneck = True  # L2-normalise the bottleneck
norm_last_layer = True  # weight-normed prototypes, each of length 1
freeze_last_layer_epochs = 1.0  # no gradient for the prototypes at first
tau_s = 0.1  # student's temperature
tau_t = 0.07  # teacher's temperature; sharpening is tau_t < tau_s
tau_t_start = 0.04  # teacher's temperature at first
tau_t_warmup_epochs = 10.0  # from tau_t_start to tau_t
centering = True  # subtract the running mean of the teacher's Z
center_momentum = 0.9  # of that mean
ema = 0.996  # the teacher's momentum at the start; 0: the teacher is the student
ema_end = 1.0  # and at the end (cosine)
alpha = 5.0  # weight of CC beside CE
lambd = 0.005  # weight of C's off-diagonal
cc_local = False  # CC of the local views too
head = "shared"  # both losses on one Z; two: CC has a Barlow projector of its own
proj_dim = 512  # of that projector

PRESETS = {  # what a data set changes in the defaults
    "stl10": dict(image_size=96, local_size=48, patch_size=8, blur=True),
    "shapes": dict(dim=64, depth=3, heads=2, max_steps=300, base_lr=2e-3, warmup_epochs=0.5, eval_every=50, save_every=100)
    | dict(knn_bank=5000, n_local=2, hidden_dim=512, bottleneck_dim=128, out_dim=128, tau_t=0.04, tau_t_warmup_epochs=0.0, ema=0.8)
    | dict(alpha=20.0)
}


class Head(nn.Module):
    """DINO's head: a three-layer perceptron, L2, prototypes. x [n d] -> z [n k]."""

    def __init__(self, dim):
        super().__init__()
        norm = (lambda: BatchNorm1d(hidden_dim)) if head_bn else nn.Identity
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            norm(),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            norm(),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last = nn.Linear(bottleneck_dim, out_dim, bias=False)
        for layer in self.mlp[::3]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = self.mlp(x)
        if l2_bottleneck:
            x = F.normalize(x, dim=-1, eps=1e-6)
        return F.linear(x, F.normalize(self.last.weight, dim=1)) if norm_last_layer else self.last(x)


def projector(dim):
    """Barlow Twins' projector, for head='two'. x [n d] -> z [n proj_dim]."""
    hidden = (nn.Linear(dim, proj_dim, bias=False), BatchNorm1d(proj_dim), nn.ReLU())
    more = (nn.Linear(proj_dim, proj_dim, bias=False), BatchNorm1d(proj_dim), nn.ReLU())
    return nn.Sequential(*hidden, *more, nn.Linear(proj_dim, proj_dim, bias=False))


class Network(nn.Module):
    """ViT and heads. Views, a list of [b 3 s s] -> Z for CE [v b k] and for CC [v b D]; views of one size go together."""

    def __init__(self, drop_path):
        super().__init__()
        self.backbone = ViT(image_size, patch_size, dim, depth, heads, drop_path)
        self.head = Head(dim)
        self.projector = projector(dim) if head == "two" else None

    def forward(self, views):
        same_size = [torch.cat(list(group)) for _, group in groupby(views, key=lambda x: x.shape[-1])]
        features = torch.cat([self.backbone(x) for x in same_size])
        z = rearrange(self.head(features), "(v b) k -> v b k", v=len(views))
        return z, z if self.projector is None else rearrange(self.projector(features), "(v b) d -> v b d", v=len(views))


def cross_entropy(pt, zs, tau_s):
    """H(P_t, P_s) of every pair of views: teacher's pt [u b k], student's zs [v b k] -> [u v], means over the batch."""
    log_ps = F.log_softmax(zs / tau_s, dim=-1)
    return -torch.einsum("u b k, v b k -> u v", pt, log_ps) / pt.shape[1]


def standardise(z):
    """Columns of z [b d] to mean 0 and standard deviation 1 over the batch; a constant column to 0."""
    z = z - global_mean(z.mean(0))
    return z / (global_mean(z.square().mean(0)) + 1e-6).sqrt()


def cross_correlation_loss(z1, z2, lambd):
    """CC = (sum_i (1 - C_ii)^2 + lambd sum_{i != j} C_ij^2) / D of two projections [b d] of the same images."""
    b, d = z1.shape
    c = global_mean(standardise(z1).T @ standardise(z2) / b)
    on_diagonal = (1 - c.diagonal()).square().sum()
    off_diagonal = (c - c.diagonal().diag()).square().sum()
    return (on_diagonal + lambd * off_diagonal) / d


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """teacher = momentum * teacher + (1 - momentum) * student, every parameter."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


@torch.no_grad()
def clip_gradients(parameters, largest):
    """Scales every gradient whose norm is above `largest` down to it, each tensor alone, as DINO does."""
    grads = [p.grad for p in parameters if p.grad is not None]
    scale = (largest / (torch.stack(torch._foreach_norm(grads)) + 1e-6)).clamp(max=1)
    torch._foreach_mul_(grads, list(scale))


def parameter_groups(model):
    """Weight decay for matrices, none for biases and norms."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": decayed}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]


if __name__ == "__main__":
    config = configure(globals())  # from here on every key has its final value
    device, autocast = setup(device, dtype, seed, batch_size)
    data = load(dataset, data_dir, image_size, skip_bad_images=skip_bad_images)
    kept, bank, queries = training_split(data, knn_bank, knn_queries, batch_size)
    batches = Batches(data.images, kept, batch_size, seed, device, memory_gib)
    steps_per_epoch = len(kept) // batch_size
    steps = max_steps or epochs * steps_per_epoch
    crops = [Crop(image_size, global_scale, blur=1.0 * blur), Crop(image_size, global_scale, blur=0.1 * blur, solarize=0.2)]
    crops += [Crop(local_size, local_scale, blur=0.5 * blur)] * n_local

    # --- method
    student, teacher = Network(drop_path).to(device), Network(0.0).to(device)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    center = torch.zeros(out_dim, device=device)
    pairs = 1 - torch.eye(2, len(crops), device=device)  # [u v], equal views never meet
    state = {"student": student, "teacher": teacher, "center": center}
    best = teacher.backbone  # the one to evaluate and to keep
    # --- end method

    optimizer = torch.optim.AdamW(parameter_groups(student), lr=base_lr, weight_decay=wd, fused=True)
    run = Run(config, steps, state | {"optimizer": optimizer}, device)
    if run.start == 0:
        names = [f"{'global' if crop.size == image_size else 'local'} {v + 1}" for v, crop in enumerate(crops)]
        sample = batches(0)[:6]
        run.write("crops.png", crops_picture(sample, multi_crop(sample, crops, seed, 0), names))
        run.log(0, {"epoch": 0} | evaluate(best, data, bank, queries, device, autocast))
    if compile:
        for network in (part for part in state.values() if isinstance(part, nn.Module)):
            network.compile(options={"fallback_random": True})  # drop path draws what it draws uncompiled

    model = distributed(student)
    for step in range(run.start, steps):
        seed_step(seed, step)
        epoch = step / steps_per_epoch
        for group in optimizer.param_groups:
            group["lr"] = cosine(base_lr * batch_size / 256, min_lr, step, steps, warmup_epochs * steps_per_epoch)
        optimizer.param_groups[0]["weight_decay"] = cosine(wd, wd_end, step, steps)
        views = multi_crop(batches(step), crops, seed, step)

        # --- method
        warm = tau_t < tau_s and epoch < tau_t_warmup_epochs
        tau = tau_t_start + (tau_t - tau_t_start) * epoch / tau_t_warmup_epochs if warm else tau_t
        with autocast:
            (zs, ys), (zt, yt) = model(views), teacher(views[:2])
        zs, zt, ys, yt = float32(zs), float32(zt), float32(ys), float32(yt)
        pt = ((zt - center) / tau).softmax(-1)  # [u b k]
        ce = (cross_entropy(pt, zs, tau_s) * pairs).sum() / pairs.sum()
        others = range(len(crops) if cc_local else 2)
        cc = torch.stack([cross_correlation_loss(ys[v], yt[u], lambd) for u in range(2) for v in others if u != v]).mean()
        loss, parts = ce + alpha * cc, {"ce": ce, "cc": cc}
        # --- end method

        optimizer.zero_grad()
        loss.backward()
        if grad_clip:
            clip_gradients(student.parameters(), grad_clip)
        # --- method
        if epoch < freeze_last_layer_epochs:
            student.head.last.weight.grad = None
        # --- end method
        optimizer.step()
        # --- method
        update_teacher(teacher, student, cosine(ema, ema_end, step, steps) if ema else 0.0)
        if centering:
            center.lerp_(global_mean(zt.mean((0, 1))), 1 - center_momentum)
        # --- end method

        done = step + 1
        run.update()
        evaluate_now = done % eval_every == 0 or done == steps
        if done % log_every == 0 or evaluate_now:
            row = run.row(done, epoch=done / steps_per_epoch, loss=loss, **parts, lr=optimizer.param_groups[0]["lr"])
            # --- method
            row |= {"teacher_entropy": entropy(pt), "kl": ce - entropy(pt)}
            row |= correlation_meters(ys[1], yt[0])
            # --- end method
            if evaluate_now:
                row |= evaluate(best, data, bank, queries, device, autocast)
            run.log(done, row)
        if done % save_every == 0 or done == steps or run.stop:
            run.save(done, best)
        if run.stop:
            break
    run.finish()
