"""tools/tables.py: its tables and studies against figures that are made by hand."""

import json
import numpy as np
import pytest
import scipy.stats
from conftest import (copy_run, load_script)
import common


def rows_of(variant, aucs, **more):
    """Rows of {ids: AUC a repetition}."""
    return [{"variant": variant, "model": "dcn", "ids": ids, "seed": seed, "test_auc": auc,
             "test_gauc": auc - 0.03, "test_logloss": 1.2 - auc, **more}
            for ids, values in aucs.items() for seed, auc in enumerate(values)]


def data_of(rows, **more):
    """What collect() makes of runs, without intervals."""
    return {"study": "own", "metric": "test", "rows": rows, "base_rate_logloss": {"base": 0.65},
            "intervals": {}, "stability": None, "versions": {"torch": "9"}, "fields": "ids",
            "user_dropout": 0.7, "date": "2026-01-01", "code": "0", **more}


def cells_of(text):
    """({ids: {title: cell}} of a Markdown table, the notes below)."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith("| ")]
    return {row[0]: dict(zip(split[0], row)) for row in split[1:]}, text.split("\n\n")[1]


def paired(values, control):
    differences = np.array(values) - control
    return f"{differences.mean():+.4f} ± {differences.std(ddof=1):.4f}"


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """tools/tables.py with a root of its own."""
    tables = load_script("tables")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(tables, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(tables, "code_fingerprint", lambda: "the code")
    return tables


BASE = {"none": (0.60, 0.64, 0.59), "random": (0.58, 0.62, 0.60), "userip": (0.7, 0.71, 0.72),
        "planted": (0.80, 0.84, 0.82)}


def test_a_study_s_differences_are_paired_by_seed_with_the_base_in_whatever_order_rows_stand(tables):
    """A variant without none and random of its own is compared with the first variant's."""
    one, two = (0.70, 0.72, 0.75), (0.72, 0.764, 0.71)
    base, others = rows_of("base", BASE), rows_of("one", {"userip": one, "shuffled": (0.1, 0.2, 0.1)})
    rows = [base[0], *base[:0:-1], *others[::-1], *rows_of("two", {"userip": two})]
    cells, _ = cells_of(tables.table(data_of(rows)))
    for name, values in (("userip", BASE["userip"]), ("userip: one", one), ("userip: two", two),
                         ("shuffled: one", (0.1, 0.2, 0.1))):
        assert cells[name]["AUC"] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
        for control in ("none", "random"):
            assert cells[name][f"AUC - {control}"].startswith(paired(values, BASE[control]))
    assert cells["none"]["AUC - none"] == "" and cells["random"]["AUC - random"] == ""


def test_a_variant_with_controls_of_its_own_is_paired_with_those(tables):
    own = {"none": (0.50, 0.55, 0.5), "random": (0.40, 0.43, 0.4), "userip": (0.70, 0.71, 0.74)}
    cells, _ = cells_of(tables.table(data_of(rows_of("base", BASE) + rows_of("one", own))))
    for control in ("none", "random"):
        assert cells["userip: one"][f"AUC - {control}"].startswith(paired(own["userip"], own[control]))
        assert cells["userip"][f"AUC - {control}"].startswith(paired(BASE["userip"], BASE[control]))


def test_a_larger_p_is_no_smaller_when_corrected(tables):
    """Holm: .01 x 3 = .03, .03 x 2 = .06, .031 x 1 would be below that."""
    assert tables.holm([0.03, 0.01, None, 0.031]) == pytest.approx([0.06, 0.03, None, 0.06])


def test_the_lift_is_a_share_of_the_planted_one(tables):
    _, notes = cells_of(tables.table(data_of(rows_of("base", BASE))))
    floor, planted = np.mean(BASE["none"]), np.mean(BASE["planted"])
    for ids in ("random", "userip"):
        assert f"{ids} {(np.mean(BASE[ids]) - floor) / (planted - floor):.0%}" in notes
    assert "planted" not in notes.replace("planted lift", "")


def test_a_variant_of_other_rows_has_its_own_lift_and_constant(tables):
    other = {"none": (0.5, 0.5), "userip": (0.53, 0.53), "planted": (0.6, 0.6)}
    rates = {"base": 0.65, "the same rows": 0.65, "other rows": 0.61}
    rows = rows_of("base", BASE) + rows_of("the same rows", {"userip": (0.6, 0.6)})
    rows += rows_of("other rows", other)
    cells, notes = cells_of(tables.table(data_of(rows, base_rate_logloss=rates)))
    assert "- other rows: Share of the planted lift: userip 30%." in notes
    constants = {ids: row["logloss"] for ids, row in cells.items() if "constant" in ids}
    assert constants == {"constant: base rate": "0.6500", "constant: base rate: other rows": "0.6100"}


def test_a_share_of_no_lift_is_not_given(tables):
    for top, there in ((0.607, False), (0.4, False), (0.63, True)):
        aucs = {"none": (0.6, 0.61), "userip": (0.62, 0.6), "planted": (top, top), "random": (0.6, 0.61)}
        assert ("planted lift" in tables.table(data_of(rows_of("base", aucs)))) == there


def test_each_figure_stands_in_its_column(tables):
    rows, health = rows_of("base", BASE), {"perplexity": [3.5, 2.5], "nmi": [0.8, 0.6],
                                           "heldout_nll": {"own": 1.0, "population": 2.0, "shuffled": 3.0}}
    rows[8]["health"] = health | {"perplexity": [3.0, 2.0]}
    rows[7]["health"] = health | {"perplexity": [2.0, 2.2]}
    interval = {"base|dcn|userip": {"none": [0.01, 0.2], "random": [-0.03, 0.04]}}
    cells, notes = cells_of(tables.table(data_of(rows, intervals=interval, stability={"base": [0.91, 0.52]})))
    for ids, values in BASE.items():
        sd = f"± {np.std(values, ddof=1):.4f}"
        assert cells[ids]["AUC"] == f"{np.mean(values):.4f} {sd}"
        assert cells[ids]["GAUC"] == f"{np.mean(values) - 0.03:.4f} {sd}"
        assert cells[ids]["logloss"] == f"{1.2 - np.mean(values):.4f} {sd}"
    assert cells["userip"]["AUC - none"].endswith("[+0.0100, +0.2000]")
    assert cells["userip"]["AUC - random"].endswith("[-0.0300, +0.0400]")
    constant = cells["constant: base rate"]
    assert [constant[key] for key in ("AUC", "GAUC", "logloss")] == ["0.5000", "0.5000", "0.6500"]
    for text in ("perplexity 2.50 / 2.10", "NMI with the truth 0.80 / 0.60", "0.91 / 0.52", "3 repetitions",
                 "own 1.0000 / population 2.0000 / shuffled 3.0000", "user dropout 0.7", "torch 9"):
        assert text in notes, text


def test_in_a_table_of_cold_users_all_figures_are_theirs_and_metadata_is_the_reference(tables):
    cold = {"none": (0.5, 0.52), "metadata": (0.6, 0.63), "userip": (0.61, 0.66)}
    rows = [{**row, "cold_auc": row["test_auc"], "cold_gauc": 0.4, "cold_logloss": 0.9, "test_auc": 0.77}
            for row in rows_of("base", cold)]
    cells, _ = cells_of(tables.table(data_of(rows, metric="cold")))
    assert cells["userip"]["AUC"].startswith("0.6350") and cells["userip"]["warm AUC"].startswith("0.7700")
    assert cells["userip"]["GAUC"].startswith("0.4") and cells["userip"]["logloss"].startswith("0.9")
    for control in ("none", "metadata"):
        assert cells["userip"][f"AUC - {control}"].startswith(paired(cold["userip"], cold[control]))


def test_differences_that_are_equal_but_for_rounding_have_no_p(tables):
    assert tables.p_value([0.1 + 0.2, 0.3, 0.3]) is None and tables.p_value([0.1]) is None
    values = [0.1, 0.2, 0.3]
    assert tables.p_value(values) == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue)


def test_p_values_are_of_paired_differences_and_holm_is_over_claims_alone(tables):
    rng = np.random.default_rng(0)
    aucs = {"none": rng.normal(0.6, 0.01, 5), "random": rng.normal(0.6, 0.01, 5),
            "metadata": rng.normal(0.605, 0.01, 5), "words": rng.normal(0.61, 0.01, 5),
            "userip": rng.normal(0.62, 0.01, 5)}
    cells, _ = cells_of(tables.table(data_of(rows_of("base", aucs))))
    p_values = {(ids, control): scipy.stats.ttest_rel(aucs[ids], aucs[control]).pvalue
                for ids in aucs for control in ("none", "random") if ids != control}
    claims = sorted((p, key) for key, p in p_values.items() if key[0] in ("words", "userip"))
    corrected = {key: min(1, max(earlier * (4 - at) for at, (earlier, _) in enumerate(claims[:place + 1])))
                 for place, (_, key) in enumerate(claims)}
    for (ids, control), p in p_values.items():
        holm = f" (Holm {corrected[ids, control]:.2g})" if (ids, control) in corrected else ""
        assert cells[ids][f"AUC - {control}"].endswith(f", p {p:.2g}{holm}"), (ids, control)


def test_improvements_are_eq_10_against_the_best_model_without_ids(tables):
    found = tables.improvements({("dcn", "none"): 0.70, ("dcn", "userip"): 0.74, ("lr", "none"): 0.65,
                                 ("lr", "userip"): 0.72, ("lr", "planted"): 0.9})
    assert found["baseline"] == "dcn" and found["test_auc"] == 0.70
    assert found["relative"]["lr"] == {"userip": pytest.approx(0.22 / 0.2 - 1)}
    assert found["relative"]["dcn"]["userip"] == pytest.approx(0.24 / 0.2 - 1)
    assert tables.improvements({("dcn", "none"): 0.5}) is None and tables.improvements({}) is None


STUDY = {"base": ("--dataset ml-100k", "--lm tiny", "--epochs 1", "--ids none,userip", "metadata"),
         "Same Theta": (None, None, "--beta 1", "--ids userip", ""),
         "other theta": (None, "--steps 3", "", "--ids userip", ""),
         "other data": ("--dataset ml-100k --critic", "--lm tiny --history rated", "", "", "words")}


def study_of(tables, monkeypatch, name="own"):
    """Put STUDY into tools/tables.py; its stages note how they are called and leave their files."""
    started, wrote = [], {"01": "interactions.npy", "02": "profiles.npy", "03": "feature_bank.npy",
                          "tools": "feature_bank_metadata.npy", "04": "results.json"}

    def call(script, run, flags, log, threads):
        stage = script.split("/")[0] if "/" in script else script[:2]
        started.append((run.parent.name, int(run.name), stage, flags.split()))
        (run / wrote[stage]).write_text(f"{run.parent.name} {run.name}")
        if script[:2] == "02" and run.parent.name == "base":
            (run / "lm-tiny").mkdir()
            (run / "lm-tiny" / "tiny.json").write_text(run.name)

    monkeypatch.setattr(tables, "call", call)
    monkeypatch.setattr(tables, "STUDIES", {name: {
        variant: tables.variant(first, second, third, controls, fourth)
        for variant, (first, second, third, fourth, controls) in STUDY.items()}})
    return started


def test_a_variant_takes_the_first_one_s_artifacts_of_the_same_repetition(tables, monkeypatch):
    started = study_of(tables, monkeypatch)
    tables.run_study("own", 2, 1, "/data", again=False)
    folder = tables.ROOT / "runs" / "studies" / "own"
    order = list(dict.fromkeys((name, seed) for name, seed, *_ in started))
    assert order[:2] == [("base", 0), ("base", 1)] and len(order) == 8  # the first variant before the others
    flags = {(name, script): words for name, seed, script, words in started if seed == 1}
    stages = {}
    for name, seed, script, _ in started:
        stages.setdefault(name, []).extend([script] * seed)
    assert stages == {"base": ["01", "02", "03", "tools", "04"], "same-theta": ["03", "04"],
                      "other-theta": ["02", "03", "04"], "other-data": ["01", "02", "03", "tools", "04"]}
    for name in ("same-theta", "other-theta"):
        for seed in ("0", "1"):
            assert (folder / name / seed / "interactions.npy").read_text() == f"base {seed}"
    assert (folder / "same-theta/1/profiles.npy").read_text() == "base 1"
    assert (folder / "other-theta/1/profiles.npy").read_text() == "other-theta 1"
    assert (folder / "other-theta/1/lm-tiny/tiny.json").read_text() == "1"  # the base's LM
    assert not (folder / "other-data/1/lm-tiny").exists()  # it reads another history
    assert not (folder / "same-theta/1/feature_bank_metadata.npy").exists()
    assert flags["same-theta", "03"] == ["--beta", "1", "--seed", "1"]
    assert flags["other-theta", "02"] == ["--steps", "3", "--seed", "1"]
    assert flags["base", "tools"] == ["metadata", "--seed", "1"]
    assert flags["other-data", "tools"] == ["words", "--seed", "1"]
    for name in stages:
        assert flags[name, "04"][-4:] == ["--seed", "1", "--seeds", "3"]
    assert flags["base", "01"] == ["--dataset", "ml-100k", "--data-dir", "/data"]  # the same data for all
    assert {"ml-100k", "--critic", "--data-dir", "/data"} <= set(flags["other-data", "01"])
    count = len(started)
    tables.run_study("own", 2, 1, "/data", again=False)
    assert len(started) == count  # what is there is not run again
    tables.run_study("own", 2, 1, "/data", again=True)
    assert len(started) == 2 * count


def test_intervals_are_of_each_repetition_s_own_rows_and_controls(tables, monkeypatch, prepared):
    """A variant's own none where it has one, else the first variant's; users are those of the test rows."""
    dataset = common.load_dataset(prepared)
    data = dataset.rows(common.TEST)
    raw_ids = np.array(dataset.users)[data[:, 0]]
    study_of(tables, monkeypatch)
    given, rows = {}, []
    for name, ids in (("base", ("none", "random", "userip")), ("Same Theta", ("userip",)),
                      ("other theta", ("none", "userip"))):
        for seed in range(2):
            folder = copy_run(prepared, tables.folder("own", name, seed))
            (folder / "predictions").mkdir()
            rows += [{"variant": name, "model": "dcn", "ids": each, "seed": seed} for each in ids]
            for each in ids:
                given[name, each, seed] = np.random.default_rng(len(given)).random(len(data))
                np.save(folder / "predictions" / f"dcn-{each}-0.npy", given[name, each, seed])
    seen = []
    monkeypatch.setattr(tables, "bootstrap", lambda repetitions: seen.append(repetitions) or [0, 1])
    found = tables.intervals("own", rows, 2, "test", 1)
    assert list(found) == [f"{name}|dcn|userip" for name in ("base", "Same Theta", "other theta")]
    expected = [("base", "base"), ("base", "base"), ("Same Theta", "base"), ("Same Theta", "base"),
                ("other theta", "other theta"), ("other theta", "base")]
    for (name, where), control, repetitions in zip(expected, ["none", "random"] * 3, seen):
        assert len(repetitions) == 2
        for seed, (users, labels, first, second) in enumerate(repetitions):
            assert np.array_equal(users, raw_ids) and np.array_equal(labels, data[:, 2])
            assert np.array_equal(first, [given[name, "userip", seed]])
            assert np.array_equal(second, [given[where, control, seed]])


def test_intervals_of_cold_users_are_against_the_rows_that_their_table_names(tables, monkeypatch, prepared):
    data = common.load_dataset(prepared)
    study_of(tables, monkeypatch)
    folder, cold = copy_run(prepared, tables.folder("own", "base", 0)), np.array(data.interactions)
    cold[::2, 3] = common.COLD
    count = len(cold[::2])
    monkeypatch.setattr(common, "load_dataset", lambda run: common.Dataset(cold, data.users, [], [], ""))
    monkeypatch.setattr(tables, "common", common)
    (folder / "predictions").mkdir()
    given, ids = {}, ("none", "random", "metadata", "userip")
    for number, each in enumerate(ids):
        given[each] = np.random.default_rng(number).random(count)
        np.save(folder / "predictions" / f"dcn-{each}-0-cold.npy", given[each])
        np.save(folder / "predictions" / f"dcn-{each}-0.npy", np.zeros(3))
    rows, seen = [{"variant": "base", "model": "dcn", "ids": each, "seed": 0} for each in ids], []
    monkeypatch.setattr(tables, "bootstrap", lambda repetitions: seen.append(repetitions[0]) or [0, 1])
    assert tables.intervals("own", rows, 1, "cold", 1) == {
        "base|dcn|userip": {"none": [0, 1], "metadata": [0, 1]}}
    for control, (users, labels, first, second) in zip(("none", "metadata"), seen):
        assert np.array_equal(users, np.array(data.users)[cold[::2, 0]])
        assert np.array_equal(labels, cold[::2, 2])
        assert np.array_equal(first, [given["userip"]]) and np.array_equal(second, [given[control]])


def test_stability_is_the_agreement_of_two_repetitions_codes(tables, monkeypatch):
    study_of(tables, monkeypatch)
    monkeypatch.setattr(tables, "STUDIES", {"own": {"base": tables.STUDIES["own"]["base"]}})
    bank = np.random.default_rng(0).integers(4, size=(500, 2))
    for seed, codes in enumerate((bank, np.stack([(bank[:, 0] + 1) % 4, bank[::-1, 1]], axis=1))):
        folder = tables.folder("own", "base", seed)
        folder.mkdir(parents=True)
        np.save(folder / "feature_bank.npy", codes.astype(np.int16))
    same, other = tables.stability("own", 2)["base"]
    assert same == pytest.approx(1) and abs(other) < 0.05  # the names of codes do not matter
    assert tables.stability("own", 1) is None


def test_writing_one_table_leaves_the_others(tables, monkeypatch):
    other = "<!-- table nosignal -->\nkept\n<!-- end nosignal -->\n"
    tables.PAGE.write_text(f"{other}between\n<!-- table demo -->\nold\n<!-- end demo -->\n{other}")
    tables.KEPT.mkdir()
    (tables.KEPT / "demo.json").write_text(json.dumps(data_of(rows_of("default", BASE))))
    monkeypatch.setattr("sys.argv", ["tables.py", "demo", "--kept", "--write"])
    tables.main()
    text = tables.PAGE.read_text()
    assert text.startswith(f"{other}between\n<!-- table demo -->\n| ids") and "old" not in text
    assert text.endswith(f"<!-- end demo -->\n{other}")
    monkeypatch.setattr("sys.argv", ["tables.py", "demo7", "--kept", "--write"])
    (tables.KEPT / "demo7.json").write_text(json.dumps(data_of(rows_of("default", BASE))))
    with pytest.raises(common.UserError, match="no markers for demo7"):
        tables.main()
    assert tables.PAGE.read_text() == text
