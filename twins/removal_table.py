"""What every method loses without a mechanism: all removal studies of a data set in one table."""

import numpy as np

from twins.pages import table
from twins.sentences import count_seeds, points, verdicts
from twins.studies import ce_is_dead, folders_of, group_rows, pair_with_full, read_rows
from twins.study_pictures import METRIC


def removal_studies(results, dataset):
    """{method: [its rows of one study, ...]} of studies with pairs, more seeds and larger budgets first.

    Studies of one seed, which give no verdict, are left out if there is a better one.
    """
    studies_of = {}
    for folder in folders_of(results, "removal", dataset):
        for title, rows in group_rows(read_rows(folder)).items():
            if pair_with_full(rows)[1]:
                studies_of.setdefault(title, []).append(rows)
    for title, studies in studies_of.items():
        studies.sort(key=lambda rows: (-number_of_seeds(rows), -rows[0]["budget"]))
        studies_of[title] = [rows for rows in studies if number_of_seeds(rows) > 1] or studies[:1]
    return {title: studies_of[title] for title in sorted(studies_of)}


def number_of_seeds(rows):
    return len({row["seed"] for row in rows})


def removals_table(removals):
    """One row per mechanism: the change in k-NN accuracy without it and the verdict, of each study.

    For each hybrid also its change less that of DINO, of the studies that decide, if they can be compared.
    """
    columns = dict(removals_column(title, rows) for title in removals for rows in removals[title])
    for title in [title for title in removals if "DINO" in removals and title != "DINO"]:
        columns.update(less_dino(title, removals[title][0], removals["DINO"][0]))
    names = dict.fromkeys(name for cells in columns.values() for name in cells)
    lines = [[name, *(cells.get(name, "") for cells in columns.values())] for name in names]
    return table([f"{METRIC} (untrained) and change without", *columns], lines)


def less_dino(title, rows, dino):
    """{heading: {mechanism: a hybrid's change less DINO's, paired by seed}}; {} if the studies differ."""
    (runs, changes), (dino_runs, dino_changes) = pair_with_full(rows), pair_with_full(dino)
    cells = {}
    for label, values in changes.items() if rows[0]["budget"] == dino[0]["budget"] else ():
        seeds = [sorted(row["seed"] for row in some.get(label, [])) for some in (runs, dino_runs)]
        others = dino_changes.get(label, [])
        if label.endswith(" off") and seeds[0] == seeds[1] and len(values) == len(others) > 1:
            cells[row_name(label)] = with_interval(np.subtract(values, others))
    return {f"{title}'s change less DINO's": cells} if cells else {}


def with_interval(differences):
    """Mean and 95 % interval in points, "+1.0 [+0.5, +1.5]"."""
    return "{} [{}]".format(*points(differences)).replace(" to ", ", ")


def row_name(label):
    """The row of removals_table() that a label such as "EMA off" is in."""
    name = label.rpartition(" ")[0]
    return "all of these" if name == "all" else name


def removals_column(title, rows):
    """One study's column of removals_table(): its heading, {mechanism: text}."""
    runs, differences = pair_with_full(rows)
    outcomes = verdicts(runs, differences)
    means = {key: 100 * np.mean([row[key] for row in runs["full"]]) for key in ("knn", "knn_init")}
    cells = {"nothing": f"{means['knn']:.1f} ({means['knn_init']:.1f}){failure_counts(runs['full'])}"}
    for label, values in differences.items():
        text = "already off"
        if label.endswith(" off"):
            outcome = outcomes[label.removesuffix(" off")]
            text = f"{100 * np.mean(values):+.1f}, {outcome}{failure_counts(runs[label])}"
        cells[row_name(label)] = text
    seeds = count_seeds(*sorted({len(values) for values in differences.values()}))
    return f"{title}, {rows[0]['budget']:g} PFLOP, {seeds}", cells


def failure_counts(rows):
    """How many runs collapsed, and in how many the teacher's output became the same for all images."""
    failed = sum(row["collapsed"] for row in rows)
    dead = sum(map(ce_is_dead, rows))
    return (f", {failed} failed" if failed else "") + (f", CE dead in {dead}" if dead else "")
