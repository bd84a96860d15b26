"""The answer in README.md: a sentence for each question, a table and a figure, from the rows in results/."""

import re
import textwrap

import numpy as np

from twins.errors import UserError
from twins.files import write_file
from twins.pictures import printed
from twins.reports import attention_sentence, collapsed_share, points, read_attention, spreads, table
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
        "Does CC beside CE give better features?": compare_models(models, dataset, main_measure(models)),
        "Which of DINO's mechanisms can then go?": list_removals(studies["removal"]),
        "Is training more stable?": compare_collapse(studies["search"]),
    }
    if any("mIoU" in measures(row) for rows in models.values() for row in rows):
        questions["Is segmentation better?"] = compare_models(models, dataset, "mIoU")
    if models and attention:
        questions["Do attention maps differ?"] = attention_sentence(attention)
    links = [f"[{name}](results/{name}-{dataset}/README.md)" for name in STUDIES if studies[name]]
    parts = [
        *(textwrap.fill(f"**{question}** {text}", 105) for question, text in questions.items()),
        overview(studies),
        f'<img src="results/{picture}" alt="{caption}, {printed(dataset)}" width="420">',
        f"All rows and tables: {', '.join(links)}; [other results](results/README.md).",
    ]
    return "\n\n".join(parts) + "\n"


def main_measure(models):
    """Test k-NN, or k-NN on held-out training images if a run has no test result."""
    rows = [row for group in models.values() for row in group]
    return "test k-NN" if all("test k-NN" in measures(row) for row in rows) else METRIC


def compare_models(models, dataset, measure):
    """Each hybrid against each single loss: yes or no only where Holm's p over all of these is below 0.05."""
    hybrids = [title for title in models if title.startswith("Hybrid")]
    singles = [title for title in models if title not in hybrids]
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
        word = "Not shown."
    n, row = min(map(len, found.values())), models[hybrids[0]][0]
    against = [f"against {s}: {', '.join(gain(h, found[h, s]) for h in hybrids)}" for s in singles]
    text = f"{word} Points of {measure} {'; '.join(against)} (95 % intervals over {n} seeds; "
    text += f"{printed(dataset)}, {row['budget']:g} PFLOP a run)."
    if len(pairs) * 2 / 2**n > SIGNIFICANT:
        text += f" {n} seeds are too few for p below {SIGNIFICANT} in {len(pairs)} comparisons."
    return text


def gain(name, differences):
    mean, interval = points(differences)
    return f"{name} {mean} ({interval})"


def compare_collapse(search):
    """Whether fewer random settings of a hybrid fail than of DINO, by either sign: p values."""
    if not search or "DINO" not in search:
        return "Not answered yet: there is no search."
    budget = search["DINO"][0]["budget"]
    flat, collapsed = failure_ps(search, rank_fell), failure_ps(search, lambda row: row["collapsed"])
    return (
        f"Of random settings, {budget:g} PFLOP each, the table counts those whose RankMe fell below a quarter"
        f" ({flat} against DINO), then also those whose k-NN fell below the untrained network's, which may "
        f"be slow learning ({collapsed}; exact p, paired by trial)."
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
    """A row a method: its search, then the fresh seeds of its best setting on the test set."""
    search, models = studies["search"], studies["models"]
    measured = [measures(row) for rows in models.values() for row in rows]
    names = [name for name in ("test k-NN", "test linear", "mIoU") if any(name in row for row in measured)]
    lines = []
    for title in search | models:
        trials, runs = search.get(title, []), models.get(title, [])
        best, line = best_trial(trials), [title, "", ""]
        if trials:
            line = [title, f"{sum(map(rank_fell, trials))} of {len(trials)}", collapsed_share(trials)]
        line.append(f"{100 * best['knn']:.1f}" if best else "")
        if models:
            line += [len(runs), collapsed_share(runs) if runs else "", *spreads(runs, names)]
        lines.append(line)
    columns = ["method", "random settings: RankMe fell", "or k-NN fell (95 %)", f"best {METRIC}, %"]
    return table(columns + (["fresh seeds", "collapsed", *names] if models else []), lines)
