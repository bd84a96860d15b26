"""A run's device and precision; torchrun's processes, of which N compute what one would."""

import atexit
import ctypes
import functools
import os
import sys
import time

import einops
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from twins.errors import UserError, first_line


def under_torchrun():
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    ranks = all(number.isdigit() for number in numbers) and int(numbers[0]) < int(numbers[1])
    return ranks and all(os.environ.get(name) for name in names)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def launcher():
    """The command that started this process: python, or torchrun with its processes."""
    return "python" if world() == 1 else f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')}"


def setup(device, dtype, seed):
    """Seeds torch, joins torchrun's processes; returns the torch.device and the autocast context of a run.

    Raises UserError for a device or precision that this machine does not have.
    """
    torch.manual_seed(seed)
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    if device == "cuda" and under_torchrun():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        number = torch.zeros((), device=device)
        number.item()  # raises on meta
        device = number.device
    except (RuntimeError, AssertionError, ImportError) as error:
        problem = first_line(error)[:120]
        raise UserError(f"--device={device} does not work here ({problem}): try --device=cpu") from None
    dtype = precision(dtype, device)
    print(f"device {device}, {dtype}", flush=True)
    torch.set_default_dtype(torch.float64 if dtype == "float64" else torch.float32)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if under_torchrun() and not dist.is_initialized():
        hook = sys.excepthook
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        sys.excepthook = hook  # torch's hook prints the output of ours only after ours returns
        atexit.register(leave_group)
    if device.type == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc: keep freed memory; a step takes up to 20 % less time
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return device, torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def precision(dtype, device):
    """--dtype with auto resolved on a torch.device: bfloat16 where it is faster, else float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if bfloat16_is_faster(device) else "float32"


def bfloat16_is_faster(device):
    """Whether matrix products are faster in bfloat16: a GPU tells, a CPU that supports it is measured.

    A CPU without bfloat16 instructions emulates them, and products can take minutes. With them, products on
    AMD are two to four times as fast as in float32, but on Intel without AMX half as fast.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # undocumented
    if device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in names):
        return product_speed(device, torch.bfloat16, 512) > product_speed(device, torch.float32, 512)
    return False


def compile_blocks(module):
    """Compiles the members of a module's ModuleLists, such as a ViT's blocks; without any, the module itself.

    Blocks share their code, which is compiled once for all of them and for all view sizes.
    """
    blocks = []
    for child in module.modules():
        if isinstance(child, nn.ModuleList):
            blocks.extend(child)
    options = {"fallback_random": True}  # the same random numbers as without compilation
    for block in blocks or [module]:
        block.compile(dynamic=True, options=options)


@functools.cache
def product_speed(device, dtype, n):
    """FLOP/s of a product of n x n matrices, the best of 20; measured once per process."""
    x = torch.linspace(-1, 1, n * n, device=device).to(dtype).view(n, n)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the result
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def leave_group():
    """Waits for gloo's threads, which may still hold tensors: torch 2.10 and 2.11 would abort at exit."""
    time.sleep(0.1)
    dist.destroy_process_group()


def seed_step(seed, step):
    """Makes torch's random numbers a function of (seed, step), so a run resumes bit-identically."""
    torch.manual_seed(int(np.random.SeedSequence((seed, 2, step)).generate_state(1, np.uint64)[0]))


class MeanOverProcesses(torch.autograd.Function):
    """all_reduce has no gradient; this one averages it, so that DistributedDataParallel is exact."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x / world()

    @staticmethod
    def backward(ctx, gradient):
        return MeanOverProcesses.apply(gradient)


def global_mean(x):
    """A mean over this process's shard of the batch -> the mean over the whole batch, with its gradient."""
    return MeanOverProcesses.apply(x) if world() > 1 else x


class BatchNorm1d(nn.BatchNorm1d):
    """BatchNorm with the statistics of the batch of all processes, in training and evaluation. x [n d]."""

    def __init__(self, dim):
        super().__init__(dim, track_running_stats=False)

    def forward(self, x):
        if world() == 1:
            return super().forward(x)
        z = to_float32(x)
        z = z - global_mean(z.mean(0))
        z = z * (global_mean(z.square().mean(0)) + self.eps).rsqrt()
        return (z * self.weight + self.bias).to(x.dtype)


def batch_rand(n, rows, batch_size, device):
    """Uniform random numbers [n rows] for `rows` "(v b)": v views of this process's batch_size images.

    They are the numbers that a single process would draw for these images.
    """
    numbers = torch.rand(n, rows * world(), device=device)
    if world() == 1:
        return numbers
    return einops.rearrange(numbers, "n (v w b) -> w n (v b)", w=world(), b=batch_size)[rank()]


def shard(x):
    """This process's rows of x [n ...]; gather() joins the shards again."""
    return x.tensor_split(world())[rank()]


def gather(x):
    """Shards [n ...] of all processes, which may differ in length -> all rows, in order."""
    if world() == 1:
        return x
    shards = [None] * world()
    dist.all_gather_object(shards, x.cpu())
    return torch.cat(shards).to(x.device)


@torch.no_grad()
def map_shards(function, x, autocast, title, batch_size=500, leave=True):
    """function(batch) for batches of x [n ...], shared by all processes: its results joined, in float32."""
    chunks = []
    for batch in tqdm(shard(x).split(batch_size), title, unit="batch", leave=leave, delay=3):
        with autocast:
            chunks.append(to_float32(function(batch)))
    return gather(torch.cat(chunks))


def distributed(module):
    """The module, with gradients that are the mean over all processes."""
    if world() == 1:
        return module
    device = next(module.parameters()).device
    return DistributedDataParallel(module, [device] if device.type == "cuda" else None)


def to_float32(x):
    """bfloat16 (from autocast) -> float32; float64 is unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def to_numbers(row):
    """A dict with its tensors replaced by numbers, their means over all processes."""
    names = [name for name, value in row.items() if isinstance(value, torch.Tensor)]
    if not names:
        return dict(row)
    with torch.no_grad():
        values = global_mean(torch.stack([row[name].detach().double() for name in names]))
    return {**row, **dict(zip(names, values.tolist(), strict=True))}
