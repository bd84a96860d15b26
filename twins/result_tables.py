"""The tables of results/README.md that belong to no study, from the JSON files beside it."""

import re

import numpy as np

from twins.files import read_json, write_file
from twins.pictures import printed
from twins.reports import table

BLOCK = re.compile(r"<!-- table (\S+) -->\n(.*?)<!-- end table -->", re.DOTALL)


def write_tables(page):
    """Replaces the text from <!-- table FILE --> to <!-- end table --> by a table of FILE, beside `page`."""

    def replace(block):
        return f"<!-- table {block[1]} -->\n{table_of(page.parent / block[1])}\n<!-- end table -->"

    write_file(page, BLOCK.sub(replace, page.read_text(encoding="utf-8")))
    print(f"wrote {page}")


def table_of(file):
    """Markdown of attention.json, of seg_transfer.json, or of a list of probes: {"probes": [...]}."""
    found = read_json(file)
    if "probes" in found:
        return probes_table(found["probes"])
    return attention_table(found) if "runs" in found else segmentation_table(found["results"])


def attention_table(found):
    """One row per group: means over heads and images, then over runs."""
    lines = []
    for name in found["names"]:
        runs = [run for run in found["runs"] if run["group"] == name]
        means = [np.mean([run[column] for run in runs]) for column in ("mass_over_area", "entropy_bits")]
        lines.append([printed(name), *(f"{mean:.2f}" for mean in means)])
    images = f"{found['images']} photographs, {found['image_size']} pixels"
    uniform = found["runs"][0]["entropy_uniform"]
    columns = [images, "mass on the object / its area", f"entropy, bits (uniform {uniform:.2f})"]
    return table(columns, lines)


def segmentation_table(results):
    lines = [
        [name, *(f"{100 * result[share]:.1f}" for share in ("miou", "pixel_accuracy"))]
        for name, result in results.items()
    ]
    return table(["linear head on", "mIoU", "pixel accuracy"], lines)


def probes_table(probes):
    """Top-1 accuracies in %: the keys of the first row, and ours - scikit-learn's."""
    lines = [[*row.values(), f"{row['ours'] - row['scikit-learn']:+.1f}"] for row in probes]
    return table([*probes[0], "difference"], lines)
