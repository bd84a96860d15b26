"""The page of a study: tables and figures made from its rows alone."""

from itertools import combinations
from pathlib import Path

import numpy as np

from twins.errors import UserError
from twins.evaluation_pictures import divergence_picture
from twins.files import read_json, write_file
from twins.pages import table
from twins.permutation import sentence
from twins.pictures import printed
from twins.sentences import compare_trials, points, verdicts
from twins.stats import expected_best, holm, sign_flip_p, wilson_interval
from twins.studies import (
    INFORMATION,
    check_rows,
    group_rows,
    measures,
    pair_with_full,
    paired,
    read_rows,
    sorted_trials,
    trial_knn,
)
from twins.study_pictures import METRIC, best_figure, cost_figure, differences_figure

PROTOCOL = {
    "search": "Random settings from the space in ablate.py, the same number for every method. For expected "
    "and best k-NN a trial that collapsed counts as its untrained network.",
    "later round": "The best settings of an earlier round, and settings or changes by hand (ablate.py): the "
    "same number for every method, with one seed that the first round does not have.",
    "models": "The best setting of each method's search, of its last round if there are several, on fresh "
    "seeds. Differences are paired by seed.",
    "removal": "One mechanism changed at a time, paired with the full run of its seed. The verdict, stated "
    "before the runs: *can go* if the interval of the difference lies above -2 points, *cannot go* if it "
    "lies below, else *unclear*; a mechanism switched on has none. Added later: *too little learned* if the "
    "full runs are less than 4 points above random weights, where losing all that was learned could pass for "
    "*can go*.",
}


def write_report(folder, study):
    """Writes README.md and figures."""
    rows = read_rows(folder)
    if not rows:
        raise UserError(f"{folder} holds no finished run: there is nothing to report")
    check_rows(rows, study, folder)
    for name, content in report_study(rows, study, read_attention(folder)).items():
        write_file(Path(folder) / name, content)
    print(f"wrote {folder}/README.md", flush=True)


def read_attention(folder):
    """What attn_viz.py measured of a study's runs: attention.json in its folder, {} if it holds no test."""
    file = Path(folder) / "attention.json"
    attention = read_json(file) if file.exists() else {}
    if not attention.get("tests"):
        return {}
    try:
        sentence(attention["tests"][0], attention["tests"][0]["groups"])
        mean, groups, seeds = divergences(attention)
        if mean.shape != (len(groups), len(seeds)):
            raise ValueError
    except (KeyError, TypeError, ValueError, IndexError):
        raise UserError(f"{file} is broken: remove it, and run attn_viz.py again") from None
    return attention


def divergences(attention):
    """Mean divergence [r r], group and seed of each run int64 [r], of an attention.json."""
    return [np.array(attention[key]) for key in ("divergence_bits", "group_of_run", "seed_of_run")]


def report_study(rows, study, attention=None):
    """{file name: content}: README.md and figures, from a study's rows and read_attention()."""
    groups = group_rows(rows)
    if study == "search" and any(row["label"] != "trial" for row in rows):
        study = "later round"
    text = [f"# {study.capitalize()}: {len(rows)} runs", PROTOCOL[study], provenance(rows)]
    reports = {"search": report_search, "models": report_models, "removal": report_removal}
    tables, figures = reports.get(study, report_later_round)(groups)
    if study in ("models", "removal") and not any(row["setting"] for row in rows if row["label"] == "full"):
        text.append("There was no search: the settings are those of the presets.")
    text += tables
    text += [f"![{name}]({name})" for name in figures]
    if attention:
        test = attention["tests"][0]  # of all methods
        text.append(sentence(test, [printed(name) for name in test["groups"]]))
        mean, *runs = divergences(attention)
        figures["divergence.png"] = divergence_picture(mean, attention["names"], *runs)
        text.append("![divergence.png](divergence.png)")
    text.append("Each run's command, commit, device and curve: `rows.jsonl`.")
    return {"README.md": "\n\n".join(text) + "\n", **figures}


def provenance(rows):
    """The sentences on commits, devices, cost, and the rule of collapse."""
    commits = {row["git_commit"][:8] + (" with edits" if row["git_edited"] else "") for row in rows}
    several = f"rows of {len(commits)} commits, whose code may differ: " if len(commits) > 1 else "commit "
    devices = "; ".join(sorted({row["device"] for row in rows}))
    hours = sum(row["seconds"] for row in rows) / 3600
    cost = f"{rows[0]['budget']:g} PFLOP a run, {hours:.2g} hours of training in all, on {devices}"
    rule = (
        "Collapsed: RankMe below a quarter of the untrained network's, k-NN accuracy below it, or a loss "
        "that is not finite. Held-out k-NN: on training images that no run trained on."
    )
    text = f"{several}{', '.join(sorted(commits))}; {cost}. {rule}"
    return text[0].upper() + text[1:]


def information(rows):
    """Mean teacher_information, in nats; '' if no row has it."""
    values = [row[INFORMATION] for row in rows if INFORMATION in row]
    return f"{np.mean(values):.3f}" if values else ""


def add_information(columns, lines, groups):
    """Adds a last column to a table: the information() of `groups`, one for each line, if there is any."""
    cells = [information(rows) for rows in groups]
    if any(cells):
        columns.append("teacher's information, nats")
        for line, cell in zip(lines, cells, strict=True):
            line.append(cell)


def percent(values):
    """Mean and standard deviation of shares, in per cent; a dash for none."""
    if not values:
        return "-"
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def collapsed_share(rows):
    count = sum(row["collapsed"] for row in rows)
    low, high = wilson_interval(count, len(rows))
    return f"{count} of {len(rows)} ({100 * low:.0f} to {100 * high:.0f} %)"


def report_search(groups):
    lines, curves = [], {}
    for title, rows in groups.items():
        values = [trial_knn(row) for row in rows]
        curves[title] = expected_best(values)
        k = len(values)
        expected = [f"{100 * curves[title][n - 1]:.1f}" if n <= k else "" for n in (1, 4, 8, 16)]
        best = "all collapsed" if all(row["collapsed"] for row in rows) else f"{100 * max(values):.1f}"
        accuracies = [percent([row[name] for row in rows]) for name in ("knn_init", "knn")]
        lines.append([title, k, collapsed_share(rows), *accuracies, *expected, best])
    columns = ["method", "trials", "collapsed (95 %)", "untrained", "k-NN of trials"]
    columns += [f"expected best of {n}" for n in (1, 4, 8, 16)] + ["best"]
    tables = [table(columns, lines), *best_settings(groups), compare_trials(groups)]
    return tables, {"expected-best.png": best_figure(curves)}


def report_later_round(groups):
    lines = []
    for title, rows in groups.items():
        for row in rows:
            trained = [f"{100 * row['knn']:.1f}", f"{row['rank']:.1f}", "yes" if row["collapsed"] else "no"]
            untrained = [f"{100 * row['knn_init']:.1f}", f"{row['rank_init']:.1f}"]
            lines.append([title, row["label"], row["steps"], *trained, *untrained])
    columns = ["method", "setting", "steps", METRIC, "RankMe", "collapsed"]
    columns += ["k-NN, untrained", "RankMe, untrained"]
    add_information(columns, lines, [[row] for rows in groups.values() for row in rows])
    return [table(columns, lines), *best_settings(groups)], {}


def best_settings(groups):
    """A list of the settings of the best trials, as options, of the methods that have one."""
    lines = []
    for title, rows in groups.items():
        for row in sorted_trials(rows)[:1]:
            words = " ".join(f"--{name}={value}" for name, value in row["setting"].items())
            lines.append(f"- {title}: `{words}`")
    return ["Best settings:", "\n".join(lines)] if lines else []


def spreads(rows, names):
    """percent() of each measure, over the rows that have it."""
    return [percent([measures(row)[name] for row in rows if name in measures(row)]) for name in names]


def report_models(groups):
    names = list(dict.fromkeys(name for rows in groups.values() for row in rows for name in measures(row)))
    lines = []
    for title, rows in groups.items():
        columns = ("rank", "rank_init", "pflop", "seconds")
        mean = {name: np.mean([row[name] for row in rows]) for name in columns}
        steps = sorted(row["steps"] for row in rows)
        steps = " to ".join(map(str, dict.fromkeys((steps[0], steps[-1]))))
        cost = [f"{mean['pflop']:.3g}", steps, rows[0]["views"], f"{mean['seconds'] / 60:.1f}"]
        ranks = f"{mean['rank']:.1f} ({mean['rank_init']:.1f})"
        lines.append([title, len(rows), *cost, collapsed_share(rows), ranks, *spreads(rows, names)])
    columns = ["method", "seeds", "PFLOP", "steps", "views", "minutes"]
    columns += ["collapsed (95 %)", "RankMe (untrained)", *names]
    add_information(columns, lines, groups.values())
    tables = [table(columns, lines)]
    panels = {}
    for name in names:
        pairs = {f"{b} - {a}": paired(groups[b], groups[a], name) for a, b in combinations(groups, 2)}
        if panel := {label: differences for label, differences in pairs.items() if differences}:
            panels[name] = panel
            tables.append(differences_table(name, panel))
    figures = {"cost.png": cost_figure(groups)}
    if panels:
        figures["differences.png"] = differences_figure(panels)
    return tables, figures


def report_removal(groups):
    tables, panels = [], {}
    for title, rows in groups.items():
        runs, panel = pair_with_full(rows)
        full, untrained = (percent([row[name] for row in runs["full"]]) for name in ("knn", "knn_init"))
        nats = information(runs["full"])
        text = f"{title}: {METRIC} {full} with nothing removed, {untrained} with random weights."
        tables.append(f"{text} The teacher's information: {nats} nats." if nats else text)
        if panel:
            panels[title] = panel
            tables.append(differences_table(title, panel, runs))
    return tables, {"removal.png": differences_figure(panels, -0.02)} if panels else {}


def differences_table(name, panel, runs=None):
    """Mean, interval and p of paired differences; given each label's runs, collapse and verdict too."""
    columns = [name, "pairs", "points", "95 % interval", "p", "p (Holm)"]
    if runs:
        columns += ["collapsed (95 %)", "verdict"]
    outcomes = verdicts(runs, panel) if runs else {}
    ps = [sign_flip_p(differences) for differences in panel.values()]
    lines = []
    for (label, differences), p, corrected in zip(panel.items(), ps, holm(ps), strict=True):
        line = [label, len(differences), *points(differences), f"{p:.3f}", f"{corrected:.3f}"]
        if runs:
            line += [collapsed_share(runs[label]), outcomes.get(label.removesuffix(" off"), "-")]
        lines.append(line)
    if runs:
        add_information(columns, lines, [runs[label] for label in panel])
    return table(columns, lines)
