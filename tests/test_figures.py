"""What the two figures draw, by gradients, in the real loops: who sees which view, who learns from which
loss, how the teacher moves.
"""

import pytest
import torch

from dino import cosine


def gradient(loss, inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)


def learns_from(loss, z):
    """For each view of z [v b d], whether `loss` has a gradient in it. None: z is in no graph."""
    if not z.requires_grad:
        return None
    return (gradient(loss, [z])[0].abs().amax((1, 2)) > 0).tolist()


@pytest.fixture
def views_seen(monkeypatch):
    """views_seen[model] lists the mean of every image batch [b 3 s s] that a ViT got in its last forward."""
    import vit

    seen, forward = {}, vit.ViT.forward

    def spied(self, images, noise=None):
        if torch.is_grad_enabled() and self.training:  # not the k-NN monitor
            seen.setdefault(id(self), []).append(images.detach().clone())
        return forward(self, images, noise)

    monkeypatch.setattr(vit.ViT, "forward", spied)
    return seen


@pytest.mark.parametrize("cc_local", [False, True])
@pytest.mark.parametrize("head", ["shared", "two"])
def test_a_cc_teaches_the_student_alone(train, head, cc_local):
    def spy(g):
        assert learns_from(g["cc"], g["z_s_cc"]) == [True, True] + [cc_local] * 2
        assert learns_from(g["ce"], g["z_s"]) == [True] * 4
        assert learns_from(g["cc"], g["z_t_cc"]) is None and learns_from(g["ce"], g["z_t"]) is None

    train("hybrid_a.py", spy, n_local=2, head=head, cc_local=cc_local)


@pytest.mark.parametrize("cc_local", [False, True])
@pytest.mark.parametrize("head", ["shared", "two"])
def test_b_cc_teaches_through_both_projections(train, head, cc_local):
    def spy(g):
        assert learns_from(g["cc"], g["z_s_cc"]) == [True, True] + [cc_local] * 2
        assert learns_from(g["ce"], g["z_s"]) == [True] * 4
        assert learns_from(g["ce"], g["z_t"]) is None

    train("hybrid_b.py", spy, n_local=2, head=head, cc_local=cc_local)


@pytest.mark.parametrize("script", ["dino.py", "hybrid_a.py", "hybrid_b.py"])
def test_a_teacher_never_has_a_gradient(train, script):
    g = train(script)
    assert all(p.grad is None and not p.requires_grad for p in g["teacher"].parameters())
    assert all(p.grad is not None for p in g["student"].backbone.parameters())
    ours = {id(p) for p in g["student"].parameters()}
    assert not any(id(p) in ours for p in g["teacher"].parameters())  # a copy, not a reference


@pytest.mark.parametrize("script", ["dino.py", "hybrid_a.py"])
def test_a_the_teacher_sees_the_two_global_views(train, views_seen, script):
    g = train(script, n_local=2, max_steps=1)
    student, teacher = (torch.cat(views_seen[id(g[name].backbone)][:1]) for name in ("student", "teacher"))
    assert teacher.shape == (32, 3, 32, 32)
    assert torch.equal(teacher, torch.cat(g["views"][:2])) and torch.equal(student, teacher)
    assert [len(x) for x in views_seen[id(g["student"].backbone)]] == [32, 32]  # two global, two local


def test_b_the_teacher_sees_a_third_global_view_that_the_student_never_sees(train, views_seen):
    g = train("hybrid_b.py", n_local=2, max_steps=1)
    (third,), student = views_seen[id(g["teacher"].backbone)], views_seen[id(g["student"].backbone)]
    assert third.shape == (16, 3, 32, 32) and [tuple(x.shape[::3]) for x in student] == [(32, 32), (32, 16)]
    assert not any(torch.equal(third[i], image) for i in range(16) for image in student[0])


@pytest.mark.parametrize("script", ["dino.py", "hybrid_a.py"])
def test_pairs_of_equal_views_never_meet(train, script):
    """A prediction is judged by the other teacher view alone: ce is linear in pt, so its gradient shows the
    pairs.
    """

    def spy(g):
        zs = g["z_s"].detach().requires_grad_()
        met = torch.zeros(2, 4)
        for u in range(2):
            only = torch.zeros_like(g["p_t"])
            only[u] = g["p_t"][u]
            pairs = g["cross_entropy"](only, zs, g["tau_s"]) * g["pair_mask"]
            met[u] = torch.autograd.grad(pairs.sum(), zs)[0].abs().amax((1, 2)) > 0
        assert met.tolist() == [[0, 1, 1, 1], [1, 0, 1, 1]]
        by_hand = [
            -(g["p_t"][u] * (zs[v] / g["tau_s"]).log_softmax(-1)).sum(-1).mean()
            for u in range(2)
            for v in range(4)
            if u != v
        ]
        torch.testing.assert_close(g["ce"], torch.stack(by_hand).mean())

    train(script, spy, n_local=2)


def test_a_cc_is_over_the_two_cross_pairs(train):
    def spy(g):
        loss, ys, yt = g["cross_correlation_loss"], g["z_s_cc"], g["z_t_cc"]
        torch.testing.assert_close(
            g["cc"], (loss(ys[0], yt[1], g["lambd"]) + loss(ys[1], yt[0], g["lambd"])) / 2
        )
        torch.testing.assert_close(g["loss"], g["ce"] + 7 * g["cc"])

    train("hybrid_a.py", spy, alpha=7.0)


def test_b_losses_are_the_figures(train):
    def spy(g):
        loss, zs = g["cross_correlation_loss"], g["z_s"]
        torch.testing.assert_close(g["cc"], loss(g["z_s_cc"][0], g["z_s_cc"][1], g["lambd"]))
        by_hand = [-(g["p_t"][0] * (z / g["tau_s"]).log_softmax(-1)).sum(-1).mean() for z in zs]
        torch.testing.assert_close(g["ce"], torch.stack(by_hand).mean())
        torch.testing.assert_close(g["loss"], g["ce"] + 7 * g["cc"])

    train("hybrid_b.py", spy, alpha=7.0)


def trail(train, script, **keys):
    """Student, teacher, centre and teacher's output at every step of a run, and at its end."""
    steps = []

    def snapshot(g):
        flat = [
            torch.cat([p.detach().flatten() for p in g[name].parameters()]) for name in ("student", "teacher")
        ]
        return [*flat, g["center"].clone(), g["z_t"].mean((0, 1))]

    g = train(script, lambda g: steps.append(snapshot(g)), **keys)
    return [*steps, snapshot(g)], g


@pytest.mark.parametrize("script", ["dino.py", "hybrid_a.py", "hybrid_b.py"])
def test_teacher_and_centre_follow_their_formulas(train, script):
    steps, _ = trail(
        train, script, ema=0.5, ema_end=0.9, center_momentum=0.8, max_steps=4, base_lr=0.1, warmup_epochs=0
    )
    assert torch.equal(steps[0][0], steps[0][1])  # one start
    assert (steps[1][0] - steps[0][0]).abs().max() > 1e-3  # steps so large that another momentum shows
    for step in range(4):
        (_, teacher, center, zt), (student, after, center_after, _) = steps[step], steps[step + 1]
        m = cosine(0.5, 0.9, step, 4)
        torch.testing.assert_close(after, m * teacher + (1 - m) * student)
        torch.testing.assert_close(center_after, 0.8 * center + 0.2 * zt)
    assert steps[1][2].abs().max() > 0


def test_alpha_0_is_dino(train):
    """20 steps of the defaults: every mechanism on, locals, drop path, float32."""

    def losses(script, **keys):
        trace = []
        train(
            script, lambda g: trace.append(g["loss"].item()), max_steps=20, n_local=2, dtype="float32", **keys
        )
        return trace

    dino = losses("dino.py")
    assert len(set(dino)) > 15
    for hybrid in (losses("hybrid_a.py", alpha=0.0), losses("hybrid_a.py", alpha=0.0, head="two")):
        assert hybrid == pytest.approx(dino, abs=1e-6)
