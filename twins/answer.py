"""The answer in README.md: a sentence for each question, a table and a figure, from the rows in results/."""

import re
import textwrap

import numpy as np

from twins.errors import UserError
from twins.files import write_file
from twins.pictures import printed
from twins.reports import points, read_attention, spreads, table
from twins.statistics import holm, sign_flip_p, t_interval, verdict
from twins.studies import group_rows, learned, measures, pair_with_full, paired, rank_fell, read_rows
from twins.study_pictures import METRIC

BLOCK = re.compile(r"<!-- (answer|results) (\S+) -->\n(.*?)<!-- end \1 -->", re.DOTALL)
STUDIES = ("search", "models", "removal")
SIGNIFICANT = 0.05
UNTRAINED = "Not answered yet: the best settings of the search have not been trained on fresh seeds.\n"
VERDICTS = ("one seed so far", "too little learned", "can go", "cannot go", "unclear")


def write_answer(readme, results):
    """Replaces README.md's text between <!-- answer DATASET --> and <!-- end answer -->, and of "results".

    results: the folder of search-DATASET, models-DATASET, removal-DATASET.
    """
    text = readme.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        raise UserError(f"{readme} has no lines <!-- answer DATASET --> and <!-- end answer -->")

    def replace(block):
        part, dataset, _ = block.groups()
        return f"<!-- {part} {dataset} -->\n{answer(results, dataset)[part]}<!-- end {part} -->"

    write_file(readme, BLOCK.sub(replace, text))
    print(f"wrote {readme}")


def answer(results, dataset):
    """Markdown: {"answer": table, figure, the two questions; "results": the other questions, the studies}."""
    search, models = (group_rows(read_rows(results / f"{s}-{dataset}")) for s in ("search", "models"))
    if search.keys() - models.keys() or not all(split_titles(models)):  # some methods alone are no comparison
        return dict.fromkeys(("answer", "results"), UNTRAINED)
    removals = best_removals(results, dataset)
    hybrids = {title: removals[title] for title in split_titles(removals)[0]}
    rule = f"Change in {METRIC} (points) without each; it can go if the 95 % interval lies above -2. "
    first = {
        "Does CC give better features?": compare_models(models, main_measure(models)),
        "Which of DINO's mechanisms become unnecessary?": rule * bool(hybrids) + list_removals(hybrids),
    }
    others, elsewhere = {}, same_settings(results, dataset)
    if "DINO" in removals:
        others["Can DINO do without them, too?"] = list_removals({"DINO": removals["DINO"]})
    for name, (groups, source) in elsewhere.items():
        measure = main_measure(groups)
        means = ", ".join(f"{title} {spreads(rows, [measure])[0]}" for title, rows in groups.items())
        text = f"{compare_models(groups, measure)} {measure[0].upper() + measure[1:]}: {means}."
        others[f"Are features better on {printed(name)}, with the settings of {source}?"] = text
    others["Is training more stable?"] = compare_collapse(search)
    if any("mIoU" in measures(row) for rows in models.values() for row in rows):
        others["Is segmentation better?"] = compare_models(models, "mIoU")
    attention = {name: read_attention(results / f"models-{name}") for name in (dataset, *elsewhere)}
    found = [f"{printed(name)}: {compare_attention(test)}" for name, test in attention.items() if test]
    if found:
        found.append("(Jensen-Shannon divergence, permutation tests over runs.)")
        others["Do attention maps differ?"] = " ".join(found)
    folders = [folder for study in STUDIES for folder in folders_of(results, study, dataset)]
    links = [f"[{short(folder, dataset)}](results/{folder.name}/README.md)" for folder in folders]
    picture = f'src="results/models-{dataset}/cost.png" alt="k-NN against PFLOP, {printed(dataset)}"'
    parts = overview(search, models), f'<img align="right" width="330" {picture}>', legend(models, dataset)
    studied = wrap(f"{when_yes(models)}Studies: {', '.join(links)}; [all](results/README.md).")
    return {
        "answer": "\n\n".join([*parts, bullets(first)]) + "\n",
        "results": "\n\n".join([bullets(others), studied]) + "\n",
    }


def bullets(answers):
    """{question: answer} as a Markdown list."""
    return "\n".join(wrap(f"- **{question}** {text}", "  ") for question, text in answers.items())


def folders_of(results, study, dataset):
    """The folders of a study on a data set that hold rows: STUDY-DATASET, then STUDY-DATASET-*."""
    folders = [results / f"{study}-{dataset}", *sorted(results.glob(f"{study}-{dataset}-*"))]
    return [folder for folder in folders if (folder / "rows.jsonl").exists()]


def best_removals(results, dataset):
    """{method: its rows}, of each method the removal study with the most rows, then the largest budget."""
    found = {}
    for folder in folders_of(results, "removal", dataset):
        for title, rows in group_rows(read_rows(folder)).items():
            found.setdefault(title, []).append(rows)

    def size(rows):
        return len(rows), rows[0]["budget"]

    return {title: max(rows, key=size) for title, rows in found.items()}


def same_settings(results, dataset):
    """{other data set: (its models study's rows, the study of `dataset` whose settings it has)}: untuned."""

    def settings(groups):
        return {title: rows[0]["setting"] for title, rows in groups.items()}

    tuned, found = folders_of(results, "models", dataset), {}
    for folder in sorted(set(results.glob("models-*")) - set(tuned)):
        groups = group_rows(read_rows(folder))
        for own in tuned:
            if groups and settings(groups) == settings(group_rows(read_rows(own))):
                found.setdefault(folder.name.removeprefix("models-"), (groups, short(own, dataset)))
    return found


def short(folder, dataset):
    """A study's name in a page on one data set."""
    return folder.name.replace(f"-{dataset}", "")


def wrap(text, indent=""):
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    return textwrap.fill(text, 109, **options)


def legend(models, dataset):
    """What the numbers of the models study mean."""
    n, budget = min(map(len, models.values())), next(iter(models.values()))[0]["budget"]
    minutes = [row["seconds"] / 60 for rows in models.values() for row in rows]
    return wrap(
        f"{printed(dataset)}, {n} fresh seed{'s' * (n > 1)} of each method's best setting found, {budget:g} "
        f"PFLOP ({min(minutes):.0f} to {max(minutes):.0f} minutes) a run: mean ± standard deviation in %; "
        "differences in points, paired by seed, with Student's 95 % interval. Figure: k-NN on held-out "
        "training images."
    )


def when_yes(models):
    """When an answer is yes or no, and whether there are enough seeds for that."""
    n, (hybrids, singles) = min(map(len, models.values())), split_titles(models)
    too_few = len(hybrids) * len(singles) * 2 / 2**n > SIGNIFICANT
    impossible = f", impossible with {n} seed{'s' * (n > 1)}" * too_few
    test = "(paired sign-flip test, Holm)"
    return f"A yes or no needs p < {SIGNIFICANT} {test}{impossible}. {describe_cc(models)}"


def describe_cc(models):
    """How the hybrids' settings differ from what README draws."""
    sentences = ""
    for option, value, text in (("head", "two", "a projector of its own"), ("cc_local", True, "local views")):
        titles = [title for title, rows in models.items() if rows[0]["setting"].get(option) == value]
        if titles:
            sentences += f"CC has {text} in {' and '.join(titles)} (`--{option}={value}`). "
    return sentences


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
    pairs = [(h, s) for h in hybrids for s in singles]
    found = {(h, s): paired(models[h], models[s], measure) for h, s in pairs}
    ps = dict(zip(pairs, holm([sign_flip_p(differences) for differences in found.values()]), strict=True))
    n = min(map(len, found.values()))

    def ahead(h, s, sign):
        return ps[h, s] < SIGNIFICANT and sign * np.mean(found[h, s]) > 0

    sides = [side([d for h in hybrids for d in found[h, s]], s) for s in singles]
    if any(all(ahead(h, s, 1) for s in singles) for h in hybrids):
        word = "Yes: "
    elif any(all(ahead(h, s, -1) for h in hybrids) for s in singles):
        word = "No: "
    else:
        word = ""
    sides = ", ".join(filter(None, sides))
    which = "both hybrids" if len(hybrids) > 1 else hybrids[0]
    seeds = f"all {n} seeds" if n > 1 else "one seed"
    text = f"{sides} ({which}, {seeds})." if sides else f"inconclusive with {n} seed{'s' * (n > 1)}."
    return word + (text if word else text[0].upper() + text[1:])


def side(differences, single):
    if differences and min(differences) > 0:
        return f"better than {single}"
    if differences and max(differences) < 0:
        return f"worse than {single}"
    return ""


def compare_attention(attention):
    """attn_viz.py's test of all methods' maps, in one sentence."""
    test = attention["tests"][0]
    if "p" not in test:
        return "not answered yet, that needs two seeds of each method."
    n = sum(attention["names"][group] in test["groups"] for group in attention["group_of_run"])
    word = "yes, more than seeds do" if test["p"] <= SIGNIFICANT else "not shown"
    return (
        f"{word}, {test['between']:.2f} bits between methods, {test['within']:.2f} between seeds of one "
        f"method, p = {test['p']:.2g}, {n} runs."
    )


def compare_collapse(search):
    """Whether fewer random settings of a hybrid collapse than of DINO, and by RankMe alone."""
    if "DINO" not in search or not split_titles(search)[0]:
        return "Not answered yet: that needs a search with DINO and a hybrid."
    budget, n = search["DINO"][0]["budget"], len(search["DINO"])
    collapsed, ps = failures(search, lambda row: row["collapsed"])
    fell, rank_ps = failures(search, rank_fell)
    fewer = all(collapsed[title] < collapsed["DINO"] and p < SIGNIFICANT for title, p in ps.items())
    fewer_fell = all(fell[title] < fell["DINO"] and p < SIGNIFICANT for title, p in rank_ps.items())

    def count(counts, ps):
        return ", ".join(f"{counts[title]} of {title}'s (p = {p:.3f})" for title, p in ps.items())

    word = "Yes" if fewer and fewer_fell else "Fewer settings fail" if fewer else "Not shown"
    return (
        f"{word}. Of {n} random settings at {budget:g} PFLOP, {collapsed['DINO']} of DINO's collapse, "
        f"{count(collapsed, ps)}. Collapsed: final k-NN below that of random weights (possibly just slow "
        f"learning), or RankMe below a quarter of theirs. By RankMe alone{', not shown' * (not fewer_fell)}: "
        f"{fell['DINO']} of DINO's, {count(fell, rank_ps)}."
    )


def failures(search, failed):
    """{method: number of trials that failed}, {hybrid: Holm's p of its difference from DINO, by trial}."""
    signs = {title: {row["seed"]: failed(row) for row in rows} for title, rows in search.items()}
    hybrids, dino = split_titles(search)[0], signs["DINO"]
    pairs = [[signs[h][n] - dino[n] for n in signs[h].keys() & dino.keys()] for h in hybrids]
    ps = holm([sign_flip_p(differences) for differences in pairs])
    return {title: sum(sign.values()) for title, sign in signs.items()}, dict(zip(hybrids, ps, strict=True))


def list_removals(removals):
    """What each method can do without, by the rule of the study; no verdict after one seed."""
    sentences = []
    for title, rows in removals.items():
        runs, differences = pair_with_full(rows)
        full, lists = runs["full"], {}
        gain = learned(full)
        for label, found in differences.items():
            name, _, state = label.rpartition(" ")
            if state == "off":
                word = "one seed so far" if len(found) == 1 else verdict(t_interval(found), gain)
                name = "all at once" if name == "all" else name
                lists.setdefault(word, []).append(f"{name} {100 * np.mean(found):+.1f}")
        text = "; ".join(f"{word}: {', '.join(lists[word])}" for word in sorted(lists, key=VERDICTS.index))
        now, random = (100 * np.mean([row[name] for row in full]) for name in ("knn", "knn_init"))
        level = f"k-NN {now:.1f} with nothing removed, {random:.1f} untrained, {full[0]['budget']:g} PFLOP"
        counts = sorted({len(found) for found in differences.values()})
        seeds = f"{' or '.join(map(str, counts))} seed{'s' * (counts[-1:] > [1])}"
        sentences += [f"{title} ({seeds}; {level}): {text}."] if differences else []
    return " ".join(sentences) or "Not answered yet: no removal has been run."


def overview(search, models):
    """One row per method: its best setting with fresh seeds on the test set, and its random settings."""
    measured = [measures(row) for rows in models.values() for row in rows]
    main, singles = main_measure(models), split_titles(models)[1]
    others = [name for name in ("test linear", "mIoU") if any(name in row for row in measured)]
    columns = [main, *(f"vs {single}" for single in singles), *others]
    lines = []
    for title, runs in models.items():
        trials = search.get(title, [])
        pairs = [[] if title == single else paired(runs, models[single], main) for single in singles]
        differences = [
            "{} [{}]".format(*points(found)).replace(" to ", ", ") if found else "" for found in pairs
        ]
        collapsed = f"{sum(row['collapsed'] for row in trials)} of {len(trials)}" if trials else ""
        lines.append([title, *spreads(runs, [main]), *differences, *spreads(runs, others), collapsed])
    return table(["method", *columns, "collapsed in search"], lines)
