"""Hybrid A: DINO's cross-entropy (CE) and Barlow Twins' cross-correlation (CC) on one projection Z.

X1, X2 are random views of an image, plus local ones; the student sees all, the teacher only X1 and X2.
The teacher is the exponential moving average (EMA) of the student, without gradient (sg = stop-gradient):

    P_t = softmax((sg Zt - center) / tau_t)    P_s = softmax(Zs / tau_s)    CE = H(P_t, P_s)
    C = z1^T z2 / B    CC = (sum_i (1 - C_ii)^2 + lambd sum_{i != j} C_ij^2) / D
    L = CE + alpha CC(Zs, sg Zt), means over pairs of different views; alpha = 0 is dino.py

z1, z2: columns standardised over the batch (Zbontar et al., 2103.03230). The division by D is ours.

    python hybrid_a.py --dataset=shapes   a few minutes on two CPU cores

Letters in shapes:  b images  u teacher views  v student views  k prototypes  d width
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from data import Batches, Crop, fingerprint, load, multi_crop, training_split, view_features
from twins.keys import configure
from twins.monitor import correlation_meters, evaluate, teacher_meters
from twins.processes import BatchNorm1d, distributed, global_mean, setup, to_float32
from twins.run import Run
from twins.weights import start_from
from vit import ViT, check_size, init_weights

dataset = "cifar10"  # shapes, cifar10, cifar100, imagenet32, stl10 or folder
data_dir = "data"  # folder of the data set; downloads go there
out_dir = ""  # where the run writes; empty: out/<script>-<dataset>
preset = ""  # named defaults, see PRESETS: small; shapes and stl10 come with their data set
skip_bad_images = False  # in a folder, skip files that cannot be read, up to 1 %
memory_gib = 8.0  # data sets up to this size stay on the device; batches of larger ones are read ahead [0..]
resume = False  # continue the run in out_dir
init = ""  # weights to start from: a run, an export folder, a file of DINO's, DINOv2's or timm's
seed = 0  # for the weights, data order and views [0..18446744073709551615]
device = "auto"  # cuda, mps or cpu; auto: the first available
dtype = "auto"  # of the networks; auto: bfloat16 where it is faster [float32|bfloat16|float64]
compile = False  # torch.compile the blocks: a minute slower to start, faster afterwards
epochs = 100  # passes over the training images [1..]
max_steps = 0  # optimizer steps; 0: set by `epochs` [0..]
batch_size = 256  # images per step, over all processes [2..]
base_lr = 5e-4  # learning rate at batch_size 256, scaled linearly with it [0..]
min_lr = 1e-6  # learning rate at the end of the cosine [0..]
warmup_epochs = 10.0  # epochs of learning-rate warm-up from 0 [0..1000000]
wd = 0.04  # weight decay at the start; none on biases and norms [0..]
wd_end = 0.4  # weight decay at the end of its cosine schedule [0..]
grad_clip = 3.0  # largest gradient norm of each parameter tensor; 0: no clipping [0..]
image_size = 32  # pixels, of images and global views [2..]
cache_size = 0  # pixels a folder is decoded to; 0: 1.6 x image_size, but no more than its images have [0..]
local_size = 16  # pixels, of local views [1..]
n_local = 6  # local views per image [0..]
global_scale = (0.4, 1.0)  # share of an image's area in a global view [0.001..1]
local_scale = (0.1, 0.4)  # share of an image's area in a local view [0.001..1]
blur = False  # Gaussian blur in the views: for images larger than 32 pixels
patch_size = 4  # pixels, side of a patch [1..]
dim = 192  # width of the ViT [1..]
depth = 12  # blocks [1..]
heads = 3  # attention heads [1..]
drop_path = 0.1  # rate in the student's last block, rising linearly from 0 in the first [0..0.99]
knn_bank = 4000  # maximum number of images in the k-NN monitor's bank [2..]
knn_queries = 1000  # maximum number of held-out images that the monitor classifies [1..]
eval_every = 1000  # steps between evaluations [1..]
save_every = 1000  # steps between checkpoints [1..]
log_every = 10  # steps between rows of log.jsonl [1..]
logger = ""  # also log the rows to this tracker [tensorboard|wandb|trackio]

# --- method
out_dim = 1024  # prototypes k, the width of Z [1..]
hidden_dim = 2048  # hidden width of the head [1..]
bottleneck_dim = 256  # width of the head's bottleneck, before the prototypes [1..]
head_bn = False  # BatchNorm in the head; official DINO has none with a ViT
l2_bottleneck = True  # L2-normalise the bottleneck
norm_last_layer = True  # weight-normed prototypes keep length 1; False: their lengths are learned
freeze_last_layer_epochs = 1.0  # epochs without a gradient for the prototypes [0..]
tau_s = 0.1  # student temperature [1e-6..]
tau_t = 0.07  # teacher temperature; sharpening is tau_t < tau_s [1e-6..]
tau_t_start = 0.04  # teacher temperature at the start of its warm-up [1e-6..]
tau_t_warmup_epochs = 10.0  # epochs of teacher-temperature warm-up, linear by epoch [0..]
centering = True  # subtract the running mean of the teacher's Z
center_momentum = 0.9  # momentum of that running mean [0..1]
ema = 0.996  # momentum of the teacher at the start; 0: the teacher is the current student [0..1]
ema_end = 1.0  # momentum of the teacher at the end of its cosine schedule [0..1]
alpha = 20.0  # weight of CC beside CE; 0: CE alone [0..]
lambd = 0.005  # weight of C's off-diagonal [0..]
cc_local = False  # CC of the local views as well
head = "shared"  # one Z for both losses, or a Barlow projector of its own for CC [shared|two]
proj_dim = 512  # width of that projector, D [1..]
# --- end method

PRESETS = {
    "stl10": {
        "image_size": 96,
        "local_size": 48,
        "patch_size": 8,
        "blur": True,
    },
    "shapes": {
        "dim": 64,
        "depth": 3,
        "heads": 2,
        "max_steps": 300,
        "base_lr": 2e-3,
        "warmup_epochs": 0.5,
        "n_local": 2,
        "eval_every": 50,
        "hidden_dim": 512,
        "bottleneck_dim": 128,
        "out_dim": 128,
        "tau_t": 0.04,
        "tau_t_warmup_epochs": 0.0,
        "ema": 0.8,
    },
    "small": {  # with options of DINO's best setting in the search on CIFAR-10, see results/README.md
        "dim": 96,
        "depth": 4,
        "batch_size": 128,
        "max_steps": 3000,
        "base_lr": 4e-3,
        "warmup_epochs": 0.5,
        "n_local": 0,
        "hidden_dim": 512,
        "head_bn": True,
        "norm_last_layer": False,
        "tau_t": 0.055,
        "tau_t_warmup_epochs": 0.0,
        "ema": 0.97,
        "freeze_last_layer_epochs": 0.2,
        "head": "two",
        "alpha": 12.0,
    },
}


class Head(nn.Module):
    """DINO's head: a three-layer perceptron, L2, weight-normed prototypes. x [n d] -> z [n k]."""

    def __init__(self, dim):
        super().__init__()
        layers = []
        for width in (dim, hidden_dim):
            norm = BatchNorm1d(hidden_dim) if head_bn else nn.Identity()
            layers += [nn.Linear(width, hidden_dim), norm, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim)).apply(init_weights)
        self.last = nn.Linear(bottleneck_dim, out_dim, bias=False)
        self.length = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)

    def forward(self, x):
        x = self.mlp(x)
        if l2_bottleneck:
            x = F.normalize(x, dim=-1, eps=1e-6)
        return F.linear(x, self.length * F.normalize(self.last.weight, dim=1))


def projector(dim):
    """Barlow Twins' projector, Linear-BN-ReLU twice, then Linear. x [n d] -> z [n proj_dim]."""
    layers = []
    for width in (dim, proj_dim):
        layers += [nn.Linear(width, proj_dim, bias=False), BatchNorm1d(proj_dim), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(proj_dim, proj_dim, bias=False))


class Network(nn.Module):
    """ViT and heads. Views, a list of [b 3 s s] -> Z for CE [v b k], for CC [v b D], the same if shared."""

    def __init__(self, drop_path):
        super().__init__()
        self.backbone = ViT(image_size, patch_size, dim, depth, heads, drop_path)
        self.head = Head(dim)
        self.projector = projector(dim) if head == "two" else None

    def forward(self, views):
        features = view_features(self.backbone, views)
        z_ce = z_cc = rearrange(to_float32(self.head(features)), "(v b) k -> v b k", v=len(views))
        if self.projector is not None:  # BatchNorm sees each view alone
            z_cc = torch.stack([to_float32(self.projector(x)) for x in features.chunk(len(views))])
        return z_ce, z_cc


def cross_entropy(p_t, z_s, tau_s):
    """H(P_t, P_s) of every pair of views, mean over the batch: p_t [u b k], z_s [v b k] -> [u v]."""
    log_p_s = F.log_softmax(z_s / tau_s, dim=-1)
    return -torch.einsum("u b k, v b k -> u v", p_t, log_p_s) / p_t.shape[1]


def standardise(z):
    """Columns of z [b d] to mean 0 and standard deviation 1 over the batch; a constant column to 0."""
    z = z - global_mean(z.mean(0))
    return z / (global_mean(z.square().mean(0)) + 1e-6).sqrt()


def cross_correlation_loss(z1, z2, lambd):
    """CC = (sum_i (1 - C_ii)^2 + lambd sum_{i != j} C_ij^2) / D of two projections [b d] of one batch."""
    c = global_mean(standardise(z1).T @ standardise(z2) / len(z1))
    on_diagonal = (1 - c.diagonal()).square().sum()
    off_diagonal = (c - c.diagonal().diag()).square().sum()
    return (on_diagonal + lambd * off_diagonal) / len(c)


def cosine(start, end, step, steps, warmup=0):
    """Value at `step` of `steps`: linear from 0 to `start` in `warmup` steps, then half a cosine to `end`."""
    if step < warmup:
        return start * step / max(warmup - 1, 1)
    return end + (start - end) * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


if __name__ == "__main__":
    config = configure(globals())  # command line and presets: from here on every option has its final value
    device, autocast = setup(device, dtype, seed)
    init_state = start_from(globals(), config, ViT) if init and not resume else None  # sets dim, heads ...
    for size in (image_size, local_size):
        check_size(size, patch_size)
    data = load(dataset, data_dir, image_size, "train", skip_bad_images, cache_size)
    train_indices, bank, queries = training_split(data, knn_bank, knn_queries, batch_size)
    batches = Batches(data.images, train_indices, batch_size, seed, device, memory_gib)  # step -> images
    steps_per_epoch = len(train_indices) // batch_size
    steps = max_steps or epochs * steps_per_epoch
    crops = [Crop(image_size, global_scale, blur=1.0 * blur)]
    crops += [Crop(image_size, global_scale, blur=0.1 * blur, solarize=0.2)]
    crops += [Crop(local_size, local_scale, blur=0.5 * blur)] * n_local

    # --- method
    student, teacher = Network(drop_path).to(device), Network(0.0).to(device).requires_grad_(False)
    if init_state:
        student.backbone.load_state_dict(init_state)
    teacher.load_state_dict(student.state_dict())
    center = torch.zeros(out_dim, device=device)
    pair_mask = 1 - torch.eye(2, len(crops), device=device)  # [u v], a crop is not compared with itself
    cc_pairs = [(u, v) for u in range(2) for v in range(len(crops) if cc_local else 2) if u != v]
    state = {"student": student, "teacher": teacher, "center": center}
    eval_backbone = teacher.backbone  # the one that is evaluated and exported
    # --- end method

    decayed = [p for p in student.parameters() if p.ndim > 1]
    not_decayed = [p for p in student.parameters() if p.ndim < 2]  # biases and norms
    groups = [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=base_lr, weight_decay=wd, fused=True)
    state.update(optimizer=optimizer, data=fingerprint(data))  # resuming warns if the data has changed
    run = Run(__file__, config, steps, state, eval_backbone, device)  # state: what a checkpoint holds
    if run.start == 0:  # a new run, not a resumed one
        sample = batches(0)[:6]
        run.draw_crops(sample, multi_crop(sample, crops, seed, 0))
        run.log(0, {"epoch": 0.0, **evaluate(eval_backbone, data, bank, queries, device, autocast)})

    model = distributed(student)  # DistributedDataParallel under torchrun, else the student itself
    for step in run.loop():  # seeds every step, saves the state, ends after a signal
        epoch = step / steps_per_epoch
        lr = cosine(base_lr * batch_size / 256, min_lr, step, steps, int(warmup_epochs * steps_per_epoch))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = cosine(wd, wd_end, step, steps)  # of `decayed`
        views = multi_crop(batches(step), crops, seed, step)  # a list of [b 3 s s], one for each crop

        # --- method
        warming_up = tau_t < tau_s and epoch < tau_t_warmup_epochs  # no warm-up without sharpening
        progress = min(int(epoch) / max(tau_t_warmup_epochs - 1, 1), 1) if warming_up else 1
        tau = tau_t_start + (tau_t - tau_t_start) * progress
        with autocast:
            (z_s, z_s_cc), (z_t, z_t_cc) = model(views), teacher(views[:2])
        p_t = ((z_t - center) / tau).softmax(-1)  # [u b k]
        ce = (cross_entropy(p_t, z_s, tau_s) * pair_mask).sum() / pair_mask.sum()
        cc = torch.stack([cross_correlation_loss(z_s_cc[v], z_t_cc[u], lambd) for u, v in cc_pairs]).mean()
        loss, parts = ce + alpha * cc, {"ce": ce, "cc": cc}
        # --- end method

        run.check(step, lr, **parts, loss=loss)  # stops the run if one is not finite
        optimizer.zero_grad()
        loss.backward()
        if grad_clip:  # per parameter tensor, as in DINO's code
            grads = [p.grad for p in student.parameters() if p.grad is not None]
            scale = (grad_clip / (torch.stack(torch._foreach_norm(grads)) + 1e-6)).clamp(max=1)
            torch._foreach_mul_(grads, list(scale))
        # --- method
        if epoch < freeze_last_layer_epochs:
            student.head.last.weight.grad = student.head.length.grad = None  # the optimizer skips them
        # --- end method
        optimizer.step()
        # --- method
        momentum = cosine(ema, ema_end, step, steps) if ema else 0.0
        with torch.no_grad():  # teacher = momentum teacher + (1 - momentum) student
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
        if centering:
            center.lerp_(global_mean(z_t.mean((0, 1))), 1 - center_momentum)  # for the next step
        # --- end method
        done = step + 1
        evaluate_now = done % eval_every == 0 or done == steps
        if done % log_every == 0 or evaluate_now:
            row = run.row(done, epoch=done / steps_per_epoch, loss=loss, **parts, lr=lr)
            # --- method
            row.update(teacher_meters(p_t, ce))  # what its output tells about the image
            row.update(correlation_meters(z_s_cc[1], z_t_cc[0]))  # of two different views
            # --- end method
            if evaluate_now:
                row.update(evaluate(eval_backbone, data, bank, queries, device, autocast))
            run.log(done, row)
    run.finish()
