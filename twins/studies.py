"""A study's rows, one per finished run, and the tables and figures made from them alone."""

import contextlib
import json
from itertools import combinations
from pathlib import Path

import numpy as np

from twins.decoding import locked
from twins.errors import UserError
from twins.files import read_json, read_log, write_file
from twins.statistics import bootstrap_interval, expected_best, holm, sign_flip_p, verdict, wilson_interval
from twins.study_pictures import METRIC, best_figure, cost_figure, differences_figure

PROTOCOL = {
    "search": "Random settings from the space in ablate.py, the same number for every method. For expected "
    "and best k-NN a trial that collapsed counts as its untrained network.",
    "models": "The best setting of each method's search on fresh seeds. Differences are paired by seed.",
    "removal": "One mechanism changed at a time, paired with the full run of its seed. The verdict, stated "
    "before the runs: *can go* if the interval of the difference lies above -2 points, *cannot go* if it "
    "lies below, else *unclear*.",
}


def read_rows(folder):
    """The rows of a study's finished runs, a list of dicts; [] if there are none yet."""
    file = Path(folder) / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_rows(folder, rows):
    """Writes all rows anew, so that no kill leaves half a row."""
    write_file(Path(folder) / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def only_writer(folder):
    """Keeps other studies out of a results folder, which it makes."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder, wait=False):
            yield
    except BlockingIOError:
        raise UserError(f"another study is writing into {folder}: give another --out_dir") from None


def unfinished(cells, folder, name_of):
    """The cells without a row yet. Raises UserError if a row was made with other options than its cell's."""
    ids = {name_of(row): row["id"] for row in read_rows(folder)}
    for cell in cells:
        if ids.get(name_of(cell), cell["id"]) != cell["id"]:
            raise UserError(f"{folder} holds {name_of(cell)} with other options: give another --out_dir")
    return [cell for cell in cells if name_of(cell) not in ids]


def run_results(folder, flop, diverged):
    """What the row of a finished run says of it: provenance, cost, k-NN, RankMe, collapsed, curve.

    flop: of a step. diverged: its loss was not finite; it then counts as its untrained network.
    """
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
    row["curve"] = [[evaluation["step"] * flop / 1e15, evaluation["knn"]] for evaluation in evaluations]
    return row


def rank_fell(row):
    """Whether a run's RankMe ended below a quarter of the untrained network's."""
    return row["rank"] < row["rank_init"] / 4


def sorted_trials(rows):
    """The trials without collapse, that of the highest k-NN accuracy first."""
    return sorted((row for row in rows if not row["collapsed"]), key=lambda row: -row["knn"])


def best_trial(rows):
    """The first of sorted_trials(), None if there is none."""
    return next(iter(sorted_trials(rows)), None)


def best_setting(rows, script):
    """The setting of a script's best_trial(). Raises UserError if there is none."""
    best = best_trial([row for row in rows if row["script"] == script])
    if best is None:
        raise UserError(f"the search has no trial of {script} without collapse: leave it out of --scripts")
    return best["setting"]


def write_report(folder, study, titles):
    """Writes README.md and figures. titles: {script: name in print}, in the order of the tables."""
    rows = read_rows(folder)
    if not rows:
        raise UserError(f"{folder} holds no finished run: there is nothing to report")
    for name, content in report_study(rows, study, titles).items():
        write_file(Path(folder) / name, content)
    print(f"wrote {folder}/README.md", flush=True)


def group_rows(rows, titles):
    """{name in print: its rows}, of the scripts in titles {script: name in print} that have any."""
    groups = {title: [row for row in rows if row["script"] == script] for script, title in titles.items()}
    return {title: group for title, group in groups.items() if group}


def report_study(rows, study, titles):
    """{file name: content} of the README.md and figures of a study's rows."""
    groups = group_rows(rows, titles)
    reports = {"search": report_search, "models": report_models, "removal": report_removal}
    tables, figures = reports[study](groups)
    text = [f"# {study.capitalize()}: {len(rows)} runs", PROTOCOL[study], provenance(rows)]
    if study != "search" and not any(row["setting"] for row in rows if row["label"] == "full"):
        text.append("There was no search: the settings are those of the presets.")
    text += [part for part in tables if part]
    text += [f"![{name}]({name})" for name in figures]
    text.append("Each run's command, commit, device and curve: `rows.jsonl`.")
    return {"README.md": "\n\n".join(text) + "\n", **figures}


def provenance(rows):
    """The sentences on commits, devices, cost, and the rule of collapse."""
    commits = {row["git_commit"][:8] + " with edits" * row["git_edited"] for row in rows}
    several = f"rows of {len(commits)} commits, whose code may differ: " if len(commits) > 1 else "commit "
    devices = ", ".join(sorted({row["device"] for row in rows}))
    budget, hours = rows[0]["budget"], sum(row["seconds"] for row in rows) / 3600
    cost = f"{budget:g} PFLOP a run, {hours:.2g} hours of training in all, on {devices}"
    rule = (
        "Collapsed: RankMe below a quarter of the untrained network's, k-NN accuracy below it, or a loss "
        "that is not finite. Held-out k-NN: on training images that no run trained on."
    )
    text = f"{several}{', '.join(sorted(commits))}; {cost}. {rule}"
    return text[0].upper() + text[1:]


def table(columns, rows):
    """A markdown table, first column left, others right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def percent(values):
    """Mean and standard deviation of shares, in per cent; a dash for none."""
    if not values:
        return "-"
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def points(differences):
    """Mean and 95 % interval of differences of shares, in points: ('+1.0', '+0.5 to +1.5')."""
    low, high = bootstrap_interval(differences)
    return f"{100 * np.mean(differences):+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"


def collapsed_share(rows):
    count = sum(row["collapsed"] for row in rows)
    low, high = wilson_interval(count, len(rows))
    return f"{count} of {len(rows)} ({100 * low:.0f} to {100 * high:.0f} %)"


def report_search(groups):
    lines, settings, curves = [], [], {}
    for title, rows in groups.items():
        values = [row["knn_init"] if row["collapsed"] else row["knn"] for row in rows]
        curves[title] = expected_best(values)
        sound, k = [row for row in rows if not row["collapsed"]], len(values)
        shown = [f"{100 * curves[title][n - 1]:.1f}" if n <= k else "" for n in (1, 4, 8, 16)]
        top = f"{100 * max(values):.1f}" if sound else "all collapsed"
        accuracies = [percent([row[name] for row in rows]) for name in ("knn_init", "knn")]
        lines.append([title, k, collapsed_share(rows), *accuracies, *shown, top])
        if sound:
            best = best_setting(rows, rows[0]["script"])
            settings.append(f"- {title}: `{' '.join(f'--{name}={value}' for name, value in best.items())}`")
    columns = ["method", "trials", "collapsed (95 %)", "untrained", "k-NN of trials"]
    columns += [f"expected best of {n}" for n in (1, 4, 8, 16)] + ["best"]
    best_settings = ["Best settings:", "\n".join(settings)] if settings else []
    return [table(columns, lines), *best_settings], {"expected-best.png": best_figure(curves)}


def measures(row):
    """{name: value} of what a run is compared by; a run that diverged has no test results."""
    tests = {name.replace("knn", "k-NN"): value for name, value in row.get("test", {}).items()}
    return {METRIC: row["knn"], **tests}


def spreads(rows, names):
    """percent() of each measure, over the rows that have it."""
    return [percent([measures(row)[name] for row in rows if name in measures(row)]) for name in names]


def report_models(groups):
    names = list(dict.fromkeys(name for rows in groups.values() for row in rows for name in measures(row)))
    lines = []
    for title, rows in groups.items():
        columns = ("rank", "rank_init", "pflop", "seconds")
        mean = {name: np.mean([row[name] for row in rows]) for name in columns}
        cost = [f"{mean['pflop']:.3g}", rows[0]["steps"], rows[0]["views"], f"{mean['seconds'] / 60:.1f}"]
        ranks = f"{mean['rank']:.1f} ({mean['rank_init']:.1f})"
        lines.append([title, len(rows), *cost, collapsed_share(rows), ranks, *spreads(rows, names)])
    columns = ["method", "seeds", "PFLOP", "steps", "views", "minutes"]
    columns += ["collapsed (95 %)", "RankMe (untrained)"]
    tables, panels = [table([*columns, *names], lines)], {}
    for name in names:
        panels[name] = {}
        for first, second in combinations(groups, 2):
            found = paired(groups[second], groups[first], name)
            if found:
                panels[name][f"{second} - {first}"] = found
        tables.append(differences_table(name, panels[name]))
    panels = {name: panel for name, panel in panels.items() if panel}
    figures = {"cost.png": cost_figure(groups)}
    if panels:
        figures["differences.png"] = differences_figure(panels)
    return tables, figures


def pair_with_full(rows):
    """{label: rows} of a script's removals, "full" first, and {label: differences} of those with pairs."""
    labels = dict.fromkeys(row["label"] for row in rows if row["label"] != "full")
    runs = {label: [row for row in rows if row["label"] == label] for label in ("full", *labels)}
    differences = {label: paired(runs[label], runs["full"], METRIC) for label in labels}
    return runs, {label: found for label, found in differences.items() if found}


def report_removal(groups):
    tables, panels = [], {}
    for title, rows in groups.items():
        runs, panels[title] = pair_with_full(rows)
        tables.append(f"{title}: in full {percent([row['knn'] for row in runs['full']])} {METRIC}.")
        tables.append(differences_table(title, panels[title], runs))
    panels = {title: panel for title, panel in panels.items() if panel}
    return tables, {"removal.png": differences_figure(panels, -0.02)} if panels else {}


def paired(rows, others, name):
    """Differences rows - others of a measure, for the seeds that both have, in the order of seeds."""
    first = {row["seed"]: measures(row)[name] for row in rows if name in measures(row)}
    second = {row["seed"]: measures(row)[name] for row in others if name in measures(row)}
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def differences_table(name, panel, runs=None):
    """Mean, interval and p of paired differences; given each label's runs, collapse and verdict too."""
    if not panel:
        return ""
    ps, lines = [sign_flip_p(found) for found in panel.values()], []
    for (label, found), p, corrected in zip(panel.items(), ps, holm(ps), strict=True):
        line = [label, len(found), *points(found), f"{p:.3f}", f"{corrected:.3f}"]
        lines.append(
            line + ([collapsed_share(runs[label]), verdict(bootstrap_interval(found))] if runs else [])
        )
    columns = [name, "pairs", "points", "95 % interval", "p", "p (Holm)"]
    return table(columns + (["collapsed (95 %)", "verdict"] if runs else []), lines)
