"""No work is lost and nothing is half-written: kills, interrupts, other settings, ranks, full disks."""

import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (ROOT, assert_bytes_equal, call_stage, copy_run, ctr, fork, fork_stage, infer,
                      likelihood_of, make_lm, ok, prepare, quantize, random_theta, settings)

import common

MANY_BLOCKS = ["--block-size", 4, "--steps", 2, "--task-steps", 2]
TINY = ["--lm", "tiny", "--tiny-sentences", 64, "--steps", 1, "--task-steps", 1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]


# ---------------------------------------------------------------- processes to kill

def start(work, log):
    """work() as a stage's main(), in a process group of its own. Forked: torch need not be imported again."""
    def target():
        os.setpgrp()
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdout, sys.stderr = open(os.devnull, "w"), os.fdopen(2, "w", closefd=False)
        common.guarded(work)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def stage(module, run, *flags):
    """A function that runs a stage."""
    return lambda: call_stage(module, "--run", run, *flags)


def run_forked(work, log):
    """(exit status, stderr) of work() in a process of its own; a status below 0: what signal killed it."""
    process = start(work, log)
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, log.read_text()


def killed_at(owner, name, work, number=1, only=lambda *_: True):
    """work() that is killed (-9) at its `number`-th call of owner.name with arguments that fit `only`."""
    def wrapped():
        original, calls = getattr(owner, name), count(1)

        def call(*args, **kwargs):
            if only(*args) and next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, call)  # for good: this process is a fork
        work()
    return wrapped


def limited(work, size):
    """work() on a disk that takes no file above `size` bytes."""
    def wrapped():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()
    return wrapped


def is_one_line(text):
    return text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n")


def one_line(capsys, work, *when_full):
    """The line in which work() ends, with exit 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        common.guarded(work, *when_full)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and is_one_line(text), text
    return text


class Interrupted:
    """A function that works until its `number`-th call, which Ctrl-C breaks; counts the calls."""

    def __init__(self, function, number=10**9):
        self.function, self.number, self.calls = function, number, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.number:
            raise KeyboardInterrupt
        return self.function(*args)


def call_counted(monkeypatch, module, name, number, *flags):
    """Calls of module.name that a stage makes, interrupted at the `number`-th where it gets there."""
    counter = Interrupted(getattr(module, name), number)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, counter)
        if number < 10**9:
            with pytest.raises(KeyboardInterrupt):
                call_stage(module, *flags)
        else:
            call_stage(module, *flags)
    return counter.calls


def call_02(monkeypatch, run, *flags, number=10**9):
    """Blocks that stage 02 infers."""
    return call_counted(monkeypatch, infer, "infer_block", number, "--run", run, *flags)


def call_04(monkeypatch, run, *flags, number=10**9):
    """Rows of the table that stage 04 trains."""
    return call_counted(monkeypatch, ctr, "run_one", number, "--run", run, *flags)


def blocks_done(run):
    return len(list(run.glob("blocks-*/[0-9]*.pt")))


def leftovers(run):
    """Unfinished runs and temporary files."""
    return [path for path in run.rglob("*") if path.name.startswith((".", "blocks-", "rows-"))]


def wait_for_blocks(run, running, number, seconds=90):
    end = time.time() + seconds
    while running() and blocks_done(run) < number and time.time() < end:
        time.sleep(0.005)


@pytest.fixture
def run(prepared, tmp_path):
    return copy_run(prepared, tmp_path / "run")


@pytest.fixture(scope="module")
def as_inferred(lm_folders):
    """The flags of 02 with which `inferred` was made."""
    return ["--lm", lm_folders["gpt2"], "--steps", 3, "--task-steps", 1]


@pytest.fixture(scope="module")
def flags(lm_folders):
    """Of a run of about 30 blocks."""
    return ["--lm", lm_folders["gpt2"], *MANY_BLOCKS]


@pytest.fixture(scope="module")
def unbroken(prepared, flags, tmp_path_factory):
    """What nobody interrupted, with the number of its blocks in blocks.txt."""
    run = copy_run(prepared, tmp_path_factory.mktemp("run") / "unbroken")
    with pytest.MonkeyPatch.context() as patch:
        blocks = call_02(patch, run, *flags)
    (run / "blocks.txt").write_text(str(blocks))
    assert blocks > 20 and not leftovers(run)
    return run


@pytest.fixture(scope="module")
def solved(prepared, unbroken, flags, lm_folders, tmp_path_factory):
    """A finished run of two steps, and all blocks of `unbroken`, killed before they are gathered."""
    run = copy_run(prepared, tmp_path_factory.mktemp("run") / "solved")
    call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 2, "--task-steps", 1)
    work = stage(infer, run, *flags)
    status, _ = run_forked(killed_at(infer, "gather", work), run / "stderr")
    assert status == -signal.SIGKILL and blocks_done(run) == blocks_of(unbroken)
    return run


def blocks_of(unbroken):
    return int((unbroken / "blocks.txt").read_text())


def assert_same_run(run, unbroken):
    assert_bytes_equal(run / "profiles.npy", unbroken / "profiles.npy")
    assert_bytes_equal(run / "profiles_users.json", unbroken / "profiles_users.json")
    first, second = (json.loads((path / "profiles.json").read_text()) for path in (run, unbroken))
    for key in ("train_nll", "train_nll_steps", "heldout_nll", "fingerprint"):
        assert first[key] == second[key]
    quantize.read_problem(run)  # the files vouch for each other
    assert not leftovers(run)


# ---------------------------------------------------------------- stage 02, killed

def test_killed_five_times_at_random_points_it_ends_in_the_same_bytes(run, flags, unbroken, monkeypatch):
    chance, reached = random.Random(0), 0
    infer_block = infer.infer_block

    def slowly(*inputs):  # else a fast machine has solved all blocks before the fifth kill
        time.sleep(0.05)
        return infer_block(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(infer, "infer_block", slowly)
        patch.setattr(common, "THREADS", 2 * torch.get_num_threads())  # with a helper, which dies too
        for _ in range(5):
            process = start(stage(infer, run, *flags), run / "stderr")
            wait_for_blocks(run, process.is_alive, reached + chance.randint(1, 3))
            time.sleep(chance.random() * 0.05)
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            assert blocks_done(run) >= reached  # what is done stays done
            assert not (run / "profiles.npy").exists()
            reached = blocks_done(run)
    assert 5 <= reached < blocks_of(unbroken)
    assert call_02(monkeypatch, run, *flags) == blocks_of(unbroken) - reached  # only what was missing
    assert_same_run(run, unbroken)


@pytest.mark.parametrize("owner, name, number, only", [
    (infer, "load", 1, lambda _, name, *keys: name == "000007.pt"),  # half of the blocks are read
    (infer, "heldout_nll", 1, lambda *_: True), (infer, "save_json", 1, lambda *_: True),
    (infer, "save_json", 2, lambda *_: True)], ids=["gather", "finish", "users", "facts"])
def test_killed_in_the_gathering_it_gathers_again(owner, name, number, only, solved, unbroken, flags,
                                                  tmp_path, monkeypatch):
    run = shutil.copytree(solved, tmp_path / "run")
    before = (run / "profiles.npy").read_bytes()
    killed = killed_at(owner, name, stage(infer, run, *flags), number, only)
    status, _ = run_forked(killed, tmp_path / "stderr")
    assert status == -signal.SIGKILL and (run / "profiles.npy").read_bytes() == before
    quantize.read_problem(run)  # the older run is still whole
    assert call_02(monkeypatch, run, *flags) == 0
    assert_same_run(run, unbroken)


PUBLISHED = ("profiles.json", "profiles.npy", "profiles_users.json", "space.pt")  # in the order of their move


def kill_between_renames(run, work, moved, stderr):
    """Run work() and kill it when `moved` files are published (4: all are), before the next one is."""
    if moved < 4:
        killed = killed_at(os, "replace", work, moved + 1, lambda _, target: Path(target).name in PUBLISHED
                           and Path(target).parent == run)
    else:
        killed = killed_at(Path, "rmdir", work)
    assert run_forked(killed, stderr)[0] == -signal.SIGKILL


@pytest.mark.parametrize("moved", range(5))
def test_killed_between_its_renames_the_next_reader_moves_the_rest(moved, solved, unbroken, flags, tmp_path,
                                                                   monkeypatch, capsys):
    run, work = shutil.copytree(solved, tmp_path / "run"), stage(infer, tmp_path / "run", *flags)
    before = [(run / name).stat().st_ino for name in PUBLISHED]
    kill_between_renames(run, work, moved, tmp_path / "stderr")
    is_new = [(run / name).stat().st_ino != inode for name, inode in zip(PUBLISHED, before)]
    assert is_new == [at < moved for at in range(4)]
    quantize.read_problem(run)  # whoever reads finds one whole run
    assert [(run / name).stat().st_ino != inode for name, inode in zip(PUBLISHED, before)] == [True] * 4
    assert call_02(monkeypatch, run, *flags) == 0
    assert_same_run(run, unbroken)


def test_a_result_that_is_complete_but_not_yet_renamed_is_not_made_again(solved, unbroken, flags, tmp_path,
                                                                         monkeypatch):
    """The blocks are gone by then: without the files that replace them all users would be inferred again."""
    run = shutil.copytree(solved, tmp_path / "run")
    killed = killed_at(Path, "replace", stage(infer, run, *flags), 1, lambda path, *_: "blocks-" in path.name)
    assert run_forked(killed, tmp_path / "stderr")[0] == -signal.SIGKILL and not blocks_done(run)
    assert call_02(monkeypatch, run, *flags) == 0
    assert_same_run(run, unbroken)


def open_02(run, flags, threads, *launcher):
    """The script itself, as a user starts it, in a process group of its own."""
    command = [sys.executable, *launcher, ROOT / "02_infer_profiles.py", "--run", run, *flags]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            cwd=ROOT, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                            start_new_session=True,  # a shell's background job starts with Ctrl-C ignored:
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_an_interrupt_exits_130_the_same_command_goes_on_and_a_log_stays_a_log(run, flags, unbroken,
                                                                               monkeypatch):
    for _ in range(4):  # a busy machine may let it finish before it is interrupted
        call_02(monkeypatch, run, *flags, number=1)  # makes the task prompt
        process = open_02(run, flags, 2)
        wait_for_blocks(run, lambda process=process: process.poll() is None, 1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: its helper gets it too
        _, errors = process.communicate(timeout=60)
        if process.returncode:
            break
        (run / "profiles.json").unlink()
    assert process.returncode == 130 and blocks_done(run) >= 1
    assert errors == "interrupted: finished files are kept; run the same command again\n"
    process = ok(fork_stage("02_infer_profiles.py", "--run", run, *flags))
    # Where stderr is no terminal there is no progress bar, no warning, nothing.
    assert process.stderr == "" and "\r" not in process.stdout
    assert_same_run(run, unbroken)  # which was made in another process


def test_other_settings_in_between_lose_nothing(run, flags, unbroken, monkeypatch, capsys):
    total, other = blocks_of(unbroken), [*flags, "--prior", 3]
    call_02(monkeypatch, run, *flags, number=6)
    call_02(monkeypatch, run, *other, number=4)
    assert blocks_done(run) == 5 + 3
    unfinished = [path.name for path in run.glob("blocks-*")]
    capsys.readouterr()
    assert call_02(monkeypatch, run, *flags) == total - 5
    printed = capsys.readouterr().out
    assert len(unfinished) == 2 and all(name in printed for name in unfinished) and "--fresh" in printed
    assert_bytes_equal(run / "profiles.npy", unbroken / "profiles.npy")
    assert call_02(monkeypatch, run, *other) == total - 3 and not leftovers(run)
    assert json.loads((run / "profiles.json").read_text())["prior"] == 3
    assert call_02(monkeypatch, run, *flags) == total  # one folder holds one finished run
    assert_same_run(run, unbroken)


@pytest.mark.parametrize("flag", [(), ("--fresh",)])
def test_a_folder_of_somebody_else_s_is_left_alone(flag, run, flags):
    """Its name begins as that of unfinished work, and does not go on like it."""
    for name in ("empty", "full"):
        (run / f"blocks-{name}").mkdir()
    kept = [run / "blocks-full" / name for name in ("1.pt", "profiles.json")]
    for path in kept:
        path.write_text("mine")
    call_stage(infer, "--run", run, *flags, *flag)
    assert (run / "blocks-empty").is_dir() and all(path.read_text() == "mine" for path in kept)


def test_an_interrupted_fresh_run_goes_on_without_fresh(run, flags, unbroken, monkeypatch):
    copy_run(unbroken, run)
    assert call_02(monkeypatch, run, *flags) == 0
    call_02(monkeypatch, run, *flags, "--fresh", number=4)
    assert call_02(monkeypatch, run, *flags) == blocks_of(unbroken) - 3
    assert_same_run(run, unbroken)


def test_a_finished_run_is_not_redone_and_fresh_forgets_all_unfinished_ones(run, lm_folders, monkeypatch,
                                                                            capsys):
    flags = ["--lm", lm_folders["gpt2"], "--steps", 2, "--task-steps", 1, "--block-size", 30]
    total = call_02(monkeypatch, run, *flags)
    stamp = (run / "profiles.npy").stat().st_mtime_ns
    assert call_02(monkeypatch, run, *flags, "--block-size", 8) == 0  # another machine may cut other blocks
    assert "nothing to do" in capsys.readouterr().out and (run / "profiles.npy").stat().st_mtime_ns == stamp
    content = (run / "profiles.npy").read_bytes()
    for prior in (5, 6):
        call_02(monkeypatch, run, *flags, "--prior", prior, number=3)
    assert call_02(monkeypatch, run, *flags) == 0 and (run / "profiles.npy").read_bytes() == content
    assert blocks_done(run) == 4
    assert call_02(monkeypatch, run, *flags, "--fresh") == total and not leftovers(run)
    assert (run / "profiles.npy").stat().st_mtime_ns > stamp
    assert call_02(monkeypatch, run, *flags, "--prior", 5) == total


def test_two_processes_at_once_end_well_or_in_one_line_and_leave_one_run(run, flags, unbroken, tmp_path,
                                                                         monkeypatch):
    logs = [tmp_path / name for name in ("first", "second")]
    processes = [start(stage(infer, run, *flags), log) for log in logs]
    for process, log in zip(processes, logs):
        process.join(120)
        text = log.read_text()
        assert (process.exitcode, text) == (0, "") or (process.exitcode == 2 and is_one_line(text)), text
    call_02(monkeypatch, run, *flags)
    assert_same_run(run, unbroken)


def as_rank(rank, ranks, port, work):
    """work() as one of several ranks, as torchrun starts them."""
    def wrapped():
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": port}
        common.PROCESSES, common.PROCESS, infer.PROCESS = ranks, rank, rank
        work()
    return wrapped


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_one_of_two_ranks_killed_and_resumed_by_any_number_of_ranks_gives_the_same_bytes(
        run, flags, unbroken, tmp_path, monkeypatch):
    call_02(monkeypatch, run, *flags, number=3)  # by one process
    process = open_02(run, flags, 1, *TORCHRUN)
    wait_for_blocks(run, lambda: process.poll() is None, 6)
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=90)
    reached = blocks_done(run)
    assert process.returncode != 0 and not (run / "profiles.npy").exists() and reached >= 6
    copies = {ranks: shutil.copytree(run, tmp_path / str(ranks)) for ranks in (1, 2, 3)}
    assert call_02(monkeypatch, copies[1], *flags) == blocks_of(unbroken) - reached
    assert_same_run(copies[1], unbroken)
    for ranks in (2, 3):
        port, work = free_port(), stage(infer, copies[ranks], *flags)
        logs = [tmp_path / f"stderr-{ranks}-{rank}" for rank in range(ranks)]
        started = [start(as_rank(rank, ranks, port, work), log) for rank, log in enumerate(logs)]
        for process, log in zip(started, logs):
            process.join(120)
            assert process.exitcode == 0 and log.read_text() == "", log.read_text()
        assert_same_run(copies[ranks], unbroken)


# ---------------------------------------------------------------- helpers and ranks

def pieces_in(folder, make, number=8):
    return [(folder / f"{at}.pt", make, at) for at in range(number)]


def all_of(folder):
    return {int(path.stem): torch.load(path) for path in folder.glob("*.pt")}


@pytest.fixture
def two_workers(monkeypatch):
    monkeypatch.setattr(common, "THREADS", 2 * torch.get_num_threads())


def test_processes_side_by_side_do_each_piece_once(two_workers, tmp_path):
    """Who is free takes the next one. (If both look at the same instant, both make it: once in a while.)"""
    def make(at):
        with open(tmp_path / "made", "a") as file:
            file.write(f"{at}\n")
        time.sleep(0.7 if at == 0 else 0.2)
        return [at, os.getpid()]

    common.do_all(pieces_in(tmp_path, make), "working", "piece", torch.device("cpu"))
    found = all_of(tmp_path)
    assert len((tmp_path / "made").read_text().split()) in (8, 9)
    assert {at: found[at][0] for at in found} == {at: at for at in range(8)}
    shares = Counter(pid for _, pid in found.values())
    assert len(shares) == 2 and os.getpid() in shares and shares[found[0][1]] <= 4


@pytest.mark.parametrize("end", ["error", "kill"])
def test_what_a_helper_leaves_undone_is_done_by_its_parent(end, two_workers, tmp_path, capfd):
    parent = os.getpid()

    def make(at):
        if os.getpid() != parent:
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("only in the helper")
        time.sleep(0.1)  # the helper too finds work
        return [at, os.getpid()]

    common.do_all(pieces_in(tmp_path, make), "working", "piece", torch.device("cpu"))
    assert all_of(tmp_path) == {at: [at, parent] for at in range(8)} and capfd.readouterr().err == ""


def test_a_helper_dies_with_its_parent(two_workers, tmp_path):
    def slow(at):
        time.sleep(0.2)
        return at

    process = start(lambda: common.do_all(pieces_in(tmp_path, slow, 40), "working", "piece",
                                          torch.device("cpu")), tmp_path / "stderr")
    while process.is_alive() and len(all_of(tmp_path)) < 3:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)  # it alone, as a scheduler may
    process.join()
    time.sleep(0.1)
    left = set(all_of(tmp_path))
    time.sleep(0.6)
    assert set(all_of(tmp_path)) == left and len(left) < 40


def test_an_error_that_every_process_meets_is_raised_and_the_rest_is_kept(two_workers, tmp_path):
    parent = os.getpid()

    def make(at):
        if at == 3:
            raise RuntimeError("a bug")
        time.sleep(0.3 * (os.getpid() == parent))  # so that the helper meets it first
        return at

    with pytest.raises(RuntimeError, match="a bug"):
        common.do_all(pieces_in(tmp_path, make), "working", "piece", torch.device("cpu"))
    assert set(all_of(tmp_path)) == set(range(8)) - {3}


def test_a_helper_changes_no_byte_of_stage_02(two_workers, run, flags, unbroken, monkeypatch):
    assert 0 < call_02(monkeypatch, run, *flags) < blocks_of(unbroken)  # here; the helper did the others
    assert_same_run(run, unbroken)


def test_ranks_on_gpus_of_unlike_memory_cut_the_blocks_of_the_first(run, lm_folders, tmp_path):
    flags = ["--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 1]

    def with_budget(tokens):
        def work():
            infer.token_budget_of = lambda _: tokens  # for good: this process is a fork
            call_stage(infer, "--run", run, *flags)
        return work

    port = free_port()
    logs = [tmp_path / name for name in ("first", "second")]
    started = [start(as_rank(rank, 2, port, with_budget(tokens)), log)
               for rank, (tokens, log) in enumerate(zip((300, 900), logs))]
    for process, log in zip(started, logs):
        process.join(120)
        assert process.exitcode == 0 and log.read_text() == "", log.read_text()
    quantize.read_problem(run)
    assert not leftovers(run)


def test_a_rank_whose_neighbour_stopped_says_so(monkeypatch, capsys):
    def closed():
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(common, "PROCESSES", 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", closed)
    assert "another process stopped (rank 0)" in one_line(capsys, common.wait_for_all)


# ---------------------------------------------------------------- full disks and folders that are none

@pytest.mark.parametrize("place", ["a block", "the gathering"])
def test_a_full_disk_in_stage_02_is_one_line_and_the_same_command_goes_on(place, run, flags, unbroken,
                                                                           tmp_path, monkeypatch):
    def work():
        if place == "a block":
            return limited(stage(infer, run, *flags), 1000)()
        gather = infer.gather
        infer.gather = lambda *args: limited(lambda: None, 1000)() or gather(*args)  # this is a fork
        call_stage(infer, "--run", run, *flags)

    status, text = run_forked(work, tmp_path / "stderr")
    assert status == 2 and is_one_line(text) and "free disk space" in text
    done = blocks_done(run)
    assert done == (0 if place == "a block" else blocks_of(unbroken))
    assert not [path for path in run.rglob("*") if path.name.startswith((".", "profiles"))]
    assert call_02(monkeypatch, run, *flags) == blocks_of(unbroken) - done
    assert_same_run(run, unbroken)


def test_a_full_disk_under_the_tiny_lm_is_one_line_and_the_same_command_goes_on(run, tmp_path):
    work = stage(infer, run, *TINY)
    status, text = run_forked(limited(work, 150_000), tmp_path / "stderr")
    assert status == 2 and is_one_line(text) and "the LLM cannot be written" in text
    assert "disk space" in text and not [path for path in run.glob("*lm-tiny*/*")]
    work()
    assert (run / "lm-tiny" / "tiny.json").exists() and (run / "profiles.json").exists()
    assert not leftovers(run)


def test_a_full_disk_in_stage_03_is_one_line_and_the_same_command_goes_on(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    old = {path.name: path.read_bytes() for path in run.iterdir()}
    work = stage(quantize, run, "--quantizer", "kmeans", "--seed", 1)
    status, text = run_forked(limited(work, 1500), tmp_path / "stderr")
    assert status == 2 and is_one_line(text) and "free disk space" in text
    found = {path.name: path.read_bytes() for path in run.iterdir()}
    assert found == old  # the old run is whole: nothing moves in until all is written
    work()
    assert (run / "quantize.json").exists() and (run / "codebooks.pt").read_bytes() != old["codebooks.pt"]


@pytest.mark.parametrize("flags, size", [((), 1500), (("--dataset", "csv"), 400)], ids=["demo", "csv"])
def test_a_full_disk_in_stage_01_is_one_line_and_leaves_the_old_run_whole(flags, size, inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    old = {path.name: path.read_bytes() for path in run.iterdir()}
    (tmp_path / "ratings.csv").write_text("user_id,item_id,rating\n" + "".join(
        f"{user},{item},{1 + (user + item) % 5}\n" for user in range(9) for item in range(9)))
    flags += ("--ratings-file", tmp_path / "ratings.csv") * bool(flags)
    work = stage(prepare, run, "--seed", 1, *flags)
    status, text = run_forked(limited(work, size), tmp_path / "stderr")
    assert status == 2 and is_one_line(text) and "File too large (" in text and "free disk space" in text
    assert {path.name: path.read_bytes() for path in run.iterdir()} == old
    work()
    assert (run / "truth.npy").exists() == (not flags)  # the planted truth of another data set is gone
    common.load_dataset(run)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-200]),
                                    lambda path: common.save_torch(path, [1, 2])], ids=["cut", "a list"])
def test_a_damaged_piece_is_said_once_and_made_again(damage, solved, unbroken, flags, inferred, tmp_path,
                                                     monkeypatch, capsys):
    run = shutil.copytree(solved, tmp_path / "02")
    damage(next(run.glob("blocks-*/000005.pt")))
    message = one_line(capsys, stage(infer, run, *flags))
    assert "000005.pt" in message and "run the same command again" in message
    assert call_02(monkeypatch, run, *flags) == 1
    assert_same_run(run, unbroken)
    run = copy_run(inferred, tmp_path / "04")
    call_counted(monkeypatch, ctr, "save", 1, "--run", run, *FEW_ROWS)
    damage(next(run.glob("rows-*/dcn-none-1.pt")))
    message = one_line(capsys, stage(ctr, run, *FEW_ROWS))
    assert "dcn-none-1.pt" in message and "run the same command again" in message
    assert call_04(monkeypatch, run, *FEW_ROWS) == 1 and not leftovers(run)


def test_where_the_space_of_the_descent_is_made_again_all_that_was_made_in_it_is_too(
        solved, unbroken, flags, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(solved, tmp_path / "02")
    work, = run.glob("blocks-*")
    space = common.load(work, "space.pt")
    common.save_torch(work / "space.pt", space | {"origin": space["origin"] + 1})  # of an earlier fit
    (work / "wide.pt").write_bytes((work / "wide.pt").read_bytes()[:-200])
    assert "wide.pt" in one_line(capsys, stage(infer, run, *flags))
    call_02(monkeypatch, run, *flags)
    assert_same_run(run, unbroken)


@pytest.mark.parametrize("name, content", [
    ("profiles.json", b"{"), ("profiles.npy", b"x"), ("profiles_users.json", b"{}"),
    ("profiles_users.json", b'{"users": [], "inferred": [7]}')])
def test_damaged_results_of_stage_02_are_made_again(name, content, inferred, as_inferred, tmp_path):
    run, flags = copy_run(inferred, tmp_path / "run"), as_inferred
    before = (run / name).read_bytes() if name != "profiles.json" else (run / "profiles.npy").read_bytes()
    (run / name).write_bytes(content)
    with pytest.raises(common.UserError, match="run: python 02_infer_profiles.py"):
        quantize.read_problem(run)
    call_stage(infer, "--run", run, *flags)
    assert (run / (name if name != "profiles.json" else "profiles.npy")).read_bytes() == before
    quantize.read_problem(run)


@pytest.mark.parametrize("name, content", [
    ("model.safetensors", None), ("model.safetensors", b"x"), ("tokenizer.json", None), ("config.json", b"{"),
    ("tokenizer_config.json", b"{"), ("tiny.json", b"{}"), ("tiny.json", b"[]"), ("tiny.json", b"null")])
def test_a_damaged_tiny_lm_is_trained_again(name, content, prepared, tmp_path_factory, healthy):
    run = tmp_path_factory.mktemp("run") / "damaged"
    shutil.copytree(healthy, run)
    before = (run / "lm-tiny" / "model.safetensors").read_bytes()
    (run / "lm-tiny" / name).unlink()
    if content is not None:
        (run / "lm-tiny" / name).write_bytes(content)
    call_stage(infer, "--run", run, *TINY)
    assert (run / "lm-tiny" / "model.safetensors").read_bytes() == before
    quantize.read_problem(run)[0].open_likelihood(torch.device("cpu"))


@pytest.fixture(scope="module")
def healthy(prepared, tmp_path_factory):
    run = copy_run(prepared, tmp_path_factory.mktemp("run") / "healthy")
    call_stage(infer, "--run", run, *TINY)
    return run


@pytest.mark.parametrize("at", range(3))
def test_files_that_belong_together_move_in_all_or_none(at, tmp_path):
    """A kill before the folder is ready changes nothing; after it the next reader sees all of them."""
    for name in "ab":
        common.save_json(tmp_path / f"{name}.json", "old")

    def work():
        with common.together(tmp_path) as aside:
            for name in "ab":
                common.save_json(aside / f"{name}.json", "new")

    killed = killed_at(os, "replace", work, at + 3, lambda *_: True)  # two are of save_json
    assert run_forked(killed, tmp_path / "stderr")[0] == -signal.SIGKILL
    found = [common.load(tmp_path, f"{name}.json") for name in "ab"]
    assert found == (["old", "old"] if at == 0 else ["new", "new"]) and not (tmp_path / common.READY).exists()


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    for name in ("old", "young"):
        (tmp_path / f".new.{name}").mkdir()
        (tmp_path / f".new.{name}" / "model.safetensors").write_text("half")
    day_before = time.time() - 100_000
    os.utime(tmp_path / ".new.old", (day_before, day_before))
    with common.together(tmp_path) as aside:
        common.save_json(aside / "a.json", "new")
    # In the young one another process may be at work.
    assert {path.name for path in tmp_path.iterdir()} == {".new.young", "a.json"}


def test_what_a_kill_left_ready_is_moved_before_new_files_come(tmp_path):
    def work():
        with common.together(tmp_path) as aside:
            common.save_json(aside / "a.json", "first")
            common.save_json(aside / "b.json", "first")

    killed = killed_at(os, "replace", work, 1, lambda _, target: Path(target).parent == tmp_path
                       and Path(target).name == "a.json")
    assert run_forked(killed, tmp_path / "stderr")[0] == -signal.SIGKILL
    assert (tmp_path / common.READY).exists()
    with common.together(tmp_path) as aside:
        common.save_json(aside / "a.json", "second")
    assert json.loads((tmp_path / "a.json").read_text()) == "second"
    assert json.loads((tmp_path / "b.json").read_text()) == "first"
    assert not (tmp_path / common.READY).exists()


def test_another_llm_under_the_same_name_is_noticed(run, tmp_path, capsys):
    folder = tmp_path / "lm"
    model, tokenizer = make_lm("gpt2")
    for saved in (model, tokenizer):
        saved.save_pretrained(folder)
    flags = ["--lm", folder, "--steps", 2, "--task-steps", 1]
    call_stage(infer, "--run", run, *flags)
    call_stage(infer, "--run", run, *flags)
    assert "nothing to do" in capsys.readouterr().out
    for weight in model.parameters():
        weight.data *= 1.01
    model.save_pretrained(folder)
    with pytest.raises(common.UserError, match="profiles.npy was made from another LLM"):
        quantize.read_problem(run)[0].open_likelihood(torch.device("cpu"))
    call_stage(infer, "--run", run, *flags)
    assert "nothing to do" not in capsys.readouterr().out
    quantize.read_problem(run)[0].open_likelihood(torch.device("cpu"))


@pytest.mark.parametrize("part", ["prompt_segments", "build_visibility", "build_positions"])
def test_a_part_of_the_prompt_that_was_swapped_is_noticed(part, run, lm_folders, monkeypatch, capsys):
    """By stage 02, which infers anew, and by whoever opens the LLM without the swap."""
    flags = ["--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 1]
    call_stage(infer, "--run", run, *flags)
    original = getattr(infer, part)

    def swapped(*args):
        found = original(*args)
        if part == "prompt_segments":
            return [*found[:-1], infer.Segment("task", found[-1].ids[:-1])]
        if part == "build_visibility":
            found[-1, 0] = False
            return found
        return found + 1

    with monkeypatch.context() as patch:
        patch.setattr(infer, part, swapped)
        patch.setattr(infer, "find_flaw", lambda _: None)
        call_stage(infer, "--run", run, *flags)
        assert "nothing to do" not in capsys.readouterr().out
        quantize.read_problem(run)[0].open_likelihood(torch.device("cpu"))
    with pytest.raises(common.UserError, match="profiles.npy was made from another prompt or mask"):
        quantize.read_problem(run)[0].open_likelihood(torch.device("cpu"))


def test_a_run_of_a_version_that_recorded_no_prompt_is_opened(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    facts = common.load(run, "profiles.json")
    del facts["prompt_fingerprint"]
    common.save_json(run / "profiles.json", facts)
    quantize.read_problem(run)[0].open_likelihood(torch.device("cpu"))


def test_theta_of_an_earlier_method_is_inferred_anew_and_new_users_do_not_join_it(
        inferred, as_inferred, tmp_path, capsys):
    run, flags = copy_run(inferred, tmp_path / "run"), as_inferred
    facts = common.load(run, "profiles.json")
    for method in (None, facts["method"] - 1):  # it was not recorded at first
        earlier = {key: value for key, value in facts.items() if key != "method"}
        common.save_json(run / "profiles.json", earlier if method is None else {**earlier, "method": method})
        (run / "new.txt").write_text(common.load_dataset(run).users[0])
        with pytest.raises(common.UserError, match="other settings \\(method\\).*without --users"):
            call_stage(infer, "--run", run, *flags, "--users", run / "new.txt")
        capsys.readouterr()
        call_stage(infer, "--run", run, *flags)
        assert "nothing to do" not in capsys.readouterr().out
        assert common.load(run, "profiles.json")["method"] == facts["method"]


def test_output_that_nobody_reads_is_one_line(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    process = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {ROOT}/01_prepare_data.py --run {tmp_path}/run | "
         "true"], capture_output=True, text=True, env=environment)
    assert process.returncode == 2 and is_one_line(process.stderr) and "stdout" in process.stderr


def test_titles_and_plus_minus_signs_on_an_ascii_terminal(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")

    def work():
        sys.stdout = open(1, "w", encoding="ascii", closefd=False)
        common.guarded(stage(ctr, run, *FEW_ROWS))

    process = ok(fork(work))
    assert "?" in process.stdout and "Error" not in process.stderr


@pytest.mark.parametrize("module", [prepare, infer, quantize, ctr])
def test_an_empty_run_folder_is_refused(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "--run" in one_line(capsys, stage(module, "")) and not list(tmp_path.iterdir())


FEW_ROWS = ["--seeds", 2, "--epochs", 2, "--ids", "none,userip"]


@pytest.mark.parametrize("place", ["rows", "ctr"])
def test_a_full_disk_in_stage_04_is_one_line_and_the_same_command_goes_on(place, inferred, tmp_path,
                                                                          monkeypatch):
    run = copy_run(inferred, tmp_path / "run")
    if place == "ctr":  # all rows are done, nothing of them is written
        call_counted(monkeypatch, ctr, "save", 1, "--run", run, *FEW_ROWS)
    status, text = run_forked(limited(stage(ctr, run, *FEW_ROWS), 3000), tmp_path / "stderr")
    assert status == 2 and is_one_line(text) and "free disk space" in text
    assert {path.suffix for path in run.glob("rows-*/*")} == ({".pt"} if place == "ctr" else set())
    assert not (run / "results.json").exists() and not list(run.glob("ctr_*"))
    assert call_04(monkeypatch, run, *FEW_ROWS) == (0 if place == "ctr" else 4)
    assert torch.load(run / "ctr_dcn.pt", weights_only=True) and not leftovers(run)


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path, capsys):
    """Tests may run as root, who may write everywhere: this is the folder nobody can write to."""
    (tmp_path / "run").write_text("not a folder")
    for run in (tmp_path / "run", tmp_path / "run" / "demo"):
        text = one_line(capsys, stage(prepare, run))
        assert str(tmp_path / "run") in text and "path" in text and "rights" in text
    assert (tmp_path / "run").read_text() == "not a folder"


def folder_of_blocks(run, monkeypatch, flags):
    call_02(monkeypatch, run, *flags, number=2)
    return next(run.glob("blocks-*"))


def folder_of_rows(run, monkeypatch, flags):
    call_04(monkeypatch, run, *flags, number=2)
    return next(run.glob("rows-*"))


@pytest.mark.parametrize("module, flags, blocked", [
    (infer, TINY, lambda run, *_: run / "lm-tiny"),
    (infer, None, folder_of_blocks), (ctr, FEW_ROWS, folder_of_rows),
    (ctr, FEW_ROWS, lambda run, *_: run / "predictions")], ids=["lm-tiny", "blocks", "rows", "predictions"])
def test_a_folder_that_cannot_be_made_is_one_line_and_the_same_command_goes_on(
        module, flags, blocked, inferred, lm_folders, tmp_path, monkeypatch, capsys):
    run = copy_run(inferred, tmp_path / "run")
    flags = flags or ["--lm", lm_folders["gpt2"], "--steps", 2, "--task-steps", 1, "--block-size", 30]
    folder = blocked(run, monkeypatch, flags)
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("not a folder")
    text = one_line(capsys, stage(module, run, *flags))
    assert folder.name in text and "path" in text and "rights" in text
    folder.unlink()
    call_stage(module, "--run", run, *flags)
    assert not leftovers(run)


def test_a_folder_in_a_file_s_place_is_one_line_and_stage_03_goes_on(inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    (run / "codebooks.pt").unlink()
    (run / "codebooks.pt").mkdir()
    text = one_line(capsys, stage(quantize, run, "--quantizer", "kmeans"))
    assert "codebooks.pt" in text
    (run / "codebooks.pt").rmdir()
    call_stage(quantize, "--run", run, "--quantizer", "kmeans")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")])
def test_out_of_memory_is_one_line_that_names_the_flags_to_lower(error, run, lm_folders, monkeypatch, capsys):
    def full(*_):
        raise error

    monkeypatch.setattr(infer, "descend", full)
    work = stage(infer, run, "--lm", lm_folders["gpt2"], "--block-size", 8, "--task-steps", 1)
    text = one_line(capsys, work, "lower --block-size")
    assert text == "error: out of memory (this machine); lower --block-size\n"


# ---------------------------------------------------------------- stage 04

@pytest.mark.parametrize("module", [ctr, common], ids=["04", "common"])
def test_rows_of_a_model_that_was_edited_meanwhile_are_trained_anew(module, inferred, tmp_path, monkeypatch):
    """DCN and what the models are made of stand in common.py."""
    run = copy_run(inferred, tmp_path / "run")
    assert call_04(monkeypatch, run, *FEW_ROWS, number=2) == 2
    edited = tmp_path / "edited.py"
    edited.write_text(Path(module.__file__).read_text(encoding="utf-8") + "# an edit\n", encoding="utf-8")
    monkeypatch.setattr(module, "__file__", str(edited))
    assert call_04(monkeypatch, run, *FEW_ROWS) == 4


def test_rows_of_a_model_in_a_file_of_yours_that_was_edited_meanwhile_are_trained_anew(
        inferred, tmp_path, monkeypatch):
    run = copy_run(inferred, tmp_path / "run")
    (tmp_path / "mine.py").write_text("class Mine: pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    mine = importlib.import_module("mine").Mine
    mine = type("Mine", (common.DCN,), {"__module__": mine.__module__})
    monkeypatch.setitem(ctr.MODELS, "mine", mine)
    flags = ["--models", "mine", *FEW_ROWS]
    assert call_04(monkeypatch, run, *flags, number=2) == 2
    (tmp_path / "mine.py").write_text("class Mine: 'edited'\n", encoding="utf-8")
    assert call_04(monkeypatch, run, *flags) == 4
    del sys.modules["mine"]


def test_rows_of_a_script_of_yours_that_was_edited_meanwhile_are_trained_anew(inferred, tmp_path,
                                                                               monkeypatch, capsys):
    """README's way: python mine.py, which changes a part and calls 04's main."""
    run = copy_run(inferred, tmp_path / "run")
    script = tmp_path / "mine.py"
    script.write_text("# mine\n", encoding="utf-8")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    assert call_04(monkeypatch, run, *FEW_ROWS, number=2) == 2
    left, = run.glob("rows-*")
    script.write_text("# mine, edited\n", encoding="utf-8")
    assert call_04(monkeypatch, run, *FEW_ROWS) == 4
    assert f"unfinished: {left} is of other flags, banks or code" in capsys.readouterr().out


def test_a_command_for_fewer_rows_leaves_the_finished_ones_of_another(inferred, tmp_path, monkeypatch,
                                                                       capsys):
    run = copy_run(inferred, tmp_path / "run")
    assert call_04(monkeypatch, run, *FEW_ROWS, number=4) == 4  # the last one was not finished
    assert call_04(monkeypatch, run, *FEW_ROWS, "--seeds", 1) == 0  # its two are there
    assert [path.name for path in run.glob("rows-*/*")] == ["dcn-none-1.pt"]
    assert "unfinished: " in capsys.readouterr().out
    left, = run.glob("rows-*")
    (left / ".dcn-userip-1.pt.0.77.tmp").write_bytes(b"of a killed process")
    assert call_04(monkeypatch, run, *FEW_ROWS) == 3 and not leftovers(run)


def test_a_bank_of_an_earlier_theta_is_refused(inferred, lm_folders, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 1, "--seed", 5)
    with pytest.raises(common.UserError, match="feature_bank.npy was made from another profiles.npy"):
        call_stage(ctr, "--run", run, *FEW_ROWS)
    call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 1, "--ids", "none")


def test_stage_04_goes_on_after_an_interrupt_and_after_other_settings(inferred, tmp_path, monkeypatch):
    whole, run = copy_run(inferred, tmp_path / "whole"), copy_run(inferred, tmp_path / "run")
    call_stage(ctr, "--run", whole, *FEW_ROWS)
    assert call_04(monkeypatch, run, *FEW_ROWS, number=3) == 3
    call_04(monkeypatch, run, *FEW_ROWS, "--lr", 0.01, number=2)
    cells = {path.name for path in run.glob("rows-*/*")}
    assert len(list(run.glob("rows-*/*"))) == 3 and cells == {"dcn-none-0.pt", "dcn-userip-0.pt"}
    assert not (run / "results.json").exists()
    more = [*FEW_ROWS[:-1], "none,random,userip"]  # more rows of the same settings reuse those that are done
    assert call_04(monkeypatch, run, *more) == 6 - 2
    expected, found = ([{**row, "train_samples_per_second": 0}
                        for row in json.loads((path / "results.json").read_text())["rows"]
                        if row["ids"] != "random"] for path in (whole, run))
    assert expected == found and len(found) == 4
    assert call_04(monkeypatch, run, *FEW_ROWS, "--lr", 0.01) == 3 and not leftovers(run)
    assert call_04(monkeypatch, run, *FEW_ROWS) == 4  # rows of a finished table are not kept for the next


# ---------------------------------------------------------------- LLMs

@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_point_where_fp32_ones_do(kind, dtype, world):
    def gradient(dtype):
        model, tokenizer = make_lm(kind)
        likelihood = likelihood_of(model.to(dtype), tokenizer, world[0])
        histories = [np.arange(5, 5 + length) for length in (6, 40, 25)]
        theta = (0.2 * random_theta(likelihood, 3)).requires_grad_()
        nll = likelihood(theta, *infer.pad(histories, [0, 1, 2], "cpu"))
        nll.sum().backward()
        assert theta.grad.dtype == torch.float32
        return theta.grad.flatten(1)

    assert (torch.nn.functional.cosine_similarity(gradient(dtype), gradient(torch.float32)) > 0.97).all()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_any_saved_architecture_runs_and_long_histories_are_cut_to_its_context(kind, run, lm_folders,
                                                                               tmp_path):
    call_stage(infer, "--run", run, "--lm", lm_folders[kind], "--steps", 2, "--task-steps", 1,
               "--history", "all")
    facts = json.loads((run / "profiles.json").read_text())
    assert facts["train_nll"]["after"] < facts["train_nll"]["before"] and facts["lm_sensitivity"] is None
    model, tokenizer = make_lm(kind, context=60)
    model.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    call_stage(infer, "--run", run, "--lm", tmp_path / "short", "--steps", 1, "--task-steps", 1,
               "--history", "all")
    dataset = common.load_dataset(run)
    likelihood = likelihood_of(model, tokenizer, dataset)
    texts = infer.history_texts(dataset, common.SEEN, settings(history="all"))
    cut = infer.tokenize_histories(tokenizer, texts, likelihood.room)
    assert max(map(len, cut)) + likelihood.prompt_length <= 60
    user = max(range(len(cut)), key=lambda user: len(texts[user]))
    kept, whole = tokenizer.decode(cut[user]), "".join(texts[user])
    assert whole.endswith(kept) and kept != whole


def load_some_model():
    return common.load_language_model("some/model", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("reason", [
    "401 Client Error. Cannot access gated repo for url", "[Errno 28] No space left on device",
    "We couldn't connect to the hub", "404 Client Error: RepositoryNotFound", ""])
def test_a_model_that_cannot_be_loaded_ends_in_transformers_own_reason_and_what_to_do(reason, monkeypatch,
                                                                                      capsys):
    import transformers

    def refuse(*_, **__):
        raise OSError(f"\n{reason}\nand many more lines")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    text = one_line(capsys, load_some_model)
    assert (reason or "and many more lines") in text and "(some/model)" in text
    assert all(word in text for word in ("network", "disk", "licence", "--lm gpt2"))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("x")])
def test_a_model_too_large_for_the_machine_is_out_of_memory(error, monkeypatch, capsys):
    import transformers

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    assert "out of memory" in one_line(capsys, load_some_model)


def test_llm_auto_takes_gpt2_on_a_cpu_and_says_so(run, monkeypatch, capsys):
    facts = json.loads((run / "dataset.json").read_text())
    (run / "dataset.json").write_text(json.dumps(facts | {"dataset": "other"}))

    def refuse(name, *_):
        raise common.UserError(f"asked for {name}", "x", "y")

    monkeypatch.setattr(infer, "load_language_model", refuse)
    with pytest.raises(common.UserError, match="asked for gpt2"):
        call_stage(infer, "--run", run, "--device", "cpu")
    printed = capsys.readouterr().out
    assert "chose gpt2" in printed and "0.5 GB" in printed


# ---------------------------------------------------------------- new users

def test_new_users_get_rows_and_everybody_inferred_keeps_his_bytes(lm_folders, tmp_path, monkeypatch,
                                                                   capsys):
    run, flags = tmp_path / "run", ["--lm", lm_folders["gpt2"], "--steps", 2, "--task-steps", 1]
    call_stage(prepare, "--run", run, "--subsample-users", 60, "--min-interactions", 1)
    call_stage(infer, "--run", run, *flags)
    call_stage(quantize, "--run", run)
    old_ids, books = np.load(run / "feature_bank.npy"), torch.load(run / "codebooks.pt")["codebooks"]
    old, old_users = np.load(run / "profiles.npy"), json.loads((run / "users.json").read_text())
    old_facts = json.loads((run / "profiles.json").read_text())
    old_rows = json.loads((run / "profiles_users.json").read_text())["inferred"]
    call_stage(prepare, "--run", run, "--subsample-users", 80, "--min-interactions", 1)
    users = json.loads((run / "users.json").read_text())
    added = [raw for raw in users if raw not in old_users]
    assert set(old_users) < set(users) and len(added) == 20
    asked = [*added[14::-1], old_users[0]]
    (run / "new.txt").write_text("\n".join(asked) + "\n", encoding="utf-8-sig")
    with pytest.raises(common.UserError, match="other settings \\(steps\\)"):
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 3, "--task-steps", 1,
                   "--users", run / "new.txt")
    flags += ["--users", run / "new.txt", "--block-size", 4]
    call_02(monkeypatch, run, *flags, number=2)  # an interrupt leaves the old run as it was
    assert np.array_equal(np.load(run / "profiles.npy"), old)
    capsys.readouterr()
    call_stage(infer, "--run", run, *flags)
    assert "03_quantize.py" in (printed := capsys.readouterr().out) and "--keep-codebooks" in printed
    new, facts = np.load(run / "profiles.npy"), json.loads((run / "profiles.json").read_text())
    for row in old_rows:
        assert old[row].tobytes() == new[users.index(old_users[row])].tobytes()
    inferred = json.loads((run / "profiles_users.json").read_text())["inferred"]
    fresh = [users.index(raw) for raw in added[:15] if users.index(raw) in inferred]
    assert users.index(asked[0]) in fresh  # the mark at the file's beginning is no part of the first id
    assert facts["rows_kept"] == len(old_rows) and facts["rows_new"] == len(fresh) >= 12
    assert f"validation NLL per token of the {len(fresh)} new users: own" in printed
    assert len(np.unique(new[fresh, 0], axis=0)) == len(fresh) and len(inferred) == len(old_rows) + len(fresh)
    others = np.setdiff1d(range(len(users)), inferred)  # the five not asked for, and who has no history
    assert len(others) >= 5 and (new[others] == 0).all()
    assert facts["space_fingerprint"] == old_facts["space_fingerprint"]  # new users live in the same space
    tokens = facts["train_tokens"] - old_facts["train_tokens"]  # of the new users; the likelihood is of all
    for when, at in (("before", 0), ("after", -1)):
        new_sum = facts["train_nll"][when] * facts["train_tokens"]
        new_sum -= old_facts["train_nll"][when] * old_facts["train_tokens"]
        assert tokens > 50 and facts["train_nll_steps"][at] == facts["train_nll"][when]
        assert 0 < new_sum / tokens < 2 * old_facts["train_nll"]["before"]
    call_stage(quantize, "--run", run, "--keep-codebooks")
    ids = np.load(run / "feature_bank.npy")
    assert [ids[users.index(raw)].tolist() for raw in old_users] == old_ids.tolist()
    for row in fresh:
        distances = [((new[row, m] - book.numpy()) ** 2).sum(1) for m, book in enumerate(books)]
        assert ids[row].tolist() == [int(found.argmin()) for found in distances]
    call_stage(infer, "--run", run, *flags[:4])  # without --users: everybody, also the five not asked for
    everybody = json.loads((run / "profiles_users.json").read_text())["inferred"]
    assert {users.index(raw) for raw in added[15:]} & set(everybody) and len(everybody) > len(inferred)


def test_codebooks_of_another_space_are_not_kept(run, lm_folders):
    """The words changed, and with them what a coordinate means."""
    flags = ["--lm", lm_folders["gpt2"], "--steps", 2, "--task-steps", 1]
    call_stage(infer, "--run", run, *flags)
    call_stage(quantize, "--run", run, "--quantizer", "kmeans")
    call_stage(prepare, "--run", run, "--subsample-users", 120, "--hobby-words", "a,b,c,d")
    call_stage(infer, "--run", run, *flags)
    with pytest.raises(common.UserError, match="codebooks.pt was made with another LLM"):
        call_stage(quantize, "--run", run, "--keep-codebooks")


def test_codebooks_of_another_stage_03_are_not_kept(inferred, tmp_path):
    run, other = (copy_run(inferred, tmp_path / name) for name in ("run", "other"))
    call_stage(quantize, "--run", other, "--quantizer", "kmeans", "--codes", "2,2")
    call_stage(quantize, "--run", run, "--keep-codebooks")
    shutil.copy(other / "codebooks.pt", run)
    with pytest.raises(common.UserError, match="codebooks.pt was made from another quantize.json"):
        call_stage(quantize, "--run", run, "--keep-codebooks")


def test_new_users_that_a_kill_left_half_inferred_begin_anew_where_the_first_run_is_another(
        run, lm_folders, monkeypatch):
    """Its space is another, which the flags do not tell: words are no part of them."""
    flags = ["--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 1]
    for words in (["--hobby-words", "cat,dog"], []):
        call_stage(prepare, "--run", run, "--subsample-users", 60, "--min-interactions", 1, *words)
        call_stage(infer, "--run", run, *flags)
        first = common.load(run, "profiles.json")
        old_users = common.load(run, "users.json")
        call_stage(prepare, "--run", run, "--subsample-users", 80, "--min-interactions", 1)
        (run / "new.txt").write_text("\n".join(sorted(set(common.load(run, "users.json")) - set(old_users))))
        more = ["--users", run / "new.txt", "--block-size", 4]
        call_02(monkeypatch, run, *flags, *more, **({"number": 2} if words else {}))
    assert common.load(run, "profiles.json")["space_fingerprint"] == first["space_fingerprint"]
    quantize.read_problem(run)


def test_how_many_sentences_a_tiny_lm_reads_is_nothing_to_another_llm(
        inferred, as_inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    call_stage(infer, "--run", run, *as_inferred, "--tiny-sentences", 96)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("moved", [1, 4])
def test_new_users_killed_between_the_renames_the_same_command_goes_on(moved, run, lm_folders, tmp_path):
    flags = ["--lm", lm_folders["gpt2"], "--steps", 2, "--task-steps", 1]
    call_stage(prepare, "--run", run, "--subsample-users", 60, "--min-interactions", 1)
    call_stage(infer, "--run", run, *flags)
    old, owners = np.load(run / "profiles.npy"), json.loads((run / "profiles_users.json").read_text())
    call_stage(prepare, "--run", run, "--subsample-users", 80, "--min-interactions", 1)
    users = json.loads((run / "users.json").read_text())
    (run / "new.txt").write_text("\n".join(sorted(set(users) - set(owners["users"]))))
    work = stage(infer, run, *flags, "--users", run / "new.txt")
    kill_between_renames(run, work, moved, tmp_path / "stderr")
    work()
    new = np.load(run / "profiles.npy")
    for row in owners["inferred"]:
        assert old[row].tobytes() == new[users.index(owners["users"][row])].tobytes()
    assert len(json.loads((run / "profiles_users.json").read_text())["inferred"]) > len(owners["inferred"])
    quantize.read_problem(run)
    assert not leftovers(run)


def test_new_users_are_not_inferred_under_another_prompt(inferred, as_inferred, tmp_path):
    run, flags = copy_run(inferred, tmp_path / "run"), as_inferred
    dataset, facts = common.load_dataset(run), common.load(run, "dataset.json")
    dataset.profiles[0]["prompt"] = "This user's pet is"
    facts |= {"profiles": dataset.profiles, "fingerprint": dataset.fingerprint()}
    common.save_json(run / "dataset.json", facts)
    (run / "new.txt").write_text(dataset.users[0] + "\n")
    with pytest.raises(common.UserError, match="other settings \\(profiles, prompt_fingerprint\\)"):
        call_stage(infer, "--run", run, *flags, "--users", run / "new.txt")


def test_new_users_are_not_inferred_behind_another_task_prompt(inferred, as_inferred, tmp_path):
    """Its learned vectors are of the first run's text."""
    run, flags = copy_run(inferred, tmp_path / "run"), as_inferred
    dataset, facts = common.load_dataset(run), common.load(run, "dataset.json")
    dataset.task_prompt = ". Bought:"
    facts |= {"task_prompt": dataset.task_prompt, "fingerprint": dataset.fingerprint()}
    common.save_json(run / "dataset.json", facts)
    (run / "new.txt").write_text(dataset.users[0] + "\n")
    with pytest.raises(common.UserError, match="other settings \\(prompt_fingerprint\\)"):
        call_stage(infer, "--run", run, *flags, "--users", run / "new.txt")


def test_where_nobody_of_the_first_run_is_left_some_new_users_are_not_all(run, lm_folders, capsys):
    """After --users the same command without it infers the others."""
    flags = ["--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 1]
    call_stage(infer, "--run", run, *flags)
    dataset, facts = common.load_dataset(run), common.load(run, "dataset.json")
    dataset.users[:] = [f"renamed {raw}" for raw in dataset.users]
    common.save_json(run / "users.json", dataset.users)
    common.save_json(run / "dataset.json", facts | {"fingerprint": dataset.fingerprint()})
    (run / "new.txt").write_text("\n".join(dataset.users[:9]))
    call_stage(infer, "--run", run, *flags, "--users", run / "new.txt")
    few = common.load(run, "profiles_users.json")["inferred"]
    call_stage(infer, "--run", run, *flags)
    assert 0 < len(few) < 10 < len(common.load(run, "profiles_users.json")["inferred"])
    assert "nothing to do" not in capsys.readouterr().out
    call_stage(infer, "--run", run, *flags)
    assert "nothing to do" in capsys.readouterr().out


def test_a_file_of_users_without_anybody_new_changes_no_row(inferred, as_inferred, tmp_path, capsys):
    run, flags = copy_run(inferred, tmp_path / "run"), as_inferred
    content = (run / "profiles.npy").read_bytes()
    owners, facts = (json.loads((run / f"profiles{name}.json").read_text()) for name in ("_users", ""))
    (run / "new.txt").write_text(owners["users"][owners["inferred"][0]] + "\n")
    call_stage(infer, "--run", run, *flags, "--users", run / "new.txt")
    assert "1 users of" in (printed := capsys.readouterr().out) and "have a theta" in printed
    assert json.loads((run / "profiles.json").read_text()) == facts  # what was measured of them stays
    dataset = common.load_dataset(run)
    dataset.items[0]["title"] += " of another edition"
    common.save_json(run / "items.json", dataset.items)
    common.save_json(run / "dataset.json",
                     common.load(run, "dataset.json") | {"fingerprint": dataset.fingerprint()})
    call_stage(infer, "--run", run, *flags, "--users", run / "new.txt")
    assert (run / "profiles.npy").read_bytes() == content
    again = json.loads((run / "profiles.json").read_text())
    assert all(again[key] == facts[key] for key in ("train_nll", "train_nll_steps", "space_fingerprint"))
    assert facts["heldout_nll"] and again["heldout_nll"] is None  # it is of those who are new
    (run / "new.txt").write_text("nobody\n")
    with pytest.raises(common.UserError, match="none of the file's 1 users is in the data set"):
        call_stage(infer, "--run", run, *flags, "--users", run / "new.txt")
