"""Several processes give the result of one, through the real command, with different images on each; and they
end together.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, SCRIPTS, copy_of_the_code, launch, tiny
from twins import attention, datasets, output, processes
from twins import run as run_module
from twins.checkpoints import read_checkpoint

# AdamW (eps 1e-8) makes steps of rounding, too: of a gradient of 1e-13 one of 1e-5 learning rates, with this
# one 1e-11. Where there
# is a gradient a step is 1e-6, whatever its size, so that a wrong one shows.
KEYS = dict(dtype="float64", max_steps=5, base_lr=2e-5, warmup_epochs=0.0, drop_path=0.3, log_every=1)
AHEAD_OF_BATCHNORM = (
    "head.mlp.0.bias",
    "head.mlp.3.bias",
)  # with head_bn: their gradient is nothing but rounding


def words_of(script, folder=ROOT, **keys):
    keys = KEYS | ({"freeze_last_layer_epochs": 0.0, "ema": 0.9} if script != "barlow.py" else {}) | keys
    return [str(folder / script), *tiny(script, **keys)]


def start(processes, script, **keys):
    """The command of a user."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [sys.executable, *torchrun, *words_of(script, **keys)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(processes, script, **keys):
    """The processes that torchrun would start, 0: as without torchrun."""
    return launch(words_of(script, **keys), keys["out_dir"].parent, processes)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Of the forks; they take longer than the steps. The images are made before, once."""
    datasets.shapes("train")
    monkeypatch.setattr(run_module, "crops_picture", lambda *args: b"")
    monkeypatch.setattr(run_module, "curves_picture", lambda *args: b"")
    monkeypatch.setattr(output, "SECONDS_FOR_RANK_0", 1)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """one(script): the checkpoint and the rows of one process."""

    @functools.cache
    def result(script):
        out = tmp_path_factory.mktemp("one") / "run"
        done = run(0, script, out_dir=out)
        assert done.returncode == 0, done.stderr
        return results(out)

    return result


def results(out):
    return read_checkpoint(out / "ckpt.pt"), [
        json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()
    ]


def difference(a, b):
    """The largest between two checkpoints' tensors and two logs' numbers."""
    (saved, rows), (others, other_rows) = a, b
    worst = 0.0
    for name in {"student", "teacher", "center", "network"} & saved.keys():
        mine, theirs = ({name: s[name]} if name == "center" else s[name] for s in (saved, others))
        pairs = [(v, theirs[k]) for k, v in mine.items() if k not in AHEAD_OF_BATCHNORM]
        worst = max(worst, *((x - y).abs().max().item() for x, y in pairs))
    for row, other in zip(rows, other_rows, strict=True):
        assert row.keys() == other.keys()
        worst = max(worst, *(abs(row[k] - other[k]) for k in row if k not in ("images_per_s", "seconds")))
    return worst


@pytest.mark.parametrize("script, processes", [*((script, 2) for script in SCRIPTS), ("hybrid_b.py", 4)])
def test_processes_together_are_one(script, processes, one, tmp_path):
    """Four processes of each script take half a minute more; that has been seen to hold, too."""
    done = run(processes, script, out_dir=tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert difference(one(script), results(tmp_path / "run")) < 1e-10
    assert done.stdout.count("minutes of training") == 1  # one process speaks


MUTATIONS = {
    "an all_reduce without a gradient": (
        "twins/processes.py",
        "return MeanOverProcesses.apply(gradient)",
        "return gradient / world()",
    ),
    "batch statistics of a process": ("hybrid_a.py", "z - global_mean(z.mean(0))", "z - z.mean(0)"),
    "a centre of a process": (
        "hybrid_a.py",
        "center.lerp_(global_mean(z_t.mean((0, 1)))",
        "center.lerp_(z_t.mean((0, 1))",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_can_fail(mutation, one, tmp_path):
    file, old, new = MUTATIONS[mutation]
    copy_of_the_code(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    done = run(2, "hybrid_a.py", folder=tmp_path, out_dir=tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert difference(one("hybrid_a.py"), results(tmp_path / "run")) > 1e-7


def test_a_nan_of_one_process_stops_all_with_one_message(tmp_path):
    copy_of_the_code(tmp_path)
    script = tmp_path / "dino.py"
    check = "        run.check(step, lr"
    bad = "        if step == 3 and os.environ['RANK'] == '1':\n"
    bad += f"            loss = loss * float('nan')\n{check}"
    script.write_text("import os\n" + script.read_text().replace(check, bad, 1))
    done = run(2, "dino.py", folder=tmp_path, out_dir=tmp_path / "run", save_every=1)
    assert done.returncode != 0
    assert done.stderr.count("error: loss is nan at step 3") == 1 and f'File "{script}"' not in done.stderr
    saved = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert saved["step"] == 3 and all(v.isfinite().all() for v in saved["student"].values())


def wait_for_a_row(process, out):
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_signal_saves_once_and_any_number_of_processes_go_on(tmp_path, one):
    out = tmp_path / "run"
    process = start(2, "hybrid_b.py", out_dir=out, max_steps=100_000)
    wait_for_a_row(process, out)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert said.count("and saved; continue with") == 1
    step = read_checkpoint(out / "ckpt.pt")["step"]
    assert f"stopped at step {step} and saved; continue with: torchrun --nproc_per_node=2 " in said
    for count in (4, 1):
        more = run(count, "hybrid_b.py", out_dir=out, max_steps=step + 2, resume=True)
        assert more.returncode == 0 and f"at step {step}" in more.stdout, more.stderr
        step += 2
        assert read_checkpoint(out / "ckpt.pt")["step"] == step


def test_a_killed_process_ends_the_others_with_a_sentence(tmp_path):
    out = tmp_path / "run"
    process = start(2, "barlow.py", out_dir=out, max_steps=100_000, save_every=2)
    wait_for_a_row(process, out)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "another process of this run ended" in err, err
    assert read_checkpoint(out / "ckpt.pt")["step"] >= 2


def test_what_cannot_be_shared_is_refused(tmp_path):
    done = run(2, "dino.py", out_dir=tmp_path / "run", batch_size=15)
    errors = [
        line for line in done.stderr.splitlines() if line.removeprefix("[rank0]: ").startswith("error: ")
    ]
    assert (
        done.returncode != 0
        and len(errors) == 1
        and "batch_size=15 is over all processes: give a multiple of 2" in errors[0]
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["eval_linear", "attn_viz", "seg_transfer"])
def test_evaluation_shares_the_images(script, tmp_path, monkeypatch):
    """Each of three processes looks at its part, and what is gathered is what one process finds."""
    import eval_linear
    import seg_transfer
    from vit import ViT

    vit, images = ViT(8, 4, 12, 1, 2).eval(), torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)
    cpu, off = torch.device("cpu"), torch.autocast("cpu", enabled=False)
    look = {
        "eval_linear": lambda: eval_linear.extract(vit, images, cpu, off, "")["linear_avg"],
        "attn_viz": lambda: attention.attend(vit, images, cpu, off)[0],
        "seg_transfer": lambda: seg_transfer.cached_tokens(vit, images, cpu, off, ""),
    }[script]
    module = attention if script == "attn_viz" else processes
    whole, parts = look(), []
    monkeypatch.setattr(processes, "world", lambda: 3)
    monkeypatch.setattr(module, "gather", lambda x: x)
    for i in range(3):
        monkeypatch.setattr(processes, "rank", lambda i=i: i)
        parts.append(look())
    assert [len(part) for part in parts] == [4, 3, 3]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_evaluation_command_gives_one_answer(tmp_path):
    words = [str(ROOT / "attn_viz.py"), "--ckpt=random", "--dataset=shapes", "--n_images=50", "--rows=1"]
    answers = []
    for count in (0, 2):
        done = launch([*words, "--device=cpu", f"--out_dir={tmp_path}"], tmp_path, count)
        assert done.returncode == 0, done.stderr
        said = [
            line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")
        ]  # as torch 2.10 says
        answers.append((said, json.loads((tmp_path / "attention.json").read_text())["runs"]))
        (tmp_path / "attention.json").unlink()
    assert answers[0][0] == answers[1][0] and answers[0][1][0]["distance_pixels"] == pytest.approx(
        answers[1][1][0]["distance_pixels"]
    )


def test_the_slurm_job_resumes_when_it_is_queued_again(tmp_path):
    """docs/slurm.sh, with what Slurm would give it: two processes on one node. torchrun is real at last."""

    def stand_in(name, command):
        (tmp_path / name).write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / name).chmod(0o755)

    def job(steps):
        words = words_of("barlow.py", max_steps=steps)
        command = ["bash", str(ROOT / "docs/slurm.sh"), words[0], f"--out_dir={out}", *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    slurm = {"SLURM_NNODES": "1", "SLURM_GPUS_PER_NODE": "2", "PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    out = tmp_path / "a run"
    stand_in("srun", 'exec "$@"')
    stand_in("scontrol", "echo 127.0.0.1")
    stand_in("torchrun", 'echo "$@"')
    first = job(1)
    assert f"--nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{port}" in first
    assert "--max_steps=1" in first and "--resume" not in first
    run(0, "barlow.py", max_steps=1, out_dir=out)
    stand_in("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    assert "ckpt.pt at step 1" in job(2)
    assert read_checkpoint(out / "ckpt.pt")["step"] == 2
    stand_in("torchrun", 'echo "$@"')
    (out / "ckpt.pt").rename(out / "ckpt-previous.pt")  # killed between the two renames of a save
    assert "--resume=True" in job(2)
    environment["HOME"], out = str(tmp_path), "~/a run"
    assert "--resume=True" in job(2)


@pytest.mark.parametrize("fails", [False, True])
def test_processes_part_at_the_end_but_not_after_an_error(tmp_path, fails):
    """After an error the others may wait for this one, and it must not wait for them."""
    program = f"""
import atexit, sys
import torch, torch.distributed as dist
from twins import output, processes

atexit.register(lambda: print("still joined:", dist.is_initialized()))  # runs after the group was left
sys.excepthook = output.excepthook
processes.setup("cpu", "float32", 0)
for _ in range(300):  # gloo's threads are busy at the end
    dist.all_reduce(torch.zeros(10), async_op=True)
1 / {0 if fails else 1}
"""
    alone = {
        "TORCHELASTIC_RUN_ID": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | alone,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == fails and done.stdout.count("still joined: False") == (not fails), done.stderr
    assert "terminate called" not in done.stderr and done.stderr.count("ZeroDivisionError") == fails
