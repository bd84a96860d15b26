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
        text = f"{texts[0]} ({measure}, {which}, {seeds})."
        return word + (text if word else text[0].upper() + text[1:])
    text = "; ".join(f"{h} {text}" for h, text in zip(hybrids, texts, strict=True))
    return f"{word}{text} ({measure}, {seeds})."


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
        texts = [f"{counts[title]} of {possessive(title)} (p = {p:.3f})" for title, p in ps.items()]
        texts += [f"{counts[title]} of {possessive(title)}" for title in counts if title not in ("DINO", *ps)]
        return ", ".join(texts)

    word = "Yes" if fewer and fewer_fell else "Fewer settings fail" if fewer else "Not significant"
    by_rank = "By RankMe alone" if fewer_fell else "By RankMe alone, not significant"
    return (
        f"{word}. Of {len(dino)} random settings at {dino[0]['budget']:g} PFLOP, {collapsed['DINO']} of "
        f"DINO's fail, {count(collapsed, ps)}. A setting fails if its k-NN ends below that of random weights "
        f"or its RankMe (effective rank) below a quarter of theirs. {by_rank}: "
        f"{fell['DINO']} of DINO's, {count(fell, rank_ps)}."
    )


def possessive(title):
    return f"{title}'" if title.endswith("s") else f"{title}'s"


def failures(search, failed):
    """{method: number of trials for which failed(row)}, {hybrid: Holm's p of its difference from DINO}."""
    trials = {title: [{**row, "knn": failed(row)} for row in rows] for title, rows in search.items()}
    with_dino = {title: trials[title] for title in ("DINO", *split_titles(search)[0])}
    ps = {hybrid: p for (hybrid, _), (_, p) in compare(with_dino, METRIC).items()}
    return {title: sum(row["knn"] for row in rows) for title, rows in trials.items()}, ps


def compare_attention(attention):
    """In how many studies the methods' maps differ, from attn_viz.py's test of all methods in each.

    attention: {study: read_attention()}, of studies with at least two seeds.
    """
    tests = {study: figures["tests"][0] for study, figures in attention.items()}
    ps = holm([test["p"] for test in tests.values()])
    count = sum(p < SIGNIFICANT for p in ps)
    texts = []
    for study, test in tests.items():
        texts.append(f"{study} {test['between']:.2f} and {test['within']:.2f} (p = {test['p']:.2g})")
    return (
        f"In {count} of {len(tests)} studies. Jensen-Shannon divergence in bits between methods, and between "
        f"seeds of one method: {', '.join(texts)}."
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


def decide(studies):
    """{mechanism: (verdict, differences, runs without it)}; the first study with several seeds decides."""
    decided = {}
    for rows in studies:
        runs, differences = pair_with_full(rows)
        for name, outcome in verdicts(runs, differences).items():
            label = f"{name} off"
            if name not in decided or decided[name][0] == "one seed":
                decided[name] = outcome, differences[label], runs[label]
    return decided


def summarise_removals(removals):
    """What each hybrid can and cannot do without, and whether DINO can, where the verdict is clear.

    removals: {method: [rows of a study, ...]}.
    """
    decided = {title: decide(studies) for title, studies in removals.items()}
    dino = decided.pop("DINO", {})
    of_dino = {"can go": "so can DINO", "cannot go": "DINO cannot", None: "not tried in DINO"}
    sentences = []
    for title, mechanisms in decided.items():
        _, all_off, _ = mechanisms.pop("all", (None, [], None))
        lists = {}  # {what is said of them: mechanisms}
        for name, (outcome, _, _) in mechanisms.items():
            if outcome == "can go":
                said = of_dino.get(dino.get(name, [None])[0], "unclear in DINO")
                lists.setdefault(said, []).append(name)
        can = "; ".join(f"{enumeration(names, 'and')} ({said})" for said, names in lists.items())
        cannot = enumeration([name for name in mechanisms if mechanisms[name][0] == "cannot go"], "or")
        parts = [f"{verb} do without {names}" for verb, names in (("can", can), ("cannot", cannot)) if names]
        if parts:
            sentences.append(f"{title} {', but '.join(parts)}.")
        dead = [name for name, (_, _, runs) in mechanisms.items() if all(map(ce_is_dead, runs))]
        if dead := [name for name in dead if mechanisms[name][0] == "can go"]:
            sentences.append(f"Without {enumeration(dead, 'or')} its CE teaches nothing, only CC does.")
        if parts and len(all_off) > 1:
            sentences.append("All at once: {} points ({}).".format(*points(all_off)))
    return " ".join(sentences) or "Not answered yet: no removal has a clear result."


def points(differences):
    """Mean and 95 % interval of differences of shares, in points: ('+1.0', '+0.5 to +1.5'); '-' for n = 1."""
    if len(differences) == 1:
        return f"{100 * differences[0]:+.1f}", "-"
    low, high = t_interval(differences)
    return f"{100 * np.mean(differences):+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"


def enumeration(names, word):
    """ "a, b and c" """
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


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
    """How the hybrids differ from the figure in README: "Hybrid B: `--cc_local=True`"."""
    hybrids, _ = split_titles(models)
    titles_of = {}
    for title, rows in models.items():
        setting = rows[0]["setting"]
        if setting.get("head") == "two":
            titles_of.setdefault("CC has its own projector, `--head=two`", []).append(title)
        if setting.get("cc_local") and setting.get("n_local"):
            titles_of.setdefault("`--cc_local=True`", []).append(title)
    name = lambda titles: "hybrids" if titles == hybrids and len(titles) > 1 else " and ".join(titles)
    return "; ".join(f"{name(titles)}: {option}" for option, titles in titles_of.items())


def main_measure(models):
    """Test k-NN, or k-NN on held-out training images if a run has no test result."""
    rows = [row for group in models.values() for row in group]
    return "test k-NN" if all("test k-NN" in measures(row) for row in rows) else METRIC


def split_titles(models):
    """The names of the hybrids, and those of the methods with one loss."""
    hybrids = [title for title in models if title.startswith("Hybrid")]
    return hybrids, [title for title in models if title not in hybrids]
