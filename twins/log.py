"""log.jsonl, a run's rows: dicts of numbers with `step`; rows of evaluations also have `knn` and more."""

import json
import math

from twins.files import read_json_lines, write_file


class Log:
    """The rows of a run, in memory and in a file."""

    def __init__(self, path):
        self.path = path
        self.rows = []
        self.is_whole = False  # the file holds all rows but the last

    def add(self, row):
        """Adds a row without numbers that are not finite; one of an evaluation gets `knn_init`."""
        row = {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
        if "knn" in row:
            row["knn_init"] = next((r["knn_init"] for r in self.rows if "knn_init" in r), row["knn"])
        self.rows.append(row)
        return row

    def save(self):
        """Writes the last row; the first time, after a full disk and if the file was deleted, all rows."""
        appends = self.is_whole and self.path.is_file()
        self.is_whole = False
        if appends:
            with open(self.path, "a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        else:
            write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.is_whole = True


def read_log(path):
    """A log's rows, dicts with `step`; the last may be cut off. Raises UserError for another broken line."""
    return read_json_lines(path, lambda row: type(row["step"]) is int, cut_off=True)


def rows_until(saved, path, log):
    """The log's rows up to the checkpoint's step. If some were lost, the first is the checkpoint's."""
    rows = {row["step"]: row for row in log}
    rows = [row for step, row in rows.items() if step <= saved["step"]]
    first = saved.get("first_row") or rows[:1]
    if rows[:1] == first and len(rows) >= saved.get("n_rows", 0):
        return rows
    print(f"warning: {path.parent}/log.jsonl has lost rows; the first is taken from {path}")
    return first + [row for row in rows if row["step"] > first[0]["step"]]
