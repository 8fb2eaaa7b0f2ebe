"""Stage 02: infer latent profiles of users as soft tokens of a frozen LLM. Sections 2.1, 2.3, Eq. (2)-(4).

A user's prompt is an ordered list of segments (Eq. 3), followed by y, the titles that the user liked:

    x^1                  theta^1    x^2 ...    theta^2    D_task                           y
    This user's hobby is <theta^1>. This user ... <theta^2>. Products that this user bought: Gold Guitar; ...

theta^m, one vector for each user and profile, stands in the place of a word and minimises
l_llm = -log P_LLM(y | x, theta, D_task)  (Eq. 2, 4), behind a mask (Fig. 4) under which a profile sees its
own name only; the task and y see all before them. In short (solve() and infer_block() do this with files):

    wide = fit_space()                     theta begins at the mean of words that could name it (music, ...)
    wide.task = fit_task(wide)             what all users share, the text's format, is learned as soft tokens
    wide_z = descend(wide)                 each user's theta by gradient descent, in all its d coordinates
    space = squeeze(wide, 256 of wide_z)   the r directions in which users differ most, and the mean user
    z = space.project(wide.theta(wide_z))  where every user lies along these: this is kept

Sizes: U users, M profiles, d the LLM's width, r coordinates of a user's z for each profile (d in the wide
space of the descent, but for --space words; at most --rank, if that is not 0, in the space that is kept), T
tokens of D_task; B users of a block, H tokens of their longest history, S tokens of prompt and history.
DEVIATION(k): row k of README's differences from the paper. "Note:" stands before what is easily overlooked.

What stands where; each part begins with a line of dashes:
    settings, data, model, train  the method: prompt, mask, likelihood, space, descent. Read it first; what it
                                  calls beside (make_blocks, pad, TokenNLL and others) stands further down.
    evaluate, running it          titles that theta has not seen; the flags, blocks of users, and solve()
    variants, low memory, opening the LLM, save, main: skip them at first

Reads:  dataset.json interactions.npy users.json items.json (01)
Writes: profiles.npy float32 (U, M, r), the coordinates z; space.pt, which turns z into theta;
        profiles.json, settings and likelihoods; profiles_users.json, who was inferred; lm-tiny/;
        until all is done blocks-*/, one file for each block of users
Run:    python 02_infer_profiles.py  # the demo, with its tiny LM: 1 min; --lm smollm2: a real LLM
"""

import shutil
import time
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import nn

from common import (
    PROCESS, READY, SEEN, TRAIN, UNFINISHED, VALIDATION, Parser, UserError, announce, at_least, check_same,
    count_parameters, do_all, fingerprint, finish, guarded, has_fast_bf16, is_out_of_memory, is_small,
    lm_fingerprint, lm_folder, load, load_dataset, load_language_model, of_first_process, once,
    overflows_in_fp16, peak_memory_mb, pick_device, pieces_of, progress, save_json, save_npy, seeded,
    train_tiny, wait_for_all)

# -------- settings

TASK_USERS = 24  # users whose histories make one step of the task prompt
TASK_JUDGES = 32  # users, at most, who decide which task prompt is kept: it is not trained on their histories
TASK_RATE = 0.3  # Adam's first step size for the task prompt, in standard deviations of its text's embeddings
TASK_CHECK = 8  # steps between two looks at the judges
NOISE_AT = 8  # the principal direction (the first is 0) along which users are taken to vary by chance alone
LOGIT_CHUNK = 4096  # tokens of y whose logits, one for each token of the vocabulary, are held at once
LOGITS = 2**27  # how many logits these are, at most: with Gemma's vocabulary those of 512 tokens of y


# -------- data: the prompt and the histories

@dataclass
class Segment:
    """A run of tokens. kind: begin, name (x^m: 01's "prompt"), theta, task, history; profile: m or None."""

    kind: str
    ids: list  # of a theta: [0], which holds its place
    profile: int | None = None


def prompt_segments(tokenizer, dataset):
    """Eq. (3): [x^1, theta^1, ..., x^M, theta^M, D_task], after a begin token if the tokenizer writes one."""
    segments = []
    first = tokenizer.encode("any text")[0]  # with the tokens that this tokenizer adds, if it adds any
    if first == tokenizer.bos_token_id:
        segments.append(Segment("begin", [first]))  # Note: all may see it: it is the same for everybody
    sentences = [profile["prompt"] for profile in dataset.profiles]
    beginning = tokenizer.encode(sentences[0], add_special_tokens=False)  # some put a space before a text
    for m, ids in enumerate([beginning] + pieces_of(tokenizer, sentences[1:])):
        segments.append(Segment("name", ids, m))
        segments.append(Segment("theta", [0], m))
    segments.append(Segment("task", pieces_of(tokenizer, [dataset.task_prompt])[0]))
    return segments


def segment_of_each_token(segments):
    """The segment to which each token of the prompt belongs: a list as long as the prompt."""
    return [segment for segment in segments for _ in segment.ids]


def build_positions(segments, mask):
    """Position of each token, (S,). Under the strict mask each profile restarts where the first begins:

        tokens      x^1 x^1 theta^1 x^2 theta^2 task task y
        positions    0   1     2     0     1     5    6   7

    Note: so the order of the profiles changes nothing (the mask makes them independent, as Fig. 4 has them);
    the task and y keep their places in the whole prompt. DEVIATION(3).
    """
    profiles = [segment.profile for segment in segment_of_each_token(segments)]
    positions = list(range(len(profiles)))
    if mask == "strict":
        first = min(place for place, profile in enumerate(profiles) if profile is not None)
        for place, profile in enumerate(profiles):
            if profile is not None:
                tokens_before = profiles[:place].count(profile)  # of the same profile
                positions[place] = first + tokens_before
    return torch.tensor(positions)


def build_visibility(segments, mask):
    """bool (S, S): may row i attend to column j? Fig. 4, which has rows and columns the other way round.

    Paper: "can only attend to their respective profile names and interactions". DEVIATION(2): attention is
    causal and the interactions come later, so theta cannot see them; they see theta. And x^m is cut off from
    other profiles too, else theta^1 reaches theta^2 through x^2.
    """
    tokens = segment_of_each_token(segments)
    visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()  # causality
    for row, own in enumerate(tokens):
        if own.kind in ("name", "theta") and mask == "strict":
            for column, other in enumerate(tokens[:row]):
                visible[row, column] = other.kind == "begin" or other.profile == own.profile
    return visible


def additive_mask(visible, dtype):
    """(1, 1, S, S): 0 where visible, else the dtype's lowest number (-inf makes NaN in some kernels)."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[None, None]


def history_texts(dataset, splits, args):
    """For each user the latest --max-history liked titles of these splits, oldest first, each as ' A Title;'.

    Latest by time or, where 01 knew no times, by the order of the rows. --history all takes the disliked
    titles as well; so does rated, which writes ' A Title +;' where it was liked and ' A Title -;' where not.
    DEVIATION(9): the paper's data point is a user-item pair, here it is a user; y is the user's titles.
    """
    plus, minus = (" +", " -") if args.history == "rated" else ("", "")
    liked_text = [f" {item['title']}{plus};" for item in dataset.items]
    disliked_text = [f" {item['title']}{minus};" for item in dataset.items]
    texts = [[] for _ in dataset.users]
    for user, item, label in dataset.rows(splits):  # not .tolist(): a list for each row is large
        if label:
            texts[user].append(liked_text[item])
        elif args.history != "liked":
            texts[user].append(disliked_text[item])
    return [lines[-args.max_history:] for lines in texts]


# -------- model: the likelihood

class ProfileLikelihood:
    """Eq. (4) with the D_task of Eq. (3): -log P_LLM(y | x^1, theta^1, ..., D_task), summed over y's tokens.

    segments: the prompt without y; it alone gives embeddings, mask and positions.
    task: float32 (T, d), the embeddings of D_task: at first of its text, then those that fit_task learns.
    """

    def __init__(self, model, segments, mask="strict", chunk=LOGIT_CHUNK):
        self.model = model
        self.segments = segments
        self.mask = mask
        self.body = model.base_model
        self.head = model.get_output_embeddings()
        self.word_table = model.get_input_embeddings()
        self.chunk = max(1, min(chunk, LOGITS // len(self.head.weight)))
        self.dtype = self.word_table.weight.dtype
        self.device = self.word_table.weight.device
        self.width = self.word_table.weight.shape[1]
        self.prompt_length = sum(len(segment.ids) for segment in segments)
        self.room = window_of(model) - self.prompt_length  # a history may have this many tokens
        self.n_profiles = sum(segment.kind == "theta" for segment in segments)
        task_ids = sum((segment.ids for segment in segments if segment.kind == "task"), [])
        self.task = self.vectors(task_ids)
        self.layouts = {}  # by history length: the last one alone, which all steps of a block share

    def layout(self, history_length):
        """(additive mask (1, 1, S, S), positions (1, S)) for a history of this many tokens."""
        if history_length not in self.layouts:
            full = self.segments + [Segment("history", history_length * [0])]
            mask = additive_mask(build_visibility(full, self.mask), self.dtype).to(self.device)
            positions = build_positions(full, self.mask)[None].to(self.device)
            self.layouts = {history_length: (mask, positions)}
        return self.layouts[history_length]

    def embeddings(self, theta, history_ids, task=None):
        """theta (B, M, d) fp32, history_ids (B, H), task (T, d) -> (B, S, d) in the LLM's dtype."""
        parts = []
        task = self.task if task is None else task  # given where ScaledGradient differentiates by it
        for segment in self.segments:
            if segment.kind == "theta":
                part = theta[:, segment.profile, None]  # Shape: (B, 1, d)
            elif segment.kind == "task":  # the next of several, if a prompt of your own has them
                part = task[:len(segment.ids)].expand(len(theta), -1, -1)  # Shape: (B, tokens, d)
                task = task[len(segment.ids):]
            else:
                part = self.vectors(segment.ids).expand(len(theta), -1, -1)
            parts.append(part.to(self.dtype))
        return torch.cat(parts + [self.word_table(history_ids)], dim=1)

    def vectors(self, ids=None):
        """float32 embeddings (n, d) of these tokens, None: of all."""
        if ids is None:
            ids = range(len(self.word_table.weight))
        # Note: by the layer, not from its table, for Gemma's layer scales the rows.
        return self.word_table(torch.as_tensor(ids, dtype=torch.long, device=self.device)).float()

    def hidden(self, theta, history_ids, task=None):
        """Last hidden states (B, S, d)."""
        mask, positions = self.layout(history_ids.shape[1])
        embedded = self.embeddings(theta, history_ids, task)
        return self.body(inputs_embeds=embedded, attention_mask=mask, position_ids=positions,
                         use_cache=False).last_hidden_state

    def __call__(self, theta, history_ids, lengths):
        """NLL in nats, float32 (B,). theta (B, M, d), history_ids (B, H) right-padded, lengths (B,)."""
        def user_nll(theta, task):
            # The state before each history token predicts it. Shape: (B, H, d)
            states = self.hidden(theta, history_ids, task)[:, self.prompt_length - 1:-1]
            is_real = torch.arange(history_ids.shape[1], device=self.device) < lengths[:, None]  # no padding
            # Cross entropy of the real tokens of all users, in one row. TokenNLL never holds all logits.
            token_nll = TokenNLL.apply(
                states[is_real], self.head.weight, self.head.bias, history_ids[is_real], self.chunk)
            by_token = token_nll.new_zeros(is_real.shape).masked_scatter(is_real, token_nll)  # Shape: (B, H)
            return by_token.sum(1)  # Shape: (B,)

        if self.dtype == torch.float16:  # which would round small gradients to 0: they are scaled on the way
            return ScaledGradient.apply(user_nll, theta, self.task)
        return user_nll(theta, self.task)


# -------- model: where a profile may lie

@dataclass
class Space:
    """theta^m = origin^m + (shrink^m * z^m) @ basis^m, where * is by element: a user is z (M, r)."""

    origin: torch.Tensor  # (M, d), theta at z = 0: in the descent the words' mean, later the mean user
    basis: torch.Tensor  # (M, r, d), orthogonal directions as long as the words' spread, or see words_space()
    words_mean: torch.Tensor  # (M, d), where all descents begin
    task: torch.Tensor  # (T, d), the soft tokens of D_task
    words: list  # of each profile its words
    vectors: list  # of each profile the embeddings of these words, (words, d)
    shrink: torch.Tensor | float = 1.0  # (M, r), how much of z is believed: see squeeze()

    def theta(self, z):
        """z (B, M, r) -> theta (B, M, d)."""
        return self.origin + torch.einsum("bmr,mrd->bmd", self.shrink * z, self.basis)

    def coordinates_of(self, vectors, m):
        """z (n, r) of vectors (n, d) that are projected into the space of profile m."""
        squared_length = self.basis[m].pow(2).sum(1).clamp(min=1e-12)  # some are 0 under --space words
        return (vectors - self.origin[m]) @ self.basis[m].T / squared_length

    def project(self, theta):
        """theta (B, M, d) of a descent -> z (B, M, r): the nearest points of the space, nothing shrunk."""
        return torch.stack([self.coordinates_of(theta[:, m], m) for m in range(theta.shape[1])], dim=1)

    def word_z(self, m):
        """z (words, r) of the words of profile m, nothing shrunk."""
        return self.coordinates_of(self.vectors[m], m)


@torch.no_grad()
def fit_space(likelihood, tokenizer, profiles):
    """The Space of all d directions around the words that could name each profile: DEVIATION(4).

    A word of several tokens is the mean of its tokens. Its weight is the root of the number of items that
    have it; words of a flag and the LLM's own weigh all the same. The words' weighted mean is the origin. The
    unit of all coordinates is their spread, the root mean square of (a word's coordinate - the mean's) over
    words, by weight, and over the d coordinates; so a whole word lies some sqrt(d) spreads from the mean.
    """
    origins = []
    bases = []
    words = []
    word_vectors = []
    for m, profile in enumerate(profiles):
        counts = profile.get("words", {})
        if len(counts) < 2:  # one word has no spread
            counts = dict.fromkeys(likeliest_words(likelihood, tokenizer, m), 1)
        pieces = pieces_of(tokenizer, [f" {word}" for word in counts])
        vectors = torch.stack([likelihood.vectors(ids).mean(0) for ids in pieces])
        weights = word_weights(counts.values()).to(likelihood.device)
        origin = weights @ vectors
        variance = weights @ (vectors - origin).pow(2)  # Shape: (d,)
        spread = variance.mean().sqrt()
        origins.append(origin)
        bases.append(spread * torch.eye(likelihood.width, device=likelihood.device))
        words.append(list(counts))
        word_vectors.append(vectors)
    origin = torch.stack(origins)
    return Space(origin=origin, basis=torch.stack(bases), words_mean=origin, task=likelihood.task,
                 words=words, vectors=word_vectors)


def squeeze(space, wide_z, rank):
    """The Space of the `rank` directions in which these users vary most, with their mean at the origin.

    wide_z (n, M, d): these users in `space`, that of the descent. By Space.project() all users get a z in the
    new one. Note: d coordinates also fit what a few titles ask for by chance. We assume that along the
    direction at NOISE_AT (if more are kept, along the first that is dropped) users vary by chance alone, and
    by chance as much along every other. Of a variance only variance - noise is then a difference of users,
    and the LLM is shown 1 - noise / variance of z (the form of probabilistic PCA, Tipping and Bishop 1999):
    titles not seen become likelier. z itself, by which users get their codes, is not shrunk. DEVIATION(4).
    """
    mean = wide_z.mean(0)  # Shape: (M, d)
    # Of (M, n, d): singular values (M, min(n, d)), directions (M, min(n, d), d)
    _, singular, directions = torch.linalg.svd((wide_z - mean).transpose(0, 1), full_matrices=False)
    variance = singular ** 2  # n times the variance; the ratio below is free of n
    kept = max(1, min(rank, len(wide_z) - 1))  # n users differ in at most n - 1 directions
    basis = directions[:, :kept] @ space.basis  # Shape: (M, r, d)
    by_chance = variance[:, max(kept, NOISE_AT):]  # empty where there are too few users
    noise = by_chance[:, :1] if by_chance.shape[1] else 0  # Shape: (M, 1)
    shrink = 1 - noise / variance[:, :kept].clamp(min=1e-30)  # Shape: (M, r)
    return replace(space, origin=space.theta(mean[None])[0], basis=basis, shrink=shrink)


# -------- train

def shared_nll(likelihood, space, histories, users, args):
    """Yield the NLL of these users with theta at its start: a sum for each block, one graph at a time."""
    chosen = [histories[user] for user in users]
    for block in make_blocks(chosen, args.block_size, token_budget_of(likelihood), likelihood.prompt_length):
        theta = space.words_mean.expand(len(block), -1, -1)
        yield likelihood(theta, *pad(chosen, block, likelihood.device)).sum()


def fit_task(likelihood, space, histories, args):
    """Learn what all users share: soft tokens (T, d) of D_task, with theta at its start. DEVIATION(11).

    Adam on -log P(y | x, theta, D_task). Some users are judges, on whom nothing is trained: every TASK_CHECK
    steps the soft tokens are tried on the judges' histories, and the best ones are returned (and left in
    likelihood.task). Note: fewer than 5 users leave no judge; then all trials are equal and the first, the
    text, stays. Histories are of training (of cold users: support) rows: no other row influences theta.
    """
    rng = np.random.default_rng(args.seed)
    users = rng.permutation([user for user, ids in enumerate(histories) if len(ids)])
    judges, fitted = np.split(users, [min(TASK_JUDGES, len(users) // 5)])
    # No more gradients in all than the descent will take: 300 users x 3 steps are 37 steps of TASK_USERS.
    steps = min(args.task_steps, len(users) * args.steps // TASK_USERS)
    task = likelihood.task.clone().requires_grad_()
    optimizer = torch.optim.Adam([task], lr=TASK_RATE * likelihood.task.std().item())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, steps))
    best_task = likelihood.task
    best_judged = float("inf")
    for step in progress(range(steps + 1), "learning the task prompt", "step"):
        likelihood.task = task.detach()
        if step % TASK_CHECK == 0 or step == steps:
            with torch.no_grad():
                judged = sum(nll.item() for nll in shared_nll(likelihood, space, histories, judges, args))
            if judged < best_judged:
                best_task = task.detach().clone()
                best_judged = judged
        if step < steps:
            chosen = rng.choice(fitted, min(TASK_USERS, len(fitted)), replace=False)
            likelihood.task = task  # the likelihood now depends on what Adam moves
            optimizer.zero_grad()
            for nll in shared_nll(likelihood, space, histories, chosen, args):
                nll.backward()
            check_finite(task.grad, "the task prompt's gradient", likelihood.dtype)
            optimizer.step()
            schedule.step()
    likelihood.task = best_task
    return best_task


def descend(likelihood, space, ids, lengths, args):
    """Minimise Eq. (4) and the prior over z, users' coordinates in `space`. DEVIATION(4), DEVIATION(14).

    ids (B, H), lengths (B,). Returns (z fp32 (B, M, r), r = d but for --space words; the NLL at the start and
    after each step (steps + 1, B)). A step is size * gradient. Each user has a size for each profile, else
    the profile on which the history depends most would hold the others back. At first the coordinate with a
    profile's largest gradient moves by --lr, the most that any may in a step; then size = 1 / curvature =
    |move|^2 / <move, change of the gradient> (Barzilai and Borwein 1988). Where a step would raise a user's
    loss, the user stays, keeps the gradient, and tries half the sizes next.
    """
    def evaluate(z, wants_gradient):
        """(NLL (B,), loss (B,), the loss's gradient (B, M, r) or 0) at z (B, M, r)."""
        gradient = torch.zeros_like(z)
        with torch.set_grad_enabled(wants_gradient):
            z = z.detach().requires_grad_(wants_gradient)
            nll = likelihood(space.theta(z), ids, lengths)  # Eq. (4)
            # l = l_llm + prior / 2 ||z||^2: a Gaussian prior, by default none, as in the paper.
            loss = nll + args.prior / 2 * (z ** 2).sum((1, 2))
            if wants_gradient:
                gradient, = torch.autograd.grad(loss.sum(), z)
        # Low precision may overflow in the gradient alone. NLL and loss are then set to NaN, and the step is
        # not taken: `trial_loss < loss` below is false.
        overflowed = ~gradient.isfinite().flatten(1).all(1)
        nll, loss = (values.detach().masked_fill(overflowed, torch.nan) for values in (nll, loss))
        return nll, loss, gradient

    def largest_size(gradient):
        """Bounds (B, M): no coordinate moves by over --lr, nor past a prior's minimum, z = 0 (1 / prior)."""
        by_lr = args.lr / gradient.abs().amax(2).clamp(min=1e-30)
        return by_lr.clamp(max=1 / args.prior) if args.prior else by_lr

    z = space.origin.new_zeros(len(ids), *space.basis.shape[:2])  # at space.origin, the words' mean
    nll, loss, gradient = evaluate(z, True)
    step_size = largest_size(gradient)
    nlls = [nll]
    for step in range(1, args.steps + 1):
        trial = z - step_size[:, :, None] * gradient
        trial_nll, trial_loss, trial_gradient = evaluate(trial, step < args.steps)
        improved = trial_loss < loss  # Shape: (B,). Who improved takes the trial's values, who did not stays
        if step < args.steps:
            move = trial - z
            change = trial_gradient - gradient
            curvature = (move * change).sum(2) / (move ** 2).sum(2).clamp(min=1e-30)  # Shape: (B, M)
            # A curvature that is not positive says nothing of how far the minimum is.
            by_curvature = torch.where(curvature > 0, 1 / curvature, torch.inf)
            next_size = by_curvature.minimum(largest_size(trial_gradient))
            step_size = torch.where(improved[:, None], next_size, step_size / 2)
            gradient = torch.where(improved[:, None, None], trial_gradient, gradient)
        z = torch.where(improved[:, None, None], trial, z)
        nll = torch.where(improved, trial_nll, nll)
        loss = torch.where(improved, trial_loss, loss)
        nlls.append(nll)
    return z, torch.stack(nlls)


# -------- here the method ends; evaluate: does theta hold for titles that it has not seen?

def heldout_nll(likelihood, space, z, histories, users, profiles, rng, block_size=None):
    """nll_per_token() of validation titles under variants of z:

    own: the user's; population: 0, the mean user (--rank 0, --space words: the words' mean);
    shuffled: the z of another of these users;
    and of several profiles for each, by its name: the user's own z, but this one profile of another user.
    """
    ring = rng.permutation(np.array(users, int))  # a random circle: each borrows the z of the one before
    neighbour = np.arange(len(z))
    neighbour[ring] = np.roll(ring, 1)

    def variants(block):
        own = z[block]
        other = z[neighbour[block]]
        found = {"own": own, "population": np.zeros_like(own)}
        if len(users) > 1:
            found["shuffled"] = other
        if len(users) > 1 and len(profiles) > 1:
            for m, profile in enumerate(profiles):
                swapped = own.copy()
                swapped[:, m] = other[:, m]
                found[profile["name"]] = swapped
        return found

    return nll_per_token(likelihood, space, variants, only(histories, users), block_size)


@torch.no_grad()
def nll_per_token(likelihood, space, variants, histories, block_size=None):
    """({name: nats per token of these histories}, {name: standard error}, how many users were left out).

    variants: a function of a block of users that returns {"own" and other names: z (B, M, r)}. The error is
    that of the difference to own, over users; fewer than ENOUGH of them tell none. block_size: most users of
    a block. Users of whom an NLL is not finite are left out, with a WARNING. Without any tokens: {}.
    """
    nlls = {}  # of each variant the nats of each user, in the order of the blocks
    tokens = []  # of these users
    budget = token_budget_of(likelihood)
    blocks = make_blocks(histories, block_size, budget, likelihood.prompt_length)
    for block in progress(blocks, "evaluating", "block"):
        ids, lengths = pad(histories, block, likelihood.device)
        tokens.extend(lengths.tolist())
        for name, z in variants(block).items():
            theta = space.theta(torch.tensor(z, device=likelihood.device))
            nlls.setdefault(name, []).extend(likelihood(theta, ids, lengths).tolist())
    finite = np.isfinite(list(nlls.values())).all(0)  # Shape: (users,)
    if not finite.all():
        bad = f"{(~finite).sum():,d} of {len(finite):,d} users"
        todo = "; --dtype bf16 or fp32 may tell them" if likelihood.dtype == torch.float16 else ""
        print(f"WARNING: the likelihood of the titles of {bad} is not finite in {likelihood.dtype}: the "
              f"figures leave these users out{todo}")
        tokens = np.array(tokens)[finite].tolist()
        nlls = {name: np.array(of_users)[finite] for name, of_users in nlls.items()} if tokens else {}
    means = {name: sum(of_users) / sum(tokens) for name, of_users in nlls.items()}
    errors = {}
    others = [name for name in nlls if name != "own"] if len(tokens) >= ENOUGH else []
    for name in others:
        # The mean difference is a ratio of two sums over users. So its error is that of what is left when
        # each user's tokens at the mean difference are taken off.
        difference = np.subtract(nlls[name], nlls["own"])
        rest = difference - (means[name] - means["own"]) * np.array(tokens)
        errors[name] = float(np.linalg.norm(rest) / sum(tokens) * (len(tokens) / (len(tokens) - 1)) ** 0.5)
    return means, errors, int((~finite).sum()) if blocks else 0


# -------- running it: the flags

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--lm", default="auto",
        help="tiny (trained here), smollm2, gemma3-270m, gpt2, llama2-7b (paper), a hub name, a folder or a "
        ".gguf file; auto: tiny on the demo, llama2-7b on a GPU of 20 GiB, else gpt2")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="auto: fp16 on a GPU (bf16 for Gemma 3), bf16 on a CPU that has it, fp32 for the tiny LM and "
        "elsewhere")
    add("--steps", type=at_least(1), default=3, help="gradient steps of a user")
    add("--lr", type=at_least(1e-12, float, 1e6), default=0.5,
        help="most that a coordinate of theta moves in a step, in the words' spread (with --space words: in "
        "their standard deviation along it; paper: AdamW's .001)")
    add("--prior", type=at_least(0, float, 1e6), default=0.0, help="weight of a Gaussian prior (paper: 0)")
    add("--space", choices=("users", "words"), default="users",
        help="users: theta moves in all d coordinates, and directions in which users differ are kept; words: "
        "it moves among the words alone, in at most --rank directions")
    add("--rank", type=at_least(0), default=8,
        help="most directions kept; 0: all, unshrunk (paper; with --space words: all of the words')")
    add("--task-steps", type=at_least(0), default=48,
        help="most steps of the shared task prompt; 0: its text stays as it is (paper)")
    add("--mask", choices=("strict", "causal"), default="strict", help="Fig. 4, or causality alone")
    add("--history", choices=("liked", "all", "rated"), default="liked", help="rows in y; rated adds + or -")
    add("--max-history", type=at_least(1), default=20, help="most titles of a user, the latest")
    add("--block-size", type=at_least(1), help="most users at once (default: by cache or memory)")
    add("--tiny-sentences", type=at_least(64), help="to train the tiny LM on (default: by items)")
    add("--users", type=Path, help="file of new users' raw ids, one a line: infer these alone")
    add("--fresh", action="store_true", help="forget unfinished runs and infer again")
    return parser.parse_args()


# -------- tokens and blocks of users

METHOD = 4  # goes up when the same flags give another theta: a finished run of before is then inferred anew
DIRECTION_USERS = 256  # users whose theta gives the directions that are kept of everybody's
ENOUGH = 10  # users of whom a standard error says something
HELDOUT_USERS = 2048  # of more users so many, drawn at random, tell how theta does on titles not seen
KEPT_USERS = 128  # users on whose own histories it is tried whether what is kept of theta still holds
LENGTH_SPREAD = 0.09  # the shortest prompt of a block is at most this share below its longest
CACHE_BYTES = 2_400_000  # of a CPU's cache: a block's hidden states in one layer shall fit into them
ACTIVATIONS = 40  # numbers that a layer keeps for each token until the gradient, in units of the LLM's width
LEAST_TOKENS_CPU = 768  # of a block, however wide the LLM is
LEAST_TOKENS_GPU = 512


def tokenize_histories(tokenizer, texts, room):
    """Per user an int32 array of token ids: the newest titles that fit whole into `room` tokens.

    A title that would not fit even alone is left out.
    """
    distinct = sorted(set(chain(*texts)))
    ids_of = dict(zip(distinct, pieces_of(tokenizer, distinct)))
    histories = []
    for lines in texts:
        kept = []
        for text in reversed(lines):  # the newest title first
            ids = ids_of[text]
            if len(ids) > room:
                continue
            if len(kept) + len(ids) > room:
                break
            kept = ids + kept
        histories.append(np.array(kept, np.int32))
    return histories


def make_blocks(histories, block_size, token_budget, prompt_length):
    """Users with a history, in blocks of at most block_size users, or if None of token_budget tokens.

    Padding stays below LENGTH_SPREAD. Longest first: too little memory shows early.
    """
    blocks = []
    longest = 0  # prompt and history of the first user of the last block
    solvable = [user for user, ids in enumerate(histories) if len(ids)]
    for user in sorted(solvable, key=lambda user: -len(histories[user])):
        length = prompt_length + len(histories[user])
        much_shorter = length < (1 - LENGTH_SPREAD) * longest
        if not blocks or much_shorter or len(blocks[-1]) >= (block_size or token_budget // longest):
            blocks.append([])
            longest = length
        blocks[-1].append(user)
    return blocks


def token_budget_of(likelihood):
    """Tokens a block: what keeps a layer in a CPU's cache, or half of a GPU's memory beside the LLM."""
    width = likelihood.width
    size = likelihood.dtype.itemsize
    if likelihood.device.type == "cpu":
        return max(LEAST_TOKENS_CPU, CACHE_BYTES // (width * size))
    # Note: total memory, not what is free now: a run that goes on must cut the same blocks.
    free_bytes = torch.cuda.get_device_properties(likelihood.device).total_memory
    free_bytes -= size * count_parameters(likelihood.model)
    layers = likelihood.model.config.get_text_config().num_hidden_layers
    return max(LEAST_TOKENS_GPU, free_bytes // 2 // (ACTIVATIONS * width * layers * size))


def only(histories, users):
    """The histories with those of all other users left empty."""
    found = [ids[:0] for ids in histories]
    for user in users:
        found[user] = histories[user]
    return found


def pad(histories, users, device):
    """(ids (B, H), lengths (B,)) of these users; padded with 0 on the right, where no token looks."""
    rows = [torch.from_numpy(histories[user]).long() for user in users]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths


def infer_block(likelihood, wide, histories, users, args, raw_ids, space=None):
    """{z fp32 (B, M, r), nll [steps + 1] summed over users, tokens, seconds}. UserError if not finite.

    wide: the Space in which these users (indices) descend; space: another one, if z is to be in its
    coordinates; raw_ids: what the data set calls all its users, for the message.
    """
    clock = time.perf_counter()
    ids, lengths = pad(histories, users, likelihood.device)
    z, nlls = descend(likelihood, wide, ids, lengths, args)
    if space is not None:
        z = space.project(wide.theta(z))
    bad = [str(raw_ids[user]) for user, good in zip(users, nlls[-1].isfinite().tolist()) if not good]
    if bad:
        raise UserError(f"the likelihood is not finite for {len(bad)} users, among them {', '.join(bad[:5])}",
                        str(likelihood.dtype), "take --dtype bf16 or fp32")
    return {"z": z.cpu(), "nll": nlls.cpu().numpy().sum(1, dtype=np.float64).tolist(),
            "tokens": int(lengths.sum()), "seconds": time.perf_counter() - clock}


def is_squeezed(args):
    """Is less kept of a user than all directions of the descent?"""
    return args.space == "users" and args.rank > 0


def plan_blocks(likelihood, histories, args):
    """(blocks of users, how many of them come first).

    The first hold DIRECTION_USERS users, or all if there are fewer. Note: they are drawn at random; blocks
    go by length, so the first ones of all users would hold the longest histories.
    """
    def blocks_of(users):
        return make_blocks(only(histories, users), args.block_size, token_budget_of(likelihood),
                           likelihood.prompt_length)

    users = np.arange(len(histories))
    if args.users or not is_squeezed(args):  # a space is there, or needs nobody's theta
        return blocks_of(users), 0
    drawn = seeded(args.seed, 4).permutation([user for user in users if len(histories[user])])
    first = blocks_of(drawn[:DIRECTION_USERS])
    return first + blocks_of(drawn[DIRECTION_USERS:]), len(first)


def solve(work, blocks, n_first, likelihood, tokenizer, histories, dataset, args):
    """Infer what has no file yet in `work`; processes share the blocks.

    blocks, n_first: of plan_blocks(). The users of the first blocks tell the directions of the space to which
    all are squeezed. Returns (the Space that is kept, the Space of the descent).
    """
    def infer_blocks(numbers, space, what):
        pieces = []
        for number in numbers:
            path = work / f"{number:06d}.pt"
            pieces.append((path, infer_block, likelihood, wide, histories, blocks[number], args,
                           dataset.users, space))
        do_all(pieces, what, "block", likelihood.device)

    device = likelihood.device
    wide = shared_space(work, "wide.pt", device, make_wide, work, likelihood, tokenizer, histories, dataset,
                        args)
    likelihood.task = wide.task
    if PROCESS == 0:
        for profile, words in zip(dataset.profiles, wide.words):
            print(f"words of {profile['name']}: {', '.join(words)}")
    if n_first:  # their files hold coordinates in `wide`: gather() will project them
        infer_blocks(range(n_first), None, "inferring the first users")
    space = shared_space(work, "space.pt", device, make_space, work, n_first, wide, args)
    infer_blocks(range(n_first, len(blocks)), space if is_squeezed(args) else None, "inferring")
    return space, wide


def shared_space(work, name, device, make, *inputs):
    """The Space make(*inputs), which the first process writes into this file and all read."""
    wait_for_all()  # until what it is made of is there
    if PROCESS == 0:
        once(work / name, lambda: saved_space(make(*inputs)))
    wait_for_all()
    return open_space(work, device, name)


def make_wide(work, likelihood, tokenizer, histories, dataset, args):
    """The Space of the descent; with --users that of the first run, where new users live too."""
    for path in [*work.glob("[0-9]*.pt"), work / "space.pt"]:  # made in another space, worth nothing
        path.unlink(missing_ok=True)
    if args.users:
        space = open_space(args.run, likelihood.device)
        return whole_space(space) if is_squeezed(args) else space
    wide = fit_space(likelihood, tokenizer, dataset.profiles)
    if args.space == "words":
        wide = words_space(wide, dataset.profiles, args.rank)
    if likelihood.task.numel() and args.task_steps:  # the prompt has a task, and it is to be learned
        clock = time.perf_counter()
        wide.task = fit_task(likelihood, wide, histories, args)
        print(f"the task prompt took {time.perf_counter() - clock:.0f} s")
    return wide


def make_space(work, n_first, wide, args):
    """The Space that is kept."""
    if args.users:
        return open_space(args.run, wide.origin.device)
    if not is_squeezed(args):
        return wide
    z = [load(work, f"{number:06d}.pt", ("z",))["z"] for number in range(n_first)]
    return squeeze(wide, torch.cat(z).to(wide.origin.device), args.rank)


def check_finite(values, what, dtype):
    """UserError where low precision overflowed."""
    if not values.isfinite().all():
        raise UserError(f"{what} is not finite", str(dtype), "run 02 with --dtype bf16 or fp32")


# -------- variants of the space, and its words

def word_weights(counts):
    """Weights (words,) that sum to 1, from how often each word occurs."""
    roots = torch.tensor(list(counts)).float().sqrt()
    return roots / roots.sum()


def words_space(wide, profiles, rank):
    """--space words: theta moves among the words alone, along the principal directions of their Gaussian.

    A direction is as long as the words' standard deviation along it. n words vary in at most n - 1 of them;
    rank 0 keeps all. Changes the space of fit_space, and returns it.
    """
    origins = []
    bases = []
    for m, profile in enumerate(profiles):
        counts = profile.get("words", {})
        if len(counts) < 2:  # as in fit_space() the words are the LLM's own
            counts = dict.fromkeys(wide.words[m], 1)
        origin, basis = gaussian_of(wide.vectors[m], word_weights(counts.values()), rank or len(counts))
        origins.append(origin)
        bases.append(basis)
    # Profiles of fewer words than others have directions of length 0 at the end.
    size = max(len(basis) for basis in bases)
    wide.basis = torch.stack([nn.functional.pad(basis, (0, 0, 0, size - len(basis))) for basis in bases])
    wide.origin = torch.stack(origins)
    wide.words_mean = wide.origin
    return wide


def gaussian_of(vectors, weights, rank):
    """The Gaussian N(origin, basis^T basis) fitted to words: (origin (d,), basis (r, d)).

    vectors (n, d), weights (n,), which sum to 1.
    """
    weights = weights.to(vectors)
    origin = weights @ vectors
    weighted = weights.sqrt()[:, None] * (vectors - origin)
    _, size, directions = torch.linalg.svd(weighted, full_matrices=False)
    kept = max(1, min(rank, len(vectors) - 1))
    return origin, size[:kept, None] * directions[:kept]


def whole_space(space):
    """The wide space from which a squeezed one was made."""
    spread = space.basis.norm(dim=2).amax(1)  # squeeze() kept the length of a direction. Shape: (M,)
    everywhere = torch.eye(space.basis.shape[2], device=space.basis.device)
    return Space(origin=space.words_mean, basis=spread[:, None, None] * everywhere,
                 words_mean=space.words_mean, task=space.task, words=space.words, vectors=space.vectors)


# -------- low memory and low precision

class TokenNLL(torch.autograd.Function):
    """-log softmax(hidden W^T + b)[target] per token, `chunk` rows of logits at a time.

    The same as torch's cross_entropy, which would hold the logits of a whole block: tokens x vocabulary. The
    gradient of hidden, (softmax - onehot) W, is made in forward(), while the logits are there.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = nn.functional.linear(hidden[rows], weight, bias).float()  # Shape: (chunk, vocabulary)
            log_normalizer = logits.logsumexp(1, keepdim=True)
            nll[rows] = (log_normalizer - logits.gather(1, targets[rows, None])).squeeze(1)
            if gradient is not None:
                error = logits.sub_(log_normalizer).exp_()  # the softmax, in the logits' memory
                error[torch.arange(len(error), device=error.device), targets[rows]] -= 1  # - onehot
                gradient[rows] = error.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx, upstream):
        gradient, = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None, None


class ScaledGradient(torch.autograd.Function):
    """nll(theta, task) (B,) of an fp16 LLM.

    fp16 would round small gradients to 0. So backward() sends them through the LLM times 64 and divides the
    result; where that overflows, it sends them again times 1.
    """

    @staticmethod
    def forward(ctx, nll, theta, task):
        ctx.inputs = [value.detach().requires_grad_(value.requires_grad) for value in (theta, task)]
        with torch.enable_grad():
            ctx.nll = nll(*ctx.inputs)
        return ctx.nll.detach()

    @staticmethod
    def backward(ctx, upstream):
        wanted = [value for value in ctx.inputs if value.requires_grad]
        for scale in (64.0, 1.0):  # 1024 would be too much for Llama-2-7B's shape
            # Note: upstream is a weight of each user; relative to the largest it is safe in fp16.
            largest = upstream.abs().max().clamp(min=1e-30)
            found = torch.autograd.grad(ctx.nll, wanted, scale * upstream / largest, retain_graph=True)
            if all(gradient.isfinite().all() for gradient in found):
                break
        del ctx.nll  # frees the LLM's graph
        found = iter([gradient * (largest / scale) for gradient in found])
        return None, *(next(found) if value.requires_grad else None for value in ctx.inputs)


# -------- opening the LLM

def window_of(model):
    """Tokens that this LLM can read, 4096 at most."""
    # Some LLMs were trained with a sliding window. Our mask shows the whole text, so it must fit into that.
    limits = "max_position_embeddings", "sliding_window", "window_size"
    config = model.config.get_text_config()  # of the language part, where the model has others
    return min(getattr(config, key, None) or 4096 for key in limits)


@torch.no_grad()
def find_flaw(likelihood):
    """What this LLM does that the method cannot have, or None.

    Not every architecture obeys a 4-D mask for several users, or positions that are given to it.
    """
    ids = torch.arange(4, device=likelihood.device).repeat(2, 1)  # two users
    # Are the logits what the head makes of the last states, and no more?
    plain = likelihood.head(likelihood.body(ids).last_hidden_state)
    if not torch.allclose(plain.float(), likelihood.model(ids).logits.float(), 0.01, 0.01, equal_nan=True):
        return "this LLM rescales its logits"
    # Change theta^1, then the last token: does any state change that must not see them?
    kinds = [segment.kind for segment in segment_of_each_token(likelihood.segments)]
    theta = likelihood.vectors([0]).repeat(2, likelihood.n_profiles, 1)
    states = likelihood.hidden(theta, ids)
    mask, positions = likelihood.layout(4)
    visible = mask[0, 0] == 0
    first = theta.clone()
    last = ids.clone()
    first[:, 0, 0] += 1
    last[0, -1] += 1
    for column, changed in ((kinds.index("theta"), (first, ids)), (-1, (theta, last))):
        change = (likelihood.hidden(*changed) - states).abs()
        noticed = (change > 9 * torch.finfo(change.dtype).eps * states.abs().max()).any(2)[0]
        if (noticed & ~visible[:, column]).any():
            return "this LLM sees through the mask"
    # Move the last token one position nearer: does its state change?
    nearer = positions.clone()
    nearer[:, -1] -= 1
    moved = likelihood.body(inputs_embeds=likelihood.embeddings(theta, ids), attention_mask=mask,
                            position_ids=nearer, use_cache=False).last_hidden_state
    if likelihood.mask == "strict" and torch.equal(moved, states):
        return "this LLM ignores positions, which make profiles exchangeable (--mask causal does without)"
    return None


def check_ids(texts, model, name):
    """UserError where lists of token ids have one that the model does not have."""
    if max(np.max(ids, initial=0) for ids in texts) >= len(model.get_input_embeddings().weight):
        raise UserError("the tokenizer writes tokens that the model does not have", name,
                        "take the model's own tokenizer")


def open_model(dataset, args, device, length, room=20):
    """(likelihood, tokenizer, {fingerprint, sensitivity} of the LLM); fills in args.lm and args.dtype.

    length: how many titles a history has at most, for which the tiny LM is trained; None: it is there
    already. room: GiB of a GPU with which --lm auto takes Llama-2-7B in 16 bits. sensitivity: of the tiny LM,
    see common.sensitivity.
    """
    on_gpu = device.type == "cuda"
    if args.lm == "auto":
        needed = room * 2**30 * (2 if args.dtype == "fp32" else 1)
        roomy = on_gpu and torch.cuda.get_device_properties(device).total_memory >= needed
        if dataset.name == "demo":
            args.lm = "tiny"
        else:
            args.lm = "llama2-7b" if roomy else "gpt2"
        args.lm = of_first_process(args.lm)  # for GPUs may be unlike
        if PROCESS == 0:
            print(f"--lm auto chose {args.lm}")
    tiny = args.lm == "tiny"
    if tiny and length and PROCESS == 0:
        train_tiny(dataset, args.run / "lm-tiny", length, args)
    if not tiny and PROCESS == 0:
        lm_folder(args.lm)  # converts a GGUF file
    wait_for_all()  # the other processes load what the first one made
    facts = load(args.run, "lm-tiny/tiny.json", ("sensitivity",)) if tiny else {}
    name = str(args.run / "lm-tiny") if tiny else lm_folder(args.lm)
    if args.dtype == "auto":
        args.dtype = "fp32"
        if not tiny and on_gpu:
            args.dtype = "bf16" if overflows_in_fp16(name) else "fp16"
        elif not is_small(name) and has_fast_bf16():
            args.dtype = "bf16"
        args.dtype = of_first_process(args.dtype)
        if PROCESS == 0:
            print(f"--dtype auto chose {args.dtype}")
    if PROCESS == 0 and not Path(name).is_dir():
        print(f"loading {name}: unless cached, a download (gpt2 0.5 GB, llama2-7b 13.5 GB)")
    model, tokenizer = load_language_model(name, DTYPES[args.dtype], device)
    segments = prompt_segments(tokenizer, dataset)
    check_ids((segment.ids for segment in segments), model, args.lm)
    likelihood = ProfileLikelihood(model, segments, args.mask)
    # Outside the try below, which would blame the LLM for a bug in build_visibility or build_positions.
    likelihood.layout(4)
    try:
        flaw = find_flaw(likelihood) if likelihood.room > 4 else "no title fits into the LLM's window"
    except Exception as error:  # it takes no embeddings, mask or positions
        if is_out_of_memory(error):
            raise
        flaw = f"this LLM cannot read the prompt: {error!r:.150}"
    if flaw:
        raise UserError(flaw, model.config.model_type, "change --lm")
    lm = {"fingerprint": lm_fingerprint(model, tokenizer), "sensitivity": facts.get("sensitivity")}
    return likelihood, tokenizer, lm


OWN_WORDS = 16  # how many of the LLM's own words stand for a profile whose items have no attributes
LIKELIEST = 200  # they are taken from so many likeliest words after the profile's name
BARE_PROMPT = "This user is"  # a prompt that names no profile


@torch.no_grad()
def likeliest_words(likelihood, tokenizer, m):
    """The LLM's own words for a profile whose items have no attributes, at most OWN_WORDS.

    Function words are likely after any prompt. So the likeliest words after x^m are ranked by a ratio: how
    much likelier they are there than after BARE_PROMPT, which names no profile.
    """
    def next_word(ids):
        tokens = torch.tensor([begin + ids], device=likelihood.device)
        return likelihood.model(tokens).logits[0, -1].float().softmax(0)

    begin = []
    for segment in likelihood.segments:
        if segment.kind == "begin":
            begin = segment.ids
        elif segment.kind == "name" and segment.profile == m:
            name = segment.ids
    after_name = next_word(name)
    after_bare = next_word(tokenizer.encode(BARE_PROMPT, add_special_tokens=False))
    likeliest = after_name.topk(min(LIKELIEST, len(after_name))).indices
    ratio = after_name[likeliest] / after_bare[likeliest].clamp(min=1e-12)
    words = []
    for token in likeliest[ratio.argsort(descending=True)].tolist():
        # What byte-level tokenizers and sentencepiece write for the space before a word.
        begins_a_word = (tokenizer.convert_ids_to_tokens(token) or "")[:1] in ("\u0120", "\u2581")
        word = tokenizer.decode([token]).strip().lower()
        # In feature_bank.csv "unknown" says that nothing was inferred.
        tells_something = word.isalpha() and len(word) > 2 and word not in (*ENGLISH_STOP_WORDS, "unknown")
        if begins_a_word and tells_something and word not in words:
            words.append(word)
        if len(words) == OWN_WORDS:
            break
    if len(words) < 2:
        raise UserError(f"no item names profile {m + 1}, and the LLM has {len(words)} words of its own",
                        "dataset.json", "run 01 with --hobby-words or --background-words")
    return words


# -------- save

SPACE_TENSORS = ("origin", "basis", "words_mean", "task", "shrink")
FILES = ("profiles.npy", "profiles_users.json", "space.pt", "profiles.json")
RECORDED = ("lm", "dtype", "steps", "lr", "prior", "space", "rank", "task_steps", "mask", "history",
            "max_history", "tiny_sentences", "seed")  # the settings on which theta depends


def open_space(folder, device, name="space.pt"):
    """The Space in a file of a folder."""
    saved = load(folder, name, (*SPACE_TENSORS, "words", "vectors"))
    tensors = {key: saved[key].to(device) for key in SPACE_TENSORS}
    return Space(**tensors, words=saved["words"], vectors=[found.to(device) for found in saved["vectors"]])


def saved_space(space):
    """What space.pt holds."""
    tensors = {key: torch.as_tensor(getattr(space, key)).cpu() for key in SPACE_TENSORS}
    return {**tensors, "words": space.words, "vectors": [found.cpu() for found in space.vectors]}


def space_fingerprint(space):
    """Of all that space.pt holds."""
    saved = saved_space(space)
    arrays = [saved[key].numpy() for key in SPACE_TENSORS]
    return fingerprint(*arrays, *(found.numpy() for found in saved["vectors"]), saved["words"])


def publish(work, run):
    """Make the FILES in a work folder the run's own, all at once.

    From the moment at which the folder is renamed to READY they count. A kill after it loses nothing, for
    whoever reads the run next calls finish(), too.
    """
    for path in work.iterdir():
        if path.name not in FILES:
            path.unlink()
    work.replace(run / READY)
    finish(run)


def read_profiles(run):
    """(profiles.json, profiles.npy (U, M, r), profiles_users.json); UserError unless they are of one run."""
    keys = (*RECORDED, "dataset_fingerprint", "lm_fingerprint", "profiles", "rows_kept", "train_tokens",
            "train_nll_steps", "seconds", "fingerprint", "users_fingerprint", "space_fingerprint")
    facts = load(run, "profiles.json", keys)
    z = load(run, "profiles.npy")
    owners = load(run, "profiles_users.json", ("users", "inferred"))
    check_same(run, "profiles.npy", "profiles.json", fingerprint(z), facts["fingerprint"])
    check_same(run, "profiles_users.json", "profiles.json", fingerprint(owners), facts["users_fingerprint"])
    found = space_fingerprint(open_space(run, "cpu"))
    check_same(run, "space.pt", "profiles.json", found, facts["space_fingerprint"])
    return facts, z, owners


def rows_that_stay(run, dataset, settings, path):
    """--users: (old facts, old z (n, M, r), {user: row of the old z}, users of the file who have no old z).

    A user is an index of today's data set, which need not be that of the first run: raw ids tell who is who.
    """
    facts, old, owners = read_profiles(run)
    changed = [key for key in settings if key != "dataset_fingerprint" and facts.get(key) != settings[key]]
    if changed:
        raise UserError(f"the first run had other settings ({', '.join(changed)})", run,
                        "repeat its flags, or infer all users anew, without --users")
    index = {raw: user for user, raw in enumerate(dataset.users)}
    asked = set(map(str.strip, path.read_text("utf-8-sig", errors="replace").splitlines())) - {""}
    served = asked & index.keys()
    if not asked:
        raise UserError("the file names no user", path, "write one raw user id a line")
    say_who_is_missing(run, asked - served, path)
    if not served:
        raise UserError(f"none of the file's {len(asked)} users is in the data set", path,
                        "run 01 with their rows")
    rows = {}
    for row in owners["inferred"]:
        user = index.get(owners["users"][row])
        if user is not None:
            rows[user] = row
    missing = {index[raw] for raw in served} - rows.keys()
    if len(missing) < len(served) and PROCESS == 0:
        print(f"{len(served) - len(missing):,d} users of {path} have a theta, which stays as it is")
    return facts, old, rows, missing


def say_who_is_missing(run, strangers, path):
    """WARNING lines for users of the file whom stage 01 dropped or never saw."""
    dropped = set()
    if (run / "dropped_users.json").exists():
        dropped = strangers & set(load(run, "dropped_users.json"))
    if dropped:
        facts = load(run, "dataset.json", ("min_interactions", "subsample_users", "max_per_user"))
        flags = f"--min-interactions {facts['min_interactions']}"
        for key in ("subsample_users", "max_per_user"):
            if facts[key]:
                flags += f", --{key.replace('_', '-')} {facts[key]}"
        warn_of(dropped, path, f"stage 01 dropped them ({flags})")
    warn_of(strangers - dropped, path, "they are not in the data set; run 01 with their rows")


def warn_of(users, path, why):
    """A WARNING line, if there are such users (raw ids) in the file."""
    if users and PROCESS == 0:
        print(f"WARNING: {len(users)} users of {path} get no profile, among them '{min(users)}': {why}")


def gather(work, blocks, n_first, old, rows, solved, n_users, before):
    """(z float32 (U, M, r), users who have one, sums over their histories), of the blocks and of a first run.

    old, rows: z of the first run and {user: row in it}; before: its figures, to which the sums are added;
    solved: what solve() returned. Users without a history hold 0, the origin.
    """
    space, wide = solved
    z = np.zeros((n_users, *space.basis.shape[:2]), np.float32)
    for user, row in rows.items():
        z[user] = old[row]
    sums = {"tokens": before["train_tokens"], "seconds": before["seconds"],
            "nll": np.array(before["train_nll_steps"]) * before["train_tokens"]}
    for number, users in enumerate(blocks):
        part = load(work, f"{number:06d}.pt", ("z", *sums))
        found = part["z"]
        if number < n_first:  # in coordinates of the wide space, for there were no directions yet
            found = space.project(wide.theta(found.to(wide.origin.device))).cpu()
        z[users] = found.numpy()
        sums = {key: value + part[key] for key, value in sums.items()}
    return z, sorted(chain(rows, *blocks)), sums


# -------- main

def prompt_fingerprint(likelihood):
    """Of the prompt's segments, and of their mask and positions."""
    full = [*likelihood.segments, Segment("history", [0, 0])]
    visible = build_visibility(full, likelihood.mask).tolist()
    positions = build_positions(full, likelihood.mask).tolist()
    return fingerprint([(part.kind, part.ids, part.profile) for part in full], visible, positions)


def settings_of(dataset, likelihood, lm, args):
    """All on which theta depends, as profiles.json records it: flags, prompt, data and LLM."""
    profiles = []
    for profile in dataset.profiles:
        # The words may change with new users; --users keeps the space of the first run.
        profiles.append({key: value for key, value in profile.items() if key != "words"})
    settings = {key: getattr(args, key) for key in RECORDED}
    if args.lm != "tiny":
        settings["tiny_sentences"] = None  # which then changes nothing
    settings["method"] = METHOD
    settings["profiles"] = profiles
    settings["prompt_fingerprint"] = prompt_fingerprint(likelihood)
    settings["dataset_fingerprint"] = dataset.fingerprint()
    settings["lm_fingerprint"] = lm["fingerprint"]
    return settings


def is_done(run, settings, histories):
    """Has an earlier run inferred all users who have a history under these settings?"""
    try:
        facts, _, _ = read_profiles(run)
    except UserError:  # what is missing or damaged is made again
        return False
    # A run with --users keeps no row either, where nobody of the first run is left; but it infers fewer.
    wanted = settings | {"rows_kept": 0, "rows_new": sum(len(ids) > 0 for ids in histories)}
    return all(facts.get(key) == value for key, value in wanted.items())


def infer(dataset, likelihood, tokenizer, lm, histories, args):
    """All users, or with --users those who are new: plan the blocks, solve them, save and report."""
    settings = settings_of(dataset, likelihood, lm, args)
    before = {"train_nll_steps": [0.0], "train_tokens": 0, "seconds": 0.0}  # figures of a first run: none
    old_z = None
    old_rows = {}
    if args.users:
        before, old_z, old_rows, missing = rows_that_stay(args.run, dataset, settings, args.users)
        if not missing and before["dataset_fingerprint"] == settings["dataset_fingerprint"]:
            return  # nobody is new, and no user's place has changed
        unread = {dataset.users[user] for user in missing if not len(histories[user])}
        warn_of(unread, args.users, f"they have no title to read (--history {args.history})")
        histories = [ids if user in missing else ids[:0] for user, ids in enumerate(histories)]
    # GPUs of unlike memory would cut unlike blocks.
    blocks, n_first = of_first_process(plan_blocks(likelihood, histories, args))
    first_space = before.get("space_fingerprint")  # in which new users are inferred
    key = fingerprint(settings, blocks, n_first, list(old_rows), first_space)
    work = args.run / f"blocks-{key[:12]}"
    # With --users the file says who is new. Unfinished work means that somebody has asked for it anew.
    may_be_done = not (args.users or args.fresh or work.exists())
    if may_be_done and is_done(args.run, settings, histories):
        if PROCESS == 0:
            print("profiles.npy has these settings: nothing to do (--fresh infers again)")
        return
    solved = solve(work, blocks, n_first, likelihood, tokenizer, histories, dataset, args)
    wait_for_all()  # else the first process would publish while another still writes
    if PROCESS > 0:
        return
    space = solved[0]
    z, known, sums = gather(work, blocks, n_first, old_z, old_rows, solved, len(histories), before)
    validation = tokenize_histories(tokenizer, history_texts(dataset, VALIDATION, args), likelihood.room)
    users = sorted(chain(*blocks))
    drawn = seeded(args.seed, 15).permutation(np.array(users, int))
    judged = sorted(drawn[:HELDOUT_USERS])
    heldout, errors, left_out = heldout_nll(likelihood, space, z, validation, judged, dataset.profiles,
                                            seeded(args.seed, 3), args.block_size)
    some = drawn[:KEPT_USERS]
    kept, kept_error, not_kept = nll_per_token(
        likelihood, space, lambda block: {"own": z[block], "population": np.zeros_like(z[block])},
        only(histories, some), args.block_size)
    steps = (sums["nll"] / max(1, sums["tokens"])).tolist()
    worked = (sums["tokens"] + len(known) * likelihood.prompt_length) * args.steps
    owners = {"users": dataset.users, "inferred": known}
    facts = settings | {
        "rows_kept": len(old_rows),
        "rows_new": len(users),
        "heldout_users": len(judged) - left_out,  # of the new ones
        "lm_sensitivity": lm["sensitivity"],
        "users_without_profile": len(z) - len(known),
        "heldout_nll": heldout or None,
        "heldout_error": errors or None,
        "train_nll": {"before": steps[0], "after": steps[-1]},
        "train_nll_kept": {**kept, "error": kept_error.get("population"), "users": len(some) - not_kept},
        "train_nll_steps": steps,
        "train_tokens": sums["tokens"],
        "tokens_per_second": round(worked / max(sums["seconds"], 1e-9)),
        "seconds": round(sums["seconds"], 1),
        "peak_memory_mb": peak_memory_mb(likelihood.device),
        "fingerprint": fingerprint(z),
        "users_fingerprint": fingerprint(owners),
        "space_fingerprint": space_fingerprint(space)}
    save_npy(work / "profiles.npy", z)
    save_json(work / "profiles_users.json", owners)
    save_json(work / "profiles.json", facts)  # the last of FILES: from here on the result is complete
    publish(work, args.run)
    report(facts)
    print(f"\nwrote {' '.join(FILES)} to {args.run}")


def warnings_of(facts):
    """What failed, a line each. facts: profiles.json."""
    found = []
    steps = facts["train_nll_steps"]
    kept = facts["train_nll_kept"]
    heldout = facts["heldout_nll"] or {}
    if not steps[-1] < steps[0]:
        found.append(f"the train NLL per token did not fall ({steps[0]:.4f} -> {steps[-1]:.4f}): "
                     "theta says nothing of its user")
    if kept["users"]:
        doubt = doubt_of(kept["own"], kept["population"], kept["error"])
        if doubt:
            found.append("under the theta that is kept the histories it was fitted to are not surely "
                         f"likelier than under the population's, of {kept['users']} users: {doubt}")
    others = {"population": "what all users share", "shuffled": "the theta of another user"}
    for name in [name for name in heldout if name != "own"]:
        doubt = doubt_of(heldout["own"], heldout[name], (facts["heldout_error"] or {}).get(name))
        if doubt:
            what = others.get(name, f"the {name} of another user (the words for it may say nothing here)")
            found.append(f"on titles not seen a user's own theta is not surely better than {what}: {doubt}")
    return found


def doubt_of(own, other, error):
    """None, if another NLL is above own by two standard errors (error None: above at all); else the figures.

    Where nothing was inferred, chance alone passes this in about one run of forty.
    """
    if other - own > 2 * (error or 0):
        return None
    spread = f" ± {error:.4f}" if error else ""
    return f"{own:.4f} and {other:.4f} nats a token, {other - own:+.4f}{spread}"


def report(facts):
    """Print the likelihoods in profiles.json and what failed."""
    steps = facts["train_nll_steps"]
    kept = facts["train_nll_kept"]
    print(f"\ntrain NLL per token {steps[0]:.4f} -> {steps[-1]:.4f} in the descent; "
          f"{facts['tokens_per_second']:,d} tokens x steps/s in each process")
    whose = f" of the {facts['rows_new']:,d} new users" if facts["rows_kept"] else ""
    if facts["heldout_users"] < facts["rows_new"]:
        whose = f" of {facts['heldout_users']:,d} of {facts['rows_new']:,d} users"
    if kept["users"]:
        print(f"of {kept['users']} users, under what is kept of theta: own {kept['own']:.4f}, population "
              f"{kept['population']:.4f}")
    if facts["users_without_profile"]:
        print(f"{facts['users_without_profile']:,d} users have no profile: no title of theirs could be read "
              f"(--history {facts['history']}), or --users did not name them")
    for what, values in ((f"validation NLL per token{whose}", facts["heldout_nll"]),
                         ("tiny LM, nats a token that a wrong word costs", facts["lm_sensitivity"])):
        if values:
            print(f"{what}:", ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    for warning in warnings_of(facts):
        print(f"WARNING: {warning}")


def tidy_up(args):
    """What an earlier run left: a finished result is published, an unfinished one waits for its command."""
    for work in args.run.glob("blocks-*"):
        if not UNFINISHED.fullmatch(work.name):  # somebody else's
            continue
        if (work / "profiles.json").exists():
            publish(work, args.run)
        elif args.fresh or not any(work.glob("*.pt")):
            shutil.rmtree(work, ignore_errors=True)
        else:
            print(f"unfinished: {work}; the command that began it goes on with it, this one or another, if "
                  "the data are the same; --fresh forgets it")


def check_tokens(likelihood, tokenizer, dataset, histories, args):
    """UserError where titles, of validation rows too, or words have tokens that the model does not have.

    Or where a word has none at all.
    """
    unseen = tokenize_histories(tokenizer, history_texts(dataset, VALIDATION, args), likelihood.room)
    words = []
    for profile in dataset.profiles:
        words += profile.get("words", ())
    pieces = pieces_of(tokenizer, [f" {word}" for word in words])
    silent = [word for word, ids in zip(words, pieces) if not ids]
    if silent:
        raise UserError(f"the tokenizer has no token for {len(silent)} words, among them '{silent[0]}'",
                        args.lm, "change --lm, or run 01 with --hobby-words or --background-words")
    check_ids(chain(histories, unseen, pieces), likelihood.model, args.lm)


def main():
    args = parse_arguments()
    dataset = load_dataset(args.run)
    device = pick_device(args.device)
    if PROCESS == 0:
        tidy_up(args)
    wait_for_all()
    if not any("words" in profile for profile in dataset.profiles):
        raise UserError("dataset.json has no words, it is of an earlier version", args.run, "run 01 again")
    texts = history_texts(dataset, SEEN, args)
    longest = max(map(len, history_texts(dataset, TRAIN, args)))
    if not longest:
        raise UserError("no user has a training history", args.history, "take --history all or more data")
    likelihood, tokenizer, lm = open_model(dataset, args, device, None if args.users else longest)
    histories = tokenize_histories(tokenizer, texts, likelihood.room)
    if not any(map(len, histories)):
        raise UserError("no title fits into the LLM's window", args.lm, "change --lm")
    check_tokens(likelihood, tokenizer, dataset, histories, args)
    if PROCESS == 0:
        announce("02 infer profiles", args, "stage 01's files")
        is_learned = args.task_steps and not args.users
        trained = f" and, for all, the task prompt ({likelihood.task.numel():,d})" if is_learned else ""
        if args.history == "liked" and any("likes" in profile for profile in dataset.profiles):
            print("WARNING: liked titles alone tell little of a critic; --history rated reads all that were "
                  "rated, with + or - behind each")
        print(f"parameters: LLM {count_parameters(likelihood.model):,d} frozen; learned are theta of each "
              f"user ({likelihood.n_profiles} x {likelihood.width}){trained}")
    infer(dataset, likelihood, tokenizer, lm, histories, args)
    if PROCESS == 0:
        keep = " --keep-codebooks" if args.users and (args.run / "codebooks.pt").exists() else ""
        print(f"next: python 03_quantize.py --run {args.run}{keep}")


if __name__ == "__main__":
    guarded(main, "lower --block-size, or change --lm")
