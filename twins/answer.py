"""The answer in README.md: a sentence for each question, a table and a figure, from the rows in results/."""

import textwrap

from twins.errors import ROOT
from twins.files import read_json
from twins.pages import fill, table, table_of
from twins.pictures import printed
from twins.removal_table import removal_studies, removals_table, with_interval
from twins.reports import read_attention, spreads
from twins.sentences import (
    compare_attention,
    compare_collapse,
    compare_models,
    count_seeds,
    main_measure,
    split_titles,
    summarise_removals,
    variants,
    when_yes,
)
from twins.studies import folders_of, group_rows, measures, paired, read_rows

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


def bullets(answers):
    """{question: answer} as a Markdown list, without questions that have no answer."""
    return "\n".join(wrap(f"- **{question}** {text}", "  ") for question, text in answers.items() if text)


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
