"""The sentences that answer each question, from the rows of studies."""

import numpy as np

from twins.stats import holm, sign_flip_p, t_interval, verdict
from twins.studies import ce_is_dead, learned, measures, pair_with_full, paired, rank_fell, trial_knn
from twins.study_pictures import METRIC

SIGNIFICANT = 0.05


def compare(groups, measure):
    """{(hybrid, single loss): (paired differences, p of their mean after Holm over all of these)}."""
    hybrids, singles = split_titles(groups)
    differences = {(h, s): paired(groups[h], groups[s], measure) for h in hybrids for s in singles}
    ps = holm([sign_flip_p(values) for values in differences.values()])
    return {pair: (differences[pair], p) for pair, p in zip(differences, ps, strict=True)}


def compare_models(models, measure):
    """Each hybrid against each single loss: yes or no only where Holm's p over all of these is below 0.05.

    Yes: a hybrid is better than both single losses; no: both hybrids are worse than one of these; yes and no:
    and better than the other.
    """
    hybrids, singles = split_titles(models)
    comparisons = compare(models, measure)
    n = min(len(differences) for differences, _ in comparisons.values())

    def significant(h, s, sign):
        differences, p = comparisons[h, s]
        return p < SIGNIFICANT and sign * np.mean(differences) > 0

    def all_hybrids_against_one(sign):
        return any(all(significant(h, s, sign) for h in hybrids) for s in singles)

    texts = [list_sides({s: comparisons[h, s][0] for s in singles}) for h in hybrids]
    if any(all(significant(h, s, 1) for s in singles) for h in hybrids):
        word = "Yes: "
    elif all_hybrids_against_one(-1):
        word = "Yes and no: " if all_hybrids_against_one(1) else "No: "
    else:
        word = ""
    seeds = count_seeds(n)
    if not any(" than " in text for text in texts):
        return f"Inconclusive with {seeds}."
    if len(set(texts)) == 1:
        which = "both hybrids" if len(hybrids) > 1 else hybrids[0]
        text = f"{texts[0]} ({which}, {seeds})."
        return word + (text if word else text[0].upper() + text[1:])
    return f"{word}{'; '.join(f'{h} {text}' for h, text in zip(hybrids, texts, strict=True))} ({seeds})."


def list_sides(differences):
    """{single loss: differences} -> "better than A, worse than B", where the 95 % interval excludes 0."""
    sides = {"better than": [], "worse than": [], "no clear difference from": []}
    for single, values in differences.items():
        low, high = t_interval(values)
        side = "better than" if low > 0 else "worse than" if high < 0 else "no clear difference from"
        sides[side].append(single)
    return ", ".join(f"{side} {' and '.join(names)}" for side, names in sides.items() if names)


def compare_trials(search):
    """In how many random settings each hybrid is better; within a trial, methods share common options."""
    trials = {title: [{**row, "knn": trial_knn(row)} for row in rows] for title, rows in search.items()}
    comparisons = compare(trials, METRIC)
    n = min((len(differences) for differences, _ in comparisons.values()), default=0)
    if n < 2:
        return "No two trials of all methods are finished, so no method is compared with another."
    counts = {}
    for (hybrid, single), (differences, p) in comparisons.items():
        sign, verb = (1, "beats") if np.mean(differences) > 0 else (-1, "loses to")
        count = sum(sign * difference > 0 for difference in differences)
        counts.setdefault(hybrid, []).append(f"{verb} {single} in {count} (p = {p:.3f})")
    text = "; ".join(f"{hybrid} {', '.join(texts)}" for hybrid, texts in counts.items())
    return f"Of {n} random settings (failures count as untrained; p: mean difference), {text}."


def compare_collapse(search):
    """Whether fewer random settings of a hybrid collapse than of DINO, and by RankMe alone."""
    if "DINO" not in search or not split_titles(search)[0]:
        return "Not answered yet: that needs a search with DINO and a hybrid."
    dino = search["DINO"]
    collapsed, ps = failures(search, lambda row: row["collapsed"])
    fell, rank_ps = failures(search, rank_fell)
    fewer = all(collapsed[title] < collapsed["DINO"] and p < SIGNIFICANT for title, p in ps.items())
    fewer_fell = all(fell[title] < fell["DINO"] and p < SIGNIFICANT for title, p in rank_ps.items())

    def count(counts, ps):
        return ", ".join(f"{counts[title]} of {title}'s (p = {p:.3f})" for title, p in ps.items())

    word = "Yes" if fewer and fewer_fell else "Fewer settings fail" if fewer else "Not significant"
    by_rank = "By RankMe alone" if fewer_fell else "By RankMe alone, not significant"
    return (
        f"{word}. Of {len(dino)} random settings at {dino[0]['budget']:g} PFLOP, {collapsed['DINO']} of "
        f"DINO's fail, {count(collapsed, ps)}. A setting fails if its k-NN ends below that of random weights "
        f"(perhaps it only learns slowly) or its RankMe below a quarter of theirs. {by_rank}: "
        f"{fell['DINO']} of DINO's, {count(fell, rank_ps)}."
    )


def failures(search, failed):
    """{method: number of trials for which failed(row)}, {hybrid: Holm's p of its difference from DINO}."""
    titles = ("DINO", *split_titles(search)[0])
    trials = {title: [{**row, "knn": failed(row)} for row in search[title]] for title in titles}
    ps = {hybrid: p for (hybrid, _), (_, p) in compare(trials, METRIC).items()}
    return {title: sum(row["knn"] for row in rows) for title, rows in trials.items()}, ps


def compare_attention(attention):
    """attn_viz.py's test of all methods' maps, in one sentence."""
    test = attention["tests"][0]
    if "p" not in test:
        return "not answered yet, that needs two seeds of each method."
    n = sum(attention["names"][group] in test["groups"] for group in attention["group_of_run"])
    word = "yes" if test["p"] <= SIGNIFICANT else "not significant"
    return (
        f"{word}, {test['between']:.2f} bits between methods, {test['within']:.2f} between seeds of one "
        f"method, p = {test['p']:.2g}, {n} runs."
    )


def verdicts(runs, differences):
    """{mechanism that was switched off: verdict} by the rule of the study, of pair_with_full()."""
    outcomes = {}
    for label, values in differences.items():
        if label.endswith(" off"):
            sure = len(values) > 1
            outcome = verdict(t_interval(values), learned(runs["full"])) if sure else "one seed"
            outcomes[label.removesuffix(" off")] = outcome
    return outcomes


def summarise_removals(removals):
    """What each hybrid can and cannot do without, and what DINO cannot, where the verdict is clear.

    removals: {method: [rows of a study, ...]}; the first study that has a mechanism decides.
    """
    sentences = []
    for title in sorted(removals, key=lambda title: title == "DINO"):  # the hybrids first
        outcomes, dead = {}, {}
        for rows in reversed(removals[title]):
            runs, differences = pair_with_full(rows)
            for name, outcome in verdicts(runs, differences).items():
                outcomes[name] = outcome
                dead[name] = all(map(ce_is_dead, runs[f"{name} off"]))
        outcomes.pop("all", None)
        parts = []
        for outcome, verb, word in (("can go", "can", "and"), ("cannot go", "cannot", "or")):
            names = [name for name in outcomes if outcomes[name] == outcome]
            if names and (title, verb) != ("DINO", "can"):  # CC does not make those unnecessary
                parts.append(f"{verb} do without {enumeration(names, word)}")
        if parts:
            sentences.append(f"{title} {', but '.join(parts)}.")
        if names := [name for name in outcomes if dead[name] and outcomes[name] == "can go"]:
            sentences.append(f"Without {enumeration(names, 'or')} its CE teaches nothing, only CC does.")
    return " ".join(sentences) or "Not answered yet: no removal has a clear result."


def enumeration(names, word):
    """ "a, b and c" """
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def count_seeds(*counts):
    """1 -> "1 seed"; 2, 3 -> "2 or 3 seeds"."""
    return f"{' or '.join(map(str, counts))} {'seed' if counts == (1,) else 'seeds'}"


def when_yes(models):
    """When an answer is yes or no, and how many seeds that takes."""
    n = min(map(len, models.values()))
    hybrids, singles = split_titles(models)
    enough = n
    while len(hybrids) * len(singles) * 2 / 2**enough > SIGNIFICANT:
        enough += 1
    more = f": {enough} seeds; with {n} no p is below {2 / 2**n:.2g}" if enough > n else ""
    return (
        "Better and worse mean that the uncorrected 95 % interval excludes 0. A yes or no needs "
        f"p < {SIGNIFICANT} (paired sign-flip test, Holm; attention: permutation test){more}."
    )


def variants(models):
    """How the hybrids differ from the figure in README: "Hybrid A and Hybrid B: `--head=two`"."""
    titles_of = {}
    for title, rows in models.items():
        setting = rows[0]["setting"]
        if setting.get("head") == "two":
            titles_of.setdefault("`--head=two`", []).append(title)
        if setting.get("cc_local") and setting.get("n_local"):
            titles_of.setdefault("`--cc_local=True`", []).append(title)
    return "; ".join(f"{' and '.join(titles)}: {option}" for option, titles in titles_of.items())


def main_measure(models):
    """Test k-NN, or k-NN on held-out training images if a run has no test result."""
    rows = [row for group in models.values() for row in group]
    return "test k-NN" if all("test k-NN" in measures(row) for row in rows) else METRIC


def split_titles(models):
    """The names of the hybrids, and those of the methods with one loss."""
    hybrids = [title for title in models if title.startswith("Hybrid")]
    return hybrids, [title for title in models if title not in hybrids]
