"""The four scripts together: subprocess runs, rules of evidence, determinism, bad input."""

import json

import numpy as np
import pytest
import torch
from conftest import assert_bytes_equal, call_stage, copy_run, ctr, infer, ok, prepare, quantize, run_stage

import common


def test_the_four_scripts_in_sequence_with_the_tiny_lm(tmp_path):
    run = tmp_path / "runs" / "demo"
    printed = [ok(run_stage("01_prepare_data.py", "--run", run, "--subsample-users", 150)),
               ok(run_stage("02_infer_profiles.py", "--run", run, "--tiny-sentences", 2000, "--steps", 8)),
               ok(run_stage("03_quantize.py", "--run", run, "--epochs", 1)),
               ok(run_stage("04_train_ctr.py", "--run", run, "--seeds", 1, "--epochs", 2))]
    for number, process in enumerate(printed[:3], 2):
        assert f"next: python 0{number}" in process.stdout and "Traceback" not in process.stderr
    facts = json.loads((run / "profiles.json").read_text())
    assert facts["lm"] == "tiny" and set(facts["heldout_nll"]) == {"own", "population", "shuffled"}
    assert set(facts["lm_sensitivity"]) == {"hobby", "background"}
    steps = facts["train_nll_steps"]
    assert len(steps) == 9 and steps[-1] < steps[0] and list(facts["train_nll"].values()) == [steps[0], steps[-1]]
    assert not list(run.glob("*progress*")) and not list(run.glob("*partial*"))
    profiles = np.load(run / "profiles.npy")
    assert profiles.dtype == np.float32 and profiles.shape == (json.loads((run / "dataset.json").read_text())["n_users"], 2, 64)
    unknown = (np.load(run / "feature_bank.npy") == [4, 3]).all(1)
    assert facts["users_without_history"] == unknown.sum()
    if unknown.any():
        assert np.allclose(profiles[unknown], profiles[~unknown].mean(0), atol=1e-6)
    again = run_stage("02_infer_profiles.py", "--run", run, "--tiny-sentences", 2000, "--steps", 8)
    assert "training the tiny LM" not in ok(again).stderr  # cached


def poisoned(source, target):
    """Every validation and test row gets another item and label; items met only there get another title."""
    copy_run(source, target)
    interactions, items = np.load(source / "interactions.npy"), json.loads((source / "items.json").read_text())
    facts = json.loads((source / "dataset.json").read_text())
    held = interactions[:, 3] != common.TRAIN
    rng = np.random.default_rng(9)
    interactions[held, 2] ^= 1
    interactions[held, 1] = rng.integers(len(items), size=held.sum())
    seen = set(interactions[~held, 1].tolist())
    hidden = [index for index in range(len(items)) if index not in seen]
    for index in hidden:
        items[index] |= {"title": "Poison Poison", "attributes": {"hobby": ["poison"], "background": ["poison"]}}
    dataset = common.Dataset(interactions, json.loads((source / "users.json").read_text()), items, facts["profiles"], facts["task_prompt"])
    np.save(target / "interactions.npy", interactions)
    (target / "items.json").write_text(json.dumps(items))
    (target / "dataset.json").write_text(json.dumps(facts | {"fingerprint": dataset.fingerprint()}))
    return len(hidden)


def test_poisoned_validation_and_test_rows_change_nothing_up_to_the_bank(tmp_path):
    clean = tmp_path / "clean"
    call_stage(prepare, "--run", clean, "--subsample-users", 100, "--min-interactions", 1)
    hidden = poisoned(clean, tmp_path / "poisoned")
    assert hidden > 0
    for run in (clean, tmp_path / "poisoned"):
        call_stage(infer, "--run", run, "--lm", "tiny", "--tiny-sentences", 320, "--steps", 2)
        call_stage(quantize, "--run", run, "--epochs", 1, "--warm-up", 1)
    for name in ("profiles.npy", "feature_bank.npy", "feature_bank.csv"):
        assert_bytes_equal(clean / name, tmp_path / "poisoned" / name)
    one, two = (torch.load(run / "codebooks.pt", weights_only=True)["codebooks"] for run in (clean, tmp_path / "poisoned"))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    facts = [json.loads((run / "profiles.json").read_text()) for run in (clean, tmp_path / "poisoned")]
    assert facts[0]["heldout_nll"] != facts[1]["heldout_nll"]  # the poison was there to be seen


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(inferred, lm_folders, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        run = tmp_path / name
        call_stage(prepare, "--run", run, "--subsample-users", 120, "--seed", seed)
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 3, "--seed", seed)
        call_stage(quantize, "--run", run, "--epochs", 1, "--warm-up", 1, "--seed", seed)
    for name in ("dataset.json", "interactions.npy", "users.json", "items.json", "truth.npy", "profiles.npy", "feature_bank.npy", "feature_bank.csv"):
        assert_bytes_equal(inferred / name, tmp_path / "again" / name)
    assert (inferred / "interactions.npy").read_bytes() != (tmp_path / "other" / "interactions.npy").read_bytes()


def test_every_flag_of_stage_02_changes_theta(prepared, lm_folders, tmp_path):
    def theta(*args):
        run = copy_run(prepared, tmp_path / "run")
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 3, *args)
        return np.load(run / "profiles.npy")
    base = theta()
    for flags in (("--steps", 4), ("--lr", 0.3), ("--prior", 0), ("--init", "vocab"), ("--init", "random"), ("--mask", "causal"),
                  ("--history", "all"), ("--history", "rated"), ("--max-history", 3), ("--dtype", "bf16"),
                  ("--max-history", 4, "--history-sample", "long-short")):
        assert not np.allclose(theta(*flags), base, atol=1e-7), flags
    assert not np.allclose(theta("--init", "random", "--seed", 1), theta("--init", "random"))
    for flags in (("--block-size", 7), ("--logit-chunk", 50), ("--block-size", "auto")):  # how, not what: rounding aside the same
        assert np.allclose(theta(*flags), base, atol=2e-3), flags
    assert theta("--lm", lm_folders["llama"]).shape == base.shape


def test_sentences_and_seed_change_the_tiny_lm(prepared, tmp_path):
    run, found = copy_run(prepared, tmp_path / "run"), []
    for flags in (("--tiny-sentences", 64), ("--tiny-sentences", 96), ("--tiny-sentences", 64, "--seed", 1)):
        call_stage(infer, "--run", run, "--lm", "tiny", "--steps", 1, "--fresh", *flags)
        found.append(json.loads((run / "profiles.json").read_text())["train_nll"]["before"])
    assert len(set(found)) == 3


def test_show_mask_prints_the_grid_and_writes_nothing(prepared, lm_folders, tmp_path, capsys):
    run = copy_run(prepared, tmp_path / "run")
    call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--show-mask")
    grid = [line for line in capsys.readouterr().out.splitlines() if " |" in line]
    assert sum("<theta^" in line for line in grid) == 2 and not (run / "profiles.npy").exists()
    first, second = (line.split("|")[1].split() for line in grid if "<theta^" in line)
    assert first.count("#") + second.count("#") == grid.index(next(line for line in grid if "<theta^2>" in line)) + 1


def break_file(path):
    path.write_bytes(b"\x93NUMPY" + bytes(40))


def empty_training(run):
    """No user has a liked training row."""
    interactions = np.load(run / "interactions.npy")
    interactions[interactions[:, 3] == 0, 2] = 0
    rewrite(run, interactions)


def one_class(run):
    """Every test row is liked."""
    interactions = np.load(run / "interactions.npy")
    interactions[interactions[:, 3] == 2, 2] = 1
    rewrite(run, interactions)


def rewrite(run, interactions):
    """Other interactions, with a fingerprint to match."""
    facts = json.loads((run / "dataset.json").read_text())
    dataset = common.Dataset(interactions, json.loads((run / "users.json").read_text()), json.loads((run / "items.json").read_text()),
                             facts["profiles"], facts["task_prompt"])
    np.save(run / "interactions.npy", interactions)
    (run / "dataset.json").write_text(json.dumps(facts | {"fingerprint": dataset.fingerprint()}))


def strange_item(run):
    interactions = np.load(run / "interactions.npy")
    interactions[5, 1] = 10**6
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


BAD = [  # stage, flags, what happens to the run before, words the error must hold
    (prepare, ["--profile-words", "zorp"], None, ["1 words for 2 profiles", "--profile-words"]),
    (prepare, ["--dataset", "ml-100k", "--data-dir", "/nowhere"], None, ["u.genre", "--data-dir"]),
    (prepare, ["--min-interactions", 100000], None, ["0 interactions are left", "lower it"]),
    (prepare, ["--min-interactions", 0], None, ["smallest is 1"]),
    (prepare, ["--dataset", "netflix"], None, ["invalid choice", "--help"]),
    (prepare, ["--nonsense"], None, ["unrecognized", "--help"]),
    (prepare, ["--positive-above", "nan"], None, ["--positive-above", "out of range"]),
    (infer, ["--steps", -3], None, ["--steps", "smallest is 1"]),
    (infer, ["--lr", 0], None, ["--lr", "out of range"]),
    (infer, ["--lr", "inf"], None, ["--lr", "out of range"]),
    (infer, ["--lm", "/nowhere/model"], None, ["/nowhere/model", "local folder"]),
    (infer, [], lambda run: (run / "dataset.json").unlink(), ["dataset.json is missing", "01_prepare_data.py"]),
    (infer, [], lambda run: break_file(run / "interactions.npy"), ["interactions.npy cannot be read", "01_prepare_data.py"]),
    (infer, [], lambda run: (run / "items.json").write_text("[]"), ["another dataset", "01_prepare_data.py"]),
    (infer, [], lambda run: (run / "users.json").write_text("{"), ["users.json cannot be read", "01_prepare_data.py"]),
    (infer, [], empty_training, ["no user has a training history", "--history all"]),
    (infer, ["--lm", "tiny"], empty_training, ["no user has a training history", "--history all"]),
    (infer, ["--users", "/nowhere"], None, ["other settings", "--users"]),
    (quantize, [], lambda run: (run / "profiles.json").write_text("{}"), ["profiles.json lacks", "02_infer_profiles.py"]),
    (quantize, [], lambda run: np.save(run / "truth.npy", np.load(run / "truth.npy") * 0), ["truth.npy was made from another dataset"]),
    (ctr, [], lambda run: (run / "quantize.json").write_text("[]"), ["quantize.json lacks", "03_quantize.py"]),
    (ctr, ["--score", "/nowhere.csv"], None, ["ctr_dcn.json is missing", "04_train_ctr.py"]),
    (ctr, [], beyond, ["beyond its codebook", "03_quantize.py"]),
    (ctr, ["--ids", "none"], strange_item, ["beyond users.json or items.json", "01_prepare_data.py"]),
    (ctr, ["--ids", "none"], one_class, ["all labels of the test split are equal"]),
    (quantize, ["--quantizer", "vq", "--assign", "likelihood"], None, ["--assign likelihood does not go with --quantizer vq"]),
    (quantize, ["--keep-codebooks", "--codes", "4,3"], None, ["--codes does not go with --keep-codebooks"]),
    (quantize, ["--keep-codebooks"], other_settings, ["codebooks.pt was made with another LLM", "03_quantize.py"]),
    (quantize, ["--keep-codebooks"], lambda run: (run / "codebooks.pt").unlink(), ["codebooks.pt is missing", "03_quantize.py"]),
    (quantize, ["--keep-codebooks"], lambda run: (run / "codebooks.pt").write_bytes(b"x"), ["codebooks.pt cannot be read"]),
    (quantize, [], lambda run: (run / "profiles.npy").unlink(), ["profiles.npy is missing", "02_infer_profiles.py"]),
    (quantize, [], other_dataset, ["profiles.npy was made from another dataset", "02_infer_profiles.py"]),
    (quantize, [], lambda run: np.save(run / "profiles.npy", np.load(run / "profiles.npy") + 1), ["another profiles", "02_infer_profiles.py"]),
    (quantize, ["--codes", "4"], None, ["1 codebook sizes for 2 profiles", "hobby, background"]),
    (quantize, ["--codes", "4,x"], None, ["not a list of integers"]),
    (quantize, ["--codes", "4,1"], None, ["2 to 32766"]),
    (quantize, ["--codes", "500,3"], None, ["500 codes for", "choose at most"]),
    (quantize, ["--alpha", -1], None, ["--alpha", "out of range"]),
    (ctr, [], lambda run: (run / "feature_bank.npy").unlink(), ["feature_bank.npy is missing", "03_quantize.py"]),
    (ctr, [], lambda run: np.save(run / "feature_bank.npy", np.load(run / "feature_bank.npy") * 0), ["another quantize", "03_quantize.py"]),
    (ctr, [], other_dataset, ["another dataset", "02_infer_profiles.py"]),
    (ctr, ["--models", "dcm"], None, ["unknown dcm", "known: lr, ffm"]),
    (ctr, ["--ids", "userip,magic"], None, ["unknown magic", "shuffled"]),
    (ctr, ["--ids", "planted"], lambda run: (run / "truth.npy").unlink(), ["no planted truth"]),
    (ctr, ["--seeds", 0], None, ["--seeds", "smallest is 1"]),
    (ctr, ["--lr", 1e30, "--ids", "none", "--seeds", 1], None, ["the loss is", "lower --lr"]),
]


@pytest.mark.parametrize("case", range(len(BAD)), ids=[f"{stage.__name__[:2]}-{number}" for number, (stage, *_) in enumerate(BAD)])
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
    lines = capsys.readouterr().err.strip().split("\n")
    message = [line for line in lines if line.startswith("error: ")]
    assert stop.value.code == 2 and len(message) == 1 and lines[-1] == message[0]
    assert all(word in message[0] for word in words) and " (" in message[0] and "); " in message[0], message[0]
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}
    assert before.keys() - {".lock"} == after.keys() and all(before[name] == after[name] for name in after)


def test_errors_of_a_real_process_have_no_traceback(tmp_path):
    process = run_stage("03_quantize.py", "--run", tmp_path / "nothing")
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and process.stderr.startswith("error: dataset.json is missing (")


@pytest.mark.parametrize("script", ["01_prepare_data.py", "02_infer_profiles.py", "03_quantize.py", "04_train_ctr.py"])
def test_help_describes_every_flag(script):
    text = ok(run_stage(script, "--help")).stdout
    assert "--run" in text and "--seed" in text and "(default:" in text
