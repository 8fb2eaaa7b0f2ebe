"""How fast stage 02 infers profiles, beside the authors' way, on the same users in one run.

    python tests/bench/bench_infer.py                # GPT-2's shape, random weights: 2 to 4 min on 2 cores
    python tests/bench/bench_infer.py --full         # more users, medians of five, peak memory: half an hour
    python tests/bench/bench_infer.py --quick        # a small shape, a minute: does it run?
    python tests/bench/bench_infer.py --linear       # 1k, 4k, 16k users, a tiny LM: time a user, peak memory
    python tests/bench/bench_infer.py --million      # what a million users of Llama-2-7B's width are on disk
    python tests/bench/bench_infer.py --device cuda  # and Llama-2-7B's shape in fp16, whole runs on the card
    python tests/bench/bench_infer.py --processes    # these whole runs alone: killed and resumed, two ranks
    python tests/bench/bench_infer.py --profile      # where our time goes, by operator
    python tests/bench/bench_infer.py --smollm2      # rates and steps on SmolLM2-135M's real weights: 15 min

Rates: user-steps a second on histories of 16 to 238 tokens, by default on eight of 64, on a GPU on 512.
Useful work of a step = 4 x block parameters x tokens (forward 2, backward 2: no weight gradients) + 4 x
vocabulary x d x targets. Peak = the fastest square matrix product of the same dtype, measured here.

A step of ours is a likelihood with its gradient; the forward pass at the end of a descent counts as half. Not
counted, because all users share it: learning the task prompt.

Solving: a user is solved when the likelihood is within 1% of what the way itself reaches: ours in 40 steps
behind the learned task prompt, the authors' at the cap, in the whole space behind the text.
Random weights have nothing to say of a user, so the steps this takes are counted on a tiny LM that is trained
here, with --smollm2 on SmolLM2-135M (8 users, 12 steps of the task prompt, the cap at 30); users solved a
second = rate / steps. The authors' loop has its own settings: theta starts at U(-.1, .1), AdamW at 1e-3 on
one dense table, random batches of 8, mean loss, no prior. Beside it stands how long that loop takes to OUR
likelihood; users whom it has not solved at the cap count with the cap, and the ratio is then a bound.

Whole runs: stage 02 as a process with a random Llama in fp16 (on a GPU Llama-2-7B's width and four layers),
unbroken; killed with SIGKILL between two blocks and started again; as two ranks on the one device. Then 04.

A million users: stage 02's files of theirs, random numbers in an LLM's place, are written block by block,
gathered and read. The first 256 users, who tell the directions, lie in all coordinates, the others in 8.

Progress goes to stderr; a table and, last, one JSON object to stdout.
"""

import argparse
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
common, prepare, infer = (importlib.import_module(name) for name in (
    "common", "01_prepare_data", "02_infer_profiles"))

BEGIN = time.perf_counter()
BUDGET = 100  # seconds for rounds of the three ways; the first is always done
DEMO = {"seed": 0, "signal": 1.0, "min_interactions": 1, "positive_above": 3.0, "max_per_user": None,
        "subsample_users": 200, "cold_users": 0.0, "critic": False, "dataset": "demo", "hobby_words": None,
        "background_words": None}
PAPER_USERS = {"Clothing": (38_764, 179_223), "Movies": (7_506, 441_783), "Games": (2_490, 19_927),
               "Yelp": (27_147, 1_293_247)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OUR_STEPS = 40  # of which the last tells what a user's descent can reach
LAST_FORWARD = 0.5  # of a step, some: descend() ends with an evaluation without a gradient


def note(text):
    print(f"[{time.perf_counter() - BEGIN:4.0f} s] {text}", file=sys.stderr, flush=True)


def defaults(*flags):
    """Stage 02's own settings."""
    with mock.patch.object(sys, "argv", ["02_infer_profiles.py", *flags]):
        return infer.parse_arguments()


# ---------------------------------------------------------------- what is measured

def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_peak(dtype, device):
    """FLOP/s of the fastest of a few square matrix products, the best of several tries."""
    best = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        a @ b
        for _ in range(5):
            synchronize(device)
            start = time.perf_counter()
            a @ b
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def random_model(shape, dtype, device):
    """A causal LM of the given shape with random weights, as load_language_model would hand it out."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        if shape == "llama2-7b":
            model = LlamaForCausalLM(LlamaConfig())  # the defaults are Llama-2-7B's
        else:
            size = {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 2000} if shape == "quick" else {}
            size["activation_function"] = "gelu_pytorch_tanh"  # as load_language_model chooses it
            model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0,
                                               eos_token_id=0, **size))
    torch.set_default_dtype(torch.float32)
    model.set_attn_implementation("eager" if dtype == torch.bfloat16 and device.type == "cpu" else "sdpa")
    return model.eval().requires_grad_(False)


def make_likelihood(model, prompt=20):
    """Two profiles with names of 5 tokens and a task of 8, as in the paper's prompt."""
    ids = np.random.default_rng(0).integers(100, size=prompt).tolist()
    segments = [infer.Segment("name", ids[:5], 0), infer.Segment("theta", [0], 0),
                infer.Segment("name", ids[5:10], 1), infer.Segment("theta", [0], 1),
                infer.Segment("task", ids[10:18])]
    return infer.ProfileLikelihood(model, segments)


def make_histories(full=True, copies=1):
    """Token ids of 64 histories of 16 to 238 tokens, or of eight of them, four short and four long."""
    lengths = np.linspace(16, 238, 64).round().astype(int)
    chosen = lengths if full else np.concatenate([lengths[14:18], lengths[46:50]])
    return [np.arange(length, dtype=np.int32) % 100 for length in np.repeat(chosen, copies)]


def useful_flops(model, histories, prompt_length):
    """Of one step over all users."""
    table, positions = model.get_input_embeddings().weight, getattr(model.base_model, "wpe", None)
    blocks = common.count_parameters(model.base_model) - table.numel()
    blocks -= positions.weight.numel() if positions else 0
    tokens = sum(len(ids) + prompt_length for ids in histories)
    return 4 * blocks * tokens + 4 * table.numel() * sum(map(len, histories))


def ours(likelihood, histories, steps, size=None):
    """`steps` steps over all users, our way: descend() on stage 02's own blocks. How many steps that was."""
    blocks = infer.make_blocks(histories, size, infer.token_budget_of(likelihood), likelihood.prompt_length)
    space = plain_space(likelihood)
    for users in blocks:
        settings = SimpleNamespace(steps=steps, lr=defaults().lr, prior=defaults().prior)
        infer.descend(likelihood, space, *infer.pad(histories, users, likelihood.device), settings)
    return steps + LAST_FORWARD


def plain_space(likelihood):
    """All directions, around 0, as long as words are wide; what they mean does not matter to the clock."""
    basis = 0.02 * torch.eye(likelihood.width, device=likelihood.device)
    origin = torch.zeros(likelihood.n_profiles, likelihood.width, device=likelihood.device)
    return infer.Space(origin=origin, basis=basis.expand(likelihood.n_profiles, -1, -1), words_mean=origin,
                       task=likelihood.task, words=[], vectors=[])


class Authors:
    """Their loop: a dense table of all users, random batches of 8, full logits, a plain causal mask."""

    def __init__(self, likelihood, histories, batch=8):
        self.likelihood, self.histories, self.batch = likelihood, histories, batch
        width = likelihood.n_profiles * likelihood.word_table.weight.shape[1]
        self.table = torch.nn.Embedding(len(histories), width, device=likelihood.device)
        torch.nn.init.uniform_(self.table.weight, -0.1, 0.1)
        self.optimizer = torch.optim.AdamW(self.table.parameters(), lr=1e-3)
        self.rng = np.random.default_rng(0)

    def epoch(self):
        """A step for each user; float (U,), the NLL in nats before it."""
        likelihood, order = self.likelihood, self.rng.permutation(len(self.histories))
        nll = np.zeros(len(order))
        for chosen in np.split(order, range(self.batch, len(order), self.batch)):
            ids, lengths = infer.pad(self.histories, chosen, likelihood.device)
            rows = torch.from_numpy(chosen).to(likelihood.device)
            embedded = likelihood.embeddings(self.table(rows).view(len(rows), likelihood.n_profiles, -1), ids)
            logits = likelihood.model(inputs_embeds=embedded, use_cache=False).logits
            logits = logits[:, likelihood.prompt_length - 1:-1].flatten(0, 1).float()
            beyond = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
            wanted = ids.masked_fill(beyond, -100).flatten()
            losses = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="none")
            self.optimizer.zero_grad()
            (losses.sum() / lengths.sum()).backward()
            self.optimizer.step()
            nll[chosen] = losses.detach().view(len(rows), -1).sum(1).cpu().numpy()
        return nll


def authors(likelihood, histories, steps):
    loop = Authors(likelihood, histories)
    for _ in range(steps):
        loop.epoch()
    return steps


VARIANTS = {"authors_fp32": (authors, "fp32"), "ours_fp32": (ours, "fp32"), "ours_bf16": (ours, "bf16")}


def seconds_of(way, model, histories, steps=1, **settings):
    """Seconds a step over all users."""
    likelihood = make_likelihood(model)
    synchronize(likelihood.device)
    clock = time.perf_counter()
    done = way(likelihood, histories, steps, **settings)
    synchronize(likelihood.device)
    return (time.perf_counter() - clock) / done


# ---------------------------------------------------------------- memory, rates, solving

def peak_mib(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(shape, device):
    """Peak memory of one step of the 8 longest users above that of the loaded model, MiB; a process each."""
    figures = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--device", device.type, "--memory-of", name,
                   "--threads", str(torch.get_num_threads()), *["--quick"] * (shape == "quick")]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures[f"{name}_step_mib"] = json.loads(output.splitlines()[-1])["step_mib"]
        note(f"memory of {name}")
        print(f"{name:14s} peak memory of a step above the model's: {figures[f'{name}_step_mib']:.0f} MiB")
    return figures


def memory_of(name, shape, device):
    """What `memory` measures, in this process."""
    way, dtype = VARIANTS[name]
    model = random_model(shape, DTYPES[dtype], device)
    before = peak_mib(device)
    seconds_of(way, model, make_histories()[-8:])
    return {"step_mib": peak_mib(device) - before}


def compare(shape, device, full, repeats):
    """Our way in fp32 and bf16, the authors' in fp32: medians of interleaved rounds, fewer if slow.

    shape: of random_model, or the folder of a real LLM.
    """
    histories = make_histories(full, 8 if device.type == "cuda" else 1)  # 64 users fill no GPU
    users = len(histories)
    models = {}
    for name, dtype in DTYPES.items():
        is_folder = Path(shape).is_dir()
        models[name] = (common.load_language_model(shape, dtype, device)[0] if is_folder
                        else random_model(shape, dtype, device))
    torch.set_num_threads(common.THREADS)
    work = useful_flops(models["fp32"], histories, make_likelihood(models["fp32"]).prompt_length)
    note("models made")
    for way, dtype in VARIANTS.values():
        seconds_of(way, models[dtype], histories[:2])  # warms up
    note(f"warm; rounds over {users} users begin")
    rates, peaks = {name: [] for name in VARIANTS}, {dtype: [] for dtype in DTYPES}
    begin = time.perf_counter()
    for number in range(repeats):
        for dtype, found in peaks.items():
            found.append(matmul_peak(DTYPES[dtype], device))
        note("peaks measured")
        for name, (way, dtype) in VARIANTS.items():
            rates[name].append(users / seconds_of(way, models[dtype], histories))
            note(f"round {number + 1} of up to {repeats}: {name} {rates[name][-1]:.2f} user-steps/s")
        if not full and (time.perf_counter() - begin) * (number + 2) / (number + 1) > BUDGET:
            break  # another round would pass the budget
    rate = {name: statistics.median(values) for name, values in rates.items()}
    figures = {f"{name}_user_steps_per_s": value for name, value in rate.items()} | {"rounds": number + 1}
    for name, (_, dtype) in VARIANTS.items():
        peak, speed = statistics.median(peaks[dtype]), rate[name] / users * work
        figures[f"{dtype}_gflops_peak"] = peak / 1e9
        figures[("authors_" if name.startswith("authors") else "") + f"{dtype}_peak_fraction"] = speed / peak
        print(f"{name:14s} {rate[name]:9.2f} user-steps/s   {speed / 1e9:9.1f} GFLOP/s of {peak / 1e9:9.1f} "
              f"= {speed / peak:.0%}")
    if "bf16" in DTYPES:
        figures["ours_bf16_over_authors_fp32"] = rate["ours_bf16"] / rate["authors_fp32"]
        print(f"ours bf16 / authors fp32: {figures['ours_bf16_over_authors_fp32']:.2f}")
    return figures


def steps_to_solve(device, users, cap, sentences, name=None):
    """{way: steps (U,) that each user needs; where none was enough, cap + 1, of ours OUR_STEPS + 1}.

    ours: to within 1% of what 40 of our steps reach in fp32; authors: to within 1% of what their loop reaches
    by the cap; authors_to_ours: to within 1% of what 40 of our steps reach. name: an LLM's folder, else tiny.
    """
    settings, dataset, needed = defaults("--lm", "tiny", "--tiny-sentences", str(sentences)), demo_world(), {}
    settings.steps = OUR_STEPS
    if name:  # with a real LLM the task prompt would take longer than all that is measured
        settings.task_steps = 12
    texts = infer.history_texts(dataset, common.TRAIN, settings)
    with tempfile.TemporaryDirectory() as folder:
        lm = name or Path(folder) / "lm-tiny"
        if not name:
            common.train_tiny(dataset, lm, max(map(len, texts)), settings)
            note("tiny LM trained")
        task = None
        for dtype in DTYPES:
            model, tokenizer = common.load_language_model(str(lm), DTYPES[dtype], device)
            likelihood = infer.ProfileLikelihood(model, infer.prompt_segments(tokenizer, dataset))
            histories = infer.tokenize_histories(tokenizer, texts, likelihood.room)
            space = infer.fit_space(likelihood, tokenizer, dataset.profiles)
            text = likelihood.task
            if task is None:
                task = infer.fit_task(likelihood, space, histories, settings)
            likelihood.task = task
            chosen = [ids for ids, lines in zip(histories, texts) if len(lines) > 3][:users]
            batch = infer.pad(chosen, range(len(chosen)), device)
            nlls = infer.descend(likelihood, space, *batch, settings)[1]
            path = nlls.cpu().numpy()  # Shape: (OUR_STEPS + 1, U)
            if dtype == "fp32":
                target = 1.01 * path[OUR_STEPS]
                likelihood.task = text
                loop = Authors(likelihood, chosen)
                theirs = np.stack([loop.epoch() for _ in range(cap + 1)])
                needed["authors_fp32"] = first_below(theirs, 1.01 * theirs.min(0))
                needed["authors_to_ours_fp32"] = first_below(theirs, target)
                note(f"authors' loop: {cap} steps done")
            needed[f"ours_{dtype}"] = first_below(path, target)
            note(f"our way in {dtype}: the slowest user took {needed[f'ours_{dtype}'].max()} steps")
    return needed


def first_below(path, target):
    """int (U,): the first step at which path, an iterable of (U,), is at most target (U,), and at least 1.

    Where none is, the length of path. It is not followed further than all need.
    """
    steps = np.full(len(target), -1)
    for number, values in enumerate(path):
        steps[(steps < 0) & (values <= target)] = max(1, number)
        if (steps >= 0).all():
            break
    return np.where(steps < 0, number + 1, steps)


def solve(device, rates, users, cap, sentences, name=None):
    """Users solved a second: the rates of compare() over the steps of steps_to_solve()."""
    figures, solved = {"default_steps": defaults().steps, "step_cap": cap}, {}
    needed = steps_to_solve(device, users, cap, sentences, name)
    for way, steps in needed.items():
        kind = way.replace("authors_to_ours", "authors")
        # The authors' loop is followed to the cap, ours to OUR_STEPS; it ends with a forward pass.
        counted = np.minimum(steps, cap) if way.startswith("authors") else steps + LAST_FORWARD
        average, rate = float(counted.mean()), rates[f"{kind}_user_steps_per_s"]
        solved[way] = rate / average
        figures |= {f"{way}_steps_to_solve": average, f"{way}_users_solved_per_s": solved[way]}
        said = f"{way:21s} {average:6.2f} steps a user: {solved[way]:.4f} users solved a second"
        if way.startswith("ours"):
            default = figures["default_steps"]
            by_default = rate / (default + LAST_FORWARD)
            said += f"; {by_default:.4f} users a second with stage 02's default of {default} steps"
        print(said)
    unsolved = float((needed["authors_to_ours_fp32"] > cap).mean())
    figures["authors_to_ours_share_unsolved"] = unsolved
    for dtype in DTYPES:
        for way, words in (("authors_fp32", "each to its own end"), ("authors_to_ours_fp32", "to our end")):
            ratio = solved[f"ours_{dtype}"] / solved[way]
            figures[f"solve_ratio_{'' if way == 'authors_fp32' else 'to_ours_'}{dtype}"] = ratio
            is_bound = unsolved and "to" in way and (needed[f"ours_{dtype}"] <= OUR_STEPS).all()
            bound = f" or more: {unsolved:.0%} unsolved at the cap" if is_bound else ""
            print(f"users solved a second, ours {dtype} / authors fp32, {words}: {ratio:.1f}{bound}")
    return figures


# ---------------------------------------------------------------- other measurements

def llama(device, steps=5, users=128, length=128):
    """The Llama-2-7B shape in fp16, and what the paper's data sets would take at the default steps."""
    histories = [np.arange(length, dtype=np.int32) % 100 for _ in range(users)]
    model = random_model("llama2-7b", torch.float16, device)
    prompt = make_likelihood(model).prompt_length
    work, peak = useful_flops(model, histories, prompt), matmul_peak(torch.float16, device)
    seconds_of(ours, model, histories)
    seconds = statistics.median(seconds_of(ours, model, histories, steps) for _ in range(3))
    fraction, mib = work / seconds / peak, peak_mib(device)
    print(f"llama2-7b fp16: {users / seconds:.1f} user-steps/s, {work / seconds / 1e12:.0f} TFLOP/s of "
          f"{peak / 1e12:.0f} = {fraction:.0%}, {mib:.0f} MiB")
    per_token, default = seconds / (users * (length + prompt)), defaults().steps
    hours = {name: (default + LAST_FORWARD) * per_token * (n_users * prompt + 0.8 * rows * 8) / 3600
             for name, (n_users, rows) in PAPER_USERS.items()}
    print(f"projected hours at {default} steps, 8 tokens a title, all training titles: "
          + ", ".join(f"{name} {value:.1f}" for name, value in hours.items()))
    an_hour, by_size = 3600 * users / (seconds * (default + LAST_FORWARD)), {}
    print(f"users an hour at {default} steps: {an_hour:.0f}")
    for size in (8, 16, 32, 64, 128):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            taken = seconds_of(ours, model, histories, 2, size=size)
        except torch.OutOfMemoryError:
            print(f"blocks of {size:3d} users: out of memory")
            break
        mib_of_size = peak_mib(device)
        by_size[size] = {"user_steps_per_s": users / taken, "peak_mib": mib_of_size}
        print(f"blocks of {size:3d} users: {users / taken:.1f} user-steps/s, {mib_of_size:.0f} MiB")
    return {"llama_user_steps_per_s": users / seconds, "llama_fp16_peak_fraction": fraction,
            "llama_peak_mib": mib, "llama_users_per_hour": an_hour, "llama_block_sizes": by_size,
            "projected_hours": hours}


def save_llama(folder, device):
    """A Llama with random weights and the demo's words, as a folder: on a GPU as wide as Llama-2-7B."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    common.train_tiny(demo_world(), folder, 20, defaults("--tiny-sentences", "320"))
    words = len(AutoTokenizer.from_pretrained(folder))
    size = {"num_hidden_layers": 4} if device.type == "cuda" else {
        "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=words, bos_token_id=None, eos_token_id=None, **size))
    model.to(torch.float16 if device.type == "cuda" else torch.float32).save_pretrained(folder)


def stage(name, run, *flags, **environment):
    """A stage as a process with a group of its own, its output in RUN.log."""
    command = [sys.executable, next(ROOT.glob(f"{name}_*.py")), "--run", run, *map(str, flags)]
    with open(f"{run}.log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                                   env={**os.environ, **environment})
    process.log = f"{run}.log"
    return process


def finish(*processes):
    """Seconds until all have ended well; else all are ended, and what they said is shown."""
    clock = time.perf_counter()
    try:
        for process in processes:
            if process.wait(timeout=300):
                raise SystemExit(f"{process.args[1]} ended with {process.returncode}:\n"
                                 + Path(process.log).read_text()[-2000:])
    except BaseException:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        raise
    return time.perf_counter() - clock


def whole_runs(device, users):
    """Stage 02 unbroken, killed and resumed, as two ranks on one device; 04 there and on the CPU."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder) / name for name in ("unbroken", "killed", "ranks")}
        lm = Path(folder) / "llama"
        save_llama(lm, device)
        note("a random Llama saved")
        finish(stage("01", runs["unbroken"], "--subsample-users", users))
        for name in ("killed", "ranks"):
            shutil.copytree(runs["unbroken"], runs[name])
        flags = ("--lm", lm, "--device", device.type, "--block-size", 8)
        found["run_seconds"] = finish(stage("02", runs["unbroken"], *flags))
        note(f"unbroken: {found['run_seconds']:.1f} s with loading")
        process = stage("02", runs["killed"], *flags)
        while process.poll() is None and len(list(runs["killed"].glob("blocks-*/0*.pt"))) < 3:
            time.sleep(0.002)
        if process.poll() is not None:
            raise SystemExit("stage 02 ended before it could be killed")
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
        found["killed_by"] = -process.wait()
        found["blocks_at_the_kill"] = len(list(runs["killed"].glob("blocks-*/0*.pt")))
        found["resume_seconds"] = finish(stage("02", runs["killed"], *flags))
        note(f"killed (signal {found['killed_by']}) at {found['blocks_at_the_kill']} blocks, then resumed")
        found["ranks_seconds"] = finish(*(stage(
            "02", runs["ranks"], *flags, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", GLOO_SOCKET_IFNAME="lo") for rank in (0, 1)))
        note("two ranks on one device done")
        z = np.load(runs["unbroken"] / "profiles.npy")
        for name in ("killed", "ranks"):
            other = np.load(runs[name] / "profiles.npy")
            found[f"{name}_users_equal"] = float((z == other).all((1, 2)).mean())
            far = np.abs(z - other)
            found[f"{name}_farthest"] = float(far.max())
            print(f"{name}: {found[f'{name}_users_equal']:.0%} of the users equal to the bit, the farthest "
                  f"coordinate {far.max():.2g} of the words' spread away")
        finish(stage("03", runs["unbroken"], "--quantizer", "kmeans", "--device", device.type))
        for where in dict.fromkeys((device.type, "cpu")):
            found[f"ctr_{where}_seconds"] = finish(stage(
                "04", runs["unbroken"], "--device", where, "--ids", "none,random,userip", "--seeds", 2))
            print(f"04, three rows of two seeds, on {where}: {found[f'ctr_{where}_seconds']:.1f} s")
    return found


def demo_world():
    args = SimpleNamespace(**DEMO)
    return prepare.build(prepare.load_demo(args), args)[0]


def linear(sizes, flags):
    """Stage 02 as a process on worlds of growing size, one tiny LM: ms a user in the solver, peak memory."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        lm = Path(folder) / "lm"
        common.train_tiny(demo_world(), lm, 10, defaults("--tiny-sentences", "320"))
        for size in sizes:
            run = Path(folder) / str(size)
            write_world(run, size)
            command = [sys.executable, ROOT / "02_infer_profiles.py", "--run", run, "--lm", lm, *flags]
            subprocess.run(command, check=True, capture_output=True)
            facts = json.loads((run / "profiles.json").read_text())
            found[size] = 1e3 * facts["seconds"] / size, facts["peak_memory_mb"]
            note(f"{size} users: {found[size][0]:.3f} ms a user, peak {found[size][1]} MB")
    times, peaks = zip(*found.values())
    print(f"time a user within {max(times) / min(times) - 1:.0%}, peak memory within "
          f"{max(peaks) / min(peaks) - 1:.0%}")
    return {"ms_per_user": {str(size): value[0] for size, value in found.items()},
            "peak_mb": {str(size): value[1] for size, value in found.items()}}


def million(users, width=4096, rank=8, block=64):
    """Seconds, MB on disk and peak memory of stage 02's files for so many users, the LLM left out."""
    rng = torch.Generator().manual_seed(0)
    random = {name: torch.randn(shape, generator=rng) for name, shape in (
        ("mean", (2, width)), ("task", (8, width)), ("words", (20, width)), ("basis", (2, rank, width)))}
    space = infer.Space(random["mean"], torch.linalg.qr(random["basis"].mT)[0].mT.contiguous(),
                        random["mean"], random["task"], [[], []], [random["words"], random["words"]])
    wide = infer.whole_space(space)
    blocks = [list(range(first, min(first + block, users))) for first in range(0, users, block)]
    n_first = min(len(blocks), infer.DIRECTION_USERS // block)
    facts = {"nll": [2.0, 1.0], "tokens": 100, "seconds": 1.0}
    nothing = {"train_nll_steps": [0.0], "train_tokens": 0, "seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        clock = time.perf_counter()
        common.save_torch(work / "wide.pt", infer.saved_space(wide))
        common.save_torch(work / "space.pt", infer.saved_space(space))
        for number, some in enumerate(blocks):
            z = torch.randn(len(some), 2, width if number < n_first else rank, generator=rng)
            common.save_torch(work / f"{number:06d}.pt", {"z": z, **facts})
        written = time.perf_counter() - clock
        unfinished = sum(path.stat().st_size for path in work.iterdir())
        clock = time.perf_counter()
        z, known, _ = infer.gather(work, blocks, n_first, None, {}, (space, wide), users, nothing)
        common.save_npy(work / "profiles.npy", z)
        common.save_json(work / "profiles_users.json",
                         {"users": [f"user{user}" for user in range(users)], "inferred": known})
        gathered = time.perf_counter() - clock
        kept = {name: (work / name).stat().st_size / 1e6
                for name in ("profiles.npy", "profiles_users.json", "space.pt")}
    figures = {"million_users": users, "million_blocks": len(blocks), "million_write_seconds": written,
               "million_gather_seconds": gathered, "million_unfinished_mb": unfinished / 1e6,
               "million_kept_mb": kept, "million_peak_mb": common.peak_memory_mb(torch.device("cpu"))}
    print(f"{users:,d} users, {len(blocks):,d} blocks: written in {written:.0f} s, "
          f"{unfinished / 1e6:,.0f} MB until done; gathered in {gathered:.0f} s into "
          f"{kept['profiles.npy']:,.1f} MB of coordinates "
          f"(all of theta: {users * 2 * width * 4 / 1e6:,.0f} MB); peak {figures['million_peak_mb']} MB")
    return figures


def write_world(run, users):
    """Stage 01's artifacts for many users with 10 training rows each."""
    demo, rng = demo_world(), np.random.default_rng(0)
    rows = np.stack([np.repeat(np.arange(users), 12), rng.integers(len(demo.items), size=users * 12),
                     np.ones(users * 12, dtype=int), np.tile([0] * 10 + [1, 2], users)], axis=1)
    dataset = common.Dataset(rows.astype(np.int32), [f"u{user}" for user in range(users)], demo.items,
                             demo.profiles, demo.task_prompt, "demo")
    prepare.save(run, dataset, None, SimpleNamespace(**DEMO), dropped=[])


def profile(shape, device):
    """Where our time goes, by operator: on a GPU that of the Llama-2-7B shape in fp16."""
    gpu = device.type == "cuda"
    for dtype in (torch.float16,) if gpu else DTYPES.values():
        model = random_model("llama2-7b" if gpu else shape, dtype, device)
        seconds_of(ours, model, make_histories()[:2])
        with torch.profiler.profile() as found:
            seconds_of(ours, model, make_histories(full=gpu))
        column = f"self_{'device' if gpu else 'cpu'}_time_total"
        table = found.key_averages().table(sort_by=column, row_limit=14, max_name_column_width=60)
        print(dtype, table, sep="\n")
    return {}


def leave_out_emulated_bf16():
    """Some CPUs multiply bf16 a hundred times slower than fp32; then its figures would take an hour."""
    a, took = torch.randn(512, 512), {}
    for name, dtype in DTYPES.items():
        product = a.to(dtype)
        product @ product
        clock = time.perf_counter()
        product @ product
        took[name] = time.perf_counter() - clock
    if took["bf16"] < 8 * took["fp32"]:
        return {}
    note(f"bf16 left out: a product takes {took['bf16'] / took['fp32']:.0f} times that of fp32 here")
    del DTYPES["bf16"], VARIANTS["ours_bf16"]
    return dict.fromkeys(("ours_bf16_user_steps_per_s", "bf16_peak_fraction", "solve_ratio_bf16"))


def everything(args, shape, device):
    """The figures of the contract; None for bf16 where it is left out."""
    left_out = leave_out_emulated_bf16() if device.type == "cpu" else {}
    everybody = args.full or device.type == "cuda"
    figures = compare(shape, device, everybody, 1 if args.quick else 5)
    if args.full:
        figures |= memory(shape, device)
    cap, sentences = (20, 640) if args.quick else (1000, 16000) if args.full else (300, 6000)
    torch.set_num_threads(1)  # a tiny LM gains nothing from a second one
    figures |= solve(device, figures, 16 if args.quick else 64, cap, sentences)
    torch.set_num_threads(args.threads)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        figures |= llama(device)
        gc.collect()  # a likelihood holds itself, and the model
        torch.cuda.empty_cache()
        figures |= whole_runs(device, 800)
    return figures | left_out


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=common.THREADS, help="CPU threads (default: the cores)")
    for name in ("quick", "full", "linear", "million", "profile", "processes", "smollm2"):
        add(f"--{name}", action="store_true")
    add("--memory-of", choices=VARIANTS, help="one variant's peak memory alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, shape = torch.device(args.device), "quick" if args.quick else "gpt2"
    if args.memory_of:
        figures = memory_of(args.memory_of, shape, device)
    elif args.linear:
        if args.quick:
            figures = linear((60,), ("--steps", "1", "--task-steps", "1"))
        else:
            figures = linear((1000, 4000, 16000), ("--steps", "5"))
    elif args.million:
        figures = million(2000 if args.quick else 10**6)
    elif args.smollm2:
        left_out = leave_out_emulated_bf16()
        folder = common.lm_folder("smollm2")
        figures = compare(folder, device, False, 3)
        figures |= solve(device, figures, 8, 30, 64, folder) | left_out
    elif args.processes:
        figures = whole_runs(device, 100 if args.quick else 800)
    else:
        figures = profile(shape, device) if args.profile else everything(args, shape, device)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
