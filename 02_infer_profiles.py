"""Stage 02: infer latent profiles of users as soft tokens of a frozen LLM. Paper: section 2.3, Eq. (2)-(4).

The prompt of a user is one ordered list of segments (Eq. 3, then the text to be made likely):

    x^1 theta^1  x^2 theta^2 ... D_task  y = titles of the user's history

Behind the strict mask (Fig. 4) a profile sees its own name only; task and history see all before them.
theta minimises  l_llm = -log P_LLM(y | x, theta)  (Eq. 2, 4) plus a Gaussian prior around its start. Users
are independent: a block is solved at a time. DEVIATION(k): row k of README's differences.

Reads:  dataset.json interactions.npy users.json items.json (01)
Writes: profiles.npy float32 (U, M, d), theta; profiles.json, settings and likelihoods; profiles_users.json;
        lm-tiny/; until all is done blocks-*/, a file a block

Run:
    python 02_infer_profiles.py  # the demo, with its tiny LM: 1 min
    torchrun --nproc-per-node=8 -- 02_infer_profiles.py --lm llama2-7b
"""

import functools
import math
import os
import shutil
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import (
    RANK, SEEN, TRAIN, VALIDATION, Parser, UserError, announce, at_least, atomic, check_same,
    count_parameters, do_all, fingerprint, guarded, load, load_dataset, load_language_model,
    peak_memory_mb, pick_device, pieces_of, save_json, seeded, train_tiny, wait_for_all)

# -------- settings

LLAMA = "meta-llama/Llama-2-7b-hf"  # the paper's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SLOT_WORDS = 12       # theta_0 averages the LLM's likeliest words in theta's place
LOGIT_CHUNK = 4096    # target tokens with vocabulary logits at once
LENGTH_SPREAD = 0.09  # a block's shortest prompt is at most this much shorter than its longest
ACTIVATIONS = 40      # numbers that a layer keeps per token, in units of its width
RECORDED = ("lm", "dtype", "steps", "lr", "prior", "init", "mask", "history", "max_history",
            "tiny_sentences", "seed")  # what theta depends on


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--lm", default="auto", help="tiny (trained here), gpt2, llama2-7b (paper), a hub name or a folder; "
        "auto: tiny on the demo, llama2-7b on a GPU of 20 GiB, else gpt2")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: fp32, on cuda fp16 but for tiny")
    add("--steps", type=at_least(1), default=6, help="gradient steps a user")
    add("--lr", type=at_least(1e-12, float, 1e6), default=0.3,
        help="most that a coordinate moves in a step, in units of the slot's spread (paper: Adam's 0.001)")
    add("--prior", type=at_least(0, float), default=1.0, help="weight of the prior around theta_0 (paper: 0)")
    add("--init", choices=("slot", "random", "vocab"), default="slot",
        help="theta_0: the LLM's next words after x^m; noise (authors' code); mean of all words")
    add("--mask", choices=("strict", "causal"), default="strict", help="Fig. 4, or causality alone")
    add("--history", choices=("liked", "all", "rated"), default="liked", help="rows in y; rated adds + or -")
    add("--max-history", type=at_least(1), default=20, help="most titles of a user, the latest")
    add("--block-size", type=at_least(1), help="most users at once (default: as suits cache or memory)")
    add("--tiny-sentences", type=at_least(64), help="to train the tiny LM on (default: by items)")
    add("--users", type=Path, help="file of raw ids of new users, one a line: infer these alone")
    add("--fresh", action="store_true", help="forget unfinished runs and infer again")
    return parser.parse_args()


# -------- data: the prompt

@dataclass
class Segment:
    """A run of tokens. kind: begin, name, theta, task or history; profile: whose name or theta it is."""

    kind: str
    ids: list  # of a theta: [0], which holds its place
    profile: int | None = None


def prompt_segments(tokenizer, dataset):
    """Eq. (3): [x^1, theta^1, ..., x^M, theta^M, D_task], after the begin token where the LLM has one."""
    segments, first = [], tokenizer.encode("a")[0]
    if first == tokenizer.bos_token_id:
        segments.append(Segment("begin", [first]))  # Note: every token may see it; it tells nothing
    prompts = [profile["prompt"] for profile in dataset.profiles]
    *names, task = pieces_of(tokenizer, [*prompts, dataset.task_prompt])
    for m, ids in enumerate(names):
        segments += [Segment("name", ids, m), Segment("theta", [0], m)]
    return segments + [Segment("task", task)]


def build_positions(segments, mask):
    """Position of each token, (S,). Under the strict mask each profile restarts where the first begins:

        tokens      x^1 x^1 theta^1 x^2 theta^2 task task y
        positions    0   1     2     0     1     5    6   7

    Note: profiles are then exchangeable (Fig. 4: "independent of each other"). DEVIATION(3).
    """
    owners = [segment.profile for segment in segments for _ in segment.ids]
    positions = list(range(len(owners)))
    if mask == "strict":
        first = next(at for at, owner in enumerate(owners) if owner is not None)
        for at, owner in enumerate(owners):
            if owner is not None:
                positions[at] = first + owners[:at].count(owner)
    return torch.tensor(positions)


def build_visibility(segments, mask):
    """bool (S, S): may row i attend to column j? Fig. 4.

    Paper: "can only attend to their respective profile names and interactions". Note: theta stands
    before the interactions, so causality leaves the names; the interactions attend to theta.
    DEVIATION(2): x^m is cut off from other profiles too, else theta^1 reaches theta^2 through x^2.
    """
    owner = [segment for segment in segments for _ in segment.ids]  # the segment of each token
    visible = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()  # causality
    for row, own in enumerate(owner):
        if own.kind in ("name", "theta") and mask == "strict":
            for column, other in enumerate(owner[:row]):
                visible[row, column] = other.kind == "begin" or other.profile == own.profile
    return visible


def additive_mask(visible, dtype):
    """(1, 1, S, S): 0 where visible, else the dtype's lowest number (-inf makes NaN in some kernels)."""
    floats = torch.zeros(visible.shape, dtype=dtype)
    return floats.masked_fill(~visible, torch.finfo(dtype).min)[None, None]


# -------- data: the histories

def history_texts(dataset, splits, settings):
    """Per user: texts of his latest rows of these splits, oldest first; ' A Title;' or, rated, ' A Title +;'.

    DEVIATION(9): the paper does not say which interactions y holds, and takes a data point a user-item
    pair; here a user is one data point and y what he liked.
    """
    marks = (" -", " +") if settings.history == "rated" else ("", "")  # of a dislike and a like
    titles = [[f" {item['title']}{mark};" for mark in marks] for item in dataset.items]
    texts = [[] for _ in dataset.users]
    for user, item, label in dataset.rows(splits).tolist():
        if label or settings.history != "liked":
            texts[user].append(titles[item][label])
    return [lines[-settings.max_history:] for lines in texts]


def tokenize_histories(tokenizer, texts, room):
    """Per user an int32 array of token ids: the newest titles that fit whole into `room` tokens."""
    distinct = sorted({text for lines in texts for text in lines})
    ids_of = dict(zip(distinct, pieces_of(tokenizer, distinct)))
    histories = []
    for lines in texts:
        used = np.cumsum([len(ids_of[text]) for text in reversed(lines)])
        dropped = len(lines) - sum(used <= room)
        ids = [token for text in lines[dropped:] for token in ids_of[text]]
        histories.append(np.array(ids, dtype=np.int32))
    return histories


def make_blocks(histories, block_size, token_budget, prompt_length):
    """Users with a history, in blocks of at most block_size users, or if None of token_budget tokens.

    Padding stays below LENGTH_SPREAD. Longest first: if memory does not suffice, it shows at once.
    """
    blocks, longest = [], math.inf  # the first one opens a block
    solvable = [user for user, ids in enumerate(histories) if len(ids)]
    for user in sorted(solvable, key=lambda user: -len(histories[user])):
        length = prompt_length + len(histories[user])
        shorter = length < (1 - LENGTH_SPREAD) * longest
        if shorter or len(blocks[-1]) >= (block_size or token_budget // longest):
            blocks.append([])
            longest = length
        blocks[-1].append(user)
    return blocks


def token_budget_of(likelihood):
    """Tokens a block: what keeps a layer in a CPU's cache, or half of a GPU's memory beside the LLM."""
    width, size = likelihood.words.weight.shape[1], likelihood.words.weight.element_size()
    if likelihood.device.type == "cpu":
        return max(768, 2_400_000 // (width * size))
    # Note: of all memory, not of what is free: a run that goes on must cut the same blocks.
    memory = torch.cuda.get_device_properties(likelihood.device).total_memory
    room = memory - size * count_parameters(likelihood.model)
    return max(2048, room // 2 // (ACTIVATIONS * width * likelihood.model.config.num_hidden_layers * size))


def pad(histories, users, device):
    """(ids (B, H), lengths (B,)) of these users; padded with 0 on the right, where no token looks."""
    rows = [torch.from_numpy(histories[user]).long() for user in users]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths


# -------- model

class TokenNLL(torch.autograd.Function):
    """-log softmax(hidden W^T + b)[target] per token, with `chunk` rows of vocabulary logits at a time.

    The gradient of hidden, (softmax - onehot) W, is made on the way forward while the logits are there.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = nn.functional.linear(hidden[rows], weight, bias).float()  # Shape: (chunk, words)
            log_normalizer = logits.logsumexp(1, keepdim=True)
            nll[rows] = (log_normalizer - logits.gather(1, targets[rows, None])).squeeze(1)
            if gradient is not None:
                error = logits.sub_(log_normalizer).exp_()  # softmax
                error[torch.arange(len(error), device=error.device), targets[rows]] -= 1
                gradient[rows] = error.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx, upstream):
        gradient, = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None, None


class ProfileLikelihood:
    """Eq. (4): -log P_LLM(y | x^1, theta^1, ..., x^M, theta^M, D_task) per user, summed over y's tokens.

    segments: the prompt without y. This one list gives embeddings, mask, positions and targets.
    """

    def __init__(self, model, segments, mask="strict", chunk=LOGIT_CHUNK):
        self.model, self.segments, self.mask, self.chunk = model, segments, mask, chunk
        self.body, self.head = model.base_model, model.get_output_embeddings()
        self.words = model.get_input_embeddings()
        self.dtype, self.device = self.words.weight.dtype, self.words.weight.device
        self.prompt_length = sum(len(segment.ids) for segment in segments)
        self.room = getattr(model.config, "max_position_embeddings", 4096) - self.prompt_length  # for y
        self.profiles = sum(segment.kind == "theta" for segment in segments)
        self.loss_scale = 1024.0 if self.dtype == torch.float16 else 1.0  # against underflow in the LLM
        self.layout = functools.lru_cache(1)(self.layout)  # the same for all steps of a block

    def layout(self, history_length):
        """(additive mask (1, 1, S, S), positions (1, S)) for a history of this many tokens."""
        full = self.segments + [Segment("history", [0] * history_length)]
        mask = additive_mask(build_visibility(full, self.mask), self.dtype)
        return mask.to(self.device), build_positions(full, self.mask)[None].to(self.device)

    def embeddings(self, theta, history_ids):
        """theta (B, M, d) fp32, history_ids (B, H) -> (B, S, d) in the LLM's dtype."""
        parts = []
        for segment in self.segments:
            if segment.kind == "theta":
                parts.append(theta[:, segment.profile, None].to(self.dtype))  # Shape: (B, 1, d)
            else:
                ids = torch.tensor(segment.ids, device=self.device)
                parts.append(self.words(ids).expand(len(theta), -1, -1))      # Shape: (B, tokens, d)
        return torch.cat(parts + [self.words(history_ids)], dim=1)

    def hidden(self, theta, history_ids):
        """Last hidden states (B, S, d)."""
        mask, positions = self.layout(history_ids.shape[1])
        return self.body(inputs_embeds=self.embeddings(theta, history_ids), attention_mask=mask,
                         position_ids=positions, use_cache=False).last_hidden_state

    def __call__(self, theta, history_ids, lengths):
        """NLL in nats, float32 (B,). theta (B, M, d), history_ids (B, H) right-padded, lengths (B,)."""
        # The state before each history token predicts it. Shape: (B, H, d)
        states = self.hidden(theta, history_ids)[:, self.prompt_length - 1:-1]
        real = torch.arange(history_ids.shape[1], device=self.device) < lengths[:, None]  # Shape: (B, H)
        nll = TokenNLL.apply(states[real], self.head.weight, self.head.bias, history_ids[real], self.chunk)
        return torch.zeros(len(theta), device=self.device).index_add(0, real.nonzero()[:, 0], nll)

    @torch.no_grad()
    def next_word(self, m):
        """The LLM's distribution over the word after x^m alone: float32 (vocabulary,)."""
        ids = [token for segment in self.segments for token in segment.ids
               if segment.kind == "begin" or (segment.kind == "name" and segment.profile == m)]
        return self.model(torch.tensor([ids], device=self.device)).logits[0, -1].float().softmax(0)


@torch.no_grad()
def check_head(likelihood):
    """Raise UserError if the LLM does more to its hidden states than its output layer."""
    ids = torch.arange(4, device=likelihood.device)[None]
    plain = likelihood.head(likelihood.body(ids).last_hidden_state)
    if not torch.allclose(plain.float(), likelihood.model(ids).logits.float(), atol=1e-2, rtol=1e-2):
        raise UserError("this LLM rescales its logits", likelihood.model.config.model_type, "change --lm")


@torch.no_grad()
def starting_point(likelihood, init, generator):
    """(theta_0 (M, d), spread (M,)): where the search starts and the unit of its steps and of the prior.

    slot: probability-weighted mean and spread (root mean squared deviation a coordinate) of the words
    the LLM expects after x^m; vocab: mean of all words; random: U(-.1, .1). The spread is always the slot's.
    """
    words = likelihood.words.weight.float()
    start, spread = [], []
    for m in range(likelihood.profiles):
        probability, index = likelihood.next_word(m).topk(SLOT_WORDS)
        probability = (probability / probability.sum())[:, None]
        mean = (probability * words[index]).sum(0)
        spread.append((probability * (words[index] - mean) ** 2).sum(0).mean().sqrt().clamp(min=1e-6))
        start.append(mean)
    start = torch.stack(start)
    if init == "vocab":
        start = words.mean(0).expand_as(start)
    elif init == "random":
        start = torch.from_numpy(generator.uniform(-0.1, 0.1, start.shape)).to(start)
    return start, torch.stack(spread)


# -------- loss and train

def descend(likelihood, start, spread, ids, lengths, args):
    """Minimise Eq. (4) and the prior: (theta fp32 (B, M, d), NLL before each step (steps, B)).

    ids (B, H), lengths (B,). Gradient descent whose step size is each user's own: one over the curvature
    along his last step (Barzilai and Borwein 1988). It is taken as no less than the prior's, nor than what
    keeps every coordinate's move within --lr.
    """
    # theta = theta_0 + spread * z. Shape: (B, M, d)
    z = torch.zeros(len(ids), *start.shape, device=likelihood.device)
    move, before, path = torch.zeros_like(z), torch.zeros_like(z), []
    for _ in range(args.steps):
        z.requires_grad_()
        nll = likelihood(start + spread[:, None] * z, ids, lengths)  # Eq. (4), Shape: (B,)
        # DEVIATION(4): l = l_llm + prior / 2 * ||theta - theta_0||^2 / spread^2; the paper has prior = 0.
        loss = nll + args.prior / 2 * (z ** 2).sum((1, 2))
        scale = likelihood.loss_scale  # cancels in gradient / curvature
        gradient, = torch.autograd.grad(scale * loss.sum(), z)
        # Shape of curvature and of its least value: (B, 1, 1)
        least = (gradient.abs().amax((1, 2), keepdim=True) / args.lr).clamp(min=scale * args.prior + 1e-30)
        curvature = (move * (gradient - before)).sum((1, 2), keepdim=True) / \
            (move ** 2).sum((1, 2), keepdim=True)
        move, before = -gradient / curvature.fmax(least), gradient  # fmax drops the first step's 0 / 0
        path.append(nll.detach())
        z = (z + move).detach()
    return start + spread[:, None] * z, torch.stack(path)


def infer_block(likelihood, start, spread, histories, users, args):
    """{theta fp32 (B, M, d), nll [steps + 1] summed over users, tokens, seconds}. UserError if not finite."""
    clock = time.perf_counter()
    ids, lengths = pad(histories, users, likelihood.device)
    theta, path = descend(likelihood, start, spread, ids, lengths, args)
    with torch.no_grad():
        path = torch.cat([path, likelihood(theta, ids, lengths)[None]])
    outcome = path[-1] + theta.sum((1, 2))  # finite only if both are
    bad = [str(user) for user, value in zip(users, outcome.tolist()) if not math.isfinite(value)]
    if bad:
        raise UserError(f"theta is not finite for users {', '.join(bad[:5])} of users.json",
                        f"--lr {args.lr}, {likelihood.dtype}", "lower --lr or take --dtype bf16 or fp32")
    return {"theta": theta.cpu(), "nll": path.cpu().numpy().sum(axis=1, dtype=np.float64).tolist(),
            "tokens": int(lengths.sum()), "seconds": time.perf_counter() - clock}


def solve(work, blocks, likelihood, start, spread, histories, args):
    """Infer every block that has no file yet in `work`; processes share the blocks."""
    do_all([(work / f"{number:06d}.pt", infer_block, likelihood, start, spread, histories, users, args)
            for number, users in enumerate(blocks)], "inferring", "block", likelihood.device)


# -------- evaluate

@torch.no_grad()
def heldout_nll(likelihood, theta, population, histories, solved, rng):
    """Nats per token of validation titles under own, mean and another user's theta; None without titles."""
    ring = rng.permutation(solved).tolist()
    neighbour = dict(zip(ring, ring[-1:] + ring[:-1]))
    histories = [ids if user in neighbour else ids[:0] for user, ids in enumerate(histories)]
    total, tokens = {}, 0
    for block in make_blocks(histories, None, token_budget_of(likelihood), likelihood.prompt_length):
        ids, lengths = pad(histories, block, likelihood.device)
        tokens += int(lengths.sum())
        variants = {"own": theta[block], "population": np.stack([population] * len(block)),
                    "shuffled": theta[[neighbour[user] for user in block]]}
        for name, vectors in variants.items():
            nll = likelihood(torch.tensor(vectors, device=likelihood.device), ids, lengths)
            total[name] = total.get(name, 0.0) + nll.double().sum().item()
    return {name: value / tokens for name, value in total.items()} or None


def show_users(dataset, theta, texts, solved, likelihood, tokenizer):
    """Histories beside the four words of the vocabulary nearest to each theta by cosine [Table 5]."""
    words = nn.functional.normalize(likelihood.words.weight.float(), dim=1)
    for user in solved[:: max(1, len(solved) // 3)][:3]:
        print(f"user {dataset.users[user]}:{''.join(texts[user][-6:])[:150]}")
        for profile, vector in zip(dataset.profiles, torch.tensor(theta[user], device=words.device)):
            nearest = tokenizer.batch_decode((words @ vector).topk(4).indices[:, None])
            print(f"    {profile['name']:12s} {' | '.join(map(str.strip, nearest))}")


# -------- here the method ends; opening the LLM

def open_model(dataset, args, device, length):
    """(likelihood, tokenizer, the tiny LM's facts or None); fills in args.lm and args.dtype.

    length: most titles of a history, for the tiny LM's training; None: it must be there.
    """
    cuda = device.type == "cuda"
    if args.lm == "auto":
        roomy = cuda and torch.cuda.get_device_properties(device).total_memory >= 20 * 2**30
        args.lm = "tiny" if dataset.name == "demo" else "llama2-7b" if roomy else "gpt2"
        print(f"--lm auto chose {args.lm}")
    if args.dtype == "auto":
        args.dtype = "fp16" if cuda and args.lm != "tiny" else "fp32"
    name = {"tiny": args.run / "lm-tiny", "llama2-7b": LLAMA}.get(args.lm, args.lm)
    if args.lm != "tiny" and not Path(name).is_dir():
        print(f"loading {name}: a download (gpt2 0.5 GB, llama2-7b 13.5 GB) unless in the cache")
    if args.lm == "tiny" and length and RANK == 0:
        train_tiny(dataset, name, length, args)
    wait_for_all()  # the others load what the first process made
    tiny = load(args.run, "lm-tiny/tiny.json", ("fingerprint", "sensitivity")) if args.lm == "tiny" else None
    model, tokenizer = load_language_model(str(name), DTYPES[args.dtype], device)
    likelihood = ProfileLikelihood(model, prompt_segments(tokenizer, dataset), args.mask)
    check_head(likelihood)
    return likelihood, tokenizer, tiny


# -------- save

def rows_that_stay(run, dataset, settings, path):
    """--users: (old theta (n, M, d), {user: his row in it}, the users of the file who have none)."""
    facts, old = load(run, "profiles.json", (*settings, "fingerprint")), load(run, "profiles.npy")
    owners = load(run, "profiles_users.json", ("users", "inferred"))
    changed = [key for key in settings if key != "dataset_fingerprint" and facts[key] != settings[key]]
    if changed:  # lm_fingerprint is among them
        raise UserError(f"profiles.npy was made with other settings ({', '.join(changed)})", run,
                        "give those of the first run")
    check_same(run, "profiles.npy", "profiles.json", fingerprint(old), facts["fingerprint"])
    index = {raw: user for user, raw in enumerate(dataset.users)}
    asked = set(map(str.strip, path.read_text("utf-8", errors="replace").splitlines())) - {""}
    strangers = sorted(asked - index.keys())
    if strangers:
        raise UserError(f"{len(strangers)} users are not in the data set, the first is '{strangers[0]}'",
                        path, "run 01 again with their rows")
    rows = {index[raw]: row for row in owners["inferred"] if (raw := owners["users"][row]) in index}
    return old, rows, {index[raw] for raw in asked} - rows.keys()


def gather(work, blocks, old, rows, shape):
    """Write work/profiles.npy from the blocks, one in memory at a time, and the rows that stay.

    Returns (mean theta (M, d), users with a theta, sums over the blocks). Who has none holds the mean.
    """
    total, sums = np.zeros(shape[1:]), {"nll": np.zeros(1), "tokens": 0, "seconds": 0.0}
    for stale in work.glob(".profiles.npy.*"):  # of a process killed here
        stale.unlink()
    with atomic(work / "profiles.npy") as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        begin = file.tell()

        def write(user, theta):  # Note: a memory map has no way to say that the disk is full
            file.seek(begin + user * theta.nbytes)
            file.write(theta.tobytes())
            return theta

        for user, row in rows.items():
            total += write(user, old[row])
        for number, users in enumerate(blocks):
            part = load(work, f"{number:06d}.pt")
            for user, theta in zip(users, part["theta"].numpy()):
                total += write(user, theta)
            sums = {key: value + np.array(part[key]) for key, value in sums.items()}
        known = sorted([*rows, *chain(*blocks)])
        mean = (total / len(known)).astype(np.float32)
        for user in np.setdiff1d(np.arange(shape[0]), known).tolist():
            write(user, mean)
    return mean, known, sums


FILES = ("profiles.npy", "profiles_users.json", "profiles.json")  # the last vouches for the others


def publish(work, run):
    """Move a finished run into place; a second call makes good a kill in between."""
    if (work / FILES[-1]).exists():
        for part in work.glob("*.pt"):
            part.unlink()
        for name in FILES:
            if (work / name).exists():
                os.replace(work / name, run / name)
        shutil.rmtree(work)


# -------- main

def infer(dataset, likelihood, tokenizer, tiny, texts, histories, args):
    """All users, or with --users those who are new. The first process saves and reports."""
    rng = seeded(args.seed, 3)  # the second number tells a run's random streams apart
    start, spread = starting_point(likelihood, args.init, rng)
    settings = {key: getattr(args, key) for key in RECORDED} | {
        "dataset_fingerprint": dataset.fingerprint(), "lm_fingerprint": tiny and tiny["fingerprint"],
        "profiles": dataset.profiles}
    old, rows = None, {}
    if args.users:
        old, rows, missing = rows_that_stay(args.run, dataset, settings, args.users)  # others: no history
        histories = [ids if user in missing else ids[:0] for user, ids in enumerate(histories)]
    elif not args.fresh and all((args.run / name).exists() for name in FILES):
        facts = load(args.run, "profiles.json")
        if all(facts.get(key) == value for key, value in (settings | {"rows_kept": 0}).items()):
            return print("profiles.npy was made with these settings: nothing to do (--fresh infers again)")
    blocks = make_blocks(histories, args.block_size, token_budget_of(likelihood), likelihood.prompt_length)
    work = args.run / f"blocks-{fingerprint(settings, blocks, list(rows))[:12]}"
    solve(work, blocks, likelihood, start, spread, histories, args)
    wait_for_all()  # else the first process would publish while another still writes a block
    if RANK > 0:
        return
    mean, known, sums = gather(work, blocks, old, rows, (len(texts), *start.shape))
    theta = load(work, "profiles.npy")
    validation = tokenize_histories(tokenizer, history_texts(dataset, VALIDATION, args), likelihood.room)
    heldout = heldout_nll(likelihood, theta, mean, validation, known, rng)
    steps = (sums["nll"] / max(1, sums["tokens"])).tolist()
    worked = (sums["tokens"] + sum(map(len, blocks)) * likelihood.prompt_length) * args.steps
    speed, lost = round(worked / max(sums["seconds"], 1e-9)), tiny and tiny["sensitivity"]
    save_json(work / "profiles_users.json", {"users": dataset.users, "inferred": known})
    save_json(work / "profiles.json", settings | {
        "spread": spread.tolist(), "rows_kept": len(rows), "lm_sensitivity": lost,
        "users_without_history": len(theta) - len(known), "heldout_nll": heldout,
        "train_nll": {"before": steps[0], "after": steps[-1]}, "train_nll_steps": steps,
        "tokens_per_second": speed, "seconds": round(sums["seconds"], 1),
        "peak_memory_mb": peak_memory_mb(likelihood.device), "fingerprint": fingerprint(theta)})
    publish(work, args.run)
    print(f"\ntrain NLL per token {steps[0]:.4f} -> {steps[-1]:.4f}; {speed:,d} tokens x steps/s")
    for what, values in (("validation NLL per token", heldout), ("tiny LM, loss under a wrong word", lost)):
        if values:
            print(f"{what}:", ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    show_users(dataset, theta, texts, known, likelihood, tokenizer)
    print(f"\nwrote {' '.join(FILES)} to {args.run}")


def main():
    args = parse_arguments()
    dataset, device = load_dataset(args.run), pick_device(args.device)
    for work in args.run.glob("blocks-*") if RANK == 0 else ():
        publish(work, args.run)  # if its process was killed at the very end
        if args.fresh or not any(work.glob("*.pt")):
            shutil.rmtree(work, ignore_errors=True)
        else:
            print(f"unfinished: {work} goes on with its flags, --fresh forgets it")
    wait_for_all()
    texts = history_texts(dataset, SEEN, args)
    longest = max(map(len, history_texts(dataset, TRAIN, args)))
    if not longest:
        raise UserError("no user has a training history", f"--history {args.history}",
                        "take --history all or more data")
    likelihood, tokenizer, tiny = open_model(dataset, args, device, None if args.users else longest)
    histories = tokenize_histories(tokenizer, texts, likelihood.room)
    if not any(map(len, histories)):
        raise UserError("no title fits into the LLM's window", args.lm, "change --lm")
    if RANK == 0:
        announce("02 infer profiles", args, "stage 01's files")
        size = len(texts) * likelihood.profiles * likelihood.words.weight.shape[1]
        print(f"parameters: theta {size:,d} trainable, LLM {count_parameters(likelihood.model):,d} frozen")
    infer(dataset, likelihood, tokenizer, tiny, texts, histories, args)
    if RANK == 0:
        print(f"next: python 03_quantize.py --run {args.run}")


if __name__ == "__main__":
    guarded(main)
