"""Markdown tables of finished runs, mean ± standard deviation over the seeds of a script: python results/table.py results/shapes/*"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

METERS = ["knn_init", "knn", "ce", "cc", "teacher_entropy", "kl", "feature_std", "rank", "c_diag", "c_off"]
PROBES = {"linear": "linear", "linear4": "linear4", "linear_avg": "linear_avg", "knn": "k-NN"}


def read(folder, name):
    return json.loads((folder / name).read_text()) if (folder / name).exists() else {}


runs = {}
for folder in map(Path, sys.argv[1:]):
    config = read(folder, "config.json")
    run = runs.setdefault(config.get("script", folder.name), {"folders": 0})
    run["folders"] += 1

    def add(key, value, run=run):
        run.setdefault(key, []).append(value)

    log = folder / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if config and rows:
        seconds = sum((b["step"] - a["step"]) * config["batch_size"] / b["images_per_s"] for a, b in pairwise(rows))
        for key in METERS:
            if key in rows[-1]:
                add(key, rows[-1][key])
        add("steps", rows[-1]["step"]), add("minutes", seconds / 60), add("commit", config["git_commit"][:7])
    for key, result in read(folder, "eval_linear.json").get("results", {}).items():
        add(f"test {key}", 100 * result["top1"])
    segmentation = read(folder, "seg_transfer.json")
    if segmentation:
        add("mIoU", 100 * segmentation["results"]["this checkpoint"]["miou"])
        add("J60", 100 * segmentation["jaccard_60"]["mean_map"])


def cell(values, digits):
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


trained = {name: run for name, run in runs.items() if "steps" in run}
print(f"| run | steps | {' | '.join(METERS)} | minutes | runs, commit |\n|---|{'---:|' * (len(METERS) + 2)}---|")
for name, run in trained.items():
    cells = [cell(run["steps"][:1], 0), *(cell(run.get(key), 3) for key in METERS), cell(run["minutes"], 1)]
    print(f"| {name} | {' | '.join(cells)} | {run['folders']}, {' '.join(sorted(set(run['commit'])))} |")

keys = [f"test {key}" for key in PROBES] + ["mIoU", "J60"]
keys = [key for key in keys if any(key in run for run in runs.values())]
if keys:
    titles = [PROBES.get(key.removeprefix("test "), {"mIoU": "mIoU, linear head", "J60": "Jaccard of attention"}.get(key)) for key in keys]
    print(f"\n| test set, % | {' | '.join(titles)} |\n|---|{'---:|' * len(keys)}")
    for name, run in runs.items():
        print(f"| {name} | {' | '.join(cell(run.get(key), 1) for key in keys)} |")
