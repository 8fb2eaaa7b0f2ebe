"""How fast stage 02 infers, beside the authors' way, on the same users in one run.

    python tests/bench_infer.py                    # GPT-2 small shape, random weights, 64 users, 16-238 history tokens: 8 min on 2 cores
    python tests/bench_infer.py --quick            # a small shape, half a minute: does it run?
    python tests/bench_infer.py --linear           # 1k, 4k, 16k users with a tiny LM: time per user and peak memory
    python tests/bench_infer.py --device cuda      # and the Llama-2-7B shape in fp16: 128 users, 128 tokens each
    python tests/bench_infer.py --profile          # where our time goes, by operator

Useful work of a step = 4 x block parameters x tokens (forward 2, backward 2: no weight gradients) + 4 x vocabulary x d x targets.
Peak = the fastest square matrix product of the same dtype, measured here. Prints a table and, last, one JSON object.
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
infer = importlib.import_module("02_infer_profiles")

DEMO = {"seed": 0, "signal": 1.0, "min_interactions": 1, "positive_above": 3.0, "max_per_user": None, "subsample_users": None,
        "profile_words": None, "critic": False, "dataset": "demo"}  # stage 01's settings
PAPER_USERS = {"Clothing": (38_764, 179_223), "Movies": (7_506, 441_783), "Games": (2_490, 19_927), "Yelp": (27_147, 1_293_247)}


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
    """A causal LM of the given shape with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        if shape == "llama2-7b":
            model = LlamaForCausalLM(LlamaConfig())  # the defaults are Llama-2-7B's
        else:
            size = {"gpt2": {}, "quick": {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 2000}}[shape]
            model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0, **size))
    torch.set_default_dtype(torch.float32)
    model.set_attn_implementation(common.attention_for(dtype, device))
    return common.freeze(common.fuse_activations(model))


def make_likelihood(model, prompt=20):
    """Two profiles with names of 5 tokens and a task of 8, as in the paper's prompt."""
    ids = np.random.default_rng(0).integers(100, size=prompt).tolist()
    segments = [infer.Segment("name", ids[:5], 0), infer.Segment("theta", [0], 0), infer.Segment("name", ids[5:10], 1),
                infer.Segment("theta", [0], 1), infer.Segment("task", ids[10:18])]
    return infer.ProfileLikelihood(model, segments)


def useful_flops(model, histories, prompt_length):
    """Of one step over all users."""
    table = model.get_input_embeddings().weight
    positions = getattr(model.base_model, "wpe", None)
    blocks = sum(parameter.numel() for parameter in model.base_model.parameters()) - table.numel() - (positions.weight.numel() if positions else 0)
    tokens = sum(len(ids) + prompt_length for ids in histories)
    return 4 * blocks * tokens + 4 * table.numel() * sum(map(len, histories))


def ours(model, histories, steps, block_size=None):
    """Seconds for `steps` steps over all users, our way (without the final evaluation pass)."""
    likelihood = make_likelihood(model)
    blocks = infer.make_blocks(histories, block_size, infer.token_budget_of(likelihood), likelihood.prompt_length)
    width = likelihood.words.weight.shape[1]
    start, spread = torch.zeros(2, width, device=likelihood.device), torch.full((2,), 0.02, device=likelihood.device)
    args = SimpleNamespace(steps=steps, lr=0.1, prior=1.0)
    synchronize(likelihood.device)
    clock = time.perf_counter()
    for users in blocks:
        infer.descend(likelihood, start, spread, *infer.pad(histories, users, likelihood.device), users, range(len(histories)), args)
    synchronize(likelihood.device)
    return time.perf_counter() - clock


def authors_way(model, histories, steps, batch=8):
    """Seconds for one step over all users (times steps): random batches of 8 padded users, full logits, one dense AdamW table."""
    likelihood = make_likelihood(model)
    width, users = likelihood.words.weight.shape[1], len(histories)
    table = torch.nn.Embedding(users, 2 * width, device=likelihood.device)
    optimizer = torch.optim.AdamW(table.parameters(), lr=1e-3)
    order = np.random.default_rng(0).permutation(users)
    clock = time.perf_counter()
    for _ in range(steps):
        for at in range(0, users, batch):
            chosen = order[at:at + batch].tolist()
            ids, lengths = infer.pad(histories, chosen, likelihood.device)
            theta = table(torch.tensor(chosen, device=likelihood.device)).view(-1, 2, width)
            embedded = likelihood.embeddings(theta, ids)
            logits = model(inputs_embeds=embedded, use_cache=False).logits
            wanted = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None], -100)
            logits = logits[:, likelihood.prompt_length - 1:-1].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, wanted.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    synchronize(likelihood.device)
    return time.perf_counter() - clock


def peak_mib(device):
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_histories(users=64):
    """Token ids of histories of 16 to 238 tokens."""
    return [np.arange(length) % 100 for length in np.linspace(16, 238, users).round().astype(int)]


VARIANTS = {"authors_fp32": (authors_way, torch.float32), "ours_fp32": (ours, torch.float32), "ours_bf16": (ours, torch.bfloat16)}


def memory(shape, device):
    """Peak memory of one step over all users above that of the loaded model, MiB; each variant in a process of its own."""
    figures = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--device", device.type, "--threads", str(torch.get_num_threads()), "--memory-of", name]
        output = subprocess.run(command + ["--quick"] * (shape == "quick"), check=True, capture_output=True, text=True).stdout
        figures[f"{name}_step_mib"] = json.loads(output.splitlines()[-1])["step_mib"]
        print(f"{name:14s} peak memory of a step, above the model's: {figures[f'{name}_step_mib']:.0f} MiB", flush=True)
    return figures


def memory_of(name, shape, device):
    """What `memory` measures, in this process."""
    way, dtype = VARIANTS[name]
    model = random_model(shape, dtype, device)
    before = peak_mib(device)
    way(model, make_histories(), 1)
    return {"step_mib": peak_mib(device) - before}


def compare(shape, device, repeats):
    """Our way in fp32 and bf16 against the authors' in fp32: interleaved, medians."""
    histories = make_histories()
    users = len(histories)
    fp32, bf16 = random_model(shape, torch.float32, device), random_model(shape, torch.bfloat16, device)
    work = useful_flops(fp32, histories, make_likelihood(fp32).prompt_length)
    rates = {name: [] for name in VARIANTS}
    peaks = {"fp32": [], "bf16": []}
    for repeat in range(repeats + 1):
        peaks["fp32"].append(matmul_peak(torch.float32, device))
        peaks["bf16"].append(matmul_peak(torch.bfloat16, device))
        for name, (way, dtype) in VARIANTS.items():
            seconds = way(fp32 if dtype == torch.float32 else bf16, histories, 1)
            if repeat:  # the first round warms up
                rates[name].append(users / seconds)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    peak = {name: statistics.median(values) for name, values in peaks.items()}
    figures = {f"{name}_user_steps_per_s": value for name, value in rate.items()}
    for name in ("authors_fp32", "ours_fp32", "ours_bf16"):
        dtype = name.split("_")[1]
        speed = rate[name] / users * work
        figures["authors_fp32_peak_fraction" if name.startswith("authors") else f"{dtype}_peak_fraction"] = speed / peak[dtype]
        print(f"{name:14s} {rate[name]:9.2f} user-steps/s   {speed / 1e9:9.1f} GFLOP/s of {peak[dtype] / 1e9:9.1f} = {speed / peak[dtype]:.0%}")
    figures |= {"ours_bf16_over_authors_fp32": rate["ours_bf16"] / rate["authors_fp32"], "fp32_gflops_peak": peak["fp32"] / 1e9,
                "bf16_gflops_peak": peak["bf16"] / 1e9}
    print(f"ours bf16 / authors fp32: {figures['ours_bf16_over_authors_fp32']:.2f}")
    return figures


def llama(device, steps=5, users=128, length=128):
    """The Llama-2-7B shape in fp16, and what the paper's data sets would take at 20 steps a user."""
    histories = [np.arange(length) % 100 for _ in range(users)]
    model = random_model("llama2-7b", torch.float16, device)
    prompt = make_likelihood(model).prompt_length
    work, peak = useful_flops(model, histories, prompt), matmul_peak(torch.float16, device)
    ours(model, histories, 1)
    seconds = statistics.median(ours(model, histories, steps) for _ in range(3)) / steps
    fraction = work / seconds / peak
    print(f"llama2-7b fp16: {users / seconds:.1f} user-steps/s, {work / seconds / 1e12:.0f} TFLOP/s of {peak / 1e12:.0f} = {fraction:.0%}, "
          f"{peak_mib(device):.0f} MiB")
    per_token = seconds / (users * (length + prompt))
    hours = {name: 20 * per_token * (n_users * prompt + 0.8 * rows * 8) / 3600 for name, (n_users, rows) in PAPER_USERS.items()}
    print("projected hours at 20 steps, 8 tokens a title, all training titles: " + ", ".join(f"{name} {value:.1f}" for name, value in hours.items()))
    return {"llama_user_steps_per_s": users / seconds, "llama_fp16_peak_fraction": fraction, "llama_peak_mib": peak_mib(device),
            "projected_hours": hours}


def linear(sizes=(1000, 4000, 16000)):
    """Stage 02 as a process on worlds of growing size, with one tiny LM: seconds in the solver per user, and peak memory."""
    figures, base = {}, None
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            write_world(run, size)
            base = base or make_tiny(Path(tempfile.mkdtemp()) / "lm")
            command = [sys.executable, ROOT / "02_infer_profiles.py", "--run", run, "--lm", base, "--steps", "5"]
            subprocess.run(command, check=True, capture_output=True)
            facts = json.loads((run / "profiles.json").read_text())
            figures[size] = (1e3 * facts["seconds"] / size, facts["peak_memory_mb"])
            print(f"{size:6d} users: {figures[size][0]:.3f} ms a user, peak {figures[size][1]} MB", flush=True)
    times, peaks = zip(*figures.values())
    print(f"time per user within {max(times) / min(times) - 1:.0%}, peak memory within {max(peaks) / min(peaks) - 1:.0%}")
    return {"ms_per_user": {str(size): value[0] for size, value in figures.items()},
            "peak_mb": {str(size): value[1] for size, value in figures.items()}}


def write_world(run, users):
    """Stage 01's artifacts for many users with 10 training rows each."""
    prepare = importlib.import_module("01_prepare_data")
    args = SimpleNamespace(**DEMO)
    demo, _ = prepare.build(prepare.load_demo(args), args)
    rng = np.random.default_rng(0)
    rows = np.stack([np.repeat(np.arange(users), 12), rng.integers(len(demo.items), size=users * 12), np.ones(users * 12, dtype=int),
                     np.tile([0] * 10 + [1, 2], users)], axis=1).astype(np.int32)
    dataset = common.Dataset(rows, [f"u{user}" for user in range(users)], demo.items, demo.profiles, demo.task_prompt, "demo")
    prepare.save(run, dataset, None, args)


def make_tiny(folder):
    """A random GPT-2 of the tiny LM's shape with a tokenizer of the demo's titles."""
    prepare = importlib.import_module("01_prepare_data")
    args = SimpleNamespace(**{**DEMO, "subsample_users": 200}, history="liked", max_history=10, history_sample="recent", tiny_sentences=320)
    dataset, _ = prepare.build(prepare.load_demo(args), args)
    infer.train_tiny(dataset, folder, args)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5, help="medians of this many")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--linear", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory-of", choices=VARIANTS, help="one variant's peak memory alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    shape = "quick" if args.quick else "gpt2"
    if args.memory_of:
        figures = memory_of(args.memory_of, shape, device)
    elif args.linear:
        figures = linear((200, 400) if args.quick else (1000, 4000, 16000))
    elif args.profile:
        histories = make_histories()
        for dtype in (torch.float32, torch.bfloat16):
            model = random_model(shape, dtype, device)
            ours(model, histories, 1)
            with torch.profiler.profile() as profile:
                ours(model, histories, 1)
            print(dtype, profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40), sep="\n")
        figures = {}
    else:
        figures = memory(shape, device) | compare(shape, device, 1 if args.quick else args.repeats)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            figures |= llama(device)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
