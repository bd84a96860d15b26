"""Thirty steps of dino.py in float64 are DINO's published algorithm, written by hand as plainly as it can be.

Sources: the pseudocode and section 3 of Caron et al., 2104.14294; main_dino.py, utils.py and
vision_transformer.py of
facebookresearch/dino. Ours are the views, the initial weights and the ViT (tests/test_vit.py holds it to
timm's).
lightly's DINOLoss is a second oracle of the loss and the centre.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data

EPOCHS, STEPS_PER_EPOCH, BATCH = 5, 6, 8
OPTIONS = dict(
    base_lr=0.1, min_lr=1e-5, warmup_epochs=2, wd=0.04, wd_end=0.4, grad_clip=0.03, ema=0.9, ema_end=1.0
)
OPTIONS |= dict(tau_s=0.1, tau_t_start=0.04, tau_t=0.07, tau_t_warmup_epochs=3, freeze_last_layer_epochs=1)
OPTIONS |= dict(center_momentum=0.9, n_local=2)
SAME = dict(rtol=1e-9, atol=1e-9)


class Recorder:
    """What the reference takes from a run: views and losses of each step, the networks before the first."""

    def __init__(self):
        self.views, self.losses = [], []

    def __call__(self, g):
        if not self.views:
            self.student, self.teacher = copy.deepcopy((g["student"], g["teacher"]))
        self.views.append(g["views"])
        self.losses.append(g["loss"].item())


class ReferenceNetwork(nn.Module):
    """Backbone, perceptron and torch's own weight norm, with the initial weights of one of ours."""

    def __init__(self, ours, norm_last_layer):
        super().__init__()
        self.backbone, head = copy.deepcopy(ours.backbone), ours.head
        linear = [copy.deepcopy(layer) for layer in head.mlp if isinstance(layer, nn.Linear)]
        self.mlp = nn.Sequential(linear[0], nn.GELU(), linear[1], nn.GELU(), linear[2])
        last = nn.Linear(head.last.in_features, head.last.out_features, bias=False)
        last.weight.data.copy_(head.last.weight)
        self.last_layer = nn.utils.parametrizations.weight_norm(last)
        length, _ = self.last_layer.parametrizations.weight.parameters()
        length.data.fill_(1.0)
        length.requires_grad = not norm_last_layer

    def forward(self, views):
        """The views one by one through the backbone, [v b 3 s s] -> [v b k]."""
        outputs = []
        for view in views:
            bottleneck = F.normalize(self.mlp(self.backbone(view)), p=2, dim=-1)
            outputs.append(self.last_layer(bottleneck))
        return outputs


def schedule(start, end, warmup_epochs=0):
    """A value for every step: linear warm-up from 0, then half a cosine."""
    warmup = np.linspace(0, start, warmup_epochs * STEPS_PER_EPOCH)
    left = EPOCHS * STEPS_PER_EPOCH - len(warmup)
    return np.concatenate([warmup, end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.arange(left) / left))])


def dino_loss(student_out, teacher_out, center, tau_s, tau_t):
    total, terms = 0, 0
    for u, teacher_view in enumerate(teacher_out):
        p_t = F.softmax((teacher_view - center) / tau_t, dim=-1).detach()
        for v, student_view in enumerate(student_out):
            if u != v:
                total = total + torch.sum(-p_t * F.log_softmax(student_view / tau_s, dim=-1), dim=-1).mean()
                terms += 1
    return total / terms


def published_dino(recorder, norm_last_layer):
    """The algorithm on the recorded views: student, teacher, centre, losses, which gradients were clipped."""
    o = OPTIONS
    student = ReferenceNetwork(recorder.student, norm_last_layer)
    teacher = ReferenceNetwork(recorder.teacher, True)
    teacher.requires_grad_(False)
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed (.ci/run installs it)")
    k = recorder.student.head.last.out_features
    center = torch.zeros(1, k)
    oracle = lightly.DINOLoss(k, student_temp=o["tau_s"], center_momentum=o["center_momentum"]).double()

    decayed, others = [], []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (others if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    lr_schedule = schedule(o["base_lr"] * BATCH / 256, o["min_lr"], o["warmup_epochs"])
    wd_schedule, ema_schedule = schedule(o["wd"], o["wd_end"]), schedule(o["ema"], o["ema_end"])
    warmup = np.linspace(o["tau_t_start"], o["tau_t"], o["tau_t_warmup_epochs"])
    tau_t_schedule = np.concatenate([warmup, np.full(EPOCHS - len(warmup), o["tau_t"])])

    losses, clipped = [], []
    for step, views in enumerate(recorder.views):
        epoch = step // STEPS_PER_EPOCH
        for group in optimizer.param_groups:
            group["lr"] = lr_schedule[step]
        optimizer.param_groups[0]["weight_decay"] = wd_schedule[step]
        teacher_out, student_out = teacher(views[:2]), student(views)
        loss = dino_loss(student_out, teacher_out, center, o["tau_s"], tau_t_schedule[epoch])
        second = oracle(teacher_out, student_out, teacher_temp=tau_t_schedule[epoch])
        torch.testing.assert_close(second, loss, **SAME)
        center = center * o["center_momentum"] + torch.cat(teacher_out).mean(0, keepdim=True) * (
            1 - o["center_momentum"]
        )
        torch.testing.assert_close(oracle.center[0], center, **SAME)
        optimizer.zero_grad()
        loss.backward()
        for parameter in student.parameters():
            if parameter.grad is not None:
                factor = o["grad_clip"] / (parameter.grad.norm(2) + 1e-6)
                clipped.append(bool(factor < 1))
                if factor < 1:
                    parameter.grad.mul_(factor)
        if epoch < o["freeze_last_layer_epochs"]:
            for parameter in student.last_layer.parameters():
                parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            m = ema_schedule[step]
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.copy_(m * old + (1 - m) * new)
        losses.append(loss.item())
    return student, teacher, center, losses, clipped


def weights(network):
    """The parameters of ours or of the reference under one set of names."""
    found = {f"backbone.{name}": value for name, value in network.backbone.named_parameters()}
    linear = [layer for layer in getattr(network, "head", network).mlp if isinstance(layer, nn.Linear)]
    found |= {
        f"mlp.{i}.{name}": value for i, layer in enumerate(linear) for name, value in layer.named_parameters()
    }
    if hasattr(network, "head"):
        last = network.head.length, network.head.last.weight
    else:
        last = network.last_layer.parametrizations.weight.parameters()
    found["length"], found["direction"] = last
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_thirty_steps_are_the_published_algorithm(train, monkeypatch, norm_last_layer):
    split = data.training_split
    few = STEPS_PER_EPOCH * BATCH + 3  # three images are left out of each epoch

    def small_split(*args):
        train_indices, bank, queries = split(*args)
        return train_indices[:few], bank, queries

    monkeypatch.setattr(data, "training_split", small_split)
    recorder = Recorder()
    more = dict(dtype="float64", max_steps=0, epochs=EPOCHS, batch_size=BATCH, drop_path=0.0)
    ours = train("dino.py", recorder, norm_last_layer=norm_last_layer, **more, **OPTIONS)
    student, teacher, center, losses, clipped = published_dino(recorder, norm_last_layer)

    assert len(losses) == 30 and recorder.losses == pytest.approx(losses, rel=1e-9)
    torch.testing.assert_close(ours["center"], center[0], **SAME)
    for name, reference in (("student", student), ("teacher", teacher)):
        mine, theirs, start = weights(ours[name]), weights(reference), weights(getattr(recorder, name))
        assert mine.keys() == theirs.keys()
        for parameter, value in mine.items():
            assert torch.allclose(value, theirs[parameter], **SAME), f"{name} {parameter}"
            frozen = parameter == "length" and norm_last_layer
            assert torch.equal(value, start[parameter]) == frozen, f"{name} {parameter}: did it move?"
    # the setting can tell: some gradients are clipped and some are not, losses move
    assert 0.1 < sum(clipped) / len(clipped) < 0.9 and max(losses) - min(losses) > 0.1
