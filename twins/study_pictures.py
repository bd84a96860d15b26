"""Figures of studies, as PNG bytes."""

import numpy as np

from twins.pictures import load_matplotlib, png
from twins.stats import t_interval

METRIC = "held-out k-NN"
METHODS = ("DINO", "Barlow Twins", "Hybrid A", "Hybrid B")


def colours(titles):
    """{title: colour}; a method has the same one in all figures."""
    return {title: f"C{i}" for i, title in enumerate(dict.fromkeys([*METHODS, *titles]))}


def best_figure(curves):
    """Expected k-NN accuracy of the best of n trials, {method: [k]}."""
    figure = load_matplotlib().figure.Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    for title, curve in curves.items():
        numbers = range(1, len(curve) + 1)
        line = {"marker": "o", "markersize": 3, "color": colours(curves)[title], "label": title}
        axis.plot(numbers, 100 * np.array(curve), **line)
    axis.set(xlabel="random settings tried", ylabel=f"expected best {METRIC}, %")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)
    return png(figure)


def cost_figure(groups):
    """k-NN accuracy against PFLOP: a thin line per seed, a thick one for their mean."""
    figure = load_matplotlib().figure.Figure(figsize=(4.2, 3.2), layout="constrained")
    axis = figure.subplots()
    for title, rows in groups.items():
        colour = colours(groups)[title]
        for row in rows:
            axis.plot(*np.array(row["curve"]).T * [[1], [100]], color=colour, linewidth=0.6, alpha=0.5)
        full = max(len(row["curve"]) for row in rows)
        mean = np.mean([row["curve"] for row in rows if len(row["curve"]) == full], axis=0)
        axis.plot(mean[:, 0], 100 * mean[:, 1], color=colour, linewidth=2, label=title)
    axis.set(xlabel="PFLOP of training", ylabel=f"{METRIC}, %")
    axis.locator_params("x", nbins=5)
    axis.legend(frameon=False)
    return png(figure)


def differences_figure(panels, margin=None):
    """{panel: {label: differences}}: a dot per seed, mean and 95 % interval beside them, a line at zero."""
    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel))
    columns, lines = min(len(panels), 3), -(-len(panels) // 3)
    size = (2.2 + 2.6 * columns, lines * (1 + 0.3 * len(labels)))
    figure = load_matplotlib().figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, panel) in zip(axes, panels.items(), strict=False):
        axis.axvline(0, color="black", linewidth=0.8)
        if margin:
            axis.axvline(100 * margin, color="grey", linewidth=0.8, linestyle="--")
        for label, differences in panel.items():
            y = labels.index(label)
            low, high = t_interval(differences)
            points = 100 * np.array(differences)
            axis.plot(points, [y + 0.15] * len(points), "o", color="C0", markersize=3, alpha=0.6)
            if len(points) > 1:
                axis.plot([100 * low, 100 * high], [y - 0.15] * 2, color="C3", linewidth=1.5)
            axis.plot(points.mean(), y - 0.15, "D", color="C3", markersize=4)
        axis.set(title=title, xlabel="difference, points", yticks=range(len(labels)), yticklabels=labels)
    axes[0].invert_yaxis()  # the axes share it
    return png(figure)
