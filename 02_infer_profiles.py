"""Stage 02: infer latent profiles of users as soft tokens of a frozen LLM. Paper: section 2.3, Eq. (2)-(4).

A user's prompt is an ordered list of segments (Eq. 3, then the text to be made likely):

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

import contextlib
import functools
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
    count_parameters, do_all, fingerprint, guarded, lm_fingerprint, load, load_dataset, load_language_model,
    once, peak_memory_mb, pick_device, pieces_of, progress, save_json, seeded, train_tiny, wait_for_all)

# -------- settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SLOT_WORDS = 12  # the start averages the LLM's likeliest words in theta's place
LOGIT_CHUNK = 4096  # target tokens with vocabulary logits at once
POPULATION_STEPS, POPULATION_USERS = 40, 64  # of the theta that all share; users a step
LENGTH_SPREAD = 0.09  # a block's shortest prompt is at most so much below its longest
ACTIVATIONS = 40  # numbers a layer keeps per token, in units of its width
RECORDED = ("lm", "dtype", "steps", "lr", "prior", "init", "mask", "history", "max_history",
            "tiny_sentences", "seed")  # what theta depends on


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--lm", default="auto", help="tiny (trained here), gpt2, llama2-7b (paper), hub name or folder; "
        "auto: tiny on the demo, llama2-7b on a GPU of 20 GiB, else gpt2")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: fp32, on cuda fp16 but for tiny")
    add("--steps", type=at_least(1), default=6, help="gradient steps a user")
    add("--lr", type=at_least(1e-12, float, 1e6), default=0.3,
        help="most a coordinate moves in a step, in units of the slot's spread (paper: Adam's 0.001)")
    add("--prior", type=at_least(0, float, 1e6), default=1.0, help="weight of theta's prior (paper: 0)")
    add("--init", choices=("slot", "random", "vocab"), default="slot",
        help="start: the LLM's next words after x^m; noise (authors' code); mean of all words")
    add("--mask", choices=("strict", "causal"), default="strict", help="Fig. 4, or causality alone")
    add("--history", choices=("liked", "all", "rated"), default="liked", help="rows in y; rated adds + or -")
    add("--max-history", type=at_least(1), default=20, help="most titles of a user, the latest")
    add("--block-size", type=at_least(1), help="most users at once (default: by cache or memory)")
    add("--tiny-sentences", type=at_least(64), help="to train the tiny LM on (default: by items)")
    add("--users", type=Path, help="file of new users' raw ids, one a line: infer these alone")
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
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[None, None]


# -------- data: the histories

def history_texts(dataset, splits, settings):
    """Per user: texts of his latest rows of these splits, oldest first; ' A Title;' or, rated, ' A Title +;'.

    DEVIATION(9): the paper does not say which interactions y holds; its data point is a user-item pair,
    here it is a user, with what he liked as y.
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
    distinct = sorted(set(chain(*texts)))
    ids_of = dict(zip(distinct, pieces_of(tokenizer, distinct)))
    histories = []
    for lines in texts:
        used = np.cumsum([len(ids_of[text]) for text in lines[::-1]])
        dropped = len(lines) - sum(used <= room)
        histories.append(np.array([token for text in lines[dropped:] for token in ids_of[text]], np.int32))
    return histories


def make_blocks(histories, block_size, token_budget, prompt_length):
    """Users with a history, in blocks of at most block_size users, or if None of token_budget tokens.

    Padding stays below LENGTH_SPREAD. Longest first: too little memory shows at once.
    """
    blocks, longest = [], np.inf  # the first one opens a block
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
    width, size = likelihood.words.weight.shape[1], likelihood.dtype.itemsize
    if likelihood.device.type == "cpu":
        return max(768, 2_400_000 // (width * size))
    # Note: not of the free memory: a run that goes on must cut the same blocks.
    room = torch.cuda.get_device_properties(likelihood.device).total_memory
    room -= size * count_parameters(likelihood.model)
    return max(2048, room // 2 // (ACTIVATIONS * width * likelihood.model.config.num_hidden_layers * size))


def pad(histories, users, device):
    """(ids (B, H), lengths (B,)) of these users; padded with 0 on the right, where no token looks."""
    rows = [torch.from_numpy(histories[user]).long() for user in users]
    lengths = torch.tensor(list(map(len, rows)), device=device)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths


# -------- model

class TokenNLL(torch.autograd.Function):
    """-log softmax(hidden W^T + b)[target] per token, `chunk` rows of logits at a time.

    The gradient of hidden, (softmax - onehot) W, is made in forward(), while the logits are there.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
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


class ScaledGradient(torch.autograd.Function):
    """nll(theta) (B,) of an fp16 LLM; its gradient is scaled up unless it overflows."""

    @staticmethod
    def forward(ctx, theta, nll):
        ctx.theta = theta.detach().requires_grad_(theta.requires_grad)
        with torch.enable_grad():
            ctx.nll = nll(ctx.theta)
        return ctx.nll.detach()

    @staticmethod
    def backward(ctx, upstream):
        for scale in (64.0, 1.0):  # at 1024 Llama-2-7B's shape overflows
            weight = torch.full_like(upstream, scale)
            gradient, = torch.autograd.grad(ctx.nll, ctx.theta, weight, retain_graph=True)
            if gradient.isfinite().all():
                break
        del ctx.nll  # frees the LLM's graph
        return gradient * (upstream / scale)[:, None, None], None


class ProfileLikelihood:
    """Eq. (4): -log P_LLM(y | x^1, theta^1, ..., x^M, theta^M, D_task) per user, summed over y's tokens.

    segments: the prompt without y; it alone gives embeddings, mask, positions and targets.
    """

    def __init__(self, model, segments, mask="strict", chunk=LOGIT_CHUNK):
        self.model, self.segments, self.mask, self.chunk = model, segments, mask, chunk
        self.body, self.head = model.base_model, model.get_output_embeddings()
        self.words = model.get_input_embeddings()
        self.dtype, self.device = self.words.weight.dtype, self.words.weight.device
        self.prompt_length = sum(len(segment.ids) for segment in segments)
        limits = "max_position_embeddings", "sliding_window", "window_size"  # which a 4-D mask would lift
        self.room = min(getattr(model.config, key, None) or 4096 for key in limits) - self.prompt_length
        self.profiles = sum(segment.kind == "theta" for segment in segments)
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
                parts.append(self.words(ids).expand(len(theta), -1, -1))  # Shape: (B, tokens, d)
        return torch.cat(parts + [self.words(history_ids)], dim=1)

    def vectors(self, ids=None):
        """float32 embeddings (n, d) of these words or of all. Note: some LLMs scale them after the table."""
        everything = torch.arange(len(self.words.weight), device=self.device)
        return self.words(everything if ids is None else ids).float()

    def hidden(self, theta, history_ids):
        """Last hidden states (B, S, d)."""
        mask, positions = self.layout(history_ids.shape[1])
        return self.body(inputs_embeds=self.embeddings(theta, history_ids), attention_mask=mask,
                         position_ids=positions, use_cache=False).last_hidden_state

    def __call__(self, theta, history_ids, lengths):
        """NLL in nats, float32 (B,). theta (B, M, d), history_ids (B, H) right-padded, lengths (B,)."""
        real = torch.arange(history_ids.shape[1], device=self.device) < lengths[:, None]  # Shape: (B, H)

        def nll(theta):
            # The state before each history token predicts it. Shape: (B, H, d)
            states = self.hidden(theta, history_ids)[:, self.prompt_length - 1:-1]
            nll = TokenNLL.apply(
                states[real], self.head.weight, self.head.bias, history_ids[real], self.chunk)
            return nll.new_zeros(len(theta)).index_add(0, real.nonzero()[:, 0], nll)

        return ScaledGradient.apply(theta, nll) if self.dtype == torch.float16 else nll(theta)

    @torch.no_grad()
    def next_word(self, m):
        """The LLM's distribution over the word after x^m alone: float32 (vocabulary,)."""
        ids = [token for segment in self.segments for token in segment.ids
               if segment.kind == "begin" or (segment.kind == "name" and segment.profile == m)]
        return self.model(torch.tensor([ids], device=self.device)).logits[0, -1].float().softmax(0)


@torch.no_grad()
def starting_point(likelihood, init, generator):
    """(start (M, d), spread (M,)): where fit_population starts; the unit of steps and of the prior.

    slot: probability-weighted mean and spread (root mean squared deviation a coordinate) of the words
    the LLM expects after x^m; vocab: mean of all words; random: U(-.1, .1). The spread is always the slot's.
    """
    words, start, spread = likelihood.vectors(), [], []
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

def fit_population(likelihood, start, spread, histories, args):
    """The one theta (M, d) for all users: each starts there, with his prior around it, so that he wins
    only by what is his own: empirical Bayes, DEVIATION(4). Adam from start (M, d), some users a step."""
    rng, z = np.random.default_rng(args.seed), torch.zeros_like(start).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, POPULATION_STEPS)
    known, budget = [ids for ids in histories if len(ids)], token_budget_of(likelihood)
    for _ in progress(range(POPULATION_STEPS), "population", "step"):
        chosen = rng.choice(len(known), min(POPULATION_USERS, len(known)), replace=False)
        some = [known[at] for at in chosen]
        optimizer.zero_grad()
        for block in make_blocks(some, args.block_size, budget, likelihood.prompt_length):
            theta = (start + spread[:, None] * z).expand(len(block), -1, -1)
            nll = likelihood(theta, *pad(some, block, likelihood.device))
            nll.sum().backward()
        optimizer.step()
        schedule.step()
    return (start + spread[:, None] * z).detach().cpu()


def descend(likelihood, start, spread, ids, lengths, args):
    """Minimise Eq. (4) and the prior: (theta fp32 (B, M, d), NLL before each step (steps, B)).

    ids (B, H), lengths (B,). Gradient descent whose step size is each user's own: one over the curvature
    along his last step (Barzilai and Borwein 1988), taken as no less than the prior's, nor than what
    keeps every coordinate's move within --lr.
    """
    # theta = theta_0 + spread * z. Shape: (B, M, d)
    z, path = start.new_zeros(len(ids), *start.shape), []
    move = before = torch.zeros_like(z)
    for _ in range(args.steps):
        z.requires_grad_()
        nll = likelihood(start + spread[:, None] * z, ids, lengths)  # Eq. (4), Shape: (B,)
        # DEVIATION(4): l = l_llm + prior / 2 * ||theta - theta_0||^2 / spread^2; the paper has prior = 0.
        loss = nll + args.prior / 2 * (z ** 2).sum((1, 2))
        gradient, = torch.autograd.grad(loss.sum(), z)
        # Shape of curvature and least: (B, 1, 1)
        least = (gradient.abs().amax((1, 2), keepdim=True) / args.lr).clamp(min=args.prior + 1e-30)
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
    finite = (path[-1] + theta.sum((1, 2))).isfinite().tolist()  # only if both are
    bad = [str(user) for user, good in zip(users, finite) if not good]
    if bad:
        raise UserError(f"theta is not finite for users {', '.join(bad[:5])}",
                        f"--lr {args.lr}, {likelihood.dtype}", "lower --lr or take --dtype bf16 or fp32")
    return {"theta": theta.cpu(), "nll": path.cpu().numpy().sum(1, dtype=np.float64).tolist(),
            "tokens": int(lengths.sum()), "seconds": time.perf_counter() - clock}


def solve(work, blocks, likelihood, start, spread, histories, args):
    """Infer what has no file yet in `work`: the population's theta, then blocks, which processes share."""
    if RANK == 0:
        once(work / "population.pt", fit_population, likelihood, start, spread, histories, args)
    wait_for_all()
    start = load(work, "population.pt").to(likelihood.device)
    do_all([(work / f"{number:06d}.pt", infer_block, likelihood, start, spread, histories, users, args)
            for number, users in enumerate(blocks)], "inferring", "block", likelihood.device)


# -------- evaluate

@torch.no_grad()
def heldout_nll(likelihood, theta, population, histories, solved, rng):
    """Nats per token of validation titles under own, shared and another user's theta; None without titles."""
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


# -------- here the method ends; opening the LLM

@torch.no_grad()
def find_flaw(likelihood):
    """What this LLM does that the method cannot have, or None: not every architecture obeys a 4-D mask."""
    ids = torch.arange(4, device=likelihood.device)[None]
    plain = likelihood.head(likelihood.body(ids).last_hidden_state)
    if not torch.allclose(plain.float(), likelihood.model(ids).logits.float(), 0.01, 0.01, equal_nan=True):
        return "this LLM rescales its logits"
    kinds = [segment.kind for segment in likelihood.segments for _ in segment.ids]
    theta = likelihood.vectors(ids[0, :1]).repeat(1, likelihood.profiles, 1)
    states, visible = likelihood.hidden(theta, ids), likelihood.layout(4)[0][0, 0] == 0
    first, last = theta.clone(), ids.clone()
    first[:, 0, 0] += 1
    last[0, -1] += 1
    for column, changed in ((kinds.index("theta"), (first, ids)), (-1, (theta, last))):
        change = (likelihood.hidden(*changed) - states).abs()
        noticed = (change > 9 * torch.finfo(change.dtype).eps * states.abs().max()).any(2)[0]
        if (noticed & ~visible[:, column]).any():
            return "this LLM sees through the mask"


def open_model(dataset, args, device, length):
    """(likelihood, tokenizer, {fingerprint, sensitivity} of the LLM); fills in args.lm and args.dtype.

    length: a history's most titles, to train the tiny LM; None: it must be there.
    """
    cuda = device.type == "cuda"
    if args.lm == "auto":
        roomy = cuda and torch.cuda.get_device_properties(device).total_memory >= 20 * 2**30
        args.lm = "tiny" if dataset.name == "demo" else "llama2-7b" if roomy else "gpt2"
        print(f"--lm auto chose {args.lm}")
    tiny = args.lm == "tiny"
    if args.dtype == "auto":
        args.dtype = "fp16" if cuda and not tiny else "fp32"
    name = {"tiny": args.run / "lm-tiny", "llama2-7b": "meta-llama/Llama-2-7b-hf"}.get(args.lm, args.lm)
    if tiny and length and RANK == 0:
        train_tiny(dataset, name, length, args)
    wait_for_all()  # the others load what the first made
    facts = load(args.run, "lm-tiny/tiny.json", ("sensitivity",)) if tiny else {}
    if not Path(name).is_dir():
        print(f"loading {name}: unless cached, a download (gpt2 0.5 GB, llama2-7b 13.5 GB)")
    model, tokenizer = load_language_model(str(name), DTYPES[args.dtype], device)
    likelihood = ProfileLikelihood(model, prompt_segments(tokenizer, dataset), args.mask)
    likelihood.layout(4)  # a bug in your mask or positions shows here
    try:
        flaw = find_flaw(likelihood) if likelihood.room > 4 else "no title fits into the LLM's window"
    except Exception as error:  # it takes no embeddings, mask or positions
        flaw = f"this LLM cannot read the prompt: {error!r:.150}"
    if flaw:
        raise UserError(flaw, model.config.model_type, "change --lm")
    lm = {"fingerprint": lm_fingerprint(model, tokenizer), "sensitivity": facts.get("sensitivity")}
    return likelihood, tokenizer, lm


# -------- save

def read_profiles(run):
    """profiles.json, profiles.npy (U, M, d) and profiles_users.json; UserError unless they are of one run."""
    keys = (*RECORDED, "dataset_fingerprint", "lm_fingerprint", "profiles", "start", "spread", "rows_kept",
            "train_tokens", "train_nll_steps", "seconds", "fingerprint", "users_fingerprint")
    facts, theta = load(run, "profiles.json", keys), load(run, "profiles.npy")
    owners = load(run, "profiles_users.json", ("users", "inferred"))
    check_same(run, "profiles.npy", "profiles.json", fingerprint(theta), facts["fingerprint"])
    check_same(run, "profiles_users.json", "profiles.json", fingerprint(owners), facts["users_fingerprint"])
    return facts, theta, owners


def rows_that_stay(run, dataset, settings, path):
    """--users: (old facts, old theta (n, M, d), {user: his row in it}, users of the file who have none)."""
    facts, old, owners = read_profiles(run)
    changed = [key for key in settings if key != "dataset_fingerprint" and facts[key] != settings[key]]
    if changed:
        raise UserError(f"profiles.npy has other settings ({', '.join(changed)})", run, "use the first run's")
    index = {raw: user for user, raw in enumerate(dataset.users)}
    asked = set(map(str.strip, path.read_text("utf-8-sig", errors="replace").splitlines())) - {""}
    strangers = sorted(asked - index.keys())
    if strangers:
        raise UserError(f"{len(strangers)} users are not in the data set, the first is '{strangers[0]}'",
                        path, "run 01 with their rows")
    rows = {index[raw]: row for row in owners["inferred"] if (raw := owners["users"][row]) in index}
    return facts, old, rows, {index[raw] for raw in asked} - rows.keys()


def gather(work, blocks, old, rows, start, n_users, before):
    """Write work/profiles.npy from the blocks, one in memory at a time, and the rows that stay.

    Returns (users with a theta, sums over their histories). Who has none holds start (M, d).
    """
    sums = {"tokens": before["train_tokens"], "seconds": before["seconds"]}
    sums["nll"], shape = np.array(before["train_nll_steps"]) * sums["tokens"], (n_users, *start.shape)
    for stale in work.glob(".profiles.npy.*"):  # of a process killed here
        stale.unlink()
    with atomic(work / "profiles.npy") as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        begin = file.tell()

        def write(user, theta):  # Note: a memory map cannot say that the disk is full
            file.seek(begin + user * theta.nbytes)
            file.write(theta.tobytes())

        for user, row in rows.items():
            write(user, old[row])
        for number, users in enumerate(blocks):
            part = load(work, f"{number:06d}.pt", ("theta", *sums))
            for user, theta in zip(users, part["theta"].numpy()):
                write(user, theta)
            sums = {key: value + part[key] for key, value in sums.items()}
        known = sorted(chain(rows, *blocks))
        for user in set(range(n_users)).difference(known):
            write(user, start)
    return known, sums


FILES = ("profiles.npy", "profiles_users.json", "profiles.json")  # the last vouches for the others


def publish(work, run):
    """Move a finished run into place; a second call makes good a kill in between."""
    if (work / FILES[-1]).exists():
        for part in work.glob("*.pt"):
            part.unlink()
        for path in (work / name for name in FILES):
            if path.exists():
                path.replace(run / path.name)
        shutil.rmtree(work)


# -------- main

def infer(dataset, likelihood, tokenizer, lm, histories, args):
    """All users, or with --users those who are new. The first process saves and reports."""
    rng = seeded(args.seed, 3)  # 3 tells a run's random streams apart
    start, spread = starting_point(likelihood, args.init, rng)
    settings = {key: getattr(args, key) for key in RECORDED} | {"profiles": dataset.profiles} | {
        "dataset_fingerprint": dataset.fingerprint(), "lm_fingerprint": lm["fingerprint"]}
    before, old, rows = {"train_nll_steps": [0.0], "train_tokens": 0, "seconds": 0.0}, None, {}
    if args.users:
        before, old, rows, missing = rows_that_stay(args.run, dataset, settings, args.users)
        histories = [ids if user in missing else ids[:0] for user, ids in enumerate(histories)]
    blocks = make_blocks(histories, args.block_size, token_budget_of(likelihood), likelihood.prompt_length)
    work = args.run / f"blocks-{fingerprint(settings, blocks, list(rows))[:12]}"
    with contextlib.suppress(UserError):  # a damaged run is made again
        done = (settings | {"rows_kept": 0}).items() <= read_profiles(args.run)[0].items()
        if done and not (args.users or args.fresh or work.exists()):
            return print("profiles.npy has these settings: nothing to do (--fresh infers again)")
    if rows and RANK == 0:
        once(work / "population.pt", torch.tensor, before["start"])
    solve(work, blocks, likelihood, start, spread, histories, args)
    wait_for_all()  # else the first would publish while another still writes
    if RANK > 0:
        return
    start = load(work, "population.pt").numpy()
    known, sums = gather(work, blocks, old, rows, start, len(histories), before)
    theta, owners = load(work, "profiles.npy"), {"users": dataset.users, "inferred": known}
    validation = tokenize_histories(tokenizer, history_texts(dataset, VALIDATION, args), likelihood.room)
    heldout = heldout_nll(likelihood, theta, start, validation, sorted(chain(*blocks)), rng)
    steps = (sums["nll"] / max(1, sums["tokens"])).tolist()
    worked = (sums["tokens"] + len(known) * likelihood.prompt_length) * args.steps
    speed, lost = round(worked / max(sums["seconds"], 1e-9)), lm["sensitivity"]
    save_json(work / "profiles_users.json", owners)
    save_json(work / "profiles.json", settings | {
        "start": start.tolist(), "spread": spread.tolist(), "rows_kept": len(rows), "lm_sensitivity": lost,
        "users_without_history": len(theta) - len(known), "heldout_nll": heldout,
        "train_nll": {"before": steps[0], "after": steps[-1]}, "train_nll_steps": steps,
        "train_tokens": sums["tokens"], "tokens_per_second": speed, "seconds": round(sums["seconds"], 1),
        "peak_memory_mb": peak_memory_mb(likelihood.device), "fingerprint": fingerprint(theta),
        "users_fingerprint": fingerprint(owners)})
    publish(work, args.run)
    print(f"\ntrain NLL per token {steps[0]:.4f} -> {steps[-1]:.4f}; {speed:,d} tokens x steps/s")
    for what, values in (("validation NLL per token", heldout), ("tiny LM, loss under a wrong word", lost)):
        if values:
            print(f"{what}:", ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    print(f"\nwrote {' '.join(FILES)} to {args.run}")


def main():
    args = parse_arguments()
    dataset, device = load_dataset(args.run), pick_device(args.device)
    for work in args.run.glob("blocks-*") if RANK == 0 else ():
        publish(work, args.run)
        if args.fresh or not any(work.glob("*.pt")):
            shutil.rmtree(work, ignore_errors=True)
        else:
            print(f"unfinished: {work} goes on with its flags, --fresh forgets it")
    wait_for_all()
    texts = history_texts(dataset, SEEN, args)
    longest = max(map(len, history_texts(dataset, TRAIN, args)))
    if not longest:
        raise UserError("no user has a training history", args.history, "take --history all or more data")
    likelihood, tokenizer, lm = open_model(dataset, args, device, None if args.users else longest)
    histories = tokenize_histories(tokenizer, texts, likelihood.room)
    if not any(map(len, histories)):
        raise UserError("no title fits into the LLM's window", args.lm, "change --lm")
    if RANK == 0:
        announce("02 infer profiles", args, "stage 01's files")
        size = len(histories) * likelihood.profiles * likelihood.words.weight.shape[1]
        print(f"parameters: theta {size:,d} trainable, LLM {count_parameters(likelihood.model):,d} frozen")
    infer(dataset, likelihood, tokenizer, lm, histories, args)
    if RANK == 0:
        print(f"next: python 03_quantize.py --run {args.run}")


if __name__ == "__main__":
    guarded(main)
