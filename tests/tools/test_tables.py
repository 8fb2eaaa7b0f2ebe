"""tools/tables.py: its statistics against other ways to them, its studies with stages that only pretend."""

import itertools
import json
import os
import shutil
import sys

import numpy as np
import pytest
import scipy.stats
from conftest import call_stage, copy_run, ctr, infer, load_script, prepare, quantize, fork_stage
from sklearn.metrics import adjusted_mutual_info_score, log_loss, normalized_mutual_info_score, roc_auc_score

import common

tables = load_script("tables")
recsysllm = load_script("recsysllm")


# ---------------------------------------------------------------- statistics

def test_weighted_auc_is_sklearn_s_with_weights_and_ties():
    rng = np.random.default_rng(0)
    labels, weights = rng.integers(2, size=2000), rng.integers(4, size=2000)
    for scores in (rng.integers(9, size=2000) / 9, rng.normal(size=2000) + labels, np.ones(2000)):
        ranks = np.unique(scores, return_inverse=True)[1]
        expected = roc_auc_score(labels, scores, sample_weight=weights)
        assert tables.weighted_auc(ranks, labels, weights.astype(float)) == pytest.approx(expected)


def scores_of(seed, users=150, rows=12, lift=0.5):
    """(users, labels, better scores, worse scores) of one repetition."""
    rng = np.random.default_rng(seed)
    owner, labels = np.repeat(np.arange(users), rows), rng.integers(2, size=users * rows)
    noise = rng.normal(size=(2, users * rows))
    return owner, labels, noise[0] + (0.5 + lift) * labels, noise[1] + 0.5 * labels


def test_the_bootstrap_interval_holds_the_difference_and_is_0_for_equal_scores():
    repetitions = [scores_of(seed) for seed in range(3)]
    true = scipy.stats.norm.cdf(1 / 2**0.5) - scipy.stats.norm.cdf(0.5 / 2**0.5)
    low, high = tables.bootstrap(repetitions)
    assert 0 < low < true < high < low + 0.12
    equal = [(users, labels, first, first) for users, labels, first, _ in repetitions]
    assert tables.bootstrap(equal) == [0, 0]
    reverse = [(users, labels, second, first) for users, labels, first, second in repetitions]
    assert tables.bootstrap(reverse) == pytest.approx([-high, -low])


def test_the_bootstrap_draws_users_not_rows():
    """Every row ten times says nothing new about users; the same as ten times the users would say a lot."""
    users, labels, first, second = scores_of(0, users=60)
    width = np.ptp(tables.bootstrap([(users, labels, first, second)]))
    many = [np.tile(column, 10) for column in (users, labels, first, second)]
    assert np.ptp(tables.bootstrap([many])) == pytest.approx(width)
    many[0] = np.arange(10).repeat(len(users)) * 1000 + many[0]
    assert np.ptp(tables.bootstrap([many])) < 0.6 * width


def test_more_repetitions_on_the_same_users_say_nothing_more_about_users():
    """Nine that differ by rounding alone: as wide as one. Of nine groups of users: a third as wide."""
    users, labels, first, second = scores_of(0, users=60)
    width = np.ptp(tables.bootstrap([(users, labels, first, second)]))
    noise = 1e-9 * np.random.default_rng(1).normal(size=(9, len(users)))
    same = [(users, labels, first + some, second) for some in noise]
    assert np.ptp(tables.bootstrap(same)) == pytest.approx(width, rel=0.15)
    others = [(users + 1000 * number, labels, first, second) for number in range(9)]
    assert np.ptp(tables.bootstrap(others)) < 0.5 * width


def test_the_bootstrap_draws_repetitions_too():
    """Two repetitions that agree on nothing: an interval from the one to the other, however many users."""
    users, labels, better, worse = scores_of(0, users=1500)
    low, high = tables.bootstrap([(users, labels, better, worse), (users, labels, worse, better)])
    gap = roc_auc_score(labels, better) - roc_auc_score(labels, worse)
    assert low == pytest.approx(-gap, abs=0.05) and high == pytest.approx(gap, abs=0.05) and gap > 0.1


def test_of_several_recommenders_the_bootstrap_takes_the_mean_auc():
    """Two that are paired with themselves the other way round: no difference, whoever is drawn."""
    users, labels, better, worse = scores_of(0)
    both, turned = np.stack([better, worse]), np.stack([worse, better])
    assert np.allclose(tables.bootstrap([(users, labels, both, turned)]), 0, atol=1e-12)
    alone = tables.bootstrap([(users, labels, better, worse)])
    halved = tables.bootstrap([(users, labels, both, np.stack([worse, worse]))])
    assert halved == pytest.approx([bound / 2 for bound in alone])


def test_there_is_no_interval_where_one_class_is_missing():
    rng = np.random.default_rng(0)
    for labels, given in (([1] * 5, False), ([0] * 5, False), ([1, 0, 0, 0, 0], True)):
        columns = np.arange(5), np.array(labels), rng.random(5), rng.random(5)
        assert (tables.bootstrap([columns]) is not None) == given


def test_holm_against_its_definition():
    """p_(1) <= ... <= p_(n): the corrected p_(k) is max over j <= k of min(1, (n - j + 1) p_(j))."""
    assert tables.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert tables.holm([0.01, None, 0.9, 0.6]) == [pytest.approx(0.03), None, 1, 1]
    assert tables.holm([None]) == [None]
    p_values = np.random.default_rng(0).random(9) ** 3
    ranked = sorted(p_values)
    for p, corrected in zip(p_values, tables.holm(p_values.tolist())):
        place = ranked.index(p)
        assert corrected == pytest.approx(max(min(1, (9 - j) * ranked[j]) for j in range(place + 1)))


# ---------------------------------------------------------------- tables

HEALTH = {"perplexity": [3.5, 2.5], "nmi": None, "heldout_nll": None}


def rows_of(variant, ids, aucs, metric="test", model="dcn"):
    """Rows of results.json, the last repetition first."""
    rows = [{"variant": variant, "model": model, "ids": ids, "seed": seed, "test_auc": auc,
             "test_gauc": auc - 0.1, "test_logloss": 1 - auc} for seed, auc in enumerate(aucs)][::-1]
    for row in rows if metric == "cold" else ():
        row |= {"cold_auc": row["test_auc"] - 0.2, "cold_gauc": 0.5, "cold_logloss": 0.7}
    return rows


def data_of(*rows, **changes):
    """What collect() would have found."""
    rows = [row for group in rows for row in group]
    rows[-1]["health"] = HEALTH
    return {"study": "demo", "metric": "test", "rows": rows, "base_rate_logloss": {"default": 0.654321},
            "intervals": {}, "stability": None, "versions": {"python": "3.x"}, "fields": "ids",
            "user_dropout": 0.7, "date": "2000-01-01", "code": "0", **changes}


def lines_of(data):
    """{first cells of a line: {column title: text}} and the notes of a table."""
    body, _, notes = tables.table(data).partition("\n\n")
    titles, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in body.split("\n"))
    wide = titles.index("AUC")
    return {" ".join(line[:wide]): dict(zip(titles, line)) for line in lines}, notes


def shown(differences, sign="+"):
    return f"{np.mean(differences):{sign}.4f} ± {np.std(differences, ddof=1):.4f}"


NONE, RANDOM, OURS = (0.60, 0.64, 0.61), (0.61, 0.62, 0.63), (0.66, 0.69, 0.65)


def three():
    return [rows_of("default", ids, values) for ids, values in
            (("none", NONE), ("random", RANDOM), ("userip", OURS))]


def test_differences_are_paired_by_seed_and_p_is_of_the_paired_t_test():
    rows = three()
    rows[0].reverse()
    intervals = {"default|dcn|userip": {"none": [0.01, 0.0899], "random": None}}
    lines, notes = lines_of(data_of(*rows, intervals=intervals))
    assert list(lines) == ["none", "random", "userip", "constant: base rate"]
    for control, values in (("none", NONE), ("random", RANDOM)):
        text, p = lines["userip"][f"AUC - {control}"], scipy.stats.ttest_rel(OURS, values).pvalue
        assert text.startswith(f"{shown(np.subtract(OURS, values))}, p {p:.2g} (Holm ")
    assert lines["userip"]["AUC - none"].endswith("[+0.0100, +0.0899]") and lines["none"]["AUC - none"] == ""
    assert "[" not in lines["userip"]["AUC - random"]
    assert lines["userip"]["AUC"] == shown(OURS, "")
    assert lines["none"]["logloss"] == shown(np.subtract(1, NONE), "")
    assert lines["userip"]["GAUC"] == shown(np.subtract(OURS, 0.1), "")
    constant = lines["constant: base rate"]
    assert (constant["AUC"], constant["GAUC"], constant["logloss"]) == ("0.5000", "0.5000", "0.6543")
    assert "3 repetitions" in notes and "perplexity 3.50 / 2.50" in notes and "user dropout 0.7" in notes


def test_holm_counts_claims_alone():
    """userip and words against none and random are four claims; the controls beside them are none."""
    others = ("shuffled", "planted", "metadata", "text", "hidden", "generosity", "mf")
    rng = np.random.default_rng(0)
    lines, _ = lines_of(data_of(
        *three(), rows_of("default", "words", (0.62, 0.66, 0.64)),
        *(rows_of("default", ids, 0.62 + rng.random(3) / 10) for ids in others)))
    texts = {(ids, control): lines[ids][f"AUC - {control}"]
             for ids in lines for control in ("none", "random")}
    assert {key for key, text in texts.items() if "Holm" in text} == set(
        itertools.product(("userip", "words"), ("none", "random")))
    values = {"userip": OURS, "words": (0.62, 0.66, 0.64), "none": NONE, "random": RANDOM}
    p_values = {(ids, control): scipy.stats.ttest_rel(values[ids], values[control]).pvalue
                for ids, control in itertools.product(("userip", "words"), ("none", "random"))}
    least = min(p_values, key=p_values.get)
    assert f"(Holm {4 * p_values[least]:.2g})" in texts[least]
    assert all(", p " in texts[ids, "none"] for ids in others)


def test_a_variant_is_paired_with_its_own_controls_where_it_has_them():
    lines, _ = lines_of(data_of(
        *three(), rows_of("EM", "userip", (0.70, 0.71, 0.72)), rows_of("critic", "none", (0.55, 0.56, 0.50)),
        rows_of("critic", "userip", (0.75, 0.70, 0.78))))
    assert lines["userip: EM"]["AUC - none"].startswith(shown(np.subtract((0.70, 0.71, 0.72), NONE)))
    own = np.subtract((0.75, 0.70, 0.78), (0.55, 0.56, 0.50))
    assert lines["userip: critic"]["AUC - none"].startswith(shown(own))
    assert lines["userip: critic"]["AUC - random"].startswith(shown(np.subtract((0.75, 0.70, 0.78), RANDOM)))
    assert lines["none: critic"]["AUC"] == shown((0.55, 0.56, 0.50), "")
    assert not lines["none: critic"]["AUC - none"]


def test_userip_is_compared_with_its_rivals_of_the_same_variant_below_the_table():
    _, notes = lines_of(data_of(
        *three(), rows_of("default", "words", (0.62, 0.66, 0.64)), rows_of("EM", "userip", (0.7, 0.71, 0.72)),
        rows_of("both", "kar", RANDOM), rows_of("both", "userip", OURS[::-1])))
    lines = [line for line in notes.split("\n") if "minus that of" in line]
    differences = {"default": ("words", np.subtract(OURS, (0.62, 0.66, 0.64))),
                   "both": ("kar", np.subtract(OURS[::-1], RANDOM))}  # EM has no rival of its own
    assert lines == [f"- {name}: AUC of userip minus that of {rival} {shown(values)}, p "
                     f"{scipy.stats.ttest_1samp(values, 0).pvalue:.2g}."
                     for name, (rival, values) in differences.items()]


def test_a_table_of_cold_users_is_of_their_rows_and_beside_metadata():
    lines, notes = lines_of(data_of(*(rows_of("default", ids, values, "cold") for ids, values in (
        ("none", NONE), ("random", RANDOM), ("metadata", (0.63, 0.64, 0.66)), ("userip", OURS))),
        metric="cold", study="ml-100k-cold"))
    assert lines["userip"]["AUC"] == shown(np.subtract(OURS, 0.2), "")
    assert lines["userip"]["warm AUC"] == shown(OURS, "")
    assert lines["userip"]["AUC - metadata"].startswith(shown(np.subtract(OURS, (0.63, 0.64, 0.66))))
    assert "AUC - random" not in lines["userip"] and "3 folds" in notes


def test_a_table_of_many_models_pairs_within_a_model_and_gives_eq_10():
    rows = [rows_of("default", ids, np.add(values, shift), model=model)
            for model, shift in (("dcn", 0), ("lr", -0.05))
            for ids, values in (("none", NONE), ("random", RANDOM), ("userip", OURS))]
    lines, notes = lines_of(data_of(*rows))
    assert lines["lr userip"]["AUC - none"].startswith(shown(np.subtract(OURS, NONE)))
    best = np.mean(NONE) - 0.5
    ours, random = ((np.mean(values) - 0.55) / best - 1 for values in (OURS, RANDOM))
    assert f"dcn at {np.mean(NONE):.4f}" in notes and f"lr {ours:+.2%} (random {random:+.2%})" in notes


def test_one_repetition_has_no_p():
    lines, notes = lines_of(data_of(rows_of("default", "none", [0.6]), rows_of("default", "random", [0.6]),
                                    rows_of("default", "userip", [0.7])))
    assert lines["userip"]["AUC - none"] == "+0.1000" and "1 repetitions" in notes
    assert "±" not in notes


# ---------------------------------------------------------------- studies, with stages that only pretend

ROWS = [[user, row, (user * row + split) % 3 == 1, split]
        for user in range(6) for row in range(4) for split in (0, 1, 2, 3, 4)]
WORLD = common.Dataset(np.array(ROWS, dtype=np.int32), list("abcdef"), list("wxyz"), [], "")


class Pretender:
    """In the place of tables.call: notes it, and writes what a table needs of what the stage would write."""

    def __init__(self):
        self.calls = []

    def __call__(self, script, run, flags, log, threads):
        words = flags.split()
        self.calls.append((script, run, words))
        seed = int(words[words.index("--seed") + 1]) if "--seed" in words else 0
        name = script.removeprefix("tools/")
        getattr(self, f"stage_{name[:2]}")(run, words, seed)

    def stage_01(self, run, words, seed):
        np.save(run / "interactions.npy", WORLD.interactions)
        for name in ("users", "items"):
            common.save_json(run / f"{name}.json", getattr(WORLD, name))
        common.save_json(run / "dataset.json", {"profiles": [], "task_prompt": "", "dataset": "d",
                                                "seed": seed, "fingerprint": WORLD.fingerprint()})

    def stage_02(self, run, words, seed):
        (run / "lm-tiny").mkdir(exist_ok=True)
        for name in ("lm-tiny/model", "profiles.npy"):
            (run / name).write_text(" ".join(words))
        common.save_json(run / "profiles.json", {"heldout_nll": {"own": 1.0}, "steps": 2, "seconds": 4})

    def stage_03(self, run, words, seed):
        np.save(run / "feature_bank.npy", np.random.default_rng(seed).integers(3, size=(6, 2)))
        common.save_json(run / "quantize.json", {"profiles": [{"perplexity": 2.0}] * 2, "epochs": 3,
                                                 "quantizer": "vq", "llm_loss": "--no-llm-loss" not in words})

    def stage_co(self, run, words, seed):
        for name in words[:words.index("--seed")]:
            (run / f"feature_bank_{name}.npy").write_text(f"{name} of {run.name}")
            common.save_json(run / f"feature_bank_{name}.json", {"codes": [3, 3], "of": run.name})

    def stage_lm(self, run, words, seed):
        (run / "lm-both").mkdir(exist_ok=True)
        both = {"lm-both": {"a wrong word": {"hobby": 0.5 + seed}, "another history": {"hobby": 2 + seed}}}
        common.save_json(run / "lm-both" / "tiny.json", {"both": both})

    def stage_ba(self, run, words, seed):
        shutil.copytree(run, run / "kar", ignore=shutil.ignore_patterns("kar"), dirs_exist_ok=True)
        (run / "kar" / "profiles.npy").write_text("kar's")
        common.save_json(run / "kar" / "profiles.json", {"heldout_nll": None})
        figures = {"test_auc": 0.6 + seed / 100, "test_gauc": 0.5, "test_logloss": 0.69}
        common.save_json(run / f"baselines_{words[0]}.json", {"rows": [
            {"ids": f"{words[0]}'s scores", "lm_passes": 90, "of": 60, "unit": "pair", "seconds": 7 + seed,
             **figures}, {"ids": words[0], "lm_passes": 18, "of": 6, "unit": "user", "seconds": 2}]})

    def stage_re(self, run, words, seed):
        figures = {metric: 0.1 * (1 + seed) for metric in tables.RANKING}
        costs = {"passes": 2.0, "seconds": 0.5}
        rating = {"auc": 0.6, "gauc": 0.55}
        names = [f"RecSysLLM, {wording} wording" for wording in ("seen", "unseen")]
        common.save_json(run / "recsysllm.json", {
            "next_item": {"popularity": figures} | {name: figures | costs for name in names},
            "rating": {"DCN none": rating} | {name: rating | costs for name in names},
            "trained_parameters": 1000, "seconds": 60.0, "users": 5, "items": 9, "rows": 7})

    def stage_04(self, run, words, seed):
        rng, rows = np.random.default_rng((seed, *map(ord, " ".join(words)))), []
        metrics = [f"{split}_{key}" for split in ("test", "cold")[:1 + ("--cold" in words)]
                   for key in ("auc", "gauc", "logloss")]
        recommenders = range(int(words[words.index("--seeds") + 1]))
        for ids, number in itertools.product(words[words.index("--ids") + 1].split(","), recommenders):
            for ending in ("", "-cold"):
                common.save_npy(run / "predictions" / f"dcn-{ids}-{number}{ending}.npy", rng.random(24))
            figures = dict(zip(metrics, 0.5 + rng.random(len(metrics)) / 10))
            rows.append({"model": "dcn", "ids": ids, "seed": number, "best_epoch": 5 + number, **figures})
        common.save_json(run / "results.json", {"rows": rows, "base_rate_logloss": 0.69, "versions": {},
                                                "fields": "ids", "user_dropout": 0.7})


IDS = "none,random,userip"


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """(module in an empty tree of its own, list of the stages called)."""
    pretender = Pretender()
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "KEPT", tmp_path / "docs" / "results")
    monkeypatch.setattr(tables, "PAGE", tmp_path / "docs" / "RESULTS.md")
    monkeypatch.setattr(tables, "call", pretender)
    monkeypatch.setattr(tables, "BOOTSTRAP", 8)
    (tmp_path / "docs").mkdir()
    (tmp_path / "tools").mkdir()
    for name in tables.CODE:
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(tables, "STUDIES", {
        "small": {"default": tables.variant("--signal 0.5", "--steps 2", "", "text mf", f"--ids {IDS}"),
                  "K means": tables.own("--quantizer kmeans"),
                  "no prior": tables.variant(None, "--prior 0", fourth="--ids userip")},
        "folds": {"default": tables.variant("--cold-users 0.2", "", "", "", f"--ids {IDS} --cold")}})
    monkeypatch.setattr(tables, "FOLDS", ("folds",))
    return tables, pretender.calls


def command(module, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["tools/tables.py", *args])
    module.main()


def test_a_repetition_is_one_of_everything_random_after_the_data(studies, monkeypatch, capsys):
    module, calls = studies
    command(module, monkeypatch, "small", "--seeds", "2", "--jobs", "1")
    of = {}
    for script, run, words in calls:
        short = script.removeprefix("tools/")[:2]
        of.setdefault((run.parent.name, int(run.name)), []).append((short, " ".join(words)))
    for seed in (0, 1):
        assert of["default", seed] == [
            ("01", "--signal 0.5"), ("02", f"--steps 2 --seed {seed}"), ("03", f"--seed {seed}"),
            ("co", f"text mf --seed {seed}"), ("04", f"--ids {IDS} --seed {seed} --seeds 3")]
        assert of["k-means", seed] == [("03", f"--quantizer kmeans --seed {seed}"),
                                       ("04", f"--ids userip --seed {seed} --seeds 3")]
        assert of["no-prior", seed][0] == ("02", f"--prior 0 --seed {seed}")
        assert [stage for stage, _ in of["no-prior", seed]] == ["02", "03", "04"]
        run = module.folder("small", "K means", seed)
        base = module.folder("small", "default", seed)
        for name in ("interactions.npy", "profiles.npy", "lm-tiny/model"):  # of the same repetition
            assert (run / name).read_bytes() == (base / name).read_bytes()
    assert "| userip: K means |" in capsys.readouterr().out
    before = len(calls)
    command(module, monkeypatch, "small", "--seeds", "3", "--jobs", "2")
    assert {int(run.name) for _, run, _ in calls[before:]} == {2} and len(calls) == before + 10


def test_a_repetition_made_with_other_flags_is_made_anew(studies, monkeypatch, capsys):
    module, calls = studies
    command(module, monkeypatch, "small", "--seeds", "1", "--jobs", "1")
    module.STUDIES["small"]["no prior"] = module.variant(None, "--prior 2", fourth="--ids userip")
    del calls[:]
    command(module, monkeypatch, "small", "--seeds", "1", "--jobs", "1")
    assert {run.parent.name for _, run, _ in calls} == {"no-prior"} and calls[0][2][:2] == ["--prior", "2"]
    assert "other flags made it" in capsys.readouterr().err
    module.STUDIES["small"]["default"] = module.variant("--signal 1", "", "", "", f"--ids {IDS}")
    del calls[:]
    command(module, monkeypatch, "small", "--seeds", "1", "--jobs", "1")  # all take something from it
    assert {run.parent.name for _, run, _ in calls} == {"default", "k-means", "no-prior"}


def test_a_repetition_is_of_the_code_with_which_it_was_begun(studies, monkeypatch, capsys):
    module, calls = studies

    def killed(*_, **__):
        raise KeyboardInterrupt

    begun = module.code_fingerprint()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "call", killed)
        module.repeat("small", "default", 0, None)
    (module.ROOT / module.CODE[0]).write_text("edited")
    assert module.code_fingerprint() != begun
    command(module, monkeypatch, "small", "--seeds", "1", "--jobs", "1")
    printed = capsys.readouterr().err
    assert "1 runs of small are older than the code" in printed
    assert module.marks_in(module.folder("small", "default", 0))["code.json"]["code"] == begun
    later = module.marks_in(module.folder("small", "K means", 0))["code.json"]
    assert later["code"] == module.code_fingerprint()
    monkeypatch.setitem(module.FROM, "folds", "small")
    module.look_for_old_runs("folds", again=True)  # what it takes from another study is told, and stays
    assert "3 runs of small are older" in capsys.readouterr().err  # two have something from the first
    assert module.folder("small", "default", 0).exists()


def test_a_repetition_s_figures_are_the_means_of_its_recommenders(studies, monkeypatch, capsys):
    module, _ = studies
    command(module, monkeypatch, "small", "--seeds", "2", "--jobs", "1")
    kept = json.loads((module.KEPT / "small.json").read_text())
    assert kept["recommenders"] == 3 and "2 repetitions with 3 recommenders each" in capsys.readouterr().out
    for row in kept["rows"]:
        results = common.load(module.folder("small", row["variant"], row["seed"]), "results.json")
        trained = [other for other in results["rows"] if other["ids"] == row["ids"]]
        assert len(trained) == 3 and row["best_epoch"] == 5
        for key in ("test_auc", "test_gauc", "test_logloss"):
            assert row[key] == pytest.approx(np.mean([other[key] for other in trained]))
    assert len({(row["variant"], row["ids"], row["seed"]) for row in kept["rows"]}) == len(kept["rows"])


def test_runs_of_different_numbers_of_recommenders_make_no_table(studies, monkeypatch):
    module, _ = studies
    command(module, monkeypatch, "small", "--seeds", "2", "--jobs", "1")
    path = module.folder("small", "no prior", 1) / "results.json"
    results = json.loads(path.read_text())
    common.save_json(path, {**results, "rows": [row for row in results["rows"] if row["seed"] == 0]})
    with pytest.raises(common.UserError, match=r"recommenders: \[1, 3\].*--again"):
        command(module, monkeypatch, "small", "--seeds", "2", "--jobs", "1")


def test_controls_that_ask_a_large_llm_are_made_once_for_all_repetitions(studies, monkeypatch):
    module, calls = studies
    monkeypatch.setitem(module.STUDIES, "small", {"default": tables.variant(
        "", "", "", "metadata text words", f"--ids {IDS}", once="text words")})
    monkeypatch.setattr(module, "ONE_THETA", ("small",))
    command(module, monkeypatch, "small", "--seeds", "2", "--jobs", "1")
    made = [words for script, _, words in calls if "controls" in script]
    assert made == [["metadata", "text", "words", "--seed", "0"], ["metadata", "--seed", "1"]]
    later = module.folder("small", "default", 1)
    assert (later / "feature_bank_words.npy").read_text() == "words of 0"
    assert common.load(later, "feature_bank_text.json")["of"] == "0"
    assert (later / "feature_bank_metadata.npy").read_text() == "metadata of 1"
    assert [words for script, _, words in calls if script.startswith("02")] == [["--seed", "0"]]  # one theta


def test_what_a_baseline_scores_by_itself_stands_beside_the_recommender_s_rows(studies, monkeypatch, capsys):
    """And its cost; KAR's theta is taken from a folder of the first variant, as is the LM of both ways."""
    module, calls = studies
    study = {"default": tables.variant("", "--steps 2", fourth=f"--ids {IDS}", baselines="pepler"),
             "theta": tables.variant(None, None, fourth="--ids userip", source="kar"),
             "both": tables.variant(None, "--lm {first}/lm-both", fourth="--ids userip", lm_both=True)}
    monkeypatch.setitem(module.STUDIES, "small", study)
    command(module, monkeypatch, "small", "--seeds", "2", "--jobs", "1")
    first = module.folder("small", "default", 1)
    assert (module.folder("small", "theta", 1) / "profiles.npy").read_text() == "kar's"
    both = [call for call in calls if call[0] == "tools/lm_both.py" or call[1].parent.name == "both"]
    assert both[-4][:2] == ("tools/lm_both.py", first)
    assert both[-3][0] == "02_infer_profiles.py" and both[-3][2][:2] == ["--lm", f"{first}/lm-both"]
    data = json.loads((module.KEPT / "small.json").read_text())
    own = [(row["seed"], row["model"], row["test_auc"]) for row in data["rows"]
           if row["ids"] == "pepler's scores"]
    assert own == [(0, "dcn", 0.6), (1, "dcn", 0.61)]
    assert not any("pepler" in key for key in data["intervals"])
    lines, notes = lines_of(data)
    assert lines["pepler's scores"]["AUC"] == "0.6050 ± 0.0071" and "pepler" not in lines
    none = [row["test_auc"] for row in data["rows"] if row["ids"] == "none"]
    assert lines["pepler's scores"]["AUC - none"].startswith(shown(np.subtract([0.6, 0.61], none)))
    assert ("userip (default) 6.0 a user, 4 s; pepler's scores (default) 1.5 a pair, 8 s; "
            "pepler (default) 3.0 a user, 2 s") in notes
    assert "lm-both, nats a token lost under a wrong word: hobby 1.00; another history: hobby 2.50" in notes


def test_a_fold_is_another_split_too(studies, monkeypatch):
    module, calls = studies
    command(module, monkeypatch, "folds", "--seeds", "2", "--jobs", "1")
    assert [words for script, _, words in calls if script.startswith("01")] == [
        ["--cold-users", "0.2", "--seed", str(seed)] for seed in (0, 1)]
    kept = json.loads((module.KEPT / "folds.json").read_text())
    rate = np.mean([liked for *_, liked, split in ROWS if split == common.TRAIN])
    cold = [liked for *_, liked, split in ROWS if split == common.COLD]
    assert kept["metric"] == "cold" and kept["stability"] is None
    users, _, labels, _ = WORLD.interactions[WORLD.interactions[:, 3] == common.COLD].T
    columns = []
    for seed in (0, 1):
        predictions = module.folder("folds", "default", seed) / "predictions"
        pair = [[np.load(predictions / f"dcn-{ids}-{number}-cold.npy") for number in range(3)]
                for ids in ("userip", "random")]
        columns.append((np.array(WORLD.users)[users], labels, *pair))
    expected = module.bootstrap(columns)
    assert kept["intervals"]["default|dcn|userip"]["random"] == expected  # of cold rows too
    expected = {"default": pytest.approx(log_loss(cold, [rate] * len(cold)))}
    assert kept["base_rate_logloss"] == expected  # of the rows shown


def test_profiles_of_a_study_can_have_other_prompts_or_lack_their_words(prepared, tmp_path):
    """The run stays one that stage 02 reads; twice changed is changed as once."""
    run = copy_run(prepared, tmp_path / "run")
    before = common.load_dataset(run)
    tables.change_profiles(run, ("Zorp is", "Xans are"), keeps_words=True)
    renamed = common.load_dataset(run)
    assert [profile["prompt"] for profile in renamed.profiles] == ["Zorp is", "Xans are"]
    assert [profile["words"] for profile in renamed.profiles] == [
        profile["words"] for profile in before.profiles]
    for _ in range(2):
        tables.change_profiles(run, None, keeps_words=False)
    bare = common.load_dataset(run)
    assert bare.profiles == [{**profile, "words": {}} for profile in renamed.profiles]
    assert len({one.fingerprint() for one in (before, renamed, bare)}) == 3


def test_a_study_of_recsysllm_runs_the_stages_once_for_variants_that_share_them(studies, monkeypatch, capsys):
    module, calls = studies
    monkeypatch.setitem(module.STUDIES, "recsysllm-x", {
        "tiny": module.trained("--rank 4", "", "--lm tiny", most=2),
        "tiny, untrained": module.trained("--rank 0", after="tiny", most=2),
        "large": module.trained("--lm large", "--subsample-users 9", None, most=1)})
    command(module, monkeypatch, "recsysllm-x", "--seeds", "3", "--jobs", "1")
    of = {}
    for script, run, words in calls:
        of.setdefault((run.parent.name, run.name), []).append(
            (script.removeprefix("tools/")[:2], " ".join(words)))
    assert set(of) == {("tiny", "0"), ("tiny", "1"), ("tiny-untrained", "0"), ("tiny-untrained", "1"),
                       ("large", "0")}
    assert of["tiny", "1"] == [("01", ""), ("02", "--lm tiny --seed 1"), ("03", "--no-llm-loss --seed 1"),
                               ("04", "--ids none,userip --seed 1 --seeds 3"), ("re", "--rank 4 --seed 1")]
    assert of["tiny-untrained", "1"] == [("re", "--rank 0 --seed 1")]
    assert [stage for stage, _ in of["large", "0"]] == ["01", "04", "re"]
    shared = "predictions/dcn-none-0.npy"
    assert ((module.folder("recsysllm-x", "tiny", 1) / shared).read_bytes()
            == (module.folder("recsysllm-x", "tiny, untrained", 1) / shared).read_bytes())
    table = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[:2] for row in table[2:]] == [
        ["tiny", "popularity"], ["tiny", "seen wording"], ["tiny", "unseen wording"], ["tiny", "DCN none"],
        ["tiny, untrained", "seen wording"], ["tiny, untrained", "unseen wording"],
        ["large", "popularity"], ["large", "seen wording"], ["large", "unseen wording"],
        ["large", "DCN none"]]
    assert table[2][2] == "0.1500 ± 0.0707" and table[2][7] == "" and table[3][7] == "0.6000 ± 0.0000"
    before = len(calls)
    command(module, monkeypatch, "recsysllm-x", "--seeds", "2", "--jobs", "1")
    assert len(calls) == before
    kept = common.load(module.KEPT, "recsysllm-x.json")
    begun = module.code_fingerprint()
    (module.ROOT / module.CODE[0]).write_text("edited")
    assert module.collect_recsysllm("recsysllm-x", 2)["code"] == kept["code"] == begun[:12]


def test_other_files_of_the_data_are_other_settings(tmp_path, monkeypatch):
    study = {"films": tables.variant("--dataset ml-100k", ""), "all titles": tables.own("--epochs 1")}
    monkeypatch.setitem(tables.STUDIES, "x", study)
    monkeypatch.setitem(tables.STUDIES, "made up", {"demo": tables.variant("", "")})

    def settings(folder):
        return [tables.settings_fingerprint("x", name, folder) for name in study]

    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "u.data").write_text("1 2 3")
    assert settings(tmp_path / "here") == settings(tmp_path / "there")  # a folder may be moved
    (tmp_path / "there" / "u.data").write_text("1 2 3 4")
    assert not set(settings(tmp_path / "here")) & set(settings(tmp_path / "there"))
    made_up = [tables.settings_fingerprint("made up", "demo", tmp_path / name) for name in ("here", "there")]
    assert made_up[0] == made_up[1]


def test_a_table_says_when_and_by_how_many_codes_its_runs_were_made(studies, monkeypatch, capsys):
    module, _ = studies
    run_stages = module.run_stages

    def slow(study, name, seed, *more):
        sources = run_stages(study, name, seed, *more)
        os.utime(module.folder(study, name, seed) / "begun.json", (0, 0))
        return sources

    monkeypatch.setattr(module, "run_stages", slow)
    command(module, monkeypatch, "small", "--seeds", "1", "--jobs", "1")
    assert "1970" not in capsys.readouterr().out  # the day is that on which it was done, not begun
    begun = module.code_fingerprint()
    noon = 86400 * 3 + 43200  # of the fourth of January 1970
    os.utime(module.folder("small", "default", 0) / "code.json", (0, noon))
    (module.ROOT / module.CODE[0]).write_text("edited")
    capsys.readouterr()
    command(module, monkeypatch, "small", "--seeds", "2", "--jobs", "1")
    printed, said = capsys.readouterr()
    assert "on 1970-01-04 to 2" in printed and "with 2 versions of the code" in printed
    assert begun[:12] in json.loads((module.KEPT / "small.json").read_text())["code"]
    assert "versions and of the number formats" not in said
    changed = json.loads((module.folder("small", "default", 0) / "profiles.json").read_text())
    common.save_json(module.folder("small", "default", 0) / "profiles.json", {**changed, "dtype": "bf16"})
    command(module, monkeypatch, "small", "--seeds", "2", "--jobs", "1")
    assert "of 1 sets of versions and of the number formats None, bf16;" in capsys.readouterr().err


def test_a_table_says_by_which_code_that_was_made_which_its_runs_took_from_others(
        studies, monkeypatch, capsys):
    module, _ = studies
    command(module, monkeypatch, "small", "--seeds", "1", "--jobs", "1")
    before = module.code_fingerprint()
    shutil.rmtree(module.folder("small", "K means", 0))
    (module.ROOT / module.CODE[0]).write_text("edited")
    command(module, monkeypatch, "small", "--seeds", "1", "--jobs", "1")
    mark = json.loads((module.folder("small", "K means", 0) / "code.json").read_text())
    assert mark["code"] == module.code_fingerprint() and mark["sources"] == [before]
    for name in ("default", "no prior"):
        shutil.rmtree(module.folder("small", name, 0))
    capsys.readouterr()
    command(module, monkeypatch, "small", "--seeds", "1", "--jobs", "1")  # K means still has older artifacts
    printed, said = capsys.readouterr()
    assert "with 2 versions of the code" in printed and "1 runs of small are older than the code" in said


def test_settings_are_those_of_the_variant_whose_stages_are_shared_too(monkeypatch):
    study = {"tiny": tables.trained("--rank 4", "", "--lm tiny"),
             "large": tables.trained("--lm large", "--subsample-users 9", None),
             "large, untrained": tables.trained("--rank 0", after="large")}
    monkeypatch.setitem(tables.STUDIES, "x", study)
    before = {name: tables.settings_fingerprint("x", name) for name in study}
    study["large"] = tables.trained("--lm large", "--subsample-users 8", None)
    changed = {name for name in study if tables.settings_fingerprint("x", name) != before[name]}
    assert changed == {"large", "large, untrained"}


def test_runs_older_than_the_code_are_named_and_made_again_on_demand(studies, monkeypatch, tmp_path, capsys):
    module, calls = studies
    command(module, monkeypatch, "small", "--seeds", "1")
    command(module, monkeypatch, "small", "--seeds", "1")
    assert len(calls) == 10 and "WARNING" not in capsys.readouterr().err
    (tmp_path / "03_quantize.py").write_text("another")
    command(module, monkeypatch, "small", "--seeds", "1")
    warning = capsys.readouterr().err
    assert "WARNING: 3 runs of small are older than the code" in warning and "--again" in warning
    assert len(calls) == 10
    command(module, monkeypatch, "small", "--seeds", "1", "--again")
    assert len(calls) == 20 and "WARNING" not in capsys.readouterr().err


def test_a_stage_that_fails_ends_the_study_and_the_same_command_goes_on(studies, monkeypatch):
    module, calls = studies
    fine = module.call

    def call(script, run, flags, log, threads):
        if script.startswith("03") and "kmeans" in flags:
            raise common.UserError("03_quantize.py failed: no", run, "see the log")
        fine(script, run, flags, log, threads)

    monkeypatch.setattr(module, "call", call)
    with pytest.raises(common.UserError, match="03_quantize.py failed"):
        command(module, monkeypatch, "small", "--seeds", "1", "--jobs", "1")
    assert not module.KEPT.exists()
    assert not module.folder("small", "no prior", 0).exists()  # what has not begun does not begin
    monkeypatch.setattr(module, "call", fine)
    del calls[:]
    command(module, monkeypatch, "small", "--seeds", "1", "--jobs", "1")
    assert {run.parent.name for _, run, _ in calls} <= {"k-means", "no-prior"}
    assert [script[:2] for script, run, _ in calls if run.parent.name == "k-means"] == ["03", "04"]


def test_a_stage_is_called_on_one_thread_and_its_last_line_is_the_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "stage.py").write_text(
        "import os, sys\nprint(sys.argv[1:], os.environ['OMP_NUM_THREADS'])\n"
        "if '--fail' in sys.argv:\n"
        "    print('error: no data (here); get some', file=sys.stderr)\n    sys.exit(2)")
    tables.call("stage.py", tmp_path / "run", "--seed 3 --data-dir 'a b'", tmp_path / "log.txt")
    said = f"['--run', '{tmp_path / 'run'}', '--seed', '3', '--data-dir', 'a b'] 1"
    assert said in (tmp_path / "log.txt").read_text()
    with pytest.raises(common.UserError, match=r"^stage.py failed: no data \(here\); get some") as stop:
        tables.call("stage.py", tmp_path / "run", "--fail", tmp_path / "log.txt")
    assert str(tmp_path / "log.txt") in str(stop.value)


def test_what_is_kept_holds_rows_intervals_and_how_far_codes_agree(studies, monkeypatch):
    module, _ = studies
    command(module, monkeypatch, "small", "--seeds", "3", "--jobs", "1")
    data = json.loads((module.KEPT / "small.json").read_text())
    assert {(row["variant"], row["ids"], row["seed"]) for row in data["rows"]} == {
        *itertools.product(["default"], ["none", "random", "userip"], range(3)),
        *itertools.product(["K means", "no prior"], ["userip"], range(3))}
    assert set(data["intervals"]) == {f"{name}|dcn|userip" for name in ("default", "K means", "no prior")}
    banks = [np.random.default_rng(seed).integers(3, size=(6, 2)) for seed in range(3)]
    pairs = list(itertools.combinations(banks, 2))
    expected = [np.mean([adjusted_mutual_info_score(a[:, m], b[:, m]) for a, b in pairs]) for m in range(2)]
    assert data["stability"]["default"] == pytest.approx(expected)
    test = WORLD.interactions[WORLD.interactions[:, 3] == 2]
    repetitions = []
    for seed in range(3):
        run, base = module.folder("small", "K means", seed), module.folder("small", "default", seed)
        ours = [np.load(run / "predictions" / f"dcn-userip-{number}.npy") for number in range(3)]
        none = [np.load(base / "predictions" / f"dcn-none-{number}.npy") for number in range(3)]
        repetitions.append((test[:, 0], test[:, 2], ours, none))
    assert data["intervals"]["K means|dcn|userip"]["none"] == module.bootstrap(repetitions)


def test_what_the_banks_of_controls_say_stands_below_the_table(inferred, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setitem(tables.STUDIES, "small", {"default": tables.variant("", "")})
    run = tables.folder("small", "default", 0)
    copy_run(inferred, run)
    call_stage(load_script("controls"), "--run", run, "metadata", "text", "words", "generosity", "mf")
    found = tables.what_banks_say("small")["default"]
    truth = np.load(run / "truth.npy")
    for ids, columns in (("metadata", (0, 1)), ("text", (1, 1))):
        bank = np.load(run / f"feature_bank_{ids}.npy")
        sizes = common.load(run, f"feature_bank_{ids}.json")["codes"]
        for m, column in enumerate(columns):
            known = bank[:, column] < sizes[column]
            expected = normalized_mutual_info_score(truth[known, m], bank[known, column])
            assert found[ids]["nmi"][m] == pytest.approx(expected)
    asked = common.load(run, "feature_bank_words.json")
    assert all(found["words"][key] == asked[key] for key in ("heldout_nll", "heldout_error"))
    assert not {"generosity", "mf"} & set(found)  # their codes are no profile's
    line, = tables.lines_of_banks({"default": found, "without controls": {}})
    assert "metadata {:.2f} / {:.2f}".format(*found["metadata"]["nmi"]) in line
    assert f"{asked['heldout_nll']['0.5']:.4f} ± {asked['heldout_error']['0.5']:.4f}" in line


def test_kept_tables_need_no_run_and_stand_between_their_markers(studies, monkeypatch, tmp_path, capsys):
    module, calls = studies
    module.KEPT.mkdir()
    data = data_of(*three())
    for name in module.STUDIES:
        common.save_json(module.KEPT / f"{name}.json", {**data, "study": name})
    command(module, monkeypatch, "small", "--kept")
    printed = capsys.readouterr().out
    text = module.table({**data, "study": "small"})
    assert calls == [] and not (tmp_path / "runs").exists() and text in printed
    page = ("before\n<!-- table small -->\nold\n<!-- end small -->\n"
            "after <!-- table folds -->\n<!-- end folds -->\n")
    module.PAGE.write_text(page)
    for _ in range(2):
        command(module, monkeypatch, "small", "--kept", "--write")
    found = module.PAGE.read_text()
    assert found == page.replace("old\n", text + "\n") and calls == []


def test_a_page_that_cannot_be_written_stays_as_it_was(studies, monkeypatch):
    module, _ = studies
    page = "before\n<!-- table small -->\nold\n<!-- end small -->\nafter\n"
    module.PAGE.write_text(page)

    def fails(*_):
        raise OSError(28, "no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left.*RESULTS.md"):
        patch.setattr(module.common.os, "replace", fails)
        patch.setattr(module, "run_study", lambda *_: None)
        patch.setattr(module, "collect", lambda *_: None)
        patch.setattr(module.common, "save_json", lambda *_: None)
        patch.setattr(module.common, "load", lambda *_: None)
        patch.setattr(module, "table", lambda _: "new")
        command(module, monkeypatch, "small", "--write")
    assert module.PAGE.read_text() == page


@pytest.mark.parametrize("args, words", [
    (["nonsense"], "no such table: nonsense"), (["small", "nonsense"], "no such table: nonsense"),
    (["small", "--kept"], "small.json is missing"), (["folds", "--write"], "no markers for folds"),
    ([], "NAME"), (["small", "--seeds", "0"], "out of range"),
    (["small", "--kept", "--again"], "leave out --again"), (["small", "--kept", "--seeds", "3"], "--seeds"),
    (["small", "--kept", "--data-dir", "."], "leave out --data-dir")])
def test_bad_arguments_are_one_line_and_run_nothing(args, words, studies, monkeypatch, capsys):
    module, calls = studies
    module.PAGE.write_text("no markers\n")
    with pytest.raises(SystemExit) as stop:
        common.guarded(lambda: command(module, monkeypatch, *args))
    message, = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and message.startswith("error: ") and words in message
    assert "run the same command again" not in message
    assert calls == [] and module.PAGE.read_text() == "no markers\n"


def test_every_study_names_flags_that_its_stages_know(monkeypatch):
    """Each variant's flags are parsed by the stages' own parsers; nothing is run."""
    controls = load_script("controls").CONTROLS
    for name, study in tables.STUDIES.items():
        first = next(iter(study.values()))["flags"]
        assert len({tables.folder(name, variant, 0) for variant in study}) == len(study)
        for variant, settings in study.items():
            assert set(settings["controls"].split()) <= controls.keys(), (name, variant)
            for module, flags in zip((prepare, infer, quantize, ctr), settings["flags"]):
                words = (flags or "").format(base="base", first="first").split()
                monkeypatch.setattr(sys, "argv", ["x", *words])
                args = module.parse_arguments()
            monkeypatch.setattr(sys, "argv", ["x", *(settings["recsysllm"] or "").split()])
            recsysllm.parse_arguments()
            assert settings["after"] is None or settings["after"] in study
            methods = settings["baselines"].split()
            banks = {"kar": ["kar", "kar-text", "kar-text0"], "pepler": ["pepler"], "rella": []}
            own = (settings["controls"] or next(iter(study.values()))["controls"]).split()
            own += sum((banks[method] for method in methods), [])
            assert set(args.ids) - set(ctr.IDS) <= set(own), (name, variant)
        references = {"none"} if tables.is_recsysllm(name) else {"none", "random"}
        assert references <= set(first[3].split("--ids ")[1].split()[0].split(","))


def test_the_real_script_says_what_it_does_not_know():
    process = fork_stage("tools/tables.py", "nonsense")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: no such table: nonsense (")


def test_what_a_study_takes_artifacts_from_is_made_before_it(monkeypatch, tmp_path):
    """On a fresh machine too: the study's origin, and of one theta the first repetition."""
    made = []
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "repeat", lambda study, name, seed, *_: made.append((study, name, seed)))
    monkeypatch.setattr(tables, "code_fingerprint", lambda: "x")
    tables.run_study("ml-100k-attributes", 3, 2, None, again=False)
    assert set(made[:3]) == {("ml-100k", "default", seed) for seed in range(3)} and made[0][2] == 0
    own = [(name, seed) for study, name, seed in made[3:]]
    names = list(tables.STUDIES["ml-100k-attributes"])
    assert own[0] == (names[0], 0) and set(own[1:3]) == {(names[0], 1), (names[0], 2)}
    assert {seed for _, seed in own[3:5]} == {0} and len(own) == 9
