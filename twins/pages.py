"""Markdown: tables, and the blocks of a page that are made from what results/ holds."""

import re

import numpy as np

from twins.errors import UserError
from twins.files import read_json, write_file
from twins.pictures import printed

BLOCK = re.compile(r"<!-- (\w+) (\S+) -->\n(.*?)<!-- end \1 -->", re.DOTALL)
MARK = re.compile(r"<!-- \w+ \S+ -->")  # one end of a block; other comments have more words


def table(columns, rows):
    """A markdown table, first column left, others right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def fill(page, text_of):
    """Replaces the text between <!-- KIND NAME --> and <!-- end KIND --> in a page by text_of(KIND, NAME)."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page} cannot be read ({error.strerror})") from None
    blocks = len(BLOCK.findall(text))
    if not blocks or len(MARK.findall(text)) != 2 * blocks:
        raise UserError(f"{page} needs pairs of lines <!-- KIND NAME --> and <!-- end KIND -->")

    def replace(block):
        kind, name, _ = block.groups()
        return f"<!-- {kind} {name} -->\n{text_of(kind, name)}\n<!-- end {kind} -->"

    write_file(page, BLOCK.sub(replace, text))
    print(f"wrote {page}")


def table_of(file):
    """Markdown of attention.json, of seg_transfer.json, or of a list of probes: {"probes": [...]}."""
    report = read_json(file)
    lines = []
    if "probes" in report:  # top-1 accuracies in %, and ours - scikit-learn's
        for row in report["probes"]:
            lines.append([*row.values(), f"{row['ours'] - row['scikit-learn']:+.1f}"])
        return table([*report["probes"][0], "difference"], lines)
    if "runs" not in report:
        for name, result in report["results"].items():
            lines.append([name, f"{100 * result['miou']:.1f}", f"{100 * result['pixel_accuracy']:.1f}"])
        return table(["linear head on", "mIoU", "pixel accuracy"], lines)
    for name in report["names"]:  # means over heads and images, then over runs
        runs = [run for run in report["runs"] if run["group"] == name]
        means = [np.mean([run[column] for run in runs]) for column in ("mass_over_area", "entropy_bits")]
        lines.append([printed(name), *(f"{mean:.2f}" for mean in means)])
    images = f"{report['images']} photographs, {report['image_size']} pixels"
    entropy = f"entropy, bits (uniform {report['runs'][0]['entropy_uniform']:.2f})"
    return table([images, "mass on the object / its area", entropy], lines)
