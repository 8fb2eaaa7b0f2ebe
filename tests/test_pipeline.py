"""The four scripts together: subprocess runs, rules of evidence, determinism, bad input."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (assert_bytes_equal, call_stage, copy_run, ctr, fork_stage, infer, ok, prepare, quantize,
                      run_stage, settings, small_world)

import common
from common import COLD, SEEN, SUPPORT, TEST, TRAIN, VALIDATION


def test_the_four_scripts_in_sequence_with_the_tiny_lm(tmp_path, capsys):
    run = tmp_path / "runs" / "demo"
    printed = [ok(fork_stage("01_prepare_data.py", "--run", run, "--subsample-users", 100)),
               ok(run_stage("02_infer_profiles.py", "--run", run, "--tiny-sentences", 400, "--steps", 3,
                            "--task-steps", 4)),
               ok(fork_stage("03_quantize.py", "--run", run, "--epochs", 1, "--warm-up", 1)),
               ok(fork_stage("04_train_ctr.py", "--run", run, "--seeds", 1, "--epochs", 2))]
    for number, process in enumerate(printed[:3], 2):
        assert f"next: python 0{number}" in process.stdout
    assert not any(process.stderr for process in printed), [process.stderr for process in printed]
    facts = json.loads((run / "profiles.json").read_text())
    assert facts["lm"] == "tiny" and set(facts["heldout_nll"]) == {
        "own", "population", "shuffled", "hobby", "background"}
    assert set(facts["lm_sensitivity"]) == {"hobby", "background"}
    steps = facts["train_nll_steps"]
    assert len(steps) == 4 and steps[-1] < steps[0]
    assert list(facts["train_nll"].values()) == [steps[0], steps[-1]]
    _, tokenizer = common.load_language_model(str(run / "lm-tiny"), torch.float32, torch.device("cpu"))
    prompt = sum(len(part.ids) for part in infer.prompt_segments(tokenizer, common.load_dataset(run)))
    inferred = json.loads((run / "profiles_users.json").read_text())["inferred"]
    worked = 3 * (facts["train_tokens"] + prompt * len(inferred))
    assert facts["tokens_per_second"] == pytest.approx(worked / facts["seconds"], rel=0.3)  # it is rounded
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"lm-tiny", "predictions"}
    profiles = np.load(run / "profiles.npy")
    assert profiles.dtype == np.float32
    assert profiles.shape == (json.loads((run / "dataset.json").read_text())["n_users"], 2, 8)
    unknown = (np.load(run / "feature_bank.npy") == [4, 3]).all(1)
    assert facts["users_without_profile"] == unknown.sum()
    assert (profiles[unknown] == 0).all()
    call_stage(infer, "--run", run, "--tiny-sentences", 400, "--steps", 4, "--task-steps", 4)
    trained = "training the tiny LM"
    assert trained in printed[1].stdout and trained not in capsys.readouterr().out


# ---------------------------------------------------------------- rules of evidence

def rewrite(run, interactions, items=None):
    """Other interactions, other items, with a fingerprint to match."""
    facts, dataset = json.loads((run / "dataset.json").read_text()), common.load_dataset(run)
    dataset = dataclasses.replace(dataset, interactions=interactions, items=items or dataset.items)
    np.save(run / "interactions.npy", interactions)
    (run / "items.json").write_text(json.dumps(dataset.items))
    (run / "dataset.json").write_text(json.dumps(facts | {"fingerprint": dataset.fingerprint()}))


def poisoned(source, target, splits=(VALIDATION, TEST, COLD)):
    """Rows of these splits get another item and label; items met nowhere else another title. How many?"""
    copy_run(source, target)
    interactions, items = np.load(source / "interactions.npy"), common.load(source, "items.json")
    held = np.isin(interactions[:, 3], splits)
    rng = np.random.default_rng(9)
    interactions[held, 2] ^= 1
    interactions[held, 1] = rng.integers(len(items), size=held.sum())
    hidden = set(range(len(items))) - set(interactions[~held, 1].tolist())
    for index in hidden:
        items[index]["title"] = "Poison Poison"
        items[index]["attributes"] = {"hobby": ["poison"], "background": ["poison"]}
    rewrite(target, interactions, items)
    return len(hidden)


def test_poisoned_validation_test_and_cold_rows_change_nothing_up_to_the_bank(tmp_path):
    clean, poison = tmp_path / "clean", tmp_path / "poisoned"
    call_stage(prepare, "--run", clean, "--subsample-users", 90, "--min-interactions", 1, "--cold-users", 0.3)
    assert poisoned(clean, poison) > 0
    assert set(np.load(clean / "interactions.npy")[:, 3].tolist()) == {*SEEN, VALIDATION, TEST, COLD}
    for run in (clean, poison):
        call_stage(infer, "--run", run, "--lm", "tiny", "--tiny-sentences", 320, "--steps", 2,
                   "--task-steps", 2)
        call_stage(quantize, "--run", run, "--epochs", 1, "--warm-up", 1)
    for name in ("lm-tiny/model.safetensors", "profiles.npy", "feature_bank.npy", "feature_bank.csv"):
        assert_bytes_equal(clean / name, poison / name)
    books = [common.load(run, "codebooks.pt")["codebooks"] for run in (clean, poison)]
    assert all(torch.equal(one, two) for one, two in zip(*books))
    facts = [common.load(run, "profiles.json") for run in (clean, poison)]
    assert facts[0]["heldout_nll"] != facts[1]["heldout_nll"]  # the poison was there to be seen


def test_poison_changes_no_code_that_the_likelihood_gives(prepared, lm_folders, tmp_path):
    """Of EM; test_controls.py has the words."""
    poisoned(prepared, tmp_path / "poisoned")
    for run in (copy_run(prepared, tmp_path / "clean"), tmp_path / "poisoned"):
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 1)
        call_stage(quantize, "--run", run, "--quantizer", "em", "--epochs", 1, "--codes", "2,2")
    assert_bytes_equal(tmp_path / "clean" / "feature_bank.npy", tmp_path / "poisoned" / "feature_bank.npy")


def test_support_rows_change_theta_of_their_own_users_alone(lm_folders, tmp_path, monkeypatch):
    """But for the task prompt and the directions that are kept, which all share."""
    clean, poison = tmp_path / "clean", tmp_path / "poisoned"
    call_stage(prepare, "--run", clean, "--subsample-users", 100, "--cold-users", 0.3)
    poisoned(clean, poison, (SUPPORT,))
    theta = []
    for run in (clean, poison):
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 3, "--task-steps", 0,
                   "--rank", 0)
        theta.append(np.load(run / "profiles.npy"))
    dataset = common.load_dataset(clean)
    cold = np.isin(np.arange(len(dataset.users)), dataset.rows(SUPPORT)[:, 0])
    moved = np.abs(theta[0] - theta[1]).max(axis=(1, 2))
    known = np.isin(np.arange(len(dataset.users)), common.load(clean, "profiles_users.json")["inferred"])
    assert np.isin(common.load(poison, "profiles_users.json")["inferred"], np.flatnonzero(known | cold)).all()
    assert (moved[cold & known] > 1e-3).mean() > 0.9 and moved[~cold & known].max() < 1e-4


def other_support(dataset):
    """The same data set with other items and the other label in every support row."""
    interactions = dataset.interactions.copy()
    support = interactions[:, 3] == SUPPORT
    interactions[support, 1] = (interactions[support, 1] * 7 + 3) % len(dataset.items)
    interactions[support, 2] ^= 1
    return dataclasses.replace(dataset, interactions=interactions)


def test_support_rows_train_neither_the_surrogate_nor_the_codebooks(monkeypatch):
    """Given theta, by Algorithm 1 without the LLM's term, where histories of cold users have their place."""
    made = []

    class Recorded(quantize.Surrogate):
        def __init__(self, *args):
            super().__init__(*args)
            made.append((self, {key: value.clone() for key, value in self.state_dict().items()}))

    monkeypatch.setattr(quantize, "Surrogate", Recorded)
    args = SimpleNamespace(seed=0, paper=False, start="kmeans", llm_loss=False, epochs=2, warm_up=2,
                           alpha=1.0, beta=0.25, lr=0.02, batch_users=32)
    dataset, found = small_world(cold_users=0.3)[0], []
    for each in (dataset, other_support(dataset)):
        theta = np.random.default_rng(0).normal(size=(len(dataset.users), 2, 8)).astype(np.float32)
        known = np.ones(len(theta), dtype=bool)
        space = SimpleNamespace(word_z=lambda m: None)
        problem = quantize.Problem(None, each, theta, known, {"prior": 1.0}, space)
        quantizer = quantize.JointVQ(problem, [4, 3], args, torch.device("cpu"))
        codes, _ = quantizer.fit()
        found.append([codes, *quantizer.codebooks, *made[-1][0].state_dict().values()])
    assert len(found[0]) == len(found[1]) and all(np.array_equal(one, two) for one, two in zip(*found))
    after, before = (part["dcn.embed.table.weight"] for part in (made[0][0].state_dict(), made[0][1]))
    trained = (after != before).any(1)[:len(dataset.users)].numpy()
    assert np.array_equal(np.flatnonzero(trained), np.unique(dataset.rows(TRAIN)[:, 0]))  # no cold user's id


def test_support_rows_train_no_tiny_lm(tmp_path):
    dataset, _ = small_world(cold_users=0.3)
    args = SimpleNamespace(seed=0, history="rated", tiny_sentences=64)
    for name, each in (("clean", dataset), ("poisoned", other_support(dataset))):
        length = max(map(len, infer.history_texts(each, TRAIN, settings(history="rated"))))
        common.train_tiny(each, tmp_path / name, length, args)
    for name in ("model.safetensors", "tiny.json"):
        assert_bytes_equal(tmp_path / "clean" / name, tmp_path / "poisoned" / name)


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(inferred, lm_folders, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        run = tmp_path / name
        call_stage(prepare, "--run", run, "--subsample-users", 120, "--seed", seed)
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 3, "--task-steps", 1,
                   "--seed", seed)
        call_stage(quantize, "--run", run, "--epochs", 1, "--warm-up", 1, "--seed", seed)
    for name in ("dataset.json", "interactions.npy", "users.json", "items.json", "truth.npy", "profiles.npy",
                 "feature_bank.npy", "feature_bank.csv"):
        assert_bytes_equal(inferred / name, tmp_path / "again" / name)
    for name in ("interactions.npy", "profiles.npy", "feature_bank.npy"):
        assert (inferred / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


# ---------------------------------------------------------------- every flag matters (04: test_ctr.py)

def test_every_flag_of_stage_01_changes_the_data(tmp_path):
    def data(*args):
        call_stage(prepare, "--run", tmp_path, "--subsample-users", 80, *args)
        return common.load(tmp_path, "dataset.json")["fingerprint"]
    base = data()
    assert base == data()
    for flags in (("--seed", 1), ("--subsample-users", 90), ("--max-per-user", 12), ("--min-interactions", 3),
                  ("--positive-above", 4), ("--cold-users", 0.2), ("--signal", 0), ("--critic",)):
        assert data(*flags) != base, flags
    assert data("--cold-users", 0.2) != data("--cold-users", 0.4) != data("--cold-users", 0.4, "--seed", 1)


def test_every_flag_of_stage_02_changes_theta(lm_folders, tmp_path):
    call_stage(prepare, "--run", tmp_path / "prepared", "--subsample-users", 40, "--min-interactions", 1)

    def theta(*args):
        run = copy_run(tmp_path / "prepared", tmp_path / "run")
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 2, "--max-history", 6,
                   "--task-steps", 3, *args)
        return np.load(run / "profiles.npy")
    base = theta()
    for flags in (("--steps", 1), ("--lr", 0.05), ("--prior", 2), ("--space", "words"), ("--rank", 1),
                  ("--rank", 0), ("--task-steps", 0), ("--task-steps", 2), ("--mask", "causal"),
                  ("--seed", 1), ("--history", "all"), ("--history", "rated"), ("--max-history", 3),
                  ("--dtype", "bf16")):
        found = theta(*flags)
        assert found.shape != base.shape or not np.allclose(found, base, atol=1e-7), flags
    assert np.allclose(theta("--block-size", 7), base, atol=2e-3)  # how, not what
    assert theta("--lm", lm_folders["llama"]).shape == base.shape


def test_sentences_and_seed_change_the_tiny_lm(prepared, tmp_path):
    run, found = copy_run(prepared, tmp_path / "run"), []
    for flags in (("--tiny-sentences", 64), ("--tiny-sentences", 96), ("--tiny-sentences", 64, "--seed", 1)):
        call_stage(infer, "--run", run, "--lm", "tiny", "--steps", 1, "--task-steps", 1, "--fresh", *flags)
        found.append(json.loads((run / "profiles.json").read_text())["train_nll"]["before"])
    assert len(set(found)) == 3


# ---------------------------------------------------------------- bad input

def long_prompt(run):
    """The profiles' names fill the LLM's window, so that no title fits behind them."""
    dataset, facts = common.load_dataset(run), common.load(run, "dataset.json")
    dataset.profiles[0]["prompt"] = "a hobby " * 150
    common.save_json(run / "dataset.json",
                     facts | {"profiles": dataset.profiles, "fingerprint": dataset.fingerprint()})


def break_interactions(run):
    (run / "interactions.npy").write_bytes(b"\x93NUMPY" + bytes(40))


def empty_training(run):
    """No user has a liked training row."""
    interactions = np.load(run / "interactions.npy")
    interactions[interactions[:, 3] == TRAIN, 2] = 0
    rewrite(run, interactions)


def one_class(run):
    """Every test row is liked."""
    interactions = np.load(run / "interactions.npy")
    interactions[interactions[:, 3] == TEST, 2] = 1
    rewrite(run, interactions)


def other_settings(run):
    """Stage 02 was run again with another prior."""
    facts = json.loads((run / "profiles.json").read_text())
    (run / "profiles.json").write_text(json.dumps(facts | {"prior": 9.0}))


def beyond(run):
    bank, facts = np.load(run / "feature_bank.npy"), json.loads((run / "quantize.json").read_text())
    bank[3, 0] = 99
    np.save(run / "feature_bank.npy", bank)
    (run / "quantize.json").write_text(json.dumps(facts | {"fingerprint": common.fingerprint(bank)}))


def other_dataset(run):
    call_stage(prepare, "--run", run, "--subsample-users", 110)


def drop(name):
    return lambda run: (run / name).unlink()


def put(name, text):
    return lambda run: (run / name).write_text(text)


def scale(name, factor, shift=0):
    return lambda run: np.save(run / name, np.load(run / name) * factor + shift)


def without_words(run):
    dataset, facts = common.load_dataset(run), common.load(run, "dataset.json")
    for profile in dataset.profiles:
        del profile["words"]
    facts |= {"profiles": dataset.profiles, "fingerprint": dataset.fingerprint()}
    common.save_json(run / "dataset.json", facts)


def change_inferred(change):
    def damage(run):
        owners = json.loads((run / "profiles_users.json").read_text())
        owners["inferred"] = change(owners["inferred"])
        (run / "profiles_users.json").write_text(json.dumps(owners))
    return damage


def change_facts(change):
    def damage(run):
        facts = json.loads((run / "profiles.json").read_text())
        change(facts)
        (run / "profiles.json").write_text(json.dumps(facts))
    return damage


def change_codebooks(change):
    def damage(run):
        saved = torch.load(run / "codebooks.pt")
        change(saved)
        torch.save(saved, run / "codebooks.pt")
    return damage


def change_space(change):
    def damage(run):
        saved = torch.load(run / "space.pt")
        change(saved)
        torch.save(saved, run / "space.pt")
    return damage


BAD = [  # stage, flags, what happens to the run before, words the error must hold
    (prepare, ["--dataset", "ml-100k", "--data-dir", "/nowhere"], None, ["cannot read u.genre", "/nowhere"]),
    (prepare, ["--min-interactions", 100000], None, ["kept 0 of", "lower --min-interactions"]),
    (prepare, ["--min-interactions", 0], None, ["give 1 or more"]),
    (prepare, ["--dataset", "csv"], None, ["--dataset csv needs --ratings-file", "--help"]),
    (prepare, ["--ratings-file", "r.csv"], None, ["--ratings-file needs --dataset csv", "--help"]),
    (prepare, ["--dataset", "ml-1m", "--ratings-file", "r.csv"], None, ["needs --dataset csv", "--help"]),
    (prepare, ["--dataset", "csv", "--ratings-file", "r.csv", "--items-file", "i.csv"], None,
     ["--items-file needs --title-col", "--help"]),
    (prepare, ["--data-dir", "ml-100k"], None, ["--data-dir needs --dataset", "--help"]),
    (prepare, ["--dataset", "netflix"], None, ["invalid choice", "--help"]),
    (prepare, ["--nonsense"], None, ["unrecognized", "--help"]),
    (prepare, ["--positive-above", "nan"], None, ["--positive-above", "out of range"]),
    (prepare, ["--cold-users", 1], None, ["--cold-users", "out of range"]),
    (prepare, ["--cold-users", -0.1], None, ["--cold-users", "out of range"]),
    (prepare, ["--cold-users", 0.0001], None, ["2,000 users is nobody", "--cold-users 0.0001"]),
    (prepare, ["--user-col", "who"], None, ["--user-col needs --dataset csv", "--help"]),
    (prepare, ["--value-sep", ";"], None, ["--value-sep needs --dataset csv", "--help"]),
    (prepare, ["--dataset", "ml-1m", "--signal", 0], None, ["--signal needs --dataset demo", "--help"]),
    (prepare, ["--signal", 1000], None, ["--signal", "out of range"]),
    (infer, ["--prior", 1e308], None, ["--prior", "out of range"]),
    (infer, ["--steps", -3], None, ["--steps", "give 1 or more"]),
    (infer, ["--lr", 0], None, ["--lr", "out of range"]),
    (infer, ["--lr", "inf"], None, ["--lr", "out of range"]),
    (infer, ["--lm", "/nowhere/model"], None, ["/nowhere/model", "check name, network and disk"]),
    (infer, [], drop("dataset.json"), ["dataset.json is missing", "01_prepare_data.py"]),
    (infer, [], break_interactions, ["interactions.npy cannot be read", "01_prepare_data.py"]),
    (infer, [], put("items.json", "[]"), ["another dataset", "01_prepare_data.py"]),
    (infer, [], put("users.json", "{"), ["users.json cannot be read", "01_prepare_data.py"]),
    (infer, [], empty_training, ["no user has a training history", "--history all"]),
    (infer, ["--lm", "tiny"], empty_training, ["no user has a training history", "--history all"]),
    (infer, [], long_prompt, ["no title fits", "change --lm"]),
    (infer, ["--users", "/nowhere", "--steps", 9, "--task-steps", 1], None,
     ["other settings (steps)", "the first run"]),
    (quantize, [], put("profiles.json", "{}"), ["profiles.json lacks", "02_infer_profiles.py"]),
    (quantize, [], put("profiles.json", "[]"), ["profiles.json lacks", "02_infer_profiles.py"]),
    (quantize, [], change_facts(lambda facts: facts.update(method=1)), ["earlier stage 02", "run 02 again"]),
    (quantize, [], put("profiles.json", "null"), ["profiles.json lacks", "02_infer_profiles.py"]),
    (quantize, [], change_inferred(lambda rows: [*rows, 10**6]), ["another profiles.json", "02_infer"]),
    (quantize, [], change_inferred(lambda rows: ["1", *rows]), ["another profiles.json", "02_infer"]),
    (quantize, [], change_inferred(lambda rows: None), ["another profiles.json", "02_infer"]),
    (quantize, [], lambda run: np.save(run / "interactions.npy", np.int32(3)), ["another dataset"]),
    (quantize, [], lambda run: np.save(run / "profiles.npy", np.float32(3)), ["another profiles.json"]),
    (quantize, ["--seed", 5000000000], None, ["--seed", "out of range"]),
    (quantize, ["--lr", 1e30], None, ["--lr", "out of range"]),
    (quantize, ["--lr", 1e38, "--assign", "likelihood"], None, ["--lr", "out of range"]),
    (quantize, ["--beta", 1e39], None, ["--beta", "out of range"]),
    (infer, ["--users", "/nowhere"], change_facts(lambda facts: facts.pop("seconds")),
     ["profiles.json lacks seconds", "02_infer_profiles.py"]),
    (quantize, ["--keep-codebooks"], change_facts(lambda facts: facts.update(rank=3)),
     ["made with another LLM", "without --keep-codebooks"]),
    (quantize, [], change_space(lambda saved: saved["origin"].add_(1)), ["space.pt was made from another"]),
    (quantize, [], drop("space.pt"), ["space.pt is missing", "02_infer_profiles.py"]),
    (prepare, ["--hobby-words", "music"], None, ["two different words", "--hobby-words"]),
    (prepare, ["--hobby-words", "music,unknown"], None, ["'unknown'", "--hobby-words"]),
    (prepare, ["--dataset", "csv", "--ratings-file", "r.csv", "--item-id-col", "i"], None,
     ["--item-id-col needs --items-file", "--help"]),
    (prepare, ["--hobby-words", "music,,cooking"], None, ["two different words", "--hobby-words"]),
    (infer, ["--lm", "/nowhere/model.gguf"], None, ["no such file", "model.gguf", "--lm"]),
    (quantize, ["--keep-codebooks"], change_codebooks(lambda saved: saved["codebooks"].pop()),
     ["codebooks.pt has 1 codebooks, not one for each profile", "without --keep-codebooks"]),
    (quantize, ["--keep-codebooks"], change_codebooks(lambda saved: saved["facts"].update(quantizer="ward")),
     ["codebooks.pt is of --quantizer ward", "without --keep-codebooks"]),
    (quantize, ["--quantizer", "vq", "--assign", "likelihood"], None, ["--quantizer vq goes with"]),
    (quantize, ["--quantizer", "words", "--assign", "nearest"], None, ["--quantizer words goes with"]),
    (quantize, ["--assign", "likelihood", "--codes", "17,6"], None, ["102 combinations", "at most 100"]),
    (quantize, ["--quantizer", "sense"], None, ["invalid choice", "--help"]),
    (quantize, ["--keep-codebooks", "--codes", "4,3"], None, ["goes without --codes"]),
    (quantize, ["--keep-codebooks", "--quantizer", "kmeans"], None, ["goes without --quantizer"]),
    (quantize, ["--keep-codebooks", "--no-llm-loss"], None, ["goes without --llm-loss"]),
    (quantize, ["--keep-codebooks", "--seed", "3"], None, ["goes without --seed"]),
    (quantize, ["--keep-codebooks"], other_settings, ["made with another LLM", "without --keep-codebooks"]),
    (quantize, ["--keep-codebooks"], drop("codebooks.pt"), ["codebooks.pt is missing", "03_quantize.py"]),
    (quantize, ["--keep-codebooks"], put("codebooks.pt", "x"), ["codebooks.pt cannot be read"]),
    (quantize, [], drop("profiles.npy"), ["profiles.npy is missing", "02_infer_profiles.py"]),
    (quantize, [], other_dataset, ["profiles.npy was made from another dataset", "02_infer_profiles.py"]),
    (quantize, [], scale("profiles.npy", 1, 1), ["another profiles", "02_infer_profiles.py"]),
    (quantize, ["--codes", "4"], None, ["does not give 2 codebook sizes", "hobby, background"]),
    (quantize, ["--codes", "4,x"], None, ["does not give 2 codebook sizes"]),
    (quantize, ["--codes", "4,1"], None, ["2 to 32766"]),
    (quantize, ["--codes", "500,3"], None, ["500 codes are more than", "choose fewer"]),
    (quantize, ["--alpha", -1], None, ["--alpha", "out of range"]),
    (ctr, [], put("quantize.json", "[]"), ["quantize.json lacks", "03_quantize.py"]),
    (ctr, [], put("profiles.json", "[]"),
     ["profiles.json lacks fingerprint, rows_kept", "02_infer_profiles.py"]),
    (ctr, [], put("profiles.json", "null"),
     ["profiles.json lacks fingerprint, rows_kept", "02_infer_profiles.py"]),
    (ctr, [], beyond, ["feature_bank.npy", "from 0 to [4, 3]"]),
    (ctr, ["--ids", "none"], one_class, ["all test labels are equal"]),
    (ctr, [], drop("feature_bank.npy"), ["feature_bank.npy is missing", "03_quantize.py"]),
    (ctr, ["--ids", "userip", "--seeds", 1, "--epochs", 1], scale("feature_bank.npy", 0),
     ["feature_bank.npy was made from another quantize", "03_quantize.py"]),
    (ctr, [], other_dataset, ["another dataset", "03_quantize.py"]),
    (ctr, ["--models", "dcm"], None, ["unknown dcm", "known: lr, ffm"]),
    (ctr, ["--ids", "userip,magic"], None,
     ["there are no ids called magic", "shuffled", "feature_bank_magic.npy"]),
    (ctr, ["--ids", "random-magic"], None, ["there are no ids called magic"]),
    (ctr, ["--ids", "random-none"], None, ["random-none would be a control of no codes"]),
    (ctr, ["--ids", ","], None, ["--ids", "give one name or more"]),
    (ctr, ["--ids", "planted"], drop("truth.npy"), ["no planted truth"]),
    (ctr, ["--ids", "shuffled-planted"], drop("truth.npy"), ["no planted truth"]),
    (ctr, ["--seeds", 0], None, ["--seeds", "give 1 or more"]),
    (ctr, ["--user-dropout", 2], None, ["--user-dropout", "out of range"]),
    (ctr, ["--user-dropout", 1], None, ["--user-dropout", "out of range"]),
    (ctr, ["--weight-decay", -1], None, ["--weight-decay", "out of range"]),
    (ctr, ["--lr", 1e30, "--ids", "none", "--seeds", 1], None, ["DCN: a score", "epoch 1, --lr", "lower"]),
    (ctr, ["--lr", 1e30, "--ids", "none", "--batch-size", 10**6, "--seeds", 1], None, ["DCN: a score"]),
    (infer, [], without_words, ["dataset.json has no words", "run 01 again"]),
]


@pytest.mark.parametrize("case", range(len(BAD)),
                         ids=[f"{stage.__name__[:2]}-{number}" for number, (stage, *_) in enumerate(BAD)])
def test_bad_input_is_one_line_exit_2_and_changes_no_artifact(case, inferred, lm_folders, tmp_path, capsys):
    stage, flags, damage, words = BAD[case]
    run = copy_run(inferred, tmp_path / "run")
    if damage:
        damage(run)
    if stage is infer and "--lm" not in flags:
        flags = [*flags, "--lm", lm_folders["gpt2"]]
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        common.guarded(lambda: call_stage(stage, "--run", run, *flags))
    message, = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and message.startswith("error: ")
    assert all(word in message for word in words) and " (" in message and "); " in message, message
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_errors_of_a_script_have_no_traceback(tmp_path):
    process = fork_stage("03_quantize.py", "--run", tmp_path / "nothing")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: dataset.json is missing (")


@pytest.mark.parametrize("stage", [prepare, infer, quantize, ctr])
def test_help_describes_every_flag(stage, capsys):
    with pytest.raises(SystemExit) as stop:
        call_stage(stage, "--help")
    text = capsys.readouterr().out
    assert "(default: runs/demo)" in text and "None" not in text
    lines = text.split("options:")[1].split("\n  -")[1:]
    assert stop.value.code == 0 and len(lines) > 10
    for line in lines:  # "-run RUN  what it is for"
        assert len(line.split("  ", 1)[-1].split()) > 3, line
