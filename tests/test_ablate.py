"""ablate.py and its parts: settings, jobs, rows, tables, and a study that is killed and resumed."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ablate
from conftest import ROOT, launch
from twins.answer import answer, random_weights, removals_table, result_table
from twins.errors import UserError
from twins.files import read_json, write_file
from twins.jobs import run_jobs
from twins.pages import BLOCK, fill
from twins.reports import read_attention, report_study, write_report
from twins.sentences import compare_models, compare_trials, decide, summarise_removals
from twins.settings import draw_setting, read_script, refuse_options, removals, toggle
from twins.stats import sign_flip_p, t_interval
from twins.studies import (
    best_setting,
    check_rows,
    group_rows,
    paired,
    read_rows,
    run_results,
    unfinished,
    write_rows,
)

WITH_TEACHER = ("dino", "hybrid_a", "hybrid_b")


def test_settings_are_drawn_from_the_space_and_shared():
    draws = {}
    for script in (*WITH_TEACHER, "barlow"):
        options = read_script(ROOT / f"{script}.py", ("cifar10", "small"))
        draws[script] = [draw_setting(ablate.SPACE, 0, trial, options) for trial in range(40)]
        assert draws[script] == [draw_setting(ablate.SPACE, 0, trial, options) for trial in range(40)]
        assert all(setting.keys() <= options.keys() for setting in draws[script])
    for barlow, hybrid in zip(draws["barlow"], draws["hybrid_a"], strict=True):
        assert all(hybrid[option] == value for option, value in barlow.items())
    assert "alpha" not in draws["dino"][0] and "ema" not in draws["barlow"][0]
    assert set(ablate.SPACE) == {option for setting in draws["hybrid_b"] for option in setting}
    for option, values in ablate.SPACE.items():
        seen = [setting[option] for setting in draws["hybrid_b"]]
        if isinstance(values, tuple):
            assert min(seen) >= values[0] and max(seen) <= values[1]
            assert 0.25 < np.mean(np.log(seen) < np.mean(np.log(values))) < 0.75  # log-uniform: half below
        else:
            assert set(seen) == set(values)
    other = draw_setting(ablate.SPACE, 1, 0, read_script(ROOT / "dino.py", ()))
    assert other != draws["dino"][0]


@pytest.mark.parametrize("script", WITH_TEACHER)
def test_every_mechanism_can_be_toggled_twice(script):
    options = read_script(ROOT / f"{script}.py", ("cifar10", "small"))
    for name, mechanism in ablate.MECHANISMS.items():
        once, first = toggle(mechanism, {}, options)
        assert {**options, **once} != options, name
        _, second = toggle(mechanism, once, options)
        assert {first, second} == {"on", "off"}, name
    settings = removals(ablate.MECHANISMS, {"head_bn": False, "ema": 0.9, "n_local": 2}, options)
    assert len(settings) == 2 + len(ablate.MECHANISMS) and "BatchNorm in the head on" in settings
    assert settings["EMA schedule off"]["ema_end"] == 0.9 and "head_bn" in settings["all off"]
    some = removals(
        ablate.MECHANISMS,
        {"head_bn": False, "ema": 0.9, "n_local": 2},
        options,
        "multi-crop,EMA schedule,all",
    )
    assert list(some) == ["full", "EMA schedule off", "multi-crop off", "all off"]
    assert all(settings[label] == setting for label, setting in some.items())  # so rows fit in either study
    with pytest.raises(UserError, match="ema is not a mechanism: choose from centering, sharpening"):
        removals(ablate.MECHANISMS, {}, options, "ema")
    fork = {name: value for name, value in options.items() if name not in ("head_bn", "center_momentum")}
    assert len(removals(ablate.MECHANISMS, {}, fork)) == len(settings) - 1  # without a mechanism
    for mechanism in ablate.MECHANISMS.values():
        assert toggle(mechanism, settings["all off"], options)[1] == "on"


def job(name, log, *commands, finish=lambda name: None):
    def steps():
        for command in commands:
            if (yield ["-c", command]):
                raise UserError(f"{name} has failed")
        finish(name)

    return name, log / f"{name}.txt", steps()


def test_a_failing_job_costs_itself_alone(tmp_path):
    wait, finished = "import time; time.sleep(0.3)", []

    def finish(name):
        if name == "unsaved":
            raise KeyError("row")
        finished.append(name)

    jobs = [job("good", tmp_path, wait, "print('done')", finish=finish), job("bad", tmp_path, "exit(3)")]
    jobs += [job(name, tmp_path, wait, finish=finish) for name in ("unsaved", "last")]
    failures, stopped = run_jobs(jobs, 2)
    assert failures == {"bad": "bad has failed", "unsaved": "KeyError: 'row'"} and not stopped
    assert sorted(finished) == ["good", "last"]
    assert (tmp_path / "good.txt").read_text() == "done\n"


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM], [signal.SIGHUP]])
def test_a_signal_lets_the_jobs_save(tmp_path, numbers):
    saves = "import signal, time\n"
    saves += f"signal.signal(15, lambda *_: exit(open(r'{tmp_path}/saved', 'w').write('1')))"
    saves += f"\nopen(r'{tmp_path}/ready', 'w')\ntime.sleep(60)"
    script = "import os, sys, threading, time; from pathlib import Path\nsys.path.insert(0, sys.argv[1])\n"
    script += "from test_ablate import job, run_jobs\nfolder = Path(sys.argv[2])\n"
    script += "print(run_jobs([job('a', folder, sys.argv[3]), job('b', folder, 'pass')], 1))"
    words = [sys.executable, "-c", script, ROOT / "tests", tmp_path, saves]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=paths())
    wait_for(lambda: (tmp_path / "ready").exists())
    for number in numbers:
        process.send_signal(number)
    assert process.communicate(timeout=30)[0].endswith("({}, True)\n")
    assert (tmp_path / "saved").exists() and not (tmp_path / "b.txt").exists()


@pytest.mark.parametrize("line", ['{"script": "dino", "la', "[]", '{"script": "dino"}', "\udcff"])
def test_a_broken_row_is_one_sentence(tmp_path, line):
    write_rows(tmp_path, [row("dino", "full", 0, 0.3)])
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + file.read_text())
    assert len(read_rows(tmp_path)) == 1
    file.write_text(file.read_text() + line, errors="surrogateescape")
    with pytest.raises(UserError, match=r"line 3 of .*rows.jsonl is broken, or of another version: fix or"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"knn": math.nan},
        {"curve": []},
        {"curve": [[1]]},
        {"curve": [["a", "b"]]},
        {"curve": [[0, True]]},
        {"curve": [[-1, 0.2]]},
        {"knn": 34.84},
        {"test": {"mIoU": -3}},
        {"test": {"test knn": True}},
        {"test": 1},
        {"test": {"test knn": None}},
        {"pflop": "1"},
        {"rank": math.inf},
        {},
    ],
)
def test_odd_and_repeated_rows_are_one_sentence(tmp_path, change):
    rows = [row("dino", "full", 0, 0.3)]
    write_rows(tmp_path, [*rows, {**rows[0], **change}])
    with pytest.raises(
        UserError, match="line 2 of .* is broken" if change else "repeats the run dino full 0"
    ):
        read_rows(tmp_path)


def test_a_misspelt_search_is_refused(monkeypatch):
    monkeypatch.setattr(ablate, "search_dir", "/nonexistent")
    with pytest.raises(UserError, match="--search_dir=/nonexistent holds no rows of a search"):
        ablate.make_cells()


def test_settings_are_taken_from_a_search_alone(tmp_path, monkeypatch):
    write_rows(tmp_path, [row("dino", "EMA off", 0, 0.9), row("dino", "full", 0, 0.3)])
    monkeypatch.setattr(ablate, "search_dir", str(tmp_path))
    for study in ("search", "models", "removal"):
        monkeypatch.setattr(ablate, "study", study)
        with pytest.raises(UserError, match="holds dino EMA off: not a search study's row"):
            ablate.make_cells()


@pytest.mark.parametrize("name", ["README.md", "cost.png", "attention.json"])
def test_files_that_are_not_a_studys_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is not a study's, and would be overwritten: give another"):
        unfinished([], "models", tmp_path, ablate.name_of)
    write_rows(tmp_path, [row("dino", "full", 0, 0.3)])
    assert unfinished([], "models", tmp_path, ablate.name_of) == []


@pytest.mark.parametrize(
    "study, given, said",
    [
        ("models", {"trials": 2}, "--trials is for --study=search, not for models"),
        (
            "removal",
            {"changes": "n_local=0", "search_dir": "a"},
            "--changes is for --study=search, not for rem",
        ),
        ("search", {"seeds": 2}, "--seeds is for --study=models or removal, not for search"),
        ("search", {"changes": "n_local=0"}, "--changes needs --search_dir"),
    ],
)
def test_an_option_that_a_study_does_not_use_is_refused(study, given, said):
    with pytest.raises(UserError, match=said):
        refuse_options(study, given)
    refuse_options("search", {"changes": "n_local=0", "search_dir": "a", "trials": 2})


def test_rows_of_another_study_are_one_sentence(tmp_path):
    for label, test, study in (
        ("trial", {}, "removal"),
        ("trial", {}, "models"),
        ("full", {}, "search"),
        ("full", {"test": {"test knn": 0.5}}, "removal"),
    ):
        write_rows(tmp_path, [row("dino", label, 0, 0.3, **test)])
        with pytest.raises(UserError, match=rf"holds dino {label}: not a {study} study's row"):
            write_report(tmp_path, study)
        assert not (tmp_path / "README.md").exists()
    write_rows(tmp_path, [row("dino", "full", 0, 0.3), row("dino", "full", 1, 0.3, budget=0.2)])
    with pytest.raises(UserError, match=r"runs of 0.1 and 0.2 PFLOP: give another --out_dir"):
        unfinished([], "models", tmp_path, ablate.name_of)
    write_file(tmp_path / "attention.json", '{"tests": []}')
    assert read_attention(tmp_path) == {}
    sound = read_json(ROOT / "results" / "models-cifar10" / "attention.json")
    broken = [{"tests": tests} for tests in (5, [{}], [{"groups": ["a"]}], {"a": 1})]
    broken += [{"divergence_bits": [[0.0]]}, {"seed_of_run": 3}, {"group_of_run": None}]
    for values in broken:
        write_file(tmp_path / "attention.json", json.dumps({**sound, **values}))
        with pytest.raises(UserError, match=r"attention.json is broken: remove it"):
            read_attention(tmp_path)


def paths():
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def wait_for(condition):
    end = time.time() + 300  # on a busy machine
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def row(script, label, seed, knn, **more):
    about = {"script": script, "label": label, "seed": seed, "knn": knn, "knn_init": 0.2, "collapsed": False}
    about.update(setting={"wd": knn}, id="0", budget=0.1, git_commit="a" * 40, git_edited=False, device="cpu")
    about.update(rank=9.0, rank_init=10.0, pflop=0.1, seconds=60.0, steps=5, views=4)
    return {**about, "curve": [[0, 0.2], [0.1, knn]], **more}


def test_tables_of_planted_rows():
    rows = [row("dino", "trial", 0, 0.3), row("dino", "trial", 1, 0.9, collapsed=True)]
    rows.append(row("dino", "trial", 2, 0.4))
    assert best_setting(rows, "dino") == {"wd": 0.4}
    with pytest.raises(UserError, match="no trial of barlow without collapse"):
        best_setting(rows, "barlow")
    text = report_study(rows, "search")["README.md"]
    assert "| DINO | 3 | 1 of 3 (6 to 79 %) | 20.0 ± 0.0 | 53.3 ± 32.1 | 30.0 |  |  |  | 40.0 |" in text
    assert "- DINO: `--wd=0.4`" in text and "Commit aaaaaaaa;" in text

    rows = [row("dino", "trial 2", 500, 0.31), row("dino", "by hand", 500, 0.35, rank=2.0, collapsed=True)]
    files = report_study(rows, "search")
    text = files["README.md"]
    assert text.startswith("# Later round: 2 runs") and set(files) == {"README.md"}
    assert "| DINO | trial 2 | 5 | 31.0 | 9.0 | no | 20.0 | 10.0 |" in text
    assert "| DINO | by hand | 5 | 35.0 | 2.0 | yes |" in text and "- DINO: `--wd=0.31`" in text

    seeds = range(1000, 1006)
    rows = [row("dino", "full", seed, 0.4 + seed / 1e5) for seed in seeds]
    rows += [row("dino", "EMA off", seed, 0.3 + seed / 1e5, git_commit="b" * 40) for seed in seeds]
    rows += [row("dino", "centering off", seed, 0.405 + seed / 1e5) for seed in seeds][:5]
    files = report_study(rows, "removal")
    text = files["README.md"]
    assert "| EMA off | 6 | -10.0 | -10.0 to -10.0 | 0.031 | 0.062 | 0 of 6 (0 to 39 %) | cannot go |" in text
    assert "| centering off | 5 | +0.5 | +0.5 to +0.5 | 0.062 | 0.062 | 0 of 5 (0 to 43 %) | can go |" in text
    assert "Rows of 2 commits, whose code may differ: aaaaaaaa, bbbbbbbb;" in text
    assert files["removal.png"].startswith(b"\x89PNG") and "information" not in text
    rows = [{**r, "teacher_information": 1.5 if r["label"] == "full" else 0.004} for r in rows]
    text = report_study(rows, "removal")["README.md"]
    assert "with random weights. The teacher's information: 1.500 nats." in text
    assert "verdict | teacher's information, nats |" in text and "cannot go | 0.004 |" in text
    assert "| -10.0, cannot go, CE dead in 6 |" in removals_table({"DINO": [rows]})

    rows = [row("dino", "full", 1, 0.4), row("dino", "full", 2, 0.5), row("barlow", "full", 2, 0.6)]
    assert paired(rows[2:], rows[:2], "held-out k-NN") == pytest.approx([0.1])
    rows[2]["test"] = {"test linear": 0.7}  # DINO has none, so there is nothing to compare
    files = report_study(rows, "models")
    text = files["README.md"]
    assert "| Barlow Twins - DINO | 1 | +10.0 |" in text and "| test linear | pairs" not in text
    assert "| Barlow Twins | 1 | 0.1 | 5 | 4 | 1.0 | 0 of 1 (0 to 79 %) | 9.0 (10.0) | 60.0 | 70.0 |" in text
    assert set(files) == {"README.md", "cost.png", "differences.png"}


def test_the_second_round_has_the_best_of_the_first_and_one_by_hand(tmp_path, monkeypatch):
    first = [row("barlow", "trial", n, knn, setting={"lambd": knn}) for n, knn in enumerate((0.3, 0.5, 0.4))]
    first.append(row("barlow", "trial", 3, 0.9, collapsed=True))
    write_rows(tmp_path, first)
    options = {"study": "search", "scripts": "barlow", "search_dir": str(tmp_path), "trials": 2, "pflop": 1.0}
    for name, value in options.items():
        monkeypatch.setattr(ablate, name, value)
    cells = ablate.make_cells()
    assert [cell["label"] for cell in cells] == ["trial 1", "trial 2", "by hand"]
    settings = [{"lambd": 0.5}, {"lambd": 0.4}, ablate.BY_HAND["barlow"]]
    assert [cell["setting"] for cell in cells] == settings
    assert {cell["seed"] for cell in cells} == {ablate.LATER_ROUND_SEED}
    write_rows(tmp_path, [row("barlow", cell["label"], 500, 0.3, setting=cell["setting"]) for cell in cells])
    monkeypatch.setattr(ablate, "trials", 1)
    monkeypatch.setattr(ablate, "changes", "n_local=0; wd=0.1 proj_dim=64")  # a third round
    found = {cell["label"]: cell["setting"] for cell in ablate.make_cells()}
    assert found == {
        "trial 1": {"lambd": 0.5},
        "n_local=0": {"lambd": 0.5, "n_local": 0},
        "wd=0.1 proj_dim=64": {"lambd": 0.5, "wd": 0.1, "proj_dim": 64},
    }
    assert cells[0] in ablate.make_cells()  # its row can be taken over from the second round
    check_rows([row("barlow", label, 500, 0.3) for label in found], "search", tmp_path)
    for changes in ("n_local", "head=two", "ema_end=1.0", " ", "wd={{}}"):
        monkeypatch.setattr(ablate, "changes", changes)
        with pytest.raises(UserError, match=f"--changes={changes}: write options like"):
            ablate.make_cells()
    for script, setting in ablate.BY_HAND.items():
        assert setting.keys() <= read_script(ROOT / f"{script}.py", ()).keys()


@pytest.mark.parametrize(
    "knn, rank, diverged, collapsed",
    [(0.3, 2.5, False, False), (0.3, 2.4, False, True), (0.19, 9, False, True), (0.3, 9, True, True)],
)
def test_the_rule_of_collapse(tmp_path, knn, rank, diverged, collapsed):
    config = {"git_commit": "a", "git_edited": False, "device_name": "cpu", "versions": {"torch": "2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    log = [{"step": 0, "knn": 0.2, "rank": 10}, {"step": 5, "loss": 1}]
    log.append({"step": 9, "knn": knn, "rank": rank, "seconds": 3, "teacher_information": 1.25})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    results = run_results(tmp_path, 1e14, diverged)
    assert results["collapsed"] == collapsed and results["pflop"] == pytest.approx(0.9)
    assert results["teacher_information"] == 1.25
    assert results["knn"] == (0.2 if diverged else knn)  # a run that diverged counts as its untrained network


def test_without_two_pairs_of_seeds_there_is_no_answer():
    rows = {"DINO": [row("dino", "full", 1, 0.3)], "Hybrid A": [row("hybrid_a", "full", 2, 0.4)]}
    assert compare_models(rows, "held-out k-NN") == "Inconclusive with 0 seeds."
    rows = {"DINO": [row("dino", "full", 0, 0.3)], "Hybrid A": [row("hybrid_a", "full", 0, 0.4)]}
    assert compare_models(rows, "held-out k-NN") == "Inconclusive with 1 seed."


def test_hybrids_that_disagree_are_named_one_by_one():
    accuracies = {"dino": (0.30, 0.31), "barlow": (0.40, 0.41), "hybrid_a": (0.35, 0.36)}

    def compared(**more):
        pairs = {**accuracies, **more}.items()
        rows = [row(name, "full", seed, knn) for name, both in pairs for seed, knn in enumerate(both)]
        return compare_models(group_rows(rows), "held-out k-NN")

    assert compared() == "Better than DINO, worse than Barlow Twins (held-out k-NN, Hybrid A, 2 seeds)."
    said = "Hybrid A better than DINO, worse than Barlow Twins; "
    said += "Hybrid B no clear difference from DINO and Barlow Twins (held-out k-NN, 2 seeds)."
    assert compared(hybrid_b=(0.2, 0.5)) == said
    many = {name: [knn[0] + 0.001 * seed for seed in range(8)] for name, knn in accuracies.items()}
    said = "Yes and no: better than DINO, worse than Barlow Twins (held-out k-NN, both hybrids, 8 seeds)."
    assert compared(**many, hybrid_b=many["hybrid_a"]) == said
    many["dino"] = many["hybrid_a"][:1] + [knn + 0.02 for knn in many["hybrid_a"][1:]]
    assert compared(**many, hybrid_b=many["hybrid_a"]).startswith("No: worse than DINO and Barlow Twins")


def test_random_settings_are_compared_trial_by_trial():
    trials = {"DINO": [row("dino", "trial", n, 0.3) for n in range(8)]}
    accuracies = [0.2, *8 * [0.4]]  # a ninth is not paired
    trials["Hybrid A"] = [row("hybrid_a", "trial", n, knn) for n, knn in enumerate(accuracies)]
    said = "Of 8 random settings (failures count as untrained; p: mean difference), "
    said += "Hybrid A beats DINO in {} "
    p = sign_flip_p([-0.1] + 7 * [0.1])
    assert compare_trials(trials) == f"{said.format(7)}(p = {p:.3f})."
    trials["DINO"] = [{**made, "collapsed": True, "knn_init": 0.1} for made in trials["DINO"]]
    assert compare_trials(trials) == f"{said.format(8)}(p = {2 / 2**8:.3f})."
    trials["DINO"] = trials["DINO"][:1]
    assert "no method is compared" in compare_trials(trials) and "no method" in compare_trials({})


def test_what_methods_can_do_without_is_said():
    def study(script, *losses):
        rows = [row(script, "full", seed, 0.4) for seed in range(3)]
        for name, loss in zip(("centering", "EMA", "sharpening"), losses, strict=True):
            rows += [row(script, f"{name} off", seed, 0.4 - loss + seed / 1000) for seed in range(3)]
        return rows

    removals = {
        "Hybrid A": [study("hybrid_a", 0.0, 0.0, 0.1)],
        "Hybrid B": [study("hybrid_b", 0.1, 0.1, 0.1)],
    }
    removals["DINO"] = [study("dino", 0.1, 0.0, 0.1)]
    said = "Hybrid A can do without centering (DINO cannot); EMA (so can DINO), but cannot do without "
    said += "sharpening. Hybrid B cannot do without centering, sharpening or EMA."
    assert summarise_removals(removals) == said
    again = [made for made in study("hybrid_a", 0.1, 0.0, 0.0) if "centering" not in made["label"]]
    for made in again:
        made["teacher_information"] = 0.001 if made["label"] == "sharpening off" else 1.0
    again += [row("hybrid_a", "all off", seed, 0.3 + seed / 1000) for seed in range(3)]
    removals = {"Hybrid A": [again, *removals["Hybrid A"]]}  # the first study with a mechanism decides
    assert summarise_removals(removals) == (
        "Hybrid A can do without sharpening, EMA and centering (not tried in DINO). Without sharpening its "
        "CE teaches nothing, only CC does. All at once: -9.9 points (-10.1 to -9.7)."
    )


def test_a_study_of_one_seed_does_not_decide_if_another_has_more():
    def study(seeds, change):
        full = [row("hybrid_a", "full", seed, 0.4 + seed / 1000) for seed in seeds]
        return full + [row("hybrid_a", "EMA off", seed, 0.4 + seed / 1000 + change) for seed in seeds]

    decided = decide([study([1], -0.1), study([1, 2, 3], 0.0), study([1, 2, 3], -0.3)])
    assert decided["EMA"][0] == "can go" and len(decided["EMA"][1]) == 3
    assert decide([study([1], -0.1)])["EMA"][0] == "one seed"


def test_what_a_hybrid_loses_is_compared_with_what_dino_loses():
    def study(script, losses, budget=1.0):
        rows = [row(script, "full", seed, 0.4, budget=budget) for seed in (0, 1)]
        return rows + [row(script, "EMA off", seed, 0.4 - losses[seed], budget=budget) for seed in losses]

    dino = study("dino", {0: 0.1, 1: 0.2})

    def cell(rows):
        lines = removals_table({"DINO": [dino], "Hybrid A": [rows]}).splitlines()
        return lines[-1].split(" | ")[-1] if "Hybrid A's change less DINO's" in lines[0] else ""

    assert cell(study("hybrid_a", {0: 0.0, 1: 0.1})) == "+10.0 [+10.0, +10.0] |"
    assert cell(study("hybrid_a", {0: 0.0, 1: 0.1}, budget=2.0)) == ""
    assert cell(study("hybrid_a", {0: 0.0})) == ""  # a seed is missing: the pairs would differ
    dino = dino[1:]  # its full run
    assert cell(study("hybrid_a", {0: 0.0, 1: 0.1})) == ""


def test_rows_of_other_options_are_refused(tmp_path):
    write_rows(tmp_path, [row("dino", "full", 1, 0.4)])
    cells = [row("dino", "full", 1, 0.4), row("dino", "full", 2, 0.4)]
    assert unfinished(cells, "models", tmp_path, ablate.name_of) == cells[1:]
    with pytest.raises(UserError, match="dino-full-1 with other options"):
        unfinished([{**cells[0], "id": "1"}], "models", tmp_path, ablate.name_of)


def test_rows_of_other_images_are_of_other_options(monkeypatch):
    ids = set()
    monkeypatch.setattr(ablate, "study", "models")
    monkeypatch.setattr(ablate, "dataset", "folder")
    for data_dir, masks_dir in (("one", ""), ("two", ""), ("two", "masks")):
        monkeypatch.setattr(ablate, "data_dir", data_dir)
        monkeypatch.setattr(ablate, "masks_dir", masks_dir)
        ids.update(cell["id"] for cell in ablate.make_cells())
    assert len(ids) == 3 * 4 * ablate.seeds


def test_files_beside_a_run_have_its_whole_name(monkeypatch):
    cell = {"script": "dino.v2", "label": "trial", "seed": 0, "setting": {}, "budget": 1.0, "id": "abc"}
    _, file, *_ = next(ablate.run_cell(cell))
    assert file.name == "dino.v2-trial-0-abc.json"


def test_attention_is_compared_of_the_checkpoints_that_are_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "out_dir", tmp_path)
    monkeypatch.setattr(ablate, "runs_dir", tmp_path / "runs")
    write_rows(tmp_path, [row(script, "full", 0, 0.3) for script in ("dino", "barlow")])
    ablate.compare_attention()
    assert "attention maps are not compared" in capsys.readouterr().out
    commands, done = [], SimpleNamespace(returncode=0)
    monkeypatch.setattr(ablate.subprocess, "run", lambda words: commands.append(words) or done)
    write_file(tmp_path / "runs" / "dino-full-0-0" / "ckpt.pt", "")
    write_file(tmp_path / "runs" / "attention.json", "{}")
    ablate.compare_attention()
    assert commands[0][2] == f"--ckpt=dino={tmp_path}/runs/dino-full-0-0/ckpt.pt"
    assert (tmp_path / "attention.json").read_text() == "{}"


def test_a_budget_of_less_than_a_step_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "runs_dir", tmp_path)
    cell = row("dino", "trial", 0, 0.3, budget=1e-9)
    write_file(Path(f"{ablate.run_folder(cell)}.json"), json.dumps({"flop": 2.5e6, "n_views": 2}))
    with pytest.raises(UserError, match=r"one step takes 2.5e-09 PFLOP: raise --pflop=1e-09"):
        next(ablate.run_cell(cell))
    monkeypatch.setattr(ablate, "read_json", lambda file: {"flop": 2.5e6, "seconds": 1.0})
    monkeypatch.setattr(ablate, "start", lambda *args: SimpleNamespace(wait=lambda: 0))
    with pytest.raises(UserError, match=r"raise --pflop=1e-09"):  # --dry_run says so, too
        ablate.print_plan([cell], 1)


def test_a_report_of_a_folder_elsewhere_leaves_the_pages_alone(tmp_path):
    write_rows(tmp_path, [row("dino", "full", seed, 0.3, test={}) for seed in (0, 1)])
    words = [sys.executable, ROOT / "ablate.py", "--study=models", f"--out_dir={tmp_path}", "--report=True"]
    done = subprocess.run(words, **PIPES)
    assert done.stdout == f"wrote {tmp_path}/README.md\n", done.stderr


def test_a_killed_study_continues_and_a_failing_run_costs_itself_alone(tmp_path, monkeypatch):
    """SIGKILL in the middle, one run fails: the other's row is what its command gives in one go."""
    setting = {"dim": 16, "depth": 1, "heads": 1, "batch_size": 8, "knn_bank": 50, "knn_queries": 40}
    (tmp_path / "search").mkdir()
    write_rows(tmp_path / "search", [row("barlow", "trial", 0, 0.3, setting=setting)])
    options = {"study": "removal", "scripts": "barlow", "seeds": 2, "pflop": 1e-6, "search_dir": "search"}
    options.update(out_dir="results", runs_dir="runs", device="cpu", preset="")
    monkeypatch.chdir(tmp_path)
    for name, value in options.items():
        monkeypatch.setattr(ablate, name, value)
    folders = [tmp_path / ablate.run_folder(cell) for cell in ablate.make_cells()]
    for folder in folders:  # as if its steps had been measured already
        write_file(folder.with_suffix(".json"), json.dumps({"flop": 1e7, "n_views": 2}))
    write_file(folders[1] / "ckpt.pt", "not a checkpoint")

    def start_study(jobs):
        words = [f"--{name}={value}" for name, value in {**options, "jobs": jobs}.items()]
        return subprocess.Popen([sys.executable, ROOT / "ablate.py", *words], env=paths(), **PIPES)

    killed = start_study(1)
    wait_for((folders[0] / "ckpt.pt").exists)
    killed.kill()
    killed.communicate()
    wait_for(lambda: not any(folders[0].name in line for line in command_lines()))  # no child survives
    assert not Path("results/rows.jsonl").exists()

    said, errors = start_study(2).communicate(timeout=100)
    assert f"{ablate.name_of(row('barlow', 'full', 1000, 0))}: k-NN" in said and "Traceback" not in errors
    assert errors.splitlines()[-2] == "failed:"
    assert errors.splitlines()[-1].startswith("barlow-full-1001: exit code 1: error: ")
    (made,) = [json.loads(line) for line in Path("results/rows.jsonl").read_text().splitlines()]
    assert "resumed" in folders[0].with_suffix(".txt").read_text()
    monkeypatch.setattr("twins.run.curves_picture", lambda rows: b"")  # of the fork
    words = made["command"].replace("python barlow.py", f"{ROOT}/barlow.py").split()
    assert launch([*words, "--out_dir=whole"], tmp_path).returncode == 0
    log = [json.loads(line) for line in Path("whole/log.jsonl").read_text().splitlines()]
    evaluations = [line for line in log if "knn" in line]
    assert [knn for _, knn in made["curve"]] == [line["knn"] for line in evaluations]
    assert made["rank"] == evaluations[-1]["rank"] and made["steps"] == log[-1]["step"] == 100


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def command_lines():
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines()


TITLES = {"dino": "DINO", "barlow": "Barlow Twins", "hybrid_a": "Hybrid A", "hybrid_b": "Hybrid B"}


def test_the_readmes_figures_are_those_of_the_rows():
    """README.md and the pages of all studies are what --report=True makes of the rows in results/."""
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert [part for part, _, _ in blocks] == ["answer", "results"]
    for part, name, text in blocks:
        assert text == answer(ROOT / "results", name)[part] + "\n"
    studies = [path.parent for path in ROOT.glob("results/*/rows.jsonl")]
    assert studies
    for folder in studies:
        study, attention = folder.name.partition("-")[0], read_attention(folder)
        page = report_study(read_rows(folder), study, attention)
        assert (folder / "README.md").read_text() == page["README.md"]
        pictures = {path.name for path in folder.glob("*.png")}
        assert pictures == page.keys() - {"README.md"}  # each is made from the rows
    page = (ROOT / "results" / "README.md").read_text()
    tables = BLOCK.findall(page)
    assert [name for _, name, _ in tables] == [
        "cifar10",
        "attention-ecssd.json",
        "segmentation-ecssd.json",
        "probes.json",
    ]
    for kind, name, text in tables:
        assert text == result_table(ROOT / "results", kind, name) + "\n"


def test_a_page_without_blocks_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("<!-- answer cifar10 -->\nno end\n")
    with pytest.raises(UserError, match="needs pairs of lines"):
        fill(tmp_path / "README.md", lambda kind, name: "")


def test_a_pages_other_comments_stay(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("<!-- a note to the next author -->\n<!-- answer cifar10 -->\nold\n<!-- end answer -->\n")
    fill(page, lambda kind, name: f"{kind} {name}")
    comment, *block = page.read_text().splitlines()
    assert comment == "<!-- a note to the next author -->"
    assert block == ["<!-- answer cifar10 -->", "answer cifar10", "<!-- end answer -->"]


def test_the_readmes_controls_are_those_of_the_rows():
    groups = group_rows(read_rows(ROOT / "results" / "models-cifar10-controls"))
    losses = []
    for title in ("hybrid_a_without_ce", "hybrid_a_without_cc", "hybrid_a_shared"):
        losses.append(-100 * np.mean(paired(groups[title], groups["Hybrid A"], "test k-NN")))
    untrained = random_weights(ROOT / "results" / "models-cifar10")["test k-NN"]
    learned = 100 * (np.mean([made["test"]["test knn"] for made in groups["Hybrid A"]]) - untrained)
    losses.insert(2, learned)
    said = "test k-NN falls by {:.1f} points without CE, by {:.1f} (of {:.1f} above random weights) without "
    said += "CC, by {:.1f} with one Z for both losses"
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert said.format(*losses) in readme
    alive = 100 * np.array(paired(groups["hybrid_b_alive"], groups["Hybrid B"], "test k-NN"))
    interval = "{:.1f} to {:+.1f}".format(*t_interval(alive))
    assert f"changes by {alive.mean():+.1f} points ({interval}; [controls]" in readme
    now, before = (group_rows(read_rows(ROOT / "results" / f"models-cifar10{n}")) for n in ("", "-round2"))
    gains = [100 * np.mean(paired(now[title], before[title], "test k-NN")) for title in before]
    assert f"third round raised test k-NN by {min(gains):.1f} to {max(gains):.1f} points" in readme


def answer_text(results):
    """All that the pages say of the studies of cifar10, in one line."""
    table = result_table(results, "removals", "cifar10")
    return " ".join(" ".join([*answer(results, "cifar10").values(), table]).split())


@pytest.mark.parametrize(
    "ahead, seeds, said",
    [
        (0.05, 8, "Yes: better than DINO and Barlow Twins (test k-NN, both hybrids, 8 seeds)."),
        (-0.05, 8, "No: worse than DINO and Barlow Twins (test k-NN, both hybrids, 8 seeds)."),
        (0.05, 3, "Better than DINO and Barlow Twins (test k-NN, both hybrids, 3 seeds)."),
        (0.0, 8, "Inconclusive with 8 seeds."),
    ],
)
def test_the_answer_is_yes_or_no_only_where_its_p_says_so(tmp_path, ahead, seeds, said):
    noise = np.random.default_rng(1).normal(0, 0.01, (4, seeds))
    rows, removed = [], []
    for script, values in zip(TITLES, noise, strict=True):
        for seed, value in enumerate(values):
            accuracy = 0.4 + value + ahead * script.startswith("hybrid")
            rows.append(row(script, "full", seed, 0.3, test={"test knn": accuracy, "test linear": 0.5}))
            rows[-1]["setting"] = {"cc_local": script == "hybrid_b", "n_local": 2}
    for label, knn in (("full", 0.3), ("EMA off", 0.2), ("centering off", 0.31), ("multi-crop on", 0.1)):
        removed += [row("hybrid_a", label, seed, knn, collapsed=knn == 0.2) for seed in range(seeds)]
    write_rows(tmp_path / "models-cifar10", rows)
    before = answer_text(tmp_path)
    assert "Not answered yet: no removal has a clear result" in before
    assert "more stable?** Not answered yet" in before
    trials = [row("dino", "trial", n, 0.3, collapsed=True) for n in range(seeds)]
    write_rows(tmp_path / "search-cifar10", trials)
    assert "more stable?** Not answered yet" in answer_text(tmp_path)  # no hybrid's
    trials += [row("hybrid_a", "trial", n, 0.3, collapsed=n == 0) for n in range(seeds + 1)]
    write_rows(tmp_path / "search-cifar10", trials)
    write_rows(tmp_path / "models-cifar10", [r for r in rows if r["script"] != "hybrid_a"])
    assert "have not been trained on fresh seeds" in answer_text(tmp_path)
    write_rows(tmp_path / "models-cifar10", rows)
    write_rows(tmp_path / "removal-cifar10", removed)
    readme = tmp_path / "README.md"
    readme.write_text(
        "above\n<!-- answer cifar10 -->\nold\n<!-- end answer -->\nbelow\n"
        "<!-- results cifar10 -->\nold\n<!-- end results -->\n"
    )
    for _ in range(2):
        fill(readme, lambda part, name: answer(tmp_path, name)[part])
    text = " ".join(readme.read_text().split())
    assert text.startswith("above <!-- answer") and text.endswith("-- end results -->")
    assert "-- end answer --> below <!-- results cifar10 --> - **Is training" in text
    assert f"better features?** {said} - **Which" in text
    feature_answer = said
    said = f"CIFAR-10, {seeds} seeds, each method with the best setting found (Hybrid B: `--cc_local=True`), "
    assert said + "0.1 PFLOP (1 to 1 minutes) a run: mean" in text
    more = ": 8 seeds; with 3 no p is below 0.25. [Protocol"
    assert (more in text) == (seeds == 3) and "old" not in text
    p = 2 / 2 ** (seeds - 1)  # all pairs but one differ, in one direction
    stable = "Fewer settings fail" if p < 0.05 else "Not significant"
    assert f"stable?** {stable}. Of {seeds} random settings at 0.1 PFLOP, {seeds} of DINO's fail, " in text
    assert f"fail, 1 of Hybrid A's (p = {p:.3f}). A setting fails if its k-NN ends below" in text
    assert "By RankMe alone, not significant: 0 of DINO's, 0 of Hybrid A's (p = 1.000)." in text
    gain, (low, high) = 100 * np.mean(noise[2] - noise[0] + ahead), t_interval(noise[2] - noise[0] + ahead)
    gain = f"{gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    assert re.search(
        rf"Hybrid A \| \S+ ± \S+ \| {re.escape(gain)} \| .* \| 50.0 ± 0.0 \| 1 of {seeds + 1} ", text
    )
    assert "unnecessary?** Hybrid A can do without centering (not tried in DINO), but cannot" in text
    table = f"Hybrid A, 0.1 PFLOP, {seeds} seeds | | --- | ---: | | nothing | 30.0 (20.0) | | centering "
    table += f"| +1.0, can go | | EMA | -10.0, cannot go, {seeds} failed | | multi-crop | already off |"
    assert table in answer_text(tmp_path)
    assert 'src="results/models-cifar10/cost.png" alt="k-NN against PFLOP, CIFAR-10"' in text
    assert "segmentation" not in text and "attention maps" not in text

    write_rows(tmp_path / "removal-cifar10", [r for r in removed if r["seed"] == 0])
    assert "| centering | +1.0, one seed | | EMA | -10.0, one seed, 1 failed |" in answer_text(tmp_path)
    assert "unnecessary?** Not answered yet: no removal has a clear result." in answer_text(tmp_path)
    longer = [{**r, "budget": 0.2, "knn": r["knn"] + 0.1} for r in removed]  # most seeds, then most PFLOP
    write_rows(tmp_path / "removal-cifar10-long", [r for r in longer if r["seed"] < 2])
    write_rows(tmp_path / "removal-cifar10-longer", longer[::seeds])  # of one seed: left out
    write_rows(tmp_path / "removal-cifar10-short", [{**r, "budget": 0.05} for r in removed if r["seed"] < 2])
    write_rows(tmp_path / "removal-cifar100", longer)  # another data set
    first = "Hybrid A, 0.2 PFLOP, 2 seeds |"
    assert f"| {first} Hybrid A, 0.05 PFLOP, 2 seeds | | --- |" in answer_text(tmp_path)
    assert "| nothing | 40.0 (20.0) | 30.0 (20.0) |" in answer_text(tmp_path)

    write_rows(tmp_path / "removal-cifar10-dino", [{**r, "script": "dino"} for r in removed[:: seeds // 2]])
    assert re.search(rf"\| DINO, 0.1 PFLOP, [^|]* \| {re.escape(first)}", answer_text(tmp_path))

    write_rows(tmp_path / "models-cifar100", rows[:-seeds])  # without hybrid B
    assert "CIFAR-100" not in answer_text(tmp_path)
    write_rows(tmp_path / "models-cifar100", [{**r, "setting": {"wd": 1.0}} for r in rows])
    assert "CIFAR-100" not in answer_text(tmp_path)
    write_rows(tmp_path / "models-cifar100", rows)
    write_rows(tmp_path / "models-cifar100-round2", rows)
    said = "And on CIFAR-100, with the settings of {}?** " + f"{feature_answer} - **Is"
    assert said.format("models-cifar10") in answer_text(tmp_path)
    write_rows(tmp_path / "models-cifar10-old", rows)
    write_rows(tmp_path / "models-cifar10", [{**r, "setting": {"wd": 1.0}} for r in rows])
    assert said.format("models-cifar10-old") in answer_text(tmp_path)

    for made in rows:
        made["test"]["mIoU"] = 0.6 - 0.2 * made["script"].startswith("hybrid")
    write_rows(tmp_path / "models-cifar10", rows)
    test = {"groups": list(TITLES), "between": 0.3, "within": 0.2, "ratio": 1.5, "effect": 0.1, "p": 0.01}
    test.update(interval95=[0.1, 0.2], exact=True, paired="all", smallest_p=0.01, spread_differs=False)
    found = {"tests": [test], "names": [*TITLES, "random"], "group_of_run": [0, 0, 1, 4]}
    found.update(seed_of_run=[0, 1, 0, -1], divergence_bits=np.eye(4).tolist())
    write_file(tmp_path / "models-cifar10/attention.json", json.dumps(found))
    text = answer_text(tmp_path)
    said = "No: worse than" if seeds == 8 else "Worse than"
    said += f" DINO and Barlow Twins (mIoU, both hybrids, {seeds} seeds)."
    assert f"segmentation better?** {said} - **Do" in text
    assert "differ?** In 1 of 1 studies. Jensen-Shannon divergence in bits between methods, " in text
    assert "seeds of one method: models-cifar10 0.30 and 0.20 (p = 0.01). Better" in text
    write_rows(tmp_path / "models-cifar100", rows)
    assert f"segmentation better?** {said} Pre-trained on CIFAR-100: {said} - **Do" in answer_text(tmp_path)
    found["tests"][0]["p"] = 0.04  # not below 0.05 after Holm's correction for two
    for folder in ("models-cifar10", "models-cifar10-old"):
        write_file(tmp_path / folder / "attention.json", json.dumps(found))
    assert "differ?** In 0 of 2 studies." in answer_text(tmp_path)
    del found["tests"][0]["p"]  # one seed
    write_file(tmp_path / "models-cifar10-old/attention.json", json.dumps(found))
    assert "differ?** In 1 of 1 studies." in answer_text(tmp_path)
    assert f"| 50.0 ± 0.0 | 60.0 ± 0.0 | {seeds} of {seeds} |" in text
    results = {"linear": {"top1": 0.2}, "knn": {"top1": 0.1}}
    write_file(tmp_path / "models-cifar10/eval_linear.json", json.dumps({"results": results}))
    masks = {"this checkpoint": {"miou": 0.3}, "colour alone": {"miou": 0.4}}
    write_file(tmp_path / "models-cifar10/seg_transfer.json", json.dumps({"results": masks}))
    assert "| random weights | 10.0 | | | 20.0 | 30.0 | |" in answer_text(tmp_path)
