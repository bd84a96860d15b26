"""The answer in README.md: a sentence for each question, a table and a figure, from the rows in results/."""

import textwrap

import numpy as np

from twins.errors import ROOT
from twins.files import read_json
from twins.pictures import printed
from twins.reports import fill, read_attention, spreads, table, table_of
from twins.sentences import (
    compare_attention,
    compare_collapse,
    compare_models,
    count_seeds,
    main_measure,
    points,
    split_titles,
    summarise_removals,
    variants,
    verdicts,
    when_yes,
)
from twins.studies import ce_is_dead, group_rows, measures, pair_with_full, paired, read_rows
from twins.study_pictures import METRIC

NO_BREAK = "\N{NO-BREAK SPACE}"
UNTRAINED = "Not answered yet: the best settings of the search have not been trained on fresh seeds."


def fill_pages():
    """Updates the generated text of README.md and results/README.md from what results/ holds."""
    results = ROOT / "results"
    fill(ROOT / "README.md", lambda part, name: answer(results, name)[part])
    fill(results / "README.md", lambda kind, name: result_table(results, kind, name))


def result_table(results, kind, name):
    """A table of results/README.md: the removals of a data set, or what an evaluation's file holds."""
    return removals_table(removal_studies(results, name)) if kind == "removals" else table_of(results / name)


def answer(results, dataset):
    """Markdown: {"answer": table, figure, the two questions; "results": the other questions, the studies}.

    results: the folder of search-DATASET, models-DATASET, removal-DATASET.
    """
    search, models = (group_rows(read_rows(results / f"{s}-{dataset}")) for s in ("search", "models"))
    if search.keys() - models.keys() or not all(split_titles(models)):  # some methods alone are no comparison
        return dict.fromkeys(("answer", "results"), UNTRAINED)
    elsewhere = same_settings(results, dataset)
    first = {
        "Does CC give better features?": compare_models(models, main_measure(models)),
        "Which of DINO's mechanisms become unnecessary?": judge_removals(removal_studies(results, dataset)),
    }
    others = {}
    for name, (groups, source) in elsewhere.items():
        question = f"And on {printed(name)}, with the settings of {source}?"
        others[question] = compare_models(groups, main_measure(groups))
    others["Is training more stable?"] = compare_collapse(search)
    others["Is segmentation better?"] = compare_segmentation(models, elsewhere)
    attention = attention_studies(results, [dataset, *elsewhere])
    others["Do attention maps differ?"] = compare_attention(attention) if attention else ""
    floor = random_weights(results / f"models-{dataset}")
    picture = f'src="results/models-{dataset}/cost.png" alt="k-NN against PFLOP, {printed(dataset)}"'
    picture = f'<img align="right" width="300" {picture}>'
    parts = [overview(search, models, floor), picture, legend(models, dataset), bullets(first)]
    studied = f"{when_yes(models)} [Protocol, all studies](results/README.md)."
    return {"answer": "\n\n".join(parts), "results": f"{bullets(others)}\n\n{wrap(studied)}"}


def judge_removals(removals):
    """The answer on mechanisms, with a link to the table if there is one."""
    link = " (By uncorrected 95 % intervals: [table](results/README.md#removals).)"
    return summarise_removals(removals) + (link if removals else "")


def compare_segmentation(models, elsewhere):
    """The answer on mIoU, pre-trained on the data set and on others; "" if no run was evaluated."""
    studies = {"": models, **{f"Pre-trained on {printed(name)}: ": elsewhere[name][0] for name in elsewhere}}
    texts = []
    for where, groups in studies.items():
        if any("mIoU" in measures(row) for rows in groups.values() for row in rows):
            texts.append(where + compare_models(groups, "mIoU"))
    return " ".join(texts)


def attention_studies(results, datasets):
    """{study: read_attention()} of the models studies on these data sets whose maps were tested."""
    studies = {}
    for folder in [folder for name in datasets for folder in folders_of(results, "models", name)]:
        attention = read_attention(folder)
        if attention and "p" in attention["tests"][0]:
            studies[folder.name] = attention
    return studies


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


def bullets(answers):
    """{question: answer} as a Markdown list, without questions that have no answer."""
    return "\n".join(wrap(f"- **{question}** {text}", "  ") for question, text in answers.items() if text)


def folders_of(results, study, dataset):
    """The folders of a study on a data set that hold rows: STUDY-DATASET, then STUDY-DATASET-*."""
    folders = [results / f"{study}-{dataset}", *sorted(results.glob(f"{study}-{dataset}-*"))]
    return [folder for folder in folders if (folder / "rows.jsonl").exists()]


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


def same_settings(results, dataset):
    """{other data set: (rows of its models study, the study of `dataset` with these settings)}: untuned."""

    def settings(groups):
        return {title: rows[0]["setting"] for title, rows in groups.items()}

    tuned = {own: settings(group_rows(read_rows(own))) for own in folders_of(results, "models", dataset)}
    matches = {}
    last_rounds = {folder for folder in results.glob("models-*") if folder.name.count("-") == 1}
    for folder in sorted(last_rounds - tuned.keys()):
        groups = group_rows(read_rows(folder))
        same = [own.name for own, its_settings in tuned.items() if its_settings == settings(groups)]
        if groups and same:
            matches[folder.name.removeprefix("models-")] = groups, same[0]
    return matches


def wrap(text, indent=""):
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    return textwrap.fill(text, 109, **options)


def legend(models, dataset):
    """What the numbers of the models study mean."""
    rows = [row for group in models.values() for row in group]
    minutes = [row["seconds"] / 60 for row in rows]
    seeds = count_seeds(min(map(len, models.values())))
    differences = variants(models)
    setting = f"the best setting found ({differences})" if differences else "the best setting found"
    return wrap(
        f"{printed(dataset)}, {seeds}, each method with {setting}, {rows[0]['budget']:g} PFLOP "
        f"({min(minutes):.0f} to {max(minutes):.0f} minutes) a run: mean ± standard deviation in %; "
        "differences in points, paired by seed, with Student's 95 % interval. Figure: k-NN on held-out "
        "training images."
    )


def random_weights(folder):
    """{measure: accuracy} of random weights: eval_linear.json and seg_transfer.json in a study's folder."""
    accuracies = {}
    if (file := folder / "eval_linear.json").exists():
        for name, result in read_json(file)["results"].items():
            accuracies[f"test {name}".replace("knn", "k-NN")] = result["top1"]
    if (file := folder / "seg_transfer.json").exists():
        accuracies["mIoU"] = read_json(file)["results"]["this checkpoint"]["miou"]
    return accuracies


def overview(search, models, floor):
    """One row per method: its best setting on the test set, and its random settings; random weights last."""
    results = [measures(row) for rows in models.values() for row in rows]
    main = main_measure(models)
    _, singles = split_titles(models)
    others = [name for name in ("test linear", "mIoU") if any(name in result for result in results)]
    columns = [main, *(f"vs {single}" for single in singles), *others]
    lines = []
    for title, runs in models.items():
        trials = search.get(title, [])
        pairs = [[] if title == single else paired(runs, models[single], main) for single in singles]
        differences = [with_interval(values) if values else "" for values in pairs]
        collapsed = f"{sum(row['collapsed'] for row in trials)} of {len(trials)}" if trials else ""
        lines.append([title, *spreads(runs, [main]), *differences, *spreads(runs, others), collapsed])
    if floor:
        accuracies = [f"{100 * floor[name]:.1f}" if name in floor else "" for name in (main, *others)]
        lines.append(["random weights", accuracies[0], *("" for _ in singles), *accuracies[1:], ""])
    lines = [[str(cell).replace(" ", NO_BREAK) for cell in line] for line in lines]
    return table(["method", *columns, "failed in search"], lines)
