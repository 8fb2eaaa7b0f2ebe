"""Stage 02: infer each user's latent profiles as soft tokens of a frozen LLM. Paper: section 2.3, Eq. (2)-(4), Fig. 4.

The prompt of user u is one ordered list of segments (Eq. 3, then the text to be made likely):

    x^1 theta^1  x^2 theta^2 ... D_task  y = titles of the user's training history

Behind the strict causal mask a profile sees its own name only; task and history see everything before them. theta is found
by gradient descent on  l_llm = -log P_LLM(y | x, theta)  (Eq. 4) plus a Gaussian prior around what the LLM itself expects
after the profile's name. Users are independent given the frozen LLM, so a block of users is solved at a time and written.

Reads:  dataset.json interactions.npy users.json items.json (01)
Writes: profiles.npy  float32 (U, M, d), the inferred theta;  profiles.json, settings and likelihoods;  profiles_users.json,
        whose row is whose;  lm-tiny/ (cached tiny LM). Until all blocks are done: profiles.partial.npy and profiles.progress*, to resume from.

Run:
    python 02_infer_profiles.py                                        # the demo with the tiny LM it trains first: 1 min
    python 02_infer_profiles.py --run runs/ml-100k --lm tiny           # 4 min on 2 cores
    python 02_infer_profiles.py --run runs/ml-100k --lm llama2-7b --dtype fp16
    torchrun --nproc-per-node=8 -- 02_infer_profiles.py --run runs/ml-100k --lm llama2-7b
"""

import contextlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import (TRAIN, VALIDATION, Parser, UserError, announce, at_least, atomic, check_same, fingerprint,
                    freeze, guarded, is_out_of_memory, load, load_dataset, load_language_model, one_run_at_a_time,
                    parameter_counts, peak_memory_mb, pick_device, ranks, save_json, seeded)

# ---------------------------------------------------------------- settings

HUB_NAMES = {"gpt2": ("gpt2", "0.5 GB"), "llama2-7b": ("meta-llama/Llama-2-7b-hf", "13.5 GB")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTH_SPREAD = 0.09  # a block's shortest prompt is at most this much shorter than its longest
HELDOUT_USERS = 20_000  # a sample this large fixes the held-out NLL to far less than the differences of interest
SLOT_WORDS = 12    # theta_0 averages the LLM's likeliest words in the slot, the place after x^m where theta^m stands
ACTIVATIONS = 40   # numbers a layer keeps per token for the backward pass, in units of its width
RECORDED = ("lm", "dtype", "steps", "lr", "prior", "init", "mask", "history", "max_history", "history_sample", "tiny_sentences", "block_size", "seed")
LOSS_SCALE = {torch.float16: 1024.0}  # keeps fp16 gradients above underflow; theta and its optimiser are fp32 always


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("--lm", default="auto", help="tiny (trained here on item metadata), gpt2, llama2-7b (the paper's), "
                        "a hub name or a local folder; auto: tiny on the demo, else llama2-7b on a CUDA card with 20 GiB free, else gpt2")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="of the LLM; auto: fp32, on cuda fp16 (tiny: fp32); theta is always fp32")
    parser.add_argument("--steps", type=at_least(1), default=20, help="AdamW steps a user")
    parser.add_argument("--lr", type=at_least(1e-12, float), default=0.1,
                        help="AdamW step size in units of the slot's spread (paper: 0.001, unscaled)")
    parser.add_argument("--prior", type=at_least(0, float), default=1.0,
                        help="weight of the Gaussian prior around theta_0; 0 is the paper's pure likelihood")
    parser.add_argument("--init", choices=("slot", "random", "vocab"), default="slot",
                        help="theta_0: the LLM's own next words after the profile's name; uniform noise (authors' code); the mean of all words")
    parser.add_argument("--mask", choices=("strict", "causal"), default="strict", help="strict: Fig. 4; causal: profiles see earlier profiles too")
    parser.add_argument("--history", choices=("liked", "all", "rated"), default="liked",
                        help="which training rows y holds; rated marks each title + or -")
    parser.add_argument("--max-history", type=at_least(1), default=20, help="most titles of a user")
    parser.add_argument("--history-sample", choices=("recent", "long-short"), default="recent",
                        help="of a longer history: its end; or 60%% of its end, 30%% of its newer and 10%% of its older half before that")
    parser.add_argument("--block-size", type=lambda text: None if text == "auto" else at_least(1)(text), default="auto",
                        help="most users solved at once; auto: by a budget of tokens that suits the CPU's cache or the GPU's free memory")
    parser.add_argument("--logit-chunk", type=at_least(1), default=4096, help="target tokens with vocabulary logits at once")
    parser.add_argument("--tiny-sentences", type=at_least(64), help="to train the tiny LM on (default: 16000, above 500 items 24000)")
    parser.add_argument("--users", type=Path, help="file of raw user ids, one a line, added since the last run (01 has been run again with their "
                        "rows): infer only those that have no theta yet, and leave every other row as it is")
    parser.add_argument("--fresh", action="store_true", help="forget an unfinished run instead of resuming it")
    parser.add_argument("--show-mask", action="store_true", help="print the mask of one user's prompt as a grid and stop")
    return parser.parse_args()


# ---------------------------------------------------------------- data: the prompt

@dataclass
class Segment:
    """A run of prompt tokens: kind is begin, name, theta, task or history; profile says whose name or theta it is."""

    kind: str
    ids: list  # of a theta: [0], which holds its place
    profile: int | None = None


def pieces(tokenizer, texts, anchor=" a;"):
    """Token ids of each text as it reads in the middle of a sentence (so that sentencepiece puts no space of its own before it)."""
    skip = len(tokenizer.encode(anchor, add_special_tokens=False))
    return [ids[skip:] for ids in tokenizer([anchor + text for text in texts], add_special_tokens=False)["input_ids"]]


def prompt_segments(tokenizer, dataset):
    """Eq. (3): [x^1, theta^1, ..., x^M, theta^M, D_task] as ordered segments, with the LLM's begin token first where it has one."""
    segments = []
    if tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id:
        segments.append(Segment("begin", [tokenizer.bos_token_id]))  # Note: every token may see it; it says nothing of a profile
    names = pieces(tokenizer, [profile["prompt"] for profile in dataset.profiles])
    for m, ids in enumerate(names):
        segments += [Segment("name", ids, m), Segment("theta", [0], m)]
    return segments + [Segment("task", pieces(tokenizer, [dataset.task_prompt])[0])]


def build_positions(segments, mask):
    """Position of each token, (S,). Under the strict mask each profile restarts where the first begins, as if it stood alone:

        tokens      x^1 x^1 theta^1 x^2 theta^2 task task y
        positions    0   1     2     0     1     5    6   7

    Note: profiles are then exchangeable (Fig. 4: "latent profiles are independent of each other"). DEVIATION(3).
    """
    positions, at, start = [], 0, None
    for segment in segments:
        if segment.kind == "name" and mask == "strict":
            start = at if start is None else start
            within = start
        elif segment.kind != "theta" or mask != "strict":
            within = at
        positions += range(within, within + len(segment.ids))
        within += len(segment.ids)
        at += len(segment.ids)
    return torch.tensor(positions)


def build_visibility(segments, mask):
    """bool (S, S): may row i attend to column j? Fig. 4 (below).

    Paper: "can only attend to their respective profile names and interactions". Note: theta stands before the interactions, so
    causality leaves the names; the interactions attend to theta. DEVIATION(2): x^m is cut off from other profiles too, else
    theta^1 reaches theta^2 through x^2.
    """
    kinds = [segment.kind for segment in segments for _ in segment.ids]
    owners = [segment.profile for segment in segments for _ in segment.ids]
    size = len(kinds)
    visible = torch.ones(size, size, dtype=torch.bool).tril()
    if mask == "strict":
        for row in range(size):
            for column in range(row):
                if kinds[row] in ("name", "theta") and kinds[column] != "begin" and owners[row] != owners[column]:
                    visible[row, column] = False
    return visible


def additive_mask(visible, dtype):
    """(1, 1, S, S) floats: 0 where visible, the dtype's lowest number elsewhere (not -inf: it turns into NaN in a masked row)."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[None, None]


def print_mask(segments, tokenizer, visible):
    """The mask as a grid: row i attends to the columns marked #."""
    labels = [f"<theta^{segment.profile + 1}>" if segment.kind == "theta" else tokenizer.decode([token]).replace("\n", "\\n")
              for segment in segments for token in segment.ids]
    width = max(map(len, labels))
    for row, label in enumerate(labels):
        print(f"{label:>{width}s} |" + "".join(" #" if cell else " ." for cell in visible[row].tolist()))


# ---------------------------------------------------------------- data: the histories

def history_texts(dataset, split, settings):
    """Per user: texts of the rows of one split, oldest first; ' A Title;' or, rated, ' A Title +;'.

    settings: history (which rows), max_history (how many), history_sample (which of a longer history). DEVIATION(9): the paper does not say
    which interactions y holds, and takes a data point a user-item pair; here a user is one data point and y what he liked, oldest first.
    """
    texts = [[] for _ in dataset.users]
    for user, item, label in dataset.rows(split).tolist():
        if label or settings.history != "liked":
            mark = (" +" if label else " -") if settings.history == "rated" else ""
            texts[user].append(f" {dataset.items[item]['title']}{mark};")
    return [[lines[at] for at in sample_history(len(lines), settings.max_history, settings.history_sample)] for lines in texts]


def sample_history(length, limit, kind):
    """Which places of a history of `length` titles to keep, in order: its end, or 60% recent, 30% medium and 10% long-term."""
    if kind == "recent" or length <= limit:
        return list(range(max(0, length - limit), length))
    recent = math.ceil(0.6 * limit)
    medium = min(round(0.3 * limit), limit - recent)
    older, before = limit - recent - medium, length - recent
    middle = min(max(before // 2, older), before - medium)  # the halves of what came before, as long as each can fill its share
    places = [*np.linspace(0, middle - 1, older), *np.linspace(middle, before - 1, medium)]
    return [int(place) for place in places] + list(range(before, length))


def tokenize_histories(tokenizer, texts, room):
    """Per user an int32 array of token ids: whole titles only, the oldest dropped until it fits into `room` tokens."""
    distinct = sorted({text for lines in texts for text in lines})
    ids_of = dict(zip(distinct, pieces(tokenizer, distinct) if distinct else []))
    histories = []
    for lines in texts:
        kept, used = [], 0
        for text in reversed(lines):
            if used + len(ids_of[text]) > room:
                break
            kept.append(ids_of[text])
            used += len(ids_of[text])
        histories.append(np.array([token for ids in reversed(kept) for token in ids], dtype=np.int32))
    return histories


def make_blocks(histories, block_size, token_budget, prompt_length):
    """Users with a history, longest first, cut into blocks: at most block_size users, else at most token_budget tokens.

    A block holds users within LENGTH_SPREAD of its longest, so that padding stays below half of that. Longest first: if memory
    does not suffice, it shows in the first minute.
    """
    blocks, longest = [], 0
    for user in sorted((user for user, ids in enumerate(histories) if len(ids)), key=lambda user: (-len(histories[user]), user)):
        length = prompt_length + len(histories[user])
        full = not blocks or len(blocks[-1]) >= (block_size or max(1, token_budget // longest))
        if full or length < (1 - LENGTH_SPREAD) * longest:
            blocks.append([])
            longest = length
        blocks[-1].append(user)
    return blocks


def pad(histories, users, device):
    """(ids (B, H) right-padded with 0, lengths (B,)) of some users' histories. No real token sees a pad on its right."""
    lengths = torch.tensor([len(histories[user]) for user in users])
    ids = torch.zeros(len(users), int(lengths.max()), dtype=torch.long)
    for row, user in enumerate(users):
        ids[row, :lengths[row]] = torch.from_numpy(histories[user])
    return ids.to(device), lengths.to(device)


# ---------------------------------------------------------------- model

class TokenNLL(torch.autograd.Function):
    """-log softmax(hidden W^T + b)[target] per token, never holding more than `chunk` rows of vocabulary logits.

    The gradient with respect to hidden, (softmax - onehot) W, is made on the way forward while the logits are at hand: one
    vocabulary projection forward and one back, nothing recomputed, no gradient for the frozen W.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = torch.nn.functional.linear(hidden[rows], weight, bias).float()  # Shape: (chunk, vocabulary)
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
    """-log P_LLM(y | x^1, theta^1, ..., x^M, theta^M, D_task) of Eq. (4), summed over the tokens of y, per user.

    model: frozen causal LM. segments: the prompt without y (prompt_segments). The same list gives embeddings, mask, positions
    and targets. Stage 03 calls it too (Algorithm 1 and EM).
    """

    def __init__(self, model, segments, mask="strict", chunk=4096):
        self.model, self.segments, self.mask, self.chunk = model, segments, mask, chunk
        self.body, self.head, self.words = model.base_model, model.get_output_embeddings(), model.get_input_embeddings()
        self.dtype, self.device = self.words.weight.dtype, self.words.weight.device
        self.prompt_length = sum(len(segment.ids) for segment in segments)
        self.profiles = sum(segment.kind == "theta" for segment in segments)
        self.layouts = {}

    def layout(self, history_length):
        """(additive mask (1, 1, S, S), positions (1, S)) for a history of this many tokens; one pair serves a whole block."""
        if history_length not in self.layouts:
            full = self.segments + [Segment("history", [0] * history_length)]
            mask = additive_mask(build_visibility(full, self.mask), self.dtype)
            self.layouts = {history_length: (mask.to(self.device), build_positions(full, self.mask)[None].to(self.device))}
        return self.layouts[history_length]

    def embeddings(self, theta, history_ids):
        """Shape: theta (B, M, d) fp32, history_ids (B, H) -> (B, S, d) in the LLM's dtype."""
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
        return self.body(inputs_embeds=self.embeddings(theta, history_ids), attention_mask=mask, position_ids=positions,
                         use_cache=False).last_hidden_state

    def __call__(self, theta, history_ids, lengths):
        """NLL in nats, float32 (B,). theta (B, M, d), history_ids (B, H) right-padded, lengths (B,)."""
        if theta.requires_grad and self.dtype in LOSS_SCALE:  # grow gradients on their way through fp16, shrink them where theta is fp32
            theta = theta * 1.0
            theta.register_hook(lambda gradient: gradient / LOSS_SCALE[self.dtype])
        # The state before each history token predicts it. Shape: (B, H, d)
        states = self.hidden(theta, history_ids)[:, self.prompt_length - 1:-1]
        real = torch.arange(history_ids.shape[1], device=self.device) < lengths[:, None]  # Shape: (B, H)
        nll = TokenNLL.apply(states[real], self.head.weight, self.head.bias, history_ids[real], self.chunk)
        if nll.requires_grad and self.dtype in LOSS_SCALE:
            nll.register_hook(lambda gradient: gradient * LOSS_SCALE[self.dtype])
        return torch.zeros(len(theta), device=self.device).index_add(0, real.nonzero()[:, 0], nll)

    @torch.no_grad()
    def next_word(self, m):
        """The LLM's distribution over the word after x^m alone: float32 (vocabulary,)."""
        ids = [token for segment in self.segments if segment.kind == "begin" or (segment.kind == "name" and segment.profile == m)
               for token in segment.ids]
        return self.model(torch.tensor([ids], device=self.device)).logits[0, -1].float().softmax(0)


def check_head(likelihood):
    """Raise UserError if the LLM does more to its hidden states than its output layer (then Eq. 4 would be computed wrongly)."""
    ids = torch.arange(4, device=likelihood.device)[None]
    with torch.no_grad():
        plain = likelihood.head(likelihood.body(ids).last_hidden_state)
        if not torch.allclose(plain.float(), likelihood.model(ids).logits.float(), atol=1e-2, rtol=1e-2):
            raise UserError("this architecture rescales its logits, which is not supported", likelihood.model.config.model_type,
                            "choose another --lm")


@torch.no_grad()
def starting_point(likelihood, init, generator):
    """(theta_0 (M, d), spread (M,)): where the search starts and the unit of its steps and of the prior.

    slot: probability-weighted mean and spread (root mean squared deviation a coordinate) of the words the LLM expects after x^m;
    vocab: mean of all words; random: U(-.1, .1) as in the authors' code. The spread is always that of the slot's words.
    """
    words = likelihood.words.weight.float()
    start, spread = [], []
    for m in range(likelihood.profiles):
        probability, index = likelihood.next_word(m).topk(min(SLOT_WORDS, len(words)))
        probability = (probability / probability.sum())[:, None]
        mean = (probability * words[index]).sum(0)
        spread.append((probability * (words[index] - mean) ** 2).sum(0).mean().sqrt().clamp(min=1e-6))
        start.append(mean)
    start = torch.stack(start)
    if init == "vocab":
        start = words.mean(0).expand_as(start).clone()
    elif init == "random":
        start = torch.from_numpy(generator.uniform(-0.1, 0.1, start.shape)).float().to(start.device)
    return start, torch.stack(spread)


# ---------------------------------------------------------------- loss and train

def descend(likelihood, start, spread, ids, lengths, users, names, args):
    """Minimise Eq. (4) and the prior for one block. ids (B, H), lengths (B,) -> (theta (B, M, d) fp32, NLL before each step (steps, B)).

    theta = theta_0 + spread * z; AdamW acts on z, elementwise, so that users do not touch each other.
    Raises UserError naming the users when a loss or gradient is not finite.
    """
    z = torch.zeros(len(users), *start.shape, device=likelihood.device, requires_grad=True)  # Shape: (B, M, d)
    optimizer = torch.optim.AdamW([z], lr=args.lr, weight_decay=0.0)
    path = []
    for _ in range(args.steps):
        nll = likelihood(start + spread[:, None] * z, ids, lengths)  # Eq. (4), Shape: (B,)
        # DEVIATION(4): l = l_llm + prior / 2 * ||theta - theta_0||^2 / spread^2; the paper has prior = 0.
        loss = nll + args.prior / 2 * (z ** 2).sum((1, 2))
        loss.sum().backward()
        check_finite(torch.isfinite(loss) & torch.isfinite(z.grad).flatten(1).all(dim=1), users, names, f"--lr {args.lr}, {likelihood.dtype}")
        path.append(nll.detach())
        optimizer.step()
        optimizer.zero_grad()
    return (start + spread[:, None] * z).detach(), torch.stack(path)


def check_finite(sound, users, names, where):
    """Raise UserError naming the users where bool (B,) sound is False."""
    if not sound.all():
        bad = [str(names[user]) for user, ok in zip(users, sound.tolist()) if not ok]
        raise UserError(f"loss or gradient is not finite for users {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}", where,
                        "lower --lr or take --dtype bf16 or fp32, with --fresh; nothing was written for them")


def infer_block(likelihood, start, spread, histories, users, names, args):
    """Solve one block of users. Returns numpy arrays: theta float32 (B, M, d), NLL before each step and at the end (steps + 1, B)."""
    ids, lengths = pad(histories, users, likelihood.device)
    theta, path = descend(likelihood, start, spread, ids, lengths, users, names, args)
    with torch.no_grad():
        after = likelihood(theta, ids, lengths)
    check_finite(torch.isfinite(after), users, names, f"--lr {args.lr}, {likelihood.dtype}")
    return theta.cpu().numpy(), torch.cat([path, after[None]]).cpu().numpy()


class Progress:
    """What an unfinished run has done: rows in profiles.partial.npy, and one JSON line a block in profiles.progress.<rank>.

    A line is written after the block's rows are on disk. The first line of each file holds the settings; a line cut short by a
    kill is ignored and its block done again. Every rank appends to a file of its own and writes only its own users' rows.
    """

    def __init__(self, run, rank):
        self.run, self.partial, self.final, self.path = run, run / "profiles.partial.npy", run / "profiles.npy", run / f"profiles.progress.{rank}"

    def read(self):
        """(settings, {block: record}) over all ranks' files, or (None, {})."""
        settings, done = None, {}
        for path in sorted(self.run.glob("profiles.progress.*")):
            lines = path.read_bytes().split(b"\n")[:-1]
            if lines:
                settings = settings or json.loads(lines[0])
                done |= {record["block"]: record for record in map(json.loads, lines[1:])}
        return settings, done

    def begin(self, settings, shape, fresh, kept=None):
        """Rank 0: go on with an unfinished run of the same settings, else make room on disk for a new one.

        kept: None or a function that gives (rows, array (n, M, d)) of the users whose theta stays as it is (--users).
        """
        found, _ = self.read()
        if found == settings and not fresh:
            return
        if found and not fresh:
            changed = ", ".join(key for key in settings if found.get(key) != settings[key])
            raise UserError(f"an unfinished run has other settings ({changed})", self.run, "finish it with its own settings, or add --fresh")
        self.clear()
        with atomic(self.partial) as temporary:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            if hasattr(os, "posix_fallocate"):  # reserve the space now: a memory map has no way to say that the disk is full
                with open(temporary, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            if kept:
                rows, theta = kept()
                array[rows] = theta
            array.flush()
        self.path.write_text(json.dumps(settings) + "\n")

    def open(self, settings):
        """Open the array to write rows to, and this rank's file, whose torn last line is cut off."""
        content = self.path.read_bytes() if self.path.exists() else b""
        self.log = open(self.path, "ab")
        self.log.truncate(content.rfind(b"\n") + 1)
        if b"\n" not in content:
            self.log.write((json.dumps(settings) + "\n").encode())
            self.log.flush()
        self.rows = open(self.where(), "r+b", buffering=0)

    def where(self):
        """The array's file: where a run was killed between its last files, the finished array is already in its place."""
        return self.partial if self.partial.exists() else self.final

    def record(self, block, users, theta, nll, tokens):
        """nll: (steps + 1, B), of which the sum over the users is kept."""
        offset = np.load(self.where(), mmap_mode="r").offset
        for user, row in zip(users, theta):  # plain writes, not a memory map: ranks on other machines write to the same pages
            os.pwrite(self.rows.fileno(), row.tobytes(), offset + int(user) * row.nbytes)
        os.fsync(self.rows.fileno())
        line = {"block": block, "nll": nll.sum(axis=1, dtype=np.float64).tolist(), "tokens": tokens}
        self.log.write((json.dumps(line) + "\n").encode())
        self.log.flush()
        os.fsync(self.log.fileno())

    def finish(self, facts, owners):
        """Rank 0: put the array in its place, write profiles_users.json and profiles.json, forget the progress."""
        if self.partial.exists():
            os.replace(self.partial, self.final)  # stages 03 and 04 refuse it until its profiles.json is there too
        save_json(self.run / "profiles_users.json", owners)
        save_json(self.run / "profiles.json", facts)
        self.clear()

    def clear(self):
        for path in (*self.run.glob("profiles.progress.*"), self.partial):
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- the tiny LM (trained here when --lm tiny is first used)

TINY_FIT = 0.75  # share of a person's titles that fit the one word told of them
LIKING = 1.4     # rated histories: log odds of liking a title that fits all that is told of the person; less this where nothing fits


def make_sentences(dataset, items, count, length, rng, history):
    """Texts about invented people, from item metadata only: `count` pairs (profile words {m: word}, up to `length` title texts).

    A person has a word for each profile, or for one profile only (so that x^m is understood alone, as the strict mask demands);
    their titles fit these words more often than chance. Most texts are short, so that the word has to tell what other titles
    cannot, and some are long, so that every position is learned. No user and no interaction is looked at.
    """
    likes = [profile.get("likes", {}) for profile in dataset.profiles]  # a critic's word tells the share of titles he likes
    values = [sorted(likes[m]) or sorted({value for item in items for value in item["attributes"].get(profile["name"], [])})
              for m, profile in enumerate(dataset.profiles)]
    fits = [np.array([[value in item["attributes"].get(profile["name"], []) for item in items] for value in values[m]])
            for m, profile in enumerate(dataset.profiles)]  # Shape: (values, items) each
    usable = [m for m in range(len(values)) if len(values[m])]
    if not usable:
        raise UserError("no item has a value for any profile, so there is nothing to train the tiny LM on", "items.json", "take --lm gpt2")
    share = [fit.mean(1).clip(1e-9, 1 - 1e-9) for fit in fits]
    contrast = [np.log(TINY_FIT / (1 - TINY_FIT) * (1 - part) / part) for part in share]  # log odds of fitting titles, each value
    tastes = [m for m in usable if not likes[m]]
    lengths = [size for size in (1, 2, 3, 5, 8, 12) if size < length] + [length]
    frequency = [fit.sum(1) ** 0.5 + bool(likes[m]) for m, fit in enumerate(fits)]  # Note: square root, so that rare words are learned too
    frequency = [part / part.sum() for part in frequency]
    sentences = []
    for number in range(count):
        told = usable if number % 2 == 0 or len(usable) == 1 else [usable[number // 2 % len(usable)]]
        person = {m: rng.choice(len(values[m]), p=frequency[m]) for m in told}
        told_tastes = {m: value for m, value in person.items() if m in tastes}
        weight = np.exp(np.sum([contrast[m][value] * fits[m][value] for m, value in told_tastes.items()], axis=0)) * np.ones(len(items))
        size = lengths[number % len(lengths)]
        chosen = rng.choice(len(items), size=size, p=weight / weight.sum())
        marks = [""] * size
        if history == "rated":  # log odds of liking: the critic's own, and what fits his tastes more than what does not
            general = [likes[m][values[m][value]] for m, value in person.items() if likes[m]]
            odds = np.log(general[0] / (1 - general[0])) if general else 0.0
            if told_tastes:
                odds = odds + LIKING * (2 * np.mean([fits[m][value][chosen] for m, value in told_tastes.items()], axis=0) - 1)
            marks = np.where(rng.random(size) < 1 / (1 + np.exp(-odds)), " +", " -")
        sentences.append(({m: values[m][value] for m, value in person.items()},
                          [f" {items[item]['title']}{mark};" for item, mark in zip(chosen, marks)]))
    return sentences


def encode_sentences(tokenizer, dataset, sentences):
    """(ids (n, T) right-padded, targets (n, T) with -100 on padding, first (n,) position of the history)."""
    names = pieces(tokenizer, [profile["prompt"] for profile in dataset.profiles])
    task = pieces(tokenizer, [dataset.task_prompt])[0]
    texts = sorted({text for words, titles in sentences for text in titles} | {f" {word}" for words, _ in sentences for word in words.values()})
    ids_of = dict(zip(texts, pieces(tokenizer, texts)))
    rows, first = [], []
    for words, titles in sentences:
        row = [token for m, word in words.items() for token in names[m] + ids_of[f" {word}"]] + task
        first.append(len(row))
        rows.append(row + [token for title in titles for token in ids_of[title]])
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, ids.masked_fill(~real, -100), torch.tensor(first)


def tiny_tokenizer(dataset, sentences, vocabulary):
    """Byte-level BPE of the sentences' own words."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast
    bpe = ByteLevelBPETokenizer()
    lines = ["".join(f"{dataset.profiles[m]['prompt']} {word}" for m, word in words.items()) + dataset.task_prompt + "".join(titles)
             for words, titles in sentences]
    bpe.train_from_iterator(lines, vocab_size=vocabulary, min_frequency=2, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)


def history_nll(model, ids, targets, first):
    """Mean nats per history token of encoded sentences."""
    history = torch.arange(ids.shape[1]) >= first[:, None]
    logits = model(ids).logits[:, :-1].float()
    wanted = targets.masked_fill(~history, -100)[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)


@torch.no_grad()
def sensitivity(model, tokenizer, dataset, items, length, rng, history):
    """Per profile: nats per history token lost by fresh sentences when the profile's word is replaced by a wrong one."""
    result, sentences = {}, make_sentences(dataset, items, 400, length, rng, history)
    for m, profile in enumerate(dataset.profiles):
        told = [pair for pair in sentences if m in pair[0]]
        words = sorted({known[m] for known, _ in told})
        if len(words) > 1:
            wrong = [({**known, m: str(rng.choice([word for word in words if word != known[m]]))}, titles) for known, titles in told]
            result[profile["name"]] = float(history_nll(model, *encode_sentences(tokenizer, dataset, wrong))
                                            - history_nll(model, *encode_sentences(tokenizer, dataset, told)))
    return result


def train_tiny(dataset, folder, args):
    """Train a GPT-2-architecture LM on sentences made from the metadata of training items, unless `folder` holds this very LM."""
    seen = np.unique(dataset.rows(TRAIN)[:, 1])  # rules of evidence: items met only in validation or test rows stay unknown
    items = [{"title": dataset.items[item]["title"], "attributes": dataset.items[item]["attributes"]} for item in seen]
    size = {"width": 64, "vocabulary": 768, "sentences": 16000} if len(items) <= 500 else {"width": 128, "vocabulary": 2048, "sentences": 24000}
    size["sentences"] = args.tiny_sentences or size["sentences"]
    length = max(map(len, history_texts(dataset, TRAIN, args)))  # so that every position is learned
    key = fingerprint(items, dataset.profiles, dataset.task_prompt, [args.seed, args.history, TINY_FIT, LIKING, length], size)
    facts_path = folder / "tiny.json"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(facts_path.read_text())["fingerprint"] == key:
            return
    from transformers import GPT2Config, GPT2LMHeadModel, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rng = seeded(args.seed, 2)
    sentences = make_sentences(dataset, items, size["sentences"], length, rng, args.history)
    tokenizer = tiny_tokenizer(dataset, sentences, size["vocabulary"])
    ids, targets, _ = encode_sentences(tokenizer, dataset, sentences)
    context = max(512, 2 * ids.shape[1])
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=context, n_embd=size["width"], n_layer=2, n_head=4,
                                       activation_function="gelu_pytorch_tanh",  # the same function as gelu_new in one kernel
                                       resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None))
    epochs, batch = 3, 32
    by_length = targets.ne(-100).sum(1).argsort(stable=True).numpy()  # batches of like length: hardly any padding
    order = [rows for _ in range(epochs) for rows in rng.permutation(by_length[len(ids) % batch:].reshape(-1, batch))]
    steps = len(order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    for step in (bar := tqdm(range(steps), desc=f"training the tiny LM ({sum(parameter_counts(model)):,d} parameters)")):
        rows = torch.from_numpy(order[step])
        real = targets[rows].ne(-100).any(0).sum()  # cut the batch's common padding
        logits = model(ids[rows, :real]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[rows, 1:real].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    freeze(model)
    facts = {"fingerprint": key, "parameters": sum(parameter_counts(model)),
             "sensitivity": sensitivity(model, tokenizer, dataset, items, length, rng, args.history)}
    facts_path.unlink(missing_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_json(facts_path, facts)  # last: it vouches for the others


# ---------------------------------------------------------------- evaluate

@torch.no_grad()
def mean_nll(likelihood, theta_of, histories, users, token_budget):
    """Nats per token of these users' histories, where theta_of(list of users) gives float32 (B, M, d)."""
    total, tokens = 0.0, 0
    wanted = set(users)
    chosen = [ids if user in wanted else ids[:0] for user, ids in enumerate(histories)]
    for block in make_blocks(chosen, None, token_budget, likelihood.prompt_length):
        ids, lengths = pad(chosen, block, likelihood.device)
        total += likelihood(torch.tensor(theta_of(block), device=likelihood.device), ids, lengths).double().sum().item()
        tokens += int(lengths.sum())
    return total / max(tokens, 1)


def heldout_nll(likelihood, theta, population, histories, solved, rng, token_budget):
    """Validation titles under each user's own theta, under the population's, and under another user's: nats per token.

    Over at most HELDOUT_USERS users, drawn at random. None when no user has a validation title.
    """
    ring = rng.permutation(solved)
    neighbour = dict(zip(ring.tolist(), np.roll(ring, 1).tolist()))  # one ring through all users: nobody keeps his own
    users = [user for user in ring.tolist() if len(histories[user])][:HELDOUT_USERS]
    variants = {"own": lambda block: theta[block], "population": lambda block: np.repeat(population[None], len(block), axis=0),
                "shuffled": lambda block: theta[[neighbour[user] for user in block]]}
    return {name: mean_nll(likelihood, theta_of, histories, users, token_budget) for name, theta_of in variants.items()} if users else None


def nearest_words(words, vectors, tokenizer, count=4):
    """The `count` vocabulary words with the largest cosine to each row of vectors (n, d): a list of n lists [Table 5]."""
    table = torch.nn.functional.normalize(words.float(), dim=1)
    cosine = torch.nn.functional.normalize(torch.as_tensor(vectors, device=table.device), dim=1) @ table.T
    return [[tokenizer.decode([token]).strip() for token in row] for row in cosine.topk(min(count, len(table)), dim=1).indices.tolist()]


def show_users(dataset, theta, texts, solved, likelihood, tokenizer, count=3):
    """Histories beside the words nearest to each theta [Table 5]."""
    for user in solved[:: max(1, len(solved) // count)][:count]:
        words = nearest_words(likelihood.words.weight, theta[user], tokenizer)
        print(f"user {dataset.users[user]}:{''.join(texts[user][-6:])[:150]}")
        for profile, near in zip(dataset.profiles, words):
            print(f"    {profile['name']:12s} {' | '.join(near)}")


# ---------------------------------------------------------------- main

def choose_model(dataset, args, device):
    """Fill in args.lm and args.dtype; returns the name or folder to load. Says what will be fetched before it is."""
    if args.lm == "auto":
        roomy = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] >= 20 * 2**30
        args.lm = "tiny" if dataset.name == "demo" else "llama2-7b" if roomy else "gpt2"
        print(f"--lm auto chose {args.lm}; override it with --lm tiny | gpt2 | llama2-7b | NAME")
    if args.dtype == "auto":
        args.dtype = "fp16" if device.type == "cuda" and args.lm != "tiny" else "fp32"
    name, size = HUB_NAMES.get(args.lm, (args.lm, "size unknown"))
    if args.lm != "tiny" and not Path(name).is_dir():
        print(f"loading {name} ({size} to download unless it is in the cache)")
    return str(args.run / "lm-tiny") if args.lm == "tiny" else name


def open_model(dataset, args, device, made_with=None):
    """(likelihood, tokenizer, tiny LM facts or None) for the resolved settings; trains the tiny LM when it is first needed.

    made_with: facts of a finished stage 02, whose very tiny LM is wanted. With several ranks, rank 0 chooses, trains or downloads
    first and the others follow.
    """
    rank = ranks.rank()
    if rank == 0:
        name = choose_model(dataset, args, device)
        if args.lm == "tiny" and made_with is None:
            train_tiny(dataset, Path(name), args)
        elif args.lm == "tiny" and load(args.run, "lm-tiny/tiny.json", ("fingerprint",))["fingerprint"] != made_with["lm_fingerprint"]:
            raise UserError("lm-tiny is not the LM that made profiles.npy", args.run, f"run: python 02_infer_profiles.py --run {args.run}")
        loaded = load_language_model(name, DTYPES[args.dtype], device)
    vars(args).update(ranks.share({"lm": args.lm, "dtype": args.dtype}))
    if rank > 0:
        name = str(args.run / "lm-tiny") if args.lm == "tiny" else HUB_NAMES.get(args.lm, (args.lm,))[0]
        loaded = load_language_model(name, DTYPES[args.dtype], device)
    model, tokenizer = loaded
    likelihood = ProfileLikelihood(model, prompt_segments(tokenizer, dataset), args.mask, args.logit_chunk)
    check_head(likelihood)
    return likelihood, tokenizer, load(args.run, "lm-tiny/tiny.json", ("fingerprint", "sensitivity")) if args.lm == "tiny" else None


def token_budget_of(likelihood):
    """Tokens a block: on a CPU as many as keep a layer's working set in the cache; on a GPU what half of the free memory holds."""
    width, bytes_each = likelihood.words.weight.shape[1], likelihood.words.weight.element_size()
    if likelihood.device.type == "cpu":
        return max(768, 2_400_000 // (width * bytes_each))
    layers = likelihood.model.config.num_hidden_layers
    return max(2048, torch.cuda.mem_get_info(likelihood.device)[0] // 2 // (ACTIVATIONS * width * layers * bytes_each))


def settled_budget(run, progress, likelihood):
    """The token budget of the unfinished or finished run, else a new one: free memory varies, a run's blocks must not."""
    found = progress.read()[0]
    if found is None and (run / "profiles.json").exists():
        found = load(run, "profiles.json")
    width = likelihood.words.weight.shape[1]
    return found["token_budget"] if found and found.get("width") == width else token_budget_of(likelihood)


def room_for_history(likelihood):
    """Tokens of history that fit into the LLM's context behind the prompt."""
    return getattr(likelihood.model.config, "max_position_embeddings", 4096) - likelihood.prompt_length


def solve(likelihood, start, spread, histories, blocks, progress, done, names, args):
    """Infer and record the blocks that are this rank's and not done. Returns (tokens times steps, seconds)."""
    clock, worked = time.perf_counter(), 0
    mine = [number for number in range(len(blocks)) if number not in done][ranks.rank()::ranks.count()]
    for number in tqdm(mine, desc="inferring", unit="block", disable=ranks.rank() > 0):
        users = blocks[number]
        tokens = int(sum(len(histories[user]) for user in users))
        try:
            progress.record(number, users, *infer_block(likelihood, start, spread, histories, users, names, args), tokens)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"out of memory with a block of {len(users)} users", f"{likelihood.device}",
                            f"add --fresh and --block-size {max(1, len(users) // 2)} or --dtype fp16") from None
        worked += (tokens + len(users) * likelihood.prompt_length) * args.steps
    return worked, time.perf_counter() - clock


def mean_theta(theta, users):
    """Mean of these rows of a memory-mapped (U, M, d) array, in slices."""
    total = np.zeros(theta.shape[1:])
    for at in range(0, len(users), 4096):
        total += theta[users[at:at + 4096]].sum(axis=0, dtype=np.float64)
    return (total / len(users)).astype(np.float32)


class Earlier:
    """A finished stage 02 that --users adds to: its facts and rows, by raw user id."""

    def __init__(self, run, dataset, args):
        self.run, self.facts = run, load(run, "profiles.json", (*RECORDED, "fingerprint", "lm_fingerprint"))
        owners = load(run, "profiles_users.json", ("users", "inferred"))
        for key in ("lm", "dtype"):
            if getattr(args, key) == "auto":
                setattr(args, key, self.facts[key])
        changed = [key for key in RECORDED if getattr(args, key) != self.facts[key]]
        if changed:
            raise UserError(f"profiles.npy was made with other settings ({', '.join(changed)})", run, "give --users the flags of the first run")
        try:
            asked = {line.strip() for line in args.users.read_text(encoding="utf-8").splitlines() if line.strip()}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the file of users: {error}", args.users, "give a text file with one raw user id a line") from None
        index = {raw: user for user, raw in enumerate(dataset.users)}
        strangers = sorted(asked - index.keys())
        if strangers:
            raise UserError(f"{len(strangers)} users are not in the data set, the first is '{strangers[0]}'", args.users,
                            "run 01 again with their rows")
        here = [(index[raw], row) for row, raw in enumerate(owners["users"]) if raw in index]
        self.rows, self.old_rows = [user for user, _ in here], [row for _, row in here]
        inferred = set(owners["inferred"])
        self.solved = [user for user, row in here if row in inferred]
        self.missing, self.asked = sorted({index[raw] for raw in asked} - set(self.solved)), sorted(asked)

    def kept(self):
        """(rows, theta (n, M, d)) that stay as they are."""
        theta = load(self.run, "profiles.npy")
        check_same(self.run, "profiles.npy", "profiles.json", fingerprint(theta), self.facts["fingerprint"], "02_infer_profiles.py")
        return self.rows, theta[self.old_rows]


def infer(dataset, device, args):
    earlier = Earlier(args.run, dataset, args) if args.users else None
    texts = history_texts(dataset, TRAIN, args)
    if not any(texts):
        raise UserError(f"no user has a training history with --history {args.history}", args.run, "use --history all, or give more data")
    likelihood, tokenizer, tiny = open_model(dataset, args, device, earlier and earlier.facts)
    if ranks.rank() == 0:
        announce("02 infer profiles", args, f"dataset.json interactions.npy users.json items.json in {args.run}")
        print("parameters: trainable {:,d}, frozen {:,d}; theta is the only trainable tensor".format(*parameter_counts(likelihood.model)))
    histories = tokenize_histories(tokenizer, texts, room_for_history(likelihood))
    if args.show_mask:
        user = next((user for user, ids in enumerate(histories) if len(ids)), 0)
        full = likelihood.segments + [Segment("history", histories[user][:12].tolist())]
        return print_mask(full, tokenizer, build_visibility(full, args.mask))

    if earlier:
        wanted = set(earlier.missing)
        histories = [ids if user in wanted else ids[:0] for user, ids in enumerate(histories)]
    progress = Progress(args.run, ranks.rank())
    budget = ranks.share(settled_budget(args.run, progress, likelihood) if ranks.rank() == 0 else None)
    blocks = make_blocks(histories, args.block_size, budget, likelihood.prompt_length)
    rng = seeded(args.seed, 3)
    start, spread = starting_point(likelihood, args.init, rng)
    settings = {key: getattr(args, key) for key in RECORDED} | {
        "token_budget": budget, "width": start.shape[1], "dataset_fingerprint": dataset.fingerprint(), "lm_fingerprint": tiny and tiny["fingerprint"],
        "added_users": earlier and fingerprint(earlier.asked)}
    finished = ranks.rank() == 0 and not args.fresh and already_done(args.run, settings)
    if finished:
        print("profiles.npy is there, made with these settings; nothing to do (--fresh infers again)")
        print(f"next: python 03_quantize.py --run {args.run}")
    elif ranks.rank() == 0:
        progress.begin(settings, (len(dataset.users), *start.shape), args.fresh, earlier and earlier.kept)
    finished, done = ranks.share((finished, None if finished or ranks.rank() else progress.read()[1]))
    if finished:
        return None
    progress.open(settings)
    worked, seconds = solve(likelihood, start, spread, histories, blocks, progress, done, dataset.users, args)
    worked = ranks.total(worked)  # also waits for every rank's last block
    if ranks.rank() > 0:
        return None

    done = progress.read()[1]
    if not set(range(len(blocks))) <= done.keys():
        raise RuntimeError("some blocks were never done")  # cannot happen: a block is recorded or an error raised
    theta = np.lib.format.open_memmap(progress.where(), mode="r+")
    solved = sorted({user for block in blocks for user in block} | set(earlier.solved if earlier else []))
    population = mean_theta(theta, solved)
    unknown = np.setdiff1d(np.arange(len(dataset.users)), solved)
    theta[np.setdiff1d(unknown, earlier.rows if earlier else [])] = population  # no training history: the population profile
    theta.flush()
    validation = tokenize_histories(tokenizer, history_texts(dataset, VALIDATION, args), room_for_history(likelihood))
    heldout = heldout_nll(likelihood, theta, population, validation, solved, rng, budget)
    path = np.sum([record["nll"] for record in done.values()], axis=0) / max(1, sum(record["tokens"] for record in done.values()))
    facts = {**settings, "spread": spread.tolist(), "users_without_history": len(unknown), "heldout_nll": heldout,
             "lm_sensitivity": tiny and tiny["sensitivity"],
             "train_nll": {"before": float(path.flat[0]), "after": float(path.flat[-1])}, "train_nll_steps": path.ravel().tolist(),
             "tokens_per_second": round(worked / seconds), "seconds": round(seconds, 1), "ranks": ranks.count(),
             "peak_memory_mb": round(torch.cuda.max_memory_allocated(device) / 2**20) if device.type == "cuda" else peak_memory_mb(),
             "fingerprint": fingerprint(theta)}
    progress.finish(facts, {"users": dataset.users, "inferred": solved})
    report(facts, tiny)
    show_users(dataset, theta, texts, solved, likelihood, tokenizer)
    print(f"\nwrote profiles.npy profiles.json profiles_users.json to {args.run}\nnext: python 03_quantize.py --run {args.run}")


def already_done(run, settings):
    """Is profiles.npy whole, and made with exactly these settings?"""
    try:
        facts = load(run, "profiles.json")
        return all(facts.get(key) == value for key, value in settings.items()) and fingerprint(load(run, "profiles.npy")) == facts["fingerprint"]
    except UserError:
        return False


def report(facts, tiny):
    before, after = facts["train_nll"].values()
    print(f"\ntrain NLL per token {before:.4f} -> {after:.4f}; {facts['tokens_per_second']:,d} tokens x steps a second, {facts['seconds']:.0f} s")
    if facts["heldout_nll"]:
        print("validation NLL per token: " + ", ".join(f"{name} {value:.4f}" for name, value in facts["heldout_nll"].items()))
    if tiny:
        print("tiny LM, nats per token lost under a wrong word: " + ", ".join(f"{name} {value:.3f}" for name, value in tiny["sensitivity"].items()))


def main():
    args = parse_arguments()
    dataset, device = load_dataset(args.run), pick_device(args.device)
    with ranks.joined(), one_run_at_a_time(args.run) if ranks.rank() == 0 else contextlib.nullcontext():
        infer(dataset, device, args)


if __name__ == "__main__":
    guarded(main)
