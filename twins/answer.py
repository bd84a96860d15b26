"""The answer in README.md: a sentence for each question, a table and a figure, from the rows in results/."""

import re
import textwrap

import numpy as np

from twins.errors import UserError
from twins.files import write_file
from twins.pictures import printed
from twins.reports import collapsed_share, points, read_attention, spreads, table
from twins.statistics import bootstrap_interval, holm, sign_flip_p, verdict
from twins.studies import best_trial, group_rows, measures, pair_with_full, paired, rank_fell, read_rows
from twins.study_pictures import METRIC

BLOCK = re.compile(r"<!-- answer (\S+) -->\n(.*?)<!-- end answer -->", re.DOTALL)
STUDIES = ("search", "models", "removal")
SIGNIFICANT = 0.05


def write_answer(readme, results, titles):
    """Replaces what stands in README.md between <!-- answer DATASET --> and <!-- end answer -->.

    results: the folder of search-DATASET, models-DATASET, removal-DATASET; titles: {script: name in print}.
    """
    text = readme.read_text(encoding="utf-8")
    block = BLOCK.search(text)
    if not block:
        raise UserError(f"{readme} has no lines <!-- answer DATASET --> and <!-- end answer -->")
    write_file(readme, text[: block.start(2)] + answer(results, block[1], titles) + text[block.end(2) :])
    print(f"wrote {readme}")


def answer(results, dataset, titles):
    """The two questions, their answers, a table and a figure: Markdown."""
    studies = {study: group_rows(read_rows(results / f"{study}-{dataset}"), titles) for study in STUDIES}
    if studies["search"].keys() - studies["models"].keys():
        studies["models"] = {}  # some methods alone are no comparison
    if studies["models"]:
        picture, caption = f"models-{dataset}/cost.png", "k-NN against PFLOP"
    else:
        picture, caption = f"search-{dataset}/expected-best.png", "Expected best of n trials"
    models, attention = studies["models"], read_attention(results / f"models-{dataset}")
    questions = {
        "Does CC beside CE give better features?": compare_models(models, main_measure(models)),
        "Which of DINO's mechanisms can then go?": list_removals(studies["removal"]),
        "Is training more stable?": compare_collapse(studies["search"]),
    }
    if any("mIoU" in measures(row) for rows in models.values() for row in rows):
        questions["Is segmentation better?"] = compare_models(models, "mIoU")
    if models and attention:
        questions["Do attention maps differ?"] = compare_attention(attention["tests"][0])
    links = [f"[{name}](results/{name}-{dataset}/README.md)" for name in STUDIES if studies[name]]
    parts = [
        "\n".join(wrap(f"- **{question}** {text}", "  ") for question, text in questions.items()),
        overview(studies),
        f'<img src="results/{picture}" alt="{caption}, {printed(dataset)}" width="400">',
        wrap(f"{protocol(models, dataset)}All rows: {', '.join(links)}; [other results](results/README.md)."),
    ]
    return "\n\n".join(parts) + "\n"


def wrap(text, indent=""):
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    return textwrap.fill(text, 105, **options)


def protocol(models, dataset):
    """What the figures of the models study are, and whether their number can show anything."""
    if not models:
        return ""
    n, budget = min(map(len, models.values())), next(iter(models.values()))[0]["budget"]
    text = f"Differences in points with 95 % intervals, paired by {n} fresh seed{'s' * (n > 1)} of each "
    text += f"method's best setting; {printed(dataset)}, {budget:g} PFLOP a run. "
    hybrids, singles = split_titles(models)
    comparisons = len(hybrids) * len(singles)
    text += f"Yes or no needs p < {SIGNIFICANT} (exact, Holm over {comparisons} comparisons)"
    return text + (f": {n} seeds cannot give that. " if comparisons * 2 / 2**n > SIGNIFICANT else ". ")


def main_measure(models):
    """Test k-NN, or k-NN on held-out training images if a run has no test result."""
    rows = [row for group in models.values() for row in group]
    return "test k-NN" if all("test k-NN" in measures(row) for row in rows) else METRIC


def split_titles(models):
    """The names of the hybrids, and those of the methods with one loss."""
    hybrids = [title for title in models if title.startswith("Hybrid")]
    return hybrids, [title for title in models if title not in hybrids]


def compare_models(models, measure):
    """Each hybrid against each single loss: yes or no only where Holm's p over all of these is below 0.05."""
    hybrids, singles = split_titles(models)
    if not (hybrids and singles):
        return "Not answered yet: the best settings of the search have not been trained on fresh seeds."
    pairs = [(h, s) for h in hybrids for s in singles]
    found = {(h, s): paired(models[h], models[s], measure) for h, s in pairs}
    ps = dict(zip(pairs, holm([sign_flip_p(differences) for differences in found.values()]), strict=True))

    def ahead(h, s, sign):
        return ps[h, s] < SIGNIFICANT and sign * np.mean(found[h, s]) > 0

    if any(all(ahead(h, s, 1) for s in singles) for h in hybrids):
        word = "Yes."
    elif any(all(ahead(h, s, -1) for h in hybrids) for s in singles):
        word = "No."
    else:
        word = f"Not shown by {min(map(len, found.values()))} seeds."
    sides = [side([d for h in hybrids for d in found[h, s]], s) for s in singles]
    sides = f" Both hybrids: {', '.join(filter(None, sides))}." if any(sides) else ""
    against = [f"against {s}, {' and '.join(gain(h, found[h, s]) for h in hybrids)}" for s in singles]
    return f"{word}{sides} {measure.replace('test', 'Test')} {'; '.join(against)}."


def side(differences, single):
    if all(d > 0 for d in differences):
        return f"ahead of {single} in every seed"
    if all(d < 0 for d in differences):
        return f"behind {single} in every seed"
    return ""


def gain(name, differences):
    mean, interval = points(differences)
    return f"{name} {mean} ({interval})"


def compare_attention(test):
    """attn_viz.py's test of all methods' maps, in one sentence."""
    if "p" not in test:
        return "Not answered yet: that needs two seeds of each method."
    word = "Yes, by more than seeds do" if test["p"] <= SIGNIFICANT else "Not shown"
    return (
        f"{word}: {test['between']:.2f} bits of Jensen-Shannon divergence between methods, "
        f"{test['within']:.2f} between seeds of one, p = {test['p']:.2g} (permutation test over runs)."
    )


def compare_collapse(search):
    """Whether fewer random settings of a hybrid fail than of DINO, by either sign: p values."""
    if not search or "DINO" not in search:
        return "Not answered yet: there is no search."
    budget = search["DINO"][0]["budget"]
    flat, collapsed = failure_ps(search, rank_fell), failure_ps(search, lambda row: row["collapsed"])
    return (
        f"Random settings ({budget:g} PFLOP each) whose RankMe fell below a quarter of random weights': "
        f"{flat} against DINO. Then also those whose k-NN fell below theirs, which may be slow learning: "
        f"{collapsed} (exact, paired by trial)."
    )


def failure_ps(search, failed):
    """'Hybrid A p = 0.008, ...': Holm's p of each hybrid against DINO in how many trials failed."""
    signs = {title: {row["seed"]: failed(row) for row in rows} for title, rows in search.items()}
    hybrids = [title for title in signs if title.startswith("Hybrid")]
    pairs = [
        [signs[h][n] - signs["DINO"][n] for n in signs[h].keys() & signs["DINO"].keys()] for h in hybrids
    ]
    ps = holm([sign_flip_p(differences) for differences in pairs])
    return ", ".join(f"{hybrid} p = {p:.3f}" for hybrid, p in zip(hybrids, ps, strict=True))


def list_removals(removals):
    """What each script can do without, by the rule of the study."""
    sentences = []
    for title, rows in removals.items():
        runs, differences = pair_with_full(rows)
        sorted_out = {"can go": [], "cannot go": [], "unclear": []}
        for label, found in differences.items():
            if label.endswith(" off"):
                sorted_out[verdict(bootstrap_interval(found))].append(label.removesuffix(" off"))
        lists = [f"{word}: {', '.join(names)}" for word, names in sorted_out.items() if names]
        if lists:
            sentences.append(f"{title} ({len(runs['full'])} seeds): {'; '.join(lists)}.")
    return " ".join(sentences) or "Not answered yet: no removal has been run."


def overview(studies):
    """A row a method: fresh seeds of its best setting on the test set, then its search."""
    search, models = studies["search"], studies["models"]
    measured = [measures(row) for rows in models.values() for row in rows]
    names = [name for name in ("test k-NN", "test linear", "mIoU") if any(name in row for row in measured)]
    lines = []
    for title in search | models:
        trials, runs, line = search.get(title, []), models.get(title, []), [title]
        if models:
            line += [*spreads(runs, names), f"{sum(row['collapsed'] for row in runs)} of {len(runs)}"]
        fell = ["", ""]
        if trials:
            fell = [f"{sum(map(rank_fell, trials))} of {len(trials)}", collapsed_share(trials)]
        best = best_trial(trials)
        lines.append([*line, *fell, f"{100 * best['knn']:.1f}" if best else ""])
    columns = ["method", *([*names, "collapsed"] if models else [])]
    return table([*columns, "RankMe fell", "or k-NN fell (95 %)", "best k-NN, %"], lines)
