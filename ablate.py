"""Studies: which settings learn, which method learns best, which mechanisms can go. Runs the real scripts.

    python ablate.py --study=search --dataset=stl10 --trials=16   random settings, equally many per method
    python ablate.py --study=models --dataset=stl10 --seeds=8     each method's best on fresh seeds, test set
    python ablate.py --study=removal --dataset=stl10 --seeds=8    each mechanism off alone, and all of them
    python ablate.py --study=... --dry_run=True                   what it would run, and how long that takes
    python ablate.py --study=... --report=True                    remake tables and figures, also README's

Rows go to results/<study>-<dataset>, which holds recorded ones for CIFAR: give another --out_dir there. All
runs of a study use the same number of floating-point operations: steps = pflop / count per step. The second
round of a search (successive halving) trains its best settings, and one chosen by hand, for longer. A further
round tries changes to the best setting, one at a time:

    python ablate.py --study=search --search_dir=FIRST --trials=2 --pflop=0.04 --out_dir=SECOND
    python ablate.py --study=search --search_dir=SECOND --trials=1 --changes="wd=0;n_local=0" --out_dir=THIRD
    python ablate.py --study=models --search_dir=THIRD

Settings are selected by k-NN accuracy on held-out training images, among runs that did not collapse: RankMe
below a quarter of the untrained network's, k-NN accuracy below it, or a loss that is not finite. Each trial
or seed runs for all methods before the next. Finished runs are skipped; Ctrl-C saves all, to be resumed.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from twins.answer import fill_pages
from twins.checkpoints import holds_run
from twins.errors import ROOT, UserError
from twins.files import only_writer, read_json, write_file
from twins.jobs import SLOTS, check_exit, last_line, run_jobs, start
from twins.keys import parse
from twins.reports import write_report
from twins.settings import MECHANISMS, draw_setting, read_script, refuse_options, removals, with_changes
from twins.studies import best_setting, finalists, read_rows, run_results, steps_of, unfinished, write_rows

study = "search"  # which question [search|models|removal]
scripts = "dino,barlow,hybrid_a,hybrid_b"  # which training scripts
dataset = "shapes"  # any data set of the training scripts, with labels
data_dir = "data"  # where its files are
masks_dir = ""  # for models: images and masks for seg_transfer.py; empty: it runs on shapes only
preset = "small"  # of the scripts; on shapes their shapes preset
trials = 16  # settings of a search: random ones, or the best of --search_dir [1..1000]
mechanisms = ""  # to remove, such as EMA,multi-crop; "all": all at once; empty: each one, and all at once
seeds = 8  # seeds per setting in models and removal; fewer cannot give p < 0.05 after Holm [1..1000]
pflop = 0.0  # floating-point operations per run, in 1e15; 0: the default in PFLOP [0..]
changes = ""  # for a further round: changes to the best setting, such as wd=0.1;n_local=0 ema_end=0.97
search_dir = ""  # the search whose best settings are used; empty, in models and removal: results/search-...
out_dir = ""  # rows, tables and figures; empty: results/<study>-<dataset>
runs_dir = ""  # the runs and their checkpoints; empty: out/<name of out_dir>
jobs = 0  # runs at once; 0: one per GPU, or one per CPU core [0..1000]
device = "auto"  # of the runs
space_seed = 0  # seed of the search's random settings [0..]
dry_run = False  # only print what would run, and for how long
report = False  # only remake the tables and figures

SPACE = {  # of a search. A list: one of its values; a pair: log-uniform between the two
    "base_lr": (5e-4, 8e-3),
    "wd": [0.0, 0.04, 0.1],
    "grad_clip": [0.0, 3.0],
    "batch_size": [64, 128, 256],
    "n_local": [0, 2, 4],
    "warmup_epochs": [0.05, 0.2],
    "ema": [0.8, 0.9, 0.95, 0.97, 0.99, 0.996],
    "tau_t": [0.03, 0.04, 0.055, 0.07, 0.09],
    "tau_t_warmup_epochs": [0.0],
    "center_momentum": [0.9, 0.99],
    "out_dim": [128, 256, 512, 1024],
    "hidden_dim": [512],
    "bottleneck_dim": [64, 128, 256],
    "head_bn": [False, True],
    "norm_last_layer": [False, True],
    "freeze_last_layer_epochs": [0.0, 0.1, 0.3],
    "alpha": (1.0, 200.0),
    "lambd": (1e-3, 5e-2),
    "head": ["shared", "two"],
    "proj_dim": [256, 512, 1024],
    "cc_local": [False, True],
}
TEACHER = {"batch_size": 128, "base_lr": 2e-3, "ema": 0.97, "tau_t": 0.055, "warmup_epochs": 0.2}
TEACHER.update(head_bn=True, norm_last_layer=False, freeze_last_layer_epochs=0.1)
BY_HAND = {  # one setting per method, from before the search, that takes part in its second round
    "dino": {**TEACHER, "n_local": 4},
    "barlow": {"batch_size": 128, "base_lr": 4e-3, "warmup_epochs": 0.2, "n_local": 0, "proj_dim": 1024},
    "hybrid_a": {**TEACHER, "n_local": 4, "alpha": 20.0, "head": "shared"},
    "hybrid_b": {**TEACHER, "n_local": 2, "alpha": 50.0, "head": "two", "proj_dim": 512},
}
PFLOP = {"search": 0.016, "models": 0.2, "removal": 0.06}
EVALUATIONS = {"search": 1, "models": 8, "removal": 2}  # per run, besides that of the untrained network
LATER_ROUND_SEED, FRESH_SEED = 500, 1000  # of later search rounds; the first of models and removal


def make_settings(script, seed, searched):
    """{label: setting} of a script's runs with this seed. searched: the rows of the search, if there are."""
    options = read_script(ROOT / f"{script}.py", (dataset, preset))
    if study == "search" and not search_dir:
        return {"trial": draw_setting(SPACE, space_seed, seed, options)}
    if study == "search":
        changed = with_changes(best_setting(searched, script), changes, options)
        return {**finalists(searched, script, trials), **(changed or {"by hand": BY_HAND.get(script, {})})}
    full = best_setting(searched, script) if searched else {}
    if study == "removal" and "ema" in options:
        return removals(MECHANISMS, full, options, mechanisms)
    return {"full": full}


def make_cells():
    """The runs of the study in order, each {script, label, seed, setting, budget, id}."""
    if study == "search":
        folder, numbers = search_dir, [LATER_ROUND_SEED] if search_dir else range(trials)
    else:
        folder, numbers = search_dir or f"results/search-{dataset}", range(FRESH_SEED, FRESH_SEED + seeds)
    searched = read_rows(folder, "search") if folder else []
    if folder and not searched:
        if search_dir:
            raise UserError(f"--search_dir={search_dir} holds no rows of a search")
        print(f"no search in {folder}: the settings are those of the presets")
    folders = [data_dir] if dataset == "folder" else []
    folders += [masks_dir] if masks_dir else []
    cells = []
    for seed, script in product(numbers, dict.fromkeys(scripts.split(","))):
        for label, setting in make_settings(script, seed, searched).items():
            cell = {"script": script, "label": label, "seed": seed, "setting": setting, "budget": pflop}
            identity = json.dumps([cell, dataset, *folders, preset], sort_keys=True)
            cells.append({**cell, "id": hashlib.sha256(identity.encode()).hexdigest()[:8]})
    return cells


def name_of(cell):
    return f"{cell['script']}-{cell['label']}-{cell['seed']}".replace(" ", "_")


def run_folder(cell):
    return Path(runs_dir) / f"{name_of(cell)}-{cell['id']}"


def words_of(cell, **more):
    """The options of a cell's run as command-line arguments."""
    options = {"dataset": dataset, "data_dir": data_dir, "preset": preset, "seed": cell["seed"]}
    options.update({"device": device, "knn_bank": 5000, "knn_queries": 5000, **cell["setting"], **more})
    return [f"--{name}={value}" for name, value in options.items()]


def cost_command(cell, file):
    """Measures five steps of a run and writes their cost to a file; base_lr=0, so that none diverges."""
    few = {"knn_bank": 50, "knn_queries": 20, "max_steps": 10**6, "eval_every": 10**6, "base_lr": 0.0}
    words = [ROOT / f"{cell['script']}.py", *words_of(cell, **few)]
    return [ROOT / "twins" / "stopwatch.py", file, 2, 3, "", *words]


def run_cell(cell):
    """Yields a cell's commands, receives their exit codes, writes its row. UserError if one fails."""
    out = run_folder(cell)
    script = ROOT / f"{cell['script']}.py"
    cost_file, log = Path(f"{out}.json"), Path(f"{out}.txt")
    if not cost_file.exists():
        check_exit((yield cost_command(cell, cost_file)), log)
    cost = read_json(cost_file)
    steps = steps_of(cell, cost)
    every = {"eval_every": EVALUATIONS[study], "save_every": 8, "log_every": 50}
    words = words_of(cell, max_steps=steps, **{name: -(-steps // times) for name, times in every.items()})
    code = yield [script, *(["--resume=True"] if holds_run(out) else words), f"--out_dir={out}"]
    diverged = bool(code == 1 and re.search(r"is (nan|-?inf) at step|not finite", last_line(log)))
    if not diverged:
        check_exit(code, log)
    command = " ".join(["python", script.name, *words])
    row = {**cell, "command": command, "views": cost["n_views"], **run_results(out, cost["flop"], diverged)}
    if study == "models" and not diverged:
        common = [f"--ckpt={out / 'ckpt.pt'}", f"--device={device}", f"--out_dir={out}"]
        check_exit((yield [ROOT / "eval_linear.py", *common]), log)
        protocols = read_json(out / "eval_linear.json")["results"]
        row["test"] = {f"test {name}": result["top1"] for name, result in protocols.items()}
        masks = ["--dataset=folder", f"--data_dir={masks_dir}", "--image_size=64"] if masks_dir else []
        if masks or dataset == "shapes":
            check_exit((yield [ROOT / "seg_transfer.py", *common, *masks]), log)
            row["test"]["mIoU"] = read_json(out / "seg_transfer.json")["results"]["this checkpoint"]["miou"]
    write_rows(out_dir, [*read_rows(out_dir), row])
    accuracy = f"k-NN {row['knn']:.3f} (untrained {row['knn_init']:.3f})"
    print(f"{name_of(cell)}: {accuracy}{', collapsed' if row['collapsed'] else ''}", flush=True)


def print_plan(cells, slots):
    """Prints what would run and how long that takes, from five measured steps of each script."""
    hours = {}
    for cell in cells:
        print(f"{name_of(cell)}: python {cell['script']}.py {' '.join(words_of(cell))}")
        if cell["script"] not in hours:
            with tempfile.TemporaryDirectory() as folder:
                file, log = Path(folder) / "cost.json", Path(folder) / "log.txt"
                check_exit(start(cost_command(cell, file), log, 0, slots).wait(), log)
                cost = read_json(file)
            hours[cell["script"]] = steps_of(cell, cost) * cost["seconds"] / 3600
    total = sum(hours[cell["script"]] for cell in cells) / slots
    print(f"{len(cells)} runs of {pflop:g} PFLOP, {slots} at once: {total:.2g} hours without evaluations")


def compare_attention():
    """Runs attn_viz.py on the models study's runs that have a checkpoint, one group per script."""
    groups = {}
    for row in read_rows(out_dir):
        if (path := run_folder(row) / "ckpt.pt").exists():
            groups.setdefault(row["script"], []).append(str(path))
    if not groups:
        print(f"attention maps are not compared: {runs_dir} holds no checkpoint")
        return
    text = ",".join(f"{script}={':'.join(paths)}" for script, paths in groups.items())
    words = [f"--ckpt={text}", f"--out_dir={runs_dir}", f"--device={device}"]
    if subprocess.run([sys.executable, ROOT / "attn_viz.py", *words]).returncode:
        raise UserError("attn_viz.py failed; the rows are complete")
    write_file(out_dir / "attention.json", (runs_dir / "attention.json").read_bytes())


if __name__ == "__main__":
    _, _, given = parse(globals())
    globals().update(given)
    refuse_options(study, given)
    out_dir = Path(out_dir or f"results/{study}-{dataset}")
    runs_dir = Path(runs_dir or f"out/{out_dir.name}")
    preset = "" if dataset == "shapes" else preset
    pflop = pflop or PFLOP[study]
    if report:
        write_report(out_dir, study)
        if out_dir.resolve().parent == ROOT / "results":
            fill_pages()
        sys.exit()
    cells = make_cells()
    slots = jobs or SLOTS
    with only_writer(out_dir):
        todo = unfinished(cells, study, out_dir, name_of)
        print(f"{out_dir}: {len(cells) - len(todo)} of {len(cells)} runs are finished", flush=True)
        if dry_run:
            print_plan(todo, slots)
            sys.exit()
        work = [(name_of(cell), Path(f"{run_folder(cell)}.txt"), run_cell(cell)) for cell in todo]
        failures, stopped = run_jobs(work, slots)
        if read_rows(out_dir):
            write_report(out_dir, study)
    if stopped:
        sys.exit("stopped; the same command resumes it")
    if failures:
        sys.exit("failed:\n" + "\n".join(f"{name}: {why}" for name, why in failures.items()))
    if study == "models" and (todo or not (out_dir / "attention.json").exists()):
        compare_attention()
        write_report(out_dir, study)
