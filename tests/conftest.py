"""Small worlds and random models that the tests make themselves. No network, no hub."""

import importlib
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: small models are faster on one thread
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bits are compared, and a GPU does not survive a fork

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig,
                          OPTForCausalLM, PreTrainedTokenizerFast)

ROOT = Path(__file__).resolve().parent.parent
ML_100K = ROOT.parent / "shared" / "data" / "ml-100k"
common, prepare, infer, quantize, ctr = (importlib.import_module(name) for name in (
    "common", "01_prepare_data", "02_infer_profiles", "03_quantize", "04_train_ctr"))
next_item = importlib.import_module("next_item")
# Measuring what a tiny LM knows would take longer than making it, and RecSysLLM's rival longer than itself.
common.FRESH_SENTENCES = 40
next_item.EPOCHS = 3


def pytest_ignore_collect(collection_path, config):
    """The assignments are for students: they are collected only where -m names them."""
    return True if collection_path.name == "assignments" and not config.option.markexpr else None


def pytest_collection_finish(session):
    """A mistyped task, -m a10, or a folder without tests would look as if all were well."""
    if session.config.option.markexpr and not session.items:
        pytest.exit("no such task; in the project's folder: pytest -m a1 tests/assignments (to a9, b1 to b3)",
                    returncode=5)


def run_stage(script, *args, cwd=ROOT, timeout=300):
    """Run a script as a user would, in a new interpreter; returns the finished process."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], capture_output=True,
                          text=True, cwd=cwd, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def fork_stage(script, *args, cwd=ROOT):
    """The same in a forked process: torch, which takes seconds to import, is there already."""
    def run():
        sys.argv = [str(script), *map(str, args)]
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return fork(run, cwd)


def fork(call, cwd=ROOT, **env):
    """call() in a forked process; returns the finished process with what it printed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            status = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
                os.chdir(cwd)
                os.environ.update(env)
                call()
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(call, os.waitstatus_to_exitcode(status), *texts)


def call_stage(module, *args):
    """Run a stage's main() in this process, for tests that need many runs; errors are raised."""
    argv, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, args)]
    try:
        module.main()
    finally:
        sys.argv = argv


def load_script(name):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ok(process):
    assert process.returncode == 0, process.stderr[-2000:]
    return process


def make_tokenizer(bos=False):
    """A byte-level BPE of demo words; with bos, one that begins every text with <s>, as Llama's does."""
    bpe = ByteLevelBPETokenizer()
    words = [word for group in (*prepare.DEMO_HOBBIES.values(), *prepare.DEMO_BACKGROUNDS.values())
             for word in group]
    prompt = ("This user's hobby is music. This user only buys products that are ordinary. "
              "Products that this user bought:")
    text = [f"{prompt} {word};" for word in words]
    bpe.train_from_iterator(text * 3, vocab_size=400, min_frequency=2, show_progress=False,
                            special_tokens=["<s>"])
    if not bos:
        return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    from tokenizers.processors import TemplateProcessing
    bpe._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>")


def make_lm(kind, context=256):
    """(model, tokenizer): random weights of a real architecture, large enough that attention matters."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(bos=kind == "llama")
    size = len(tokenizer)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=size, n_positions=context, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=context, initializer_range=0.2, bos_token_id=0,
            eos_token_id=None, pad_token_id=None))
    else:
        model = OPTForCausalLM(OPTConfig(
            vocab_size=size, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
            dropout=0, max_position_embeddings=context, word_embed_proj_dim=32, init_std=0.2, pad_token_id=1,
            bos_token_id=0, eos_token_id=0))
    return model.eval().requires_grad_(False), tokenizer


@pytest.fixture(scope="session")
def lm_folders(tmp_path_factory):
    """{kind: folder} of models and tokenizers written by save_pretrained."""
    folders = {}
    for kind in ("gpt2", "llama", "opt"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        model, tokenizer = make_lm(kind)
        model.save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture(params=["gpt2", "llama"])
def lm(request):
    return make_lm(request.param)


def prepare_args(**changes):
    return SimpleNamespace(**{"seed": 0, "signal": 1.0, "dataset": "demo", "min_interactions": 4,
                              "positive_above": 3.0, "max_per_user": None, "subsample_users": None,
                              "cold_users": 0.0, "data_dir": None, "critic": False, "hobby_words": None,
                              "background_words": None, **changes})


def small_world(**changes):
    """(Dataset, truth) of a demo with few users."""
    args = prepare_args(subsample_users=120, **changes)
    return prepare.build(prepare.load_demo(args), args)


@pytest.fixture(scope="session")
def world():
    return small_world()


def settings(**changes):
    """Stage 02's settings for in-process calls."""
    defaults = {"steps": 3, "lr": 0.5, "prior": 1.0, "space": "users", "rank": 16, "task_steps": 24,
                "mask": "strict", "history": "liked", "max_history": 20, "block_size": None, "seed": 0}
    return SimpleNamespace(**(defaults | changes))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A run directory with stage 01's artifacts of a small demo."""
    run = tmp_path_factory.mktemp("run") / "prepared"
    call_stage(prepare, "--run", run, "--subsample-users", 120)
    return run


@pytest.fixture(scope="session")
def inferred(prepared, lm_folders, tmp_path_factory):
    """The same after stages 02 and 03, with a random GPT-2."""
    run = copy_run(prepared, tmp_path_factory.mktemp("run") / "inferred")
    call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 3, "--task-steps", 1)
    call_stage(quantize, "--run", run, "--epochs", 1, "--warm-up", 1)
    return run


@pytest.fixture(autouse=True)
def seeds():
    """What a test draws depends neither on luck nor on the tests before it."""
    torch.manual_seed(0)
    np.random.seed(0)


def copy_run(source, target):
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def likelihood_of(model, tokenizer, dataset, mask="strict", chunk=4096):
    return infer.ProfileLikelihood(model, infer.prompt_segments(tokenizer, dataset), mask, chunk)


def space_of(likelihood, tokenizer, dataset, rank=16):
    """The words' space of a data set, or with rank 0 the whole space, without a learned task prompt."""
    space = infer.fit_space(likelihood, tokenizer, dataset.profiles)
    return infer.words_space(space, dataset.profiles, rank) if rank else space


def whole_space(profiles, width):
    """The space of all directions around 0, whose words are none."""
    origin = torch.zeros(profiles, width)
    return infer.Space(origin, torch.eye(width).expand(profiles, -1, -1), origin, None, [], [])


def random_theta(likelihood, users, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(users, likelihood.n_profiles, likelihood.width, generator=generator)


def assert_bytes_equal(first, second):
    assert Path(first).read_bytes() == Path(second).read_bytes()


def random_rows(n, users, items, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(users, size=n), rng.integers(items, size=n), rng.integers(2, size=n)],
                    axis=1)
