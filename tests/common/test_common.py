"""common.py: fingerprints, files, exit codes, seeds, opening an LLM, AUC within a user, embeddings."""

import importlib.util
import json
import os
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
from conftest import (copy_run, ctr, infer, make_lm, quantize)
import common
from common import Field, FieldEmbedding


def mean_sd(values):
    found = ctr.mean_sd(values)
    return found["mean"], found["sd"]


def test_what_another_process_had_half_written_is_not_moved_into_the_run(tmp_path):
    ready = tmp_path / common.READY
    ready.mkdir()
    (ready / "profiles.json").write_text("{}")
    (ready / ".profiles_users.json.0.7.tmp").write_text("[")
    common.finish(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["profiles.json"]


def test_a_run_may_be_called_as_a_folder_of_unfinished_work_begins(tmp_path):
    run = tmp_path / "rows-y"
    piece = tmp_path / "rows-0123456789ab"
    for folder in (run, piece):
        folder.mkdir()
        (folder / "space.pt").write_bytes(b"damaged")
    with pytest.raises(common.UserError, match="02_infer_profiles.py"):
        common.load(run, "space.pt")
    with pytest.raises(common.UserError, match="run the same command again"):
        common.load(piece, "space.pt")
    assert (run / "space.pt").exists() and not (piece / "space.pt").exists()


def test_the_fingerprint_sees_every_part_of_the_data(world):
    dataset = world[0]

    def changed(**parts):
        return common.Dataset(**{**vars(dataset), **parts}).fingerprint()

    def cell(column):
        rows = np.array(dataset.interactions)
        rows[7, column] = rows[7, column] ^ 1
        return changed(interactions=rows)

    prints = [
        dataset.fingerprint(),
        *(cell(column) for column in range(4)),
        changed(users=["other", *dataset.users[1:]]),
        changed(items=[{**dataset.items[0], "title": "Other"}, *dataset.items[1:]]),
        changed(items=[{**dataset.items[0], "attributes": {}}, *dataset.items[1:]]),
        changed(profiles=[{**dataset.profiles[0], "prompt": "His hobby is"}, *dataset.profiles[1:]]),
        changed(task_prompt="?"),
    ]
    assert len(set(prints)) == len(prints) and changed() == prints[0]


def test_a_fingerprint_of_arrays_sees_type_shape_and_the_last_of_many_rows():
    array = np.zeros((70_000, 2), dtype=np.int32)
    other = array.copy()
    other[-1, -1] = 1
    changed = (array, other, array.reshape(-1, 1), array.reshape(2, -1), array.view(np.float32), array[:-1])
    prints = [common.fingerprint(value) for value in changed]
    assert len(set(prints)) == len(prints)
    assert common.fingerprint(array) == common.fingerprint(np.asfortranarray(array))


def test_changed_artifacts_of_stage_01_are_refused(prepared, tmp_path):
    run = copy_run(prepared, tmp_path / "run")
    rows = np.load(run / "interactions.npy")
    rows[0, 2] ^= 1
    np.save(run / "interactions.npy", rows)
    with pytest.raises(common.UserError, match="interactions.npy was made from another"):
        common.load_dataset(run)
    truth = np.load(run / "truth.npy")
    np.save(run / "truth.npy", truth[::-1])
    with pytest.raises(common.UserError, match="truth.npy was made from another"):
        common.load_truth(run)
    (run / "dataset.json").write_text("{}")
    with pytest.raises(common.UserError, match="dataset.json lacks"):
        common.load_dataset(run)


def test_the_truth_of_a_stage_killed_between_two_moves_is_found(prepared, tmp_path):
    run = copy_run(prepared, tmp_path / "run")
    truth = np.load(run / "truth.npy")
    (run / common.READY).mkdir()
    (run / "truth.npy").rename(run / common.READY / "truth.npy")
    assert np.array_equal(common.load_truth(run), truth) and not (run / common.READY).exists()


def test_the_truth_of_a_demo_that_other_data_replaced_is_none(prepared, tmp_path):
    run = copy_run(prepared, tmp_path / "run")
    facts = common.load(run, "dataset.json")
    common.save_json(run / "dataset.json", facts | {"truth_fingerprint": None})  # then it was killed
    assert common.load_truth(run) is None


@pytest.mark.parametrize("error, raised", [
    (OSError(5, "Input/output error"), common.UserError), (MemoryError(), MemoryError),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError)])
def test_a_piece_that_could_not_be_read_for_another_reason_stays(error, raised, tmp_path, monkeypatch):
    work = tmp_path / "blocks-0123456789ab"
    work.mkdir()
    common.save_torch(work / "000001.pt", {"z": 1})

    def fails(_):
        raise error

    monkeypatch.setitem(common.READERS, ".pt", fails)
    with pytest.raises(raised):
        common.load(work, "000001.pt")
    assert (work / "000001.pt").exists()


def test_an_empty_rank_is_none(monkeypatch):
    """Some schedulers leave the variable empty."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    again = importlib.util.module_from_spec(importlib.util.spec_from_file_location("again", common.__file__))
    monkeypatch.setitem(sys.modules, "again", again)  # dataclasses look it up
    again.__spec__.loader.exec_module(again)
    assert (again.PROCESS, again.PROCESSES) == (0, 1)


def test_a_file_is_replaced_by_a_rename_and_nothing_half_written_stays(tmp_path):
    path, held = tmp_path / "value.json", tmp_path / "held.json"
    common.save_json(path, {"old": 1})
    os.link(path, held)  # somebody has the old file open
    common.save_json(path, {"new": 2})
    assert json.loads(held.read_text()) == {"old": 1} and json.loads(path.read_text()) == {"new": 2}
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), common.atomic(path) as temporary:
            Path(temporary).write_text("half")
            raise error
    assert json.loads(path.read_text()) == {"new": 2}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["held.json", "value.json"]
    with pytest.raises(ValueError):
        common.save_json(path, {"auc": float("nan")})  # no other reader of JSON takes NaN
    assert json.loads(path.read_text()) == {"new": 2}


def test_exit_codes(capsys):
    def raising(error):
        def main():
            raise error
        return main

    for error, code in (
        (common.UserError("what", "where", "do"), 2),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 2),
        (PermissionError(13, "Permission denied", "x"), 2),
        (torch.OutOfMemoryError("CUDA out of memory"), 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 2),
        (OSError(12, "Cannot allocate memory", "x"), 2),
        (RuntimeError("CUDA error: out of memory"), 2),
    ):
        with pytest.raises(SystemExit) as stop:
            common.guarded(raising(error))
        lines = capsys.readouterr().err.strip().split("\n")
        assert stop.value.code == code and len(lines) == 1
        assert lines[0].startswith("error: ") == (code == 2)
        assert ("out of memory" in lines[0]) == ("memory" in str(error) or isinstance(error, MemoryError))
    for bug in (ZeroDivisionError("a bug"), RuntimeError("shapes do not match"), KeyError("x")):
        with pytest.raises(type(bug)):
            common.guarded(raising(bug))


def test_too_little_memory_for_an_llm_is_no_fault_of_the_network(tmp_path, monkeypatch):
    import transformers

    def full(*_, **__):
        raise RuntimeError("unable to mmap 538090408 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", full)
    with pytest.raises(RuntimeError, match="mmap"):  # of which guarded() makes a line
        common.load_language_model(str(tmp_path), torch.float32, torch.device("cpu"))


def test_numbers_on_the_command_line_are_finite_and_within_bounds(capsys, monkeypatch):
    parser = common.Parser("A stage.")
    parser.add_argument("--x", type=common.at_least(0.5, float))
    parser.add_argument("--share", type=common.at_least(0, float, 1))
    monkeypatch.setattr("sys.argv", ["stage.py", "--x", "0.5", "--share", "0"])
    assert vars(parser.parse_args()).items() >= {"x": 0.5, "share": 0}.items()
    for flag, text in (("--x", "0.4"), ("--x", "inf"), ("--x", "nan"), ("--x", "x"), ("--share", "1")):
        monkeypatch.setattr("sys.argv", ["stage.py", flag, text])
        with pytest.raises(SystemExit) as stop:
            parser.parse_args()
        lines = capsys.readouterr().err.strip().split("\n")
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"error: argument {flag}")


def test_the_llm_s_stages_take_the_gpu_that_is_there_and_stage_04_the_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for stage, where in ((infer, "cuda"), (quantize, "cuda"), (ctr, "cpu")):
        monkeypatch.setattr("sys.argv", ["stage.py"])
        assert common.pick_device(stage.parse_arguments().device).type == where
        for flag in ("cpu", "cuda"):
            monkeypatch.setattr("sys.argv", ["stage.py", "--device", flag])
            assert common.pick_device(stage.parse_arguments().device).type == flag


def test_on_the_cores_no_gpu_is_in_sight(monkeypatch):
    """Helpers are forked after a backward pass, which is no good where autograd has a thread for a GPU."""
    for device, seen in (("auto", "0"), ("cpu", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        assert common.pick_device(device).type == "cpu"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_more_processes_than_gpus_share_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = []
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(common.pick_device("auto").index)
    assert found == [0, 1, 0, 1]


def test_seeds_decide_torch_and_numpy_alike():
    def draws(*seeds):
        generator = common.seeded(*seeds)
        return generator.integers(2**31), torch.randn(2).tolist()

    found = [draws(0), draws(1), draws(0, 1), draws(2, 1)]
    assert draws(0) == found[0]
    for part in (0, 1):
        assert len({str(one[part]) for one in found}) == 4


def test_mean_and_sample_deviation():
    assert mean_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.sqrt(7 / 3)))
    assert mean_sd([0.7]) == (0.7, None)


def test_a_loaded_lm_computes_what_it_computes_elsewhere(lm_folders):
    """Fused or not: GPT-2's activation is the tanh form of GELU."""
    from transformers import AutoModelForCausalLM
    ids = torch.arange(40)[None]
    for folder in lm_folders.values():
        model, _ = common.load_language_model(str(folder), torch.float32, torch.device("cpu"))
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        assert common.count_parameters(model) == sum(tensor.numel() for tensor in model.parameters()) > 0
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
            assert torch.allclose(model(ids).logits, expected, atol=2e-5)
        if model.config.model_type == "gpt2":
            x = torch.linspace(-4, 4, 101)
            expected = x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x ** 3)))
            assert torch.allclose(model.transformer.h[0].mlp.act(x), expected, atol=1e-6)


def test_an_lm_is_loaded_frozen_and_without_its_dropout(tmp_path):
    model, tokenizer = make_lm("gpt2")
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(model.config, name, 0.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.arange(30)[None]
    loaded, _ = common.load_language_model(str(tmp_path), torch.float32, torch.device("cpu"))
    assert loaded.config.resid_pdrop == 0.5
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=2e-5)


@pytest.mark.parametrize("rounded", [False, True])
def test_gauc_is_the_auc_within_a_user_weighted_by_his_rows(rounded):
    """By loops; users of one label say nothing, equal scores count half, in whatever order the rows stand."""
    rng = np.random.default_rng(0)
    users = rng.choice([3, 9, 40, 41, 77, 1000], p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05], size=400)
    labels = np.where(users == 40, 1, np.where(users == 41, 0, rng.integers(2, size=400)))
    scores = rng.random(400) + 0.3 * labels * (users == 3) + 5.0 * (users == 9)
    scores = scores.round(1) if rounded else scores
    weighted, weight, plain = 0.0, 0, []
    for user in (3, 9, 77, 1000):
        own = [(label, score) for who, label, score in zip(users, labels, scores) if who == user]
        pairs = [(above > below) + (above == below) / 2 for yes, above in own for no, below in own
                 if yes > no]
        weighted, weight = weighted + len(own) * np.mean(pairs), weight + len(own)
        plain.append(np.mean(pairs))
    found = common.gauc(users, labels, scores)
    assert found == pytest.approx(weighted / weight) and abs(found - np.mean(plain)) > 0.01
    assert common.gauc(users, labels, -scores) == pytest.approx(1 - found)
    assert common.gauc(users, labels, np.ones(400)) == 0.5
    assert common.gauc(np.arange(4), np.array([0, 1, 1, 0]), np.arange(4.0)) is None


MANY = [Field("user", 4), Field("genres", 5, columns=3), Field("item", 6)]


def test_a_many_valued_field_is_the_mean_of_its_values_and_padding_is_never_trained():
    torch.manual_seed(0)
    embed = FieldEmbedding(MANY, 3)
    ids = torch.tensor([[1, 0, 4, 5, 2], [3, 5, 5, 5, 0], [0, 2, 5, 5, 1], [2, 1, 3, 4, 5]])
    optimizer = torch.optim.Adam(embed.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (embed(ids) - 1).pow(2).sum().backward()
        optimizer.step()
    none = torch.tensor([[0, 5, 5, 5, 0]])
    assert not embed(none)[0, 1].any()  # no value at all
    one = [embed(torch.tensor([[0, value, 5, 5, 0]]))[0, 1] for value in range(5)]
    assert all(vector.abs().sum() > 0.1 for vector in one)
    for row, values in ((0, (0, 4)), (2, (2,)), (3, (1, 3, 4))):
        mean = sum(one[value] for value in values) / len(values)
        assert torch.allclose(embed(ids)[row, 1], mean, atol=1e-6)
    weights = embed.table.weight.detach()
    zero = [row for row in range(len(weights)) if not weights[row].any()]
    assert len(zero) == 3 and len(weights) == 4 + 5 + 6 + 3  # each field's extra row: unseen or padding


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_the_unknown_id_of_a_single_valued_field_is_trained_where_it_is_met(penalty):
    """User dropout lives on that; the padding of a many-valued field says nothing and learns nothing."""
    torch.manual_seed(0)
    embed = FieldEmbedding(MANY, 3)
    ids = torch.tensor([[4, 0, 5, 5, 2], [4, 1, 3, 5, 6], [0, 5, 5, 5, 1]])
    optimizer = torch.optim.Adam(embed.parameters(), lr=0.1, weight_decay=penalty)
    for _ in range(5):
        optimizer.zero_grad()
        (embed(ids) - 1).pow(2).sum().backward()
        optimizer.step()
    user, genres, item = embed(torch.tensor([[4, 5, 5, 5, 6]]))[0]
    assert user.min() > 0.2 and item.min() > 0.2 and not genres.any()
    assert torch.allclose(embed(ids)[0, 1], embed(torch.zeros(1, 5).long())[0, 1])  # the mean of one value
    assert not embed.table.weight[4 + 1 + 5].any()


@pytest.mark.parametrize("fields", [MANY, [Field("user", 4), Field("item", 6)]])
def test_unseen_ids_are_0_and_no_two_fields_share_a_row(fields):
    torch.manual_seed(0)
    embed = FieldEmbedding(fields, 3)
    unseen = torch.tensor([[field.size for field in fields for _ in range(field.columns)]])
    assert not embed(unseen).any()
    rows = set()
    for at, field in enumerate(fields):
        for value in range(field.size):
            ids = [other.size for other in fields for _ in range(other.columns)]
            ids[sum(other.columns for other in fields[:at])] = value
            out = embed(torch.tensor([ids]))[0]
            assert out[at].any() and not np.delete(out.detach().numpy(), at, axis=0).any()
            rows.add(tuple(out[at].tolist()))
    assert len(rows) == sum(field.size for field in fields)
