"""Rows of studies: reading them, the best setting of a search, tables and figures."""

import json

import numpy as np

from twins.errors import UserError

TITLES = {"dino": "DINO", "barlow": "Barlow Twins", "hybrid_a": "Hybrid A", "hybrid_b": "Hybrid B"}


def read_rows(folder):
    """The rows of a study's finished runs, a list of dicts; a last line that was cut off is left out."""
    rows, file = [], folder / "rows.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def winner(rows, script):
    """The setting of a script's best trial: highest k-NN accuracy among those that did not collapse."""
    sound = [row for row in rows if row["script"] == script and not row["collapsed"]]
    if not sound:
        raise UserError(f"no finished trial of {script} without collapse: run --study=search first")
    return max(sound, key=lambda row: row["knn"])["setting"]


def report_study(folder, study):
    rows = read_rows(folder)
    return "\n".join(f"{row['script']} {row['label']} {row['seed']} {row['knn']:.3f}" for row in rows)
