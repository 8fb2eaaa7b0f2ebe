"""Stage 02 loses no work: kills, other settings, locks, ranks, full disks, precision."""

import errno
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (ROOT, assert_bytes_equal, call_stage, copy_run, ctr, infer, likelihood_of, make_lm, ok, prepare, quantize, random_theta,
                      run_stage, settings)

import common

MANY_BLOCKS = ["--block-size", 4, "--steps", 25]


@pytest.fixture(scope="module")
def unbroken(prepared, lm_folders, tmp_path_factory):
    """A run of about 30 blocks that nobody interrupted, with one thread."""
    run = copy_run(prepared, tmp_path_factory.mktemp("run") / "unbroken")
    process = ok(run_stage("02_infer_profiles.py", "--run", run, "--lm", lm_folders["gpt2"], *MANY_BLOCKS))
    (run / "blocks.txt").write_text(str(blocks_inferred(process)))
    return run


def blocks_inferred(process):
    """How many blocks a process that has ended worked on, from its progress bar."""
    return int(process.stderr.split("inferring: 100%")[-1].split("/")[1].split()[0])


def start_stage_02(run, lm, *more, launcher=()):
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / "02_infer_profiles.py"), "--run", str(run), "--lm", str(lm),
                             *map(str, MANY_BLOCKS), *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def blocks_done(run):
    return len(infer.Progress(run, 0).read()[1])


def wait_for_blocks(run, process, count, seconds=90):
    end = time.time() + seconds
    while process.poll() is None and blocks_done(run) < count and time.time() < end:
        time.sleep(0.01)


def test_killed_five_times_at_random_points_and_resumed_gives_the_same_bytes(prepared, unbroken, lm_folders, tmp_path):
    run = copy_run(prepared, tmp_path / "run")
    chance, reached = random.Random(0), 0
    for _ in range(5):
        process = start_stage_02(run, lm_folders["gpt2"])
        wait_for_blocks(run, process, reached + chance.randint(1, 4))
        time.sleep(chance.random() * 0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert blocks_done(run) >= reached and not (run / "profiles.npy").exists()  # what was done stays done
        reached = blocks_done(run)
    assert reached >= 5
    process = ok(run_stage("02_infer_profiles.py", "--run", run, "--lm", lm_folders["gpt2"], *MANY_BLOCKS))
    assert_bytes_equal(run / "profiles.npy", unbroken / "profiles.npy")
    first, second = (json.loads((path / "profiles.json").read_text()) for path in (run, unbroken))
    assert first["train_nll"] == second["train_nll"] and first["heldout_nll"] == second["heldout_nll"]
    assert blocks_inferred(process) == int((unbroken / "blocks.txt").read_text()) - reached  # only the blocks that were missing were done


def test_interrupt_exits_130_and_the_same_command_goes_on(prepared, unbroken, lm_folders, tmp_path):
    run = copy_run(prepared, tmp_path / "run")
    process = start_stage_02(run, lm_folders["gpt2"])
    wait_for_blocks(run, process, 3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"interrupted" in errors and b"Traceback" not in errors and blocks_done(run) >= 3
    refused = run_stage("02_infer_profiles.py", "--run", run, "--lm", lm_folders["gpt2"], *MANY_BLOCKS, "--prior", 3)
    assert refused.returncode == 2 and "unfinished run has other settings (prior)" in refused.stderr and "--fresh" in refused.stderr
    ok(run_stage("02_infer_profiles.py", "--run", run, "--lm", lm_folders["gpt2"], *MANY_BLOCKS))
    assert_bytes_equal(run / "profiles.npy", unbroken / "profiles.npy")


def test_killed_between_its_last_two_files_the_run_finishes(prepared, unbroken, lm_folders, tmp_path, monkeypatch):
    run = copy_run(prepared, tmp_path / "run")
    flags = ["--run", run, "--lm", lm_folders["gpt2"], "--steps", 2]
    monkeypatch.setattr(infer, "save_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        call_stage(infer, *flags)
    assert (run / "profiles.npy").exists() and not (run / "profiles.json").exists()
    monkeypatch.undo()
    content = (run / "profiles.npy").read_bytes()
    call_stage(infer, *flags)
    assert (run / "profiles.npy").read_bytes() == content and (run / "profiles.json").exists() and not list(run.glob("profiles.p*.0"))


def test_a_torn_last_line_is_done_again(tmp_path):
    progress = infer.Progress(tmp_path, 0)
    progress.begin({"a": 1}, (4, 1, 2), False)
    progress.open({"a": 1})
    progress.record(0, [0, 1], np.ones((2, 1, 2), np.float32), np.ones((2, 2)), 7)
    with open(progress.path, "ab") as file:
        file.write(b'{"block": 1, "bef')
    again = infer.Progress(tmp_path, 0)
    assert set(again.read()[1]) == {0}
    again.begin({"a": 1}, (4, 1, 2), False)
    again.open({"a": 1})
    assert np.load(again.where())[:2].tolist() == [[[1, 1]]] * 2
    again.record(1, [2], np.ones((1, 1, 2), np.float32), np.ones((2, 1)), 3)
    assert set(again.read()[1]) == {0, 1}


def test_fresh_forgets_and_finished_work_is_not_redone(prepared, lm_folders, tmp_path, capsys):
    run = copy_run(prepared, tmp_path / "run")
    flags = ["--run", run, "--lm", lm_folders["gpt2"], "--steps", 2]
    call_stage(infer, *flags)
    stamp = (run / "profiles.npy").stat().st_mtime_ns
    call_stage(infer, *flags)
    assert "nothing to do" in capsys.readouterr().out and (run / "profiles.npy").stat().st_mtime_ns == stamp
    call_stage(infer, *flags, "--fresh")
    assert (run / "profiles.npy").stat().st_mtime_ns > stamp


def test_finished_settings_are_not_mixed_with_an_interrupted_run_of_others(prepared, lm_folders, tmp_path, monkeypatch):
    run = copy_run(prepared, tmp_path / "run")
    flags = ["--run", run, "--lm", lm_folders["gpt2"], "--steps", 2, "--block-size", 30]
    call_stage(infer, *flags)
    content, calls, solve_block = (run / "profiles.npy").read_bytes(), [], infer.infer_block

    def stop_at_the_second(*args):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return solve_block(*args)

    monkeypatch.setattr(infer, "infer_block", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        call_stage(infer, *flags, "--prior", 50)
    monkeypatch.undo()
    call_stage(infer, *flags)
    assert (run / "profiles.npy").read_bytes() == content


def test_stage_04_goes_on_after_an_interrupt(inferred, tmp_path, monkeypatch):
    flags = ["--seeds", 2, "--epochs", 2, "--ids", "none,userip"]
    whole, run = copy_run(inferred, tmp_path / "whole"), copy_run(inferred, tmp_path / "run")
    call_stage(ctr, "--run", whole, *flags)
    calls, run_one = [], ctr.run_one

    def stop_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_one(*args)

    monkeypatch.setattr(ctr, "run_one", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        call_stage(ctr, "--run", run, *flags)
    call_stage(ctr, "--run", run, *flags)
    assert len(calls) == 3 + 2 and not (run / "results.partial.json").exists()
    rows = [[(row["ids"], row["seed"], row["test_auc"]) for row in json.loads((path / "results.json").read_text())["rows"]] for path in (whole, run)]
    assert rows[0] == rows[1]


def test_a_second_process_on_the_run_is_refused(prepared, lm_folders, tmp_path):
    run = copy_run(prepared, tmp_path / "run")
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(common.UserError, match="another process is working"):
            call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"])


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "free some disk space"), (errno.EROFS, "choose a writable folder")])
def test_full_disk_and_read_only_folder_are_one_line(prepared, lm_folders, tmp_path, monkeypatch, capsys, number, words):
    run = copy_run(prepared, tmp_path / "run")

    def refuse(*_):
        raise OSError(number, os.strerror(number), "profiles.partial.npy")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SystemExit) as stop:
        common.guarded(lambda: call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"]))
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert stop.value.code == 2 and line.startswith("error: ") and words in line and not list(run.glob("*profiles.p*"))


def test_a_real_file_size_limit_is_one_line_and_leaves_nothing(prepared, lm_folders, tmp_path):
    run = copy_run(prepared, tmp_path / "run")
    process = subprocess.run([sys.executable, str(ROOT / "02_infer_profiles.py"), "--run", str(run), "--lm", str(lm_folders["gpt2"])],
                             capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
    assert process.returncode == 2 and "Traceback" not in process.stderr and process.stderr.strip().split("\n")[-1].startswith("error: ")
    assert not list(run.glob("*profiles.p*"))


def test_two_ranks_one_killed_and_resumed_equal_one_process(prepared, unbroken, lm_folders, tmp_path):
    run = copy_run(prepared, tmp_path / "run")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    process = start_stage_02(run, lm_folders["gpt2"], launcher=launcher)
    wait_for_blocks(run, process, 4)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode != 0 and not (run / "profiles.npy").exists() and blocks_done(run) >= 4
    assert len(list(run.glob("profiles.progress.*"))) == 2  # both ranks had begun
    process = start_stage_02(run, lm_folders["gpt2"], launcher=launcher)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert_bytes_equal(run / "profiles.npy", unbroken / "profiles.npy")
    assert json.loads((run / "profiles.json").read_text())["ranks"] == 2


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_point_where_fp32_ones_do(kind, dtype, world):
    device = "cuda" if dtype == torch.float16 and torch.cuda.is_available() else "cpu"

    def gradient(dtype):
        model, tokenizer = make_lm(kind)
        likelihood = likelihood_of(model.to(device, dtype), tokenizer, world[0])
        histories = [np.arange(5, 5 + length) for length in (6, 40, 25)]
        theta = (0.2 * random_theta(likelihood, 3)).to(device).requires_grad_()
        likelihood(theta, *infer.pad(histories, [0, 1, 2], device)).sum().backward()
        assert theta.grad.dtype == torch.float32
        return theta.grad.flatten(1).cpu()

    assert (torch.nn.functional.cosine_similarity(gradient(dtype), gradient(torch.float32)) > 0.99).all()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_any_saved_architecture_runs_and_long_histories_are_cut_to_its_context(kind, prepared, lm_folders, tmp_path):
    run = copy_run(prepared, tmp_path / "run")
    call_stage(infer, "--run", run, "--lm", lm_folders[kind], "--steps", 2, "--history", "all")
    facts = json.loads((run / "profiles.json").read_text())
    assert facts["train_nll"]["after"] < facts["train_nll"]["before"] and facts["lm_sensitivity"] is None
    model, tokenizer = make_lm(kind, context=60)
    model.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    call_stage(infer, "--run", run, "--lm", tmp_path / "short", "--steps", 1, "--history", "all")
    dataset = common.load_dataset(run)
    likelihood = likelihood_of(model, tokenizer, dataset)
    texts = infer.history_texts(dataset, 0, settings(history="all"))
    cut = infer.tokenize_histories(tokenizer, texts, infer.room_for_history(likelihood))
    assert max(map(len, cut)) + likelihood.prompt_length <= 60
    user = max(range(len(cut)), key=lambda user: len(texts[user]))
    assert "".join(texts[user]).endswith(tokenizer.decode(cut[user])) and tokenizer.decode(cut[user]) != "".join(texts[user])


def test_out_of_memory_names_a_block_size_to_try(prepared, lm_folders, tmp_path, monkeypatch):
    run = copy_run(prepared, tmp_path / "run")
    monkeypatch.setattr(infer, "descend", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(common.UserError, match=r"out of memory with a block of ([2-8]) users .*; add --fresh and --block-size [1-4] or"):
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--block-size", 8)


@pytest.mark.parametrize("error, words", [
    (OSError("401 Client Error. Cannot access gated repo for url"), "gated or private"),
    (OSError(errno.ENOSPC, "No space left on device"), "disk space"), (torch.OutOfMemoryError("x"), "does not fit in memory"),
    (OSError("We couldn't connect to the hub"), "neither a local folder nor could it be downloaded"),
    (OSError("404 Client Error: RepositoryNotFound"), "no such model")])
def test_load_failures_are_explained(error, words, monkeypatch):
    import transformers
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(common.UserError, match=words):
        common.load_language_model("some/model", torch.float32, torch.device("cpu"))


def test_llm_auto_takes_gpt2_on_a_cpu_and_says_so(prepared, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    call_stage(prepare, "--run", run, "--subsample-users", 100)
    facts = json.loads((run / "dataset.json").read_text())
    (run / "dataset.json").write_text(json.dumps(facts | {"dataset": "other"}))
    monkeypatch.setattr(infer, "load_language_model", lambda name, *_: (_ for _ in ()).throw(common.UserError(f"asked for {name}", "x", "y")))
    with pytest.raises(common.UserError, match="asked for gpt2"):
        call_stage(infer, "--run", run, "--device", "cpu")
    printed = capsys.readouterr().out
    assert "chose gpt2" in printed and "0.5 GB" in printed and "override" in printed


def test_new_users_get_rows_and_everybody_else_keeps_his_bytes(lm_folders, tmp_path, capsys):
    run, flags = tmp_path / "run", ["--lm", lm_folders["gpt2"], "--steps", 2]
    call_stage(prepare, "--run", run, "--subsample-users", 60, "--min-interactions", 1)
    call_stage(infer, "--run", run, *flags)
    call_stage(quantize, "--run", run)
    old_ids, books = np.load(run / "feature_bank.npy"), torch.load(run / "codebooks.pt", weights_only=True)["codebooks"]
    old, old_users = np.load(run / "profiles.npy"), json.loads((run / "users.json").read_text())
    call_stage(prepare, "--run", run, "--subsample-users", 80, "--min-interactions", 1)
    users = json.loads((run / "users.json").read_text())
    added = [raw for raw in users if raw not in old_users]
    assert set(old_users) < set(users) and len(added) == 20
    (run / "new.txt").write_text("\n".join([*added[:15], old_users[0]]) + "\n")
    with pytest.raises(common.UserError, match="other settings \\(steps\\)"):
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 3, "--users", run / "new.txt")
    call_stage(infer, "--run", run, *flags, "--users", run / "new.txt")
    new, facts = np.load(run / "profiles.npy"), json.loads((run / "profiles.json").read_text())
    for row, raw in enumerate(old_users):
        assert old[row].tobytes() == new[users.index(raw)].tobytes()
    inferred = set(json.loads((run / "profiles_users.json").read_text())["inferred"])
    fresh_rows = [users.index(raw) for raw in added[:15] if users.index(raw) in inferred]
    assert facts["added_users"] and len(fresh_rows) >= 12 and len(np.unique(new[fresh_rows, 0], axis=0)) == len(fresh_rows)
    call_stage(quantize, "--run", run, "--keep-codebooks")
    ids = np.load(run / "feature_bank.npy")
    assert [ids[users.index(raw)].tolist() for raw in old_users] == old_ids.tolist()
    assert ids[fresh_rows].tolist() == [[int(((new[row, m] - books[m].numpy()) ** 2).sum(1).argmin()) for m in range(2)] for row in fresh_rows]
    (run / "new.txt").write_text("nobody\n")
    with pytest.raises(common.UserError, match="1 users are not in the data set, the first is 'nobody'"):
        call_stage(infer, "--run", run, *flags, "--users", run / "new.txt")
