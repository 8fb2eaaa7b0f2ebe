"""tools/score.py: pairs of raw ids get the probabilities that stage 04 itself found."""

import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call_stage, copy_run, ctr, infer, load_script, ok, prepare, quantize, fork_stage

import common

score = load_script("score")


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def trained(inferred, tmp_path_factory):
    """A run with a DCN and a DeepFM, both trained with the ids."""
    run = copy_run(inferred, tmp_path_factory.mktemp("score") / "trained")
    call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 2, "--ids", "none,userip",
               "--models", "dcn,deepfm", "--fields", "ids+attributes")
    return run


def scored(run, pairs):
    """The probabilities in scores.csv of these pairs, by tools/score.py."""
    lines = [f"{user},{item}\n" for user, item in pairs]
    (run / "pairs.csv").write_text("user_id,item_id\n" + "".join(lines))
    call_stage(score, "--run", run, run / "pairs.csv")
    header, *lines = read(run / "scores.csv")
    assert header == ["user_id", "item_id", "probability"] and [tuple(line[:2]) for line in lines] == pairs
    return [float(line[2]) for line in lines]


def pairs_of(run, split=common.TEST):
    """[(raw user, raw item)] of one split, and predictions' order with it."""
    users, items = (json.loads((run / f"{name}.json").read_text()) for name in ("users", "items"))
    return [(users[user], items[item]["id"]) for user, item, *_, part in np.load(run / "interactions.npy")
            if part == split]


def test_the_trained_models_probabilities_and_unseen_ids(trained, tmp_path, capsys):
    run = copy_run(trained, tmp_path / "run")
    pairs = pairs_of(run)
    (user, item), expected = pairs[0], np.load(trained / "predictions" / "deepfm-userip-0.npy")
    pairs += [("stranger", item), (user, "novelty"), ("stranger", "novelty")]
    text = "item_id,when,user_id\n" + "".join(f"{item},1, {user} \n" for user, item in pairs)
    (run / "pairs.csv").write_text(text + "\ni001\n,1,u0001\n")
    call_stage(score, "--run", run, "--model", "deepfm", run / "pairs.csv")
    said = f"{len(pairs)} pairs scored by deepfm with userip ids; unseen: 1 users, 1 items; 2 lines without"
    assert said in capsys.readouterr().out
    header, *lines = read(run / "scores.csv")
    assert header == ["user_id", "item_id", "probability"] and [tuple(line[:2]) for line in lines] == pairs
    scores = np.array([float(line[2]) for line in lines])
    assert np.allclose(scores[:-3], expected, atol=1e-6) and ((scores > 0) & (scores < 1)).all()
    assert len(set(scores[-3:])) == 3


def test_an_unseen_user_has_the_unknown_codes(trained):
    """The unknown user's row, the unknown codes' rows, and the item's own: read off the model by hand."""
    args = SimpleNamespace(run=trained, model="dcn")
    dataset, _, predict = score.open_model(args, torch.device("cpu"))
    sizes = json.loads((trained / "quantize.json").read_text())["codes"]
    codes = np.zeros((len(dataset.users), 2), int)
    fields, lookup = ctr.build_features(dataset, "ids+attributes", codes, sizes)
    model = ctr.MODELS["dcn"](fields)
    model.load_state_dict(common.load(trained, "ctr_dcn.pt"))
    ids = lookup(np.array([0]), np.array([7]))
    ids[0, :3] = torch.tensor([len(dataset.users), *sizes])
    assert predict(np.array([len(dataset.users)]), np.array([7])) == pytest.approx(ctr.predict(model, ids))


def test_a_model_without_ids_that_was_trained_beside_others(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 1, "--ids", "none,random")
    (run / "pairs.csv").write_text("\ufeffuser_id,item_id\nu0001,i001\n", encoding="utf-8")
    call_stage(score, "--run", run, run / "pairs.csv")
    assert len(read(run / "scores.csv")) == 2


@pytest.mark.parametrize("ids, flags", [("random", ()), ("shuffled", ("--seed", 3)), ("planted", ()),
                                        ("userip", ("--profile-input", "embedding"))])
def test_any_kind_of_ids_is_made_again(inferred, tmp_path, ids, flags):
    run = copy_run(inferred, tmp_path / "run")
    call_stage(ctr, "--run", run, "--seeds", 2, "--epochs", 1, "--ids", ids, *flags)
    expected = np.load(run / "predictions" / f"dcn-{ids}-0.npy")
    assert np.allclose(scored(run, pairs_of(run)), expected, atol=1e-6)


def test_cold_users_are_scored_as_they_were_evaluated(tmp_path, lm_folders):
    """By their own codes and the unknown user's embedding: stage 04's own probabilities of the cold rows."""
    run = tmp_path / "run"
    call_stage(prepare, "--run", run, "--subsample-users", 120, "--cold-users", 0.3)
    call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 2, "--task-steps", 1)
    call_stage(quantize, "--run", run, "--quantizer", "kmeans")
    call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 2, "--ids", "userip")
    for split, ending in ((common.TEST, ""), (common.COLD, "-cold")):
        expected = np.load(run / "predictions" / f"dcn-userip-0{ending}.npy")
        assert np.allclose(scored(run, pairs_of(run, split)), expected, atol=1e-6)


def test_batches_do_not_change_a_score(trained, tmp_path, monkeypatch):
    run = copy_run(trained, tmp_path / "run")
    whole = scored(run, pairs_of(run))
    monkeypatch.setattr(score, "BATCH", 7)
    assert np.allclose(scored(run, pairs_of(run)), whole, atol=2e-6)


def damage(name, text):
    return lambda run: (run / name).write_bytes(text)


BAD = [  # flags, what to break, what the line must say
    (["/nowhere.csv"], None, ["No such file", "/nowhere.csv"]),
    ([], damage("pairs.csv", b"user,item\n1,2\n"), ["the columns user_id and item_id are missing"]),
    ([], damage("pairs.csv", b""), ["the columns user_id and item_id are missing"]),
    ([], damage("pairs.csv", b"user_id,item_id\n\xff\xfe,1\n"), ["the pairs cannot be read"]),
    (["--model", "pnn"], None, ["ctr_pnn.json is missing", "04_train_ctr.py", "--models pnn"]),
    (["--model", "nonsense"], None, ["invalid choice"]),
    ([], damage("ctr_dcn.json", b"[]"), ["ctr_dcn.json lacks", "04_train_ctr.py"]),
    ([], damage("ctr_dcn.pt", b"nonsense"), ["ctr_dcn.pt cannot be read", "04_train_ctr.py"]),
    ([], lambda run: (run / "ctr_deepfm.pt").rename(run / "ctr_dcn.pt"), ["ctr_dcn.pt holds another model"]),
    ([], lambda run: call_stage(quantize, "--run", run, "--epochs", 0, "--codes", "3,3"),
     ["ctr_dcn.pt was made from another feature bank or dataset", "04_train_ctr.py",
      "--models dcn --ids userip --fields ids+attributes --profile-input codes"]),
    ([], lambda run: (run / "feature_bank.npy").unlink(), ["feature_bank.npy is missing", "03_quantize.py"]),
    ([], damage("pairs.csv", b'user_id,item_id\n"u0000,i001\nu0001,i002\n'), ["the pairs cannot be read"]),
    (["--model", "deepfm"], lambda run: (run / "ctr_deepfm.pt").unlink(),
     ["ctr_deepfm.pt is missing", "--models deepfm"]),
]


@pytest.mark.parametrize("flags, breaks, says", BAD)
def test_what_is_wrong_is_said_in_one_line(trained, tmp_path, flags, breaks, says, monkeypatch, capsys):
    run = copy_run(trained, tmp_path / "run")
    (run / "pairs.csv").write_text("user_id,item_id\nu0001,i001\n")
    if breaks:
        breaks(run)
    pairs = [] if "/nowhere.csv" in flags else [run / "pairs.csv"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["tools/score.py", "--run", *map(str, [run, *flags, *pairs])])
    with pytest.raises(SystemExit) as stop:
        common.guarded(score.main)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    assert all(part in line for part in says), line
    assert not list(run.glob(".scores*")) and not (run / "scores.csv").exists()


def test_as_a_command_and_a_run_that_is_not_there(trained, tmp_path):
    run = copy_run(trained, tmp_path / "run")
    (run / "pairs.csv").write_text("user_id,item_id\nu0001,i001\n")
    assert "1 pairs scored by dcn" in ok(fork_stage("tools/score.py", "--run", run, run / "pairs.csv")).stdout
    refused = fork_stage("tools/score.py", "--run", tmp_path / "none", run / "pairs.csv")
    assert refused.returncode == 2 and "ctr_dcn.json is missing" in refused.stderr
    assert not (tmp_path / "none").exists()
