"""The sentences that answer each question, from the rows of studies."""

import numpy as np

from twins.statistics import holm, sign_flip_p, t_interval, verdict
from twins.studies import learned, measures, pair_with_full, paired, rank_fell
from twins.study_pictures import METRIC

SIGNIFICANT = 0.05
VERDICTS = ("one seed so far", "too little learned", "can go", "cannot go", "unclear")


def compare(groups, measure):
    """{(hybrid, single loss): (paired differences, Holm's p over all of these)}."""
    hybrids, singles = split_titles(groups)
    found = {(h, s): paired(groups[h], groups[s], measure) for h in hybrids for s in singles}
    ps = holm([sign_flip_p(differences) for differences in found.values()])
    return {pair: (found[pair], p) for pair, p in zip(found, ps, strict=True)}


def compare_models(models, measure):
    """Each hybrid against each single loss: yes or no only where Holm's p over all of these is below 0.05."""
    (hybrids, singles), found = split_titles(models), compare(models, measure)
    n = min(len(differences) for differences, _ in found.values())

    def ahead(h, s, sign):
        differences, p = found[h, s]
        return p < SIGNIFICANT and sign * np.mean(differences) > 0

    sides = [side([d for h in hybrids for d in found[h, s][0]], s) for s in singles]
    if any(all(ahead(h, s, 1) for s in singles) for h in hybrids):
        word = "Yes: "
    elif any(all(ahead(h, s, -1) for h in hybrids) for s in singles):
        word = "No: "
    else:
        word = ""
    if not any(sides):
        return f"Inconclusive with {n} seed{'s' * (n != 1)}."
    sides = ", ".join(text or f"no clear difference from {s}" for text, s in zip(sides, singles, strict=True))
    which = "both hybrids" if len(hybrids) > 1 else hybrids[0]
    text = f"{sides} ({which}, {f'all {n} seeds' if n > 1 else 'one seed'})."
    return word + (text if word else text[0].upper() + text[1:])


def side(differences, single):
    """Better or worse, if all seeds of all hybrids agree, else ''."""
    if differences and min(differences) > 0:
        return f"better than {single}"
    return f"worse than {single}" if differences and max(differences) < 0 else ""


def compare_trials(search):
    """In how many random settings each hybrid is better; in one trial, methods share the common options."""
    wins, found = {}, compare(search, METRIC)
    for (hybrid, single), (differences, p) in found.items():
        wins.setdefault(single, []).append(f"{hybrid} in {sum(d > 0 for d in differences)} (p = {p:.3f})")
    n = min(len(differences) for differences, _ in found.values())
    ahead = "; ".join(f"ahead of {single}: {', '.join(texts)}" for single, texts in wins.items())
    return f"In {n} random settings, {ahead}."


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
        f"{word}. Of {n} random settings at {budget:g} PFLOP, {collapsed['DINO']} of DINO's fail, "
        f"{count(collapsed, ps)}: final k-NN below that of random weights (possibly just slow learning), or "
        f"RankMe below a quarter of theirs. By RankMe alone{', not shown' * (not fewer_fell)}: "
        f"{fell['DINO']} of DINO's, {count(fell, rank_ps)}."
    )


def failures(search, failed):
    """{method: number of trials that failed}, {hybrid: Holm's p of its difference from DINO, by trial}."""
    signs = {title: {row["seed"]: failed(row) for row in rows} for title, rows in search.items()}
    hybrids, dino = split_titles(search)[0], signs["DINO"]
    pairs = [[signs[h][n] - dino[n] for n in signs[h].keys() & dino.keys()] for h in hybrids]
    ps = holm([sign_flip_p(differences) for differences in pairs])
    return {title: sum(sign.values()) for title, sign in signs.items()}, dict(zip(hybrids, ps, strict=True))


def compare_attention(attention):
    """attn_viz.py's test of all methods' maps, in one sentence."""
    test = attention["tests"][0]
    if "p" not in test:
        return "not answered yet, that needs two seeds of each method."
    n = sum(attention["names"][group] in test["groups"] for group in attention["group_of_run"])
    word = "yes, methods differ more than seeds" if test["p"] <= SIGNIFICANT else "not shown"
    return (
        f"{word}, {test['between']:.2f} bits between methods, {test['within']:.2f} between seeds of one "
        f"method, p = {test['p']:.2g}, {n} runs."
    )


def list_removals(removals):
    """What each method can do without, by the rule of the study; no verdict after one seed."""
    sentences = []
    for title, rows in removals.items():
        runs, differences = pair_with_full(rows)
        full, lists, absent = runs["full"], {}, []
        gain = learned(full)
        for label, found in differences.items():
            name, _, state = label.rpartition(" ")
            if state == "on":
                absent.append(name)
                continue
            word = "one seed so far" if len(found) == 1 else verdict(t_interval(found), gain)
            name = "all at once" if name == "all" else name
            count = sum(row["collapsed"] for row in runs[label])
            share = f"{count} of {len(found)} " * (count < len(found))
            collapsed = f" ({share}collapsed)" * bool(count)
            lists.setdefault(word, []).append(f"{name} {100 * np.mean(found):+.1f}{collapsed}")
        text = "; ".join(f"{word}: {', '.join(lists[word])}" for word in sorted(lists, key=VERDICTS.index))
        now, random = (100 * np.mean([row[name] for row in full]) for name in ("knn", "knn_init"))
        level = f"k-NN {now:.1f}, untrained {random:.1f}, {full[0]['budget']:g} PFLOP"
        level += f", does without {', '.join(absent)} anyway" * bool(absent)
        counts = sorted({len(found) for found in differences.values()})
        seeds = f"{' or '.join(map(str, counts))} seed{'s' * (counts[-1:] > [1])}"
        sentences += [f"{title} ({seeds}; {level}): {text}."] if differences else []
    return " ".join(sentences) or "Not answered yet: no removal has been run."


def when_yes(models):
    """When an answer is yes or no, and how many seeds that takes."""
    n, (hybrids, singles) = min(map(len, models.values())), split_titles(models)
    pairs, enough = len(hybrids) * len(singles), n
    while pairs * 2 / 2**enough > SIGNIFICANT:
        enough += 1
    more = f": that takes {enough} seeds, with {n} no p is below {2 / 2**n:.2g}" * (enough > n)
    return f"A yes or no needs p < {SIGNIFICANT} (paired sign-flip test, Holm){more}. {describe_cc(models)}"


def describe_cc(models):
    """How the hybrids' settings differ from what README draws."""
    settings = {title: rows[0]["setting"] for title, rows in models.items()}
    two = [title for title, setting in settings.items() if setting.get("head") == "two"]
    local = [
        title for title, setting in settings.items() if setting.get("cc_local") and setting.get("n_local")
    ]
    sentences = f"CC has a projector of its own in {' and '.join(two)} (`--head=two`). " * bool(two)
    return sentences + f"CC has local views in {' and '.join(local)} (`--cc_local=True`). " * bool(local)


def main_measure(models):
    """Test k-NN, or k-NN on held-out training images if a run has no test result."""
    rows = [row for group in models.values() for row in group]
    return "test k-NN" if all("test k-NN" in measures(row) for row in rows) else METRIC


def split_titles(models):
    """The names of the hybrids, and those of the methods with one loss."""
    hybrids = [title for title in models if title.startswith("Hybrid")]
    return hybrids, [title for title in models if title not in hybrids]
