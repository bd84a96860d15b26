"""Prints a Markdown table of finished runs, a row each: python results/table.py results/shapes/* """

import json
import sys
from itertools import pairwise
from pathlib import Path

COLUMNS = ["knn_init", "knn", "ce", "cc", "teacher_entropy", "kl", "feature_std", "rank", "c_diag", "c_off"]

print(f"| run | steps | {' | '.join(COLUMNS)} | minutes | images/s | device, seed, commit |\n|---|{'---:|' * (len(COLUMNS) + 3)}---|")
for folder in map(Path, sys.argv[1:]):
    config = json.loads((folder / "config.json").read_text())
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = rows[-1]
    seconds = sum((b["step"] - a["step"]) * config["batch_size"] / b["images_per_s"] for a, b in pairwise(rows))
    cells = [f"{last[c]:.3f}" if c in last else "" for c in COLUMNS]
    cells += [f"{seconds / 60:.1f}", f"{last['step'] * config['batch_size'] / seconds:.0f}"]
    about = f"{config['device_name']}, {config['seed']}, {config['git_commit'][:7]}"
    print(f"| {config['script']} | {last['step']} | {' | '.join(cells)} | {about} |")
