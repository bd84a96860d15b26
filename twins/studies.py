"""A study's rows, one per finished run: written, read, grouped, paired."""

import json
from pathlib import Path

from twins.errors import UserError
from twins.files import read_json, read_json_lines, write_file
from twins.log import read_log
from twins.monitor import COLLAPSED_RANK, NO_INFORMATION
from twins.pictures import NAMES, printed
from twins.settings import MECHANISMS
from twins.study_pictures import METRIC

KINDS = {"script": str, "label": str, "seed": int, "id": str, "setting": dict, "budget": float}  # of each row
KINDS.update(git_commit=str, git_edited=bool, device=str, steps=int, views=int, seconds=float, curve=list)
KINDS.update(knn=float, knn_init=float, rank=float, rank_init=float, collapsed=bool, pflop=float)
REMOVALS = [f"{name} {state}" for name in (*MECHANISMS, "all") for state in ("off", "on")]
INFORMATION = "teacher_information"  # in rows of methods with a teacher; older rows lack it
FIGURES = ("expected-best.png", "cost.png", "differences.png", "removal.png", "divergence.png")
LABELS = {"search": ["trial", "by hand"], "models": ["full"], "removal": ["full", *REMOVALS]}


def read_rows(folder, study=""):
    """The rows of a folder's finished runs, [] if there are none yet. UserError for another study's."""
    file = Path(folder) / "rows.jsonl"
    rows = read_json_lines(file, is_sound)
    seen = set()
    for row in rows:
        if (cell := (row["script"], row["label"], row["seed"])) in seen:
            raise UserError(f"{file} repeats the run {' '.join(map(str, cell))}: remove one")
        seen.add(cell)
    if study:
        check_rows(rows, study, folder)
    return rows


def is_sound(row):
    """Whether a row has all of KINDS, a curve of (PFLOP, k-NN accuracy), and accuracies from 0 to 1."""
    costs, accuracies = zip(*row["curve"], strict=True)  # ValueError without pairs
    accuracies += (row["knn"], row["knn_init"], *row.get("test", {}).values())
    numbers = [*costs, *accuracies, row.get(INFORMATION, 0)]
    kinds = all(type(row[name]) is kind for name, kind in KINDS.items())
    return (
        kinds
        and all(type(number) in (int, float) for number in numbers)
        and all(0 <= accuracy <= 1 for accuracy in accuracies)
        and min(costs) >= 0
    )


def folders_of(results, study, dataset):
    """The folders of a study on a data set that hold rows: STUDY-DATASET, then STUDY-DATASET-*."""
    folders = [results / f"{study}-{dataset}", *sorted(results.glob(f"{study}-{dataset}-*"))]
    return [folder for folder in folders if (folder / "rows.jsonl").exists()]


def write_rows(folder, rows):
    """Rewrites all rows: a process killed meanwhile leaves no half-written row."""
    write_file(Path(folder) / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def check_rows(rows, study, folder):
    """Raises UserError for rows of another study, and for rows with different budgets."""
    for row in rows:
        label = row["label"].rstrip(" 0123456789")  # "trial 4" is a trial
        is_change = study == "search" and "=" in label
        has_foreign_test = "test" in row and study != "models"
        if has_foreign_test or not (is_change or label in LABELS[study]):
            raise UserError(f"{folder} holds {row['script']} {row['label']}: not a {study} study's row")
    if len(budgets := {row["budget"] for row in rows}) > 1:
        several = " and ".join(f"{budget:g}" for budget in sorted(budgets))
        raise UserError(f"{folder} holds runs of {several} PFLOP: give another --out_dir for each budget")


def refuse_foreign(folder):
    """Raises UserError for a folder without rows that holds files which a study would overwrite."""
    if not (folder / "rows.jsonl").exists():
        for name in (*FIGURES, "README.md", "attention.json"):
            if (folder / name).exists():
                raise UserError(
                    f"{folder / name} is not a study's, and would be overwritten: give another --out_dir"
                )


def unfinished(cells, study, folder, name_of):
    """The cells without a row yet. Raises UserError if a row was made with other options than its cell's."""
    refuse_foreign(Path(folder))
    rows = read_rows(folder)
    check_rows([*rows, *cells], study, folder)
    ids = {name_of(row): row["id"] for row in rows}
    for cell in cells:
        if ids.get(name_of(cell), cell["id"]) != cell["id"]:
            raise UserError(f"{folder} holds {name_of(cell)} with other options: give another --out_dir")
    return [cell for cell in cells if name_of(cell) not in ids]


def steps_of(cell, cost):
    """The optimizer steps in a cell's budget, from the cost of one. Raises UserError if there is none."""
    steps = round(cell["budget"] * 1e15 / cost["flop"])
    if not steps:
        raise UserError(f"one step takes {cost['flop'] / 1e15:.2g} PFLOP: raise --pflop={cell['budget']:g}")
    return steps


def run_results(folder, flop, diverged):
    """What a finished run adds to its row. flop: of a step. diverged: it counts as its untrained network."""
    config = read_json(folder / "config.json")
    log = read_log(folder / "log.jsonl")
    evaluations = [row for row in log if "knn" in row]
    if not evaluations:
        raise UserError("no k-NN accuracy to compare: the images have no labels")
    first, last = evaluations[0], evaluations[0 if diverged else -1]
    steps = log[-1]["step"]
    row = {name: config[name] for name in ("git_commit", "git_edited")}
    row.update(device=config["device_name"], torch=config["versions"]["torch"])
    row.update(steps=steps, pflop=steps * flop / 1e15, seconds=log[-1].get("seconds", 0.0))
    row.update(knn=last["knn"], knn_init=first["knn"], rank=last["rank"], rank_init=first["rank"])
    row["collapsed"] = diverged or rank_fell(row) or last["knn"] < first["knn"]
    if INFORMATION in log[-1]:
        row[INFORMATION] = log[-1][INFORMATION]
    row["curve"] = [[evaluation["step"] * flop / 1e15, evaluation["knn"]] for evaluation in evaluations]
    return row


def rank_fell(row):
    """Whether a run's RankMe ended below a quarter of the untrained network's."""
    return row["rank"] < COLLAPSED_RANK * row["rank_init"]


def ce_is_dead(row):
    """Whether the teacher's output is the same for all images at a run's end, where CE teaches nothing."""
    return row.get(INFORMATION, NO_INFORMATION) < NO_INFORMATION


def trial_knn(row):
    """A trial's k-NN accuracy; one that collapsed counts as its untrained network."""
    return row["knn_init"] if row["collapsed"] else row["knn"]


def sorted_trials(rows):
    """The trials that did not collapse, highest k-NN accuracy first."""
    return sorted((row for row in rows if not row["collapsed"]), key=lambda row: -row["knn"])


def best_setting(rows, script):
    """The setting of a script's best trial. Raises UserError if all collapsed or there is none."""
    best = list(finalists(rows, script, 1).values())
    if not best:
        raise UserError(f"the search has no trial of {script} without collapse: leave it out of --scripts")
    return best[0]


def finalists(rows, script, n):
    """{"trial 4": its setting, ...} of a script's n best trials: those of the next round."""
    settings = {}
    for row in sorted_trials(row for row in rows if row["script"] == script)[:n]:
        label = f"trial {row['seed']}" if row["label"] == "trial" else row["label"]
        settings[label] = row["setting"]
    return settings


def group_rows(rows):
    """{name in print: rows of this script}, in the order of NAMES, others last."""
    groups = {script: [] for script in NAMES}
    for row in rows:
        groups.setdefault(row["script"], []).append(row)
    return {printed(script): group for script, group in groups.items() if group}


def measures(row):
    """{name: value} of the measures that runs are compared by; a diverged run has no test results."""
    tests = {name.replace("knn", "k-NN"): value for name, value in row.get("test", {}).items()}
    return {METRIC: row["knn"], **tests}


def pair_with_full(rows):
    """{label: rows} of a script's removals, "full" first, and {label: differences} of labels with pairs."""
    labels = sorted({row["label"] for row in rows} - {"full"}, key=REMOVALS.index)
    seeds = {row["seed"] for row in rows if row["label"] != "full"}  # full runs of other seeds are left out
    rows = [row for row in rows if row["seed"] in seeds or not seeds]
    runs = {label: [row for row in rows if row["label"] == label] for label in ("full", *labels)}
    differences = {label: paired(runs[label], runs["full"], METRIC) for label in labels}
    return runs, {label: values for label, values in differences.items() if values}


def learned(rows):
    """Mean k-NN accuracy of runs minus that of random weights; 0 for no runs."""
    return sum(row["knn"] - row["knn_init"] for row in rows) / max(len(rows), 1)


def paired(rows, others, name):
    """Differences rows - others in a measure, for the seeds that both have, in order of seed."""
    first = {row["seed"]: measures(row)[name] for row in rows if name in measures(row)}
    second = {row["seed"]: measures(row)[name] for row in others if name in measures(row)}
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
