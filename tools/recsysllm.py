"""RecSysLLM: an LLM that is trained to recommend, on the rows, the LLM and the controls of the stages.

    python tools/recsysllm.py --run runs/demo                # after 01; the tiny LM
    python tools/recsysllm.py --run runs/demo --lm smollm2
Paper: Chu et al. 2023, "Leveraging Large Language Models for Pre-trained Recommender Systems"; no code of it
was found. Stage 02 turned round: there the LLM is frozen and each user is learned; here no user is learned,
a user is the text of their history, and the LLM is trained by LoRA. The titles, verdicts and attributes of a
text are *entities*. Some are blanked, each whole; the LLM reads what is left in both directions and writes
the blanked spans one after the other, in the order of time:

    x          Gold Guitar was good; Budget Rod was bad;
    x_corrupt  [MASK] was good; Budget Rod was [MASK];
    spans      [START] Gold Guitar [END]  [START] bad [END]
    maximise   sum_i log p(s_i | x_corrupt, s_1, ..., s_{i-1})                                        Eq. (1)

Sizes: B texts, S tokens of a text and its spans, d the LLM's width. DEVIATION(Rk): row Rk of the differences
in docs/RESULTS.md, RecSysLLM.

What stands where: data phase, blanks and positions, model, train, inference: the method; then running it. Its
rivals are in tools/next_item.py.

Reads:  01's files; results.json and predictions/ (04) for the rows DCN
Writes: recsysllm.pt, what was learned (not with --rank 0); recsysllm.json, the figures; lm-verdicts/,
        the tiny LM; until done epochs-*/, a file an epoch
"""

import argparse
import contextlib
import copy
import functools
import itertools
import math
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

import next_item
from stages import common, infer, quantize, read_results

# -------- settings

# Stretches of a history, "Data Phase": the share of texts, and from how many rows for each of theirs they are
# drawn. DEVIATION(R1): 01 keeps the order of time and no times, so that days, weeks and months are places.
STRETCHES = {"short-term": (0.6, 1), "medium-term": (0.3, 3), "long-term": (0.1, math.inf)}
# What is blanked, "Mask Mechanism". DEVIATION(R2): the paper names the levels and gives no shares.
LEVELS = {"entity": 0.6, "sentence": 0.2, "document": 0.2}
BLANKED = 0.3  # share of the entities, or of the sentences, that are blanked
# DEVIATION(R3): GLM has trained tokens for these; here each is a learned vector, first that of a character.
MARKS = {"entity": "_", "sentence": "~", "document": "^", "start": ":", "end": ";"}
ROW_PIECES = 4  # title, words between, verdict, end: a row of a text, which is its sentence
WARM_UP = 0.1  # share of the steps in which the step size rises. DEVIATION(R7): sizes
MOST_NODES = 512  # nodes of a tree of titles in one forward pass


# -------- data phase: texts of entities

@dataclass
class Wording:
    """How a history is put: lead, then of each row: title, between, verdict, end."""

    lead: str
    between: str
    verdicts: tuple  # of label 0, of label 1
    end: str = ";"


# DEVIATION(R6): of the paper's five families of prompts the next item and the rating.
SEEN_WORDINGS = (Wording("", "", (" -;", " +;"), ""),  # the task prompt, as stage 02's rated histories
                 Wording(". What this person thought of each:", " was", (" bad", " good")),
                 Wording(". Ratings, the oldest first:", " got", (" no", " yes"), ","))
UNSEEN_WORDING = Wording(". A customer's opinions in their order:", " is", (" awful", " great"), ".")


@dataclass
class Piece:
    """A run of tokens. entity: a title, a verdict or an attribute, which is blanked whole or not at all."""

    ids: list
    entity: bool = False


class Texts:
    """The tokens of all that a text may hold, and the pool of entities. vocabulary: words of the LLM."""

    def __init__(self, tokenizer, dataset, vocabulary):
        self.dataset = dataset
        self.names = [profile["name"] for profile in dataset.profiles]
        self.tokenizer = tokenizer
        self.titles = self.token_lists([f" {item['title']}" for item in dataset.items])
        met = np.unique(dataset.rows(common.TRAIN)[:, 1])
        values = set()
        for item in (dataset.items[number] for number in met):
            for name in self.names:
                values.update(item["attributes"].get(name, []))
        values = sorted(values)
        self.values = dict(zip(values, self.token_lists([f" {value}" for value in values])))
        self.prompts = self.token_lists([profile["prompt"] for profile in dataset.profiles])
        words = set()
        for wording in (*SEEN_WORDINGS, UNSEEN_WORDING):
            words.update((self.lead(wording), self.lead(wording).lstrip(". \n"), wording.between,
                          wording.end, *wording.verdicts))
        words = sorted(words)
        self.words = dict(zip(words, self.token_lists(words)))
        # A mark's number is behind those of the LLM's own words.
        self.marks = {name: vocabulary + place for place, name in enumerate(MARKS)}
        self.characters = [ids[-1] for ids in self.token_lists(MARKS.values())]
        # Rules of evidence: the pool is of training rows, so that no other title moves a position in it.
        titles_met = [self.titles[item] for item in met]
        self.pool = Trie([*titles_met, *self.values.values(), *self.verdicts(SEEN_WORDINGS)])
        self.longest = max(self.pool.depth)
        begin = tokenizer.encode("any text")[0]
        self.begin = [begin] if begin == tokenizer.bos_token_id else []

    def verdicts(self, wordings):
        """The tokens of each wording's two verdicts."""
        found = []
        for wording in wordings:
            found += [self.words[text] for text in wording.verdicts]
        return found

    def token_lists(self, texts):
        return common.pieces_of(self.tokenizer, texts)

    def sentence(self, item, label, wording):
        """A row as four pieces: title, words between, verdict, end."""
        words = self.words
        return [Piece(self.titles[item], True), Piece(words[wording.between]),
                Piece(words[wording.verdicts[label]], True), Piece(words[wording.end])]

    def lead(self, wording):
        return wording.lead or self.dataset.task_prompt

    def opening(self, rows, wording):
        """What is said of the user, the commonest attributes of the liked rows (n, 3); then the lead."""
        pieces = [Piece(self.begin)]
        for prompt, name in zip(self.prompts, self.names):
            counts = Counter()
            for _, item, label in rows:
                if label:
                    counts.update(self.dataset.items[item]["attributes"].get(name, []))
            if counts:
                highest = max(counts.values())
                commonest = min(value for value, count in counts.items() if count == highest)
                pieces += [Piece(prompt), Piece(self.values[commonest], True)]
        lead = self.lead(wording)
        if len(pieces) == 1:  # nothing is said before it
            lead = lead.lstrip(". \n")
        return [*pieces, Piece(self.words[lead])]


def stretch(rows, length, rng):
    """At most `length` of a user's rows (n, 3), in their order: short-, medium- or long-term."""
    kind = rng.choice(list(STRETCHES), p=[share for share, _ in STRETCHES.values()])
    window = min(len(rows), length * STRETCHES[kind][1])
    first = rng.integers(len(rows) - window + 1)
    chosen = rng.choice(window, size=min(length, window), replace=False)
    return rows[first + np.sort(chosen)]


# -------- training phase: blanks and positions

@dataclass
class Example:
    """A corrupted text and, behind it, the tokens of its spans; lists of S numbers.

    inter: a token's place in the corrupted text, in a span that of the span's [MASK]; intra: its place within
    an entity, 0 outside; targets: the token that is to be written next, -100 in the corrupted text.
    """

    ids: list
    inter: list
    intra: list
    targets: list
    corrupted: int  # tokens of the corrupted text


def blanks_of(pieces, level, rng):
    """Which pieces are blanked at a level: ranges of their numbers, in the order of time, one at least."""
    if level == "document":  # the last 50 to 100% of the text, cut before a piece
        ends = np.cumsum([len(piece.ids) for piece in pieces])
        first = int((ends <= (1 - rng.uniform(0.5, 1)) * ends[-1]).sum())
        return [range(first, len(pieces))]
    if level == "sentence":
        candidates = [range(first, first + ROW_PIECES) for first in range(0, len(pieces), ROW_PIECES)]
    else:
        candidates = [range(number, number + 1) for number, piece in enumerate(pieces) if piece.entity]
    blanked = rng.random(len(candidates)) < BLANKED
    blanked[rng.integers(len(candidates))] = True
    return [candidate for candidate, chosen in zip(candidates, blanked) if chosen]


def draw_example(texts, rows, rng):
    """A stretch of a user's rows as a text with blanks, in a wording and at a level drawn by chance."""
    wording = SEEN_WORDINGS[rng.integers(len(SEEN_WORDINGS))]
    level = rng.choice(list(LEVELS), p=list(LEVELS.values()))
    body = []
    for _, item, label in rows:
        body += texts.sentence(item, label, wording)
    spans = blanks_of(body, level, rng)
    touched = set()  # rows
    for span in spans:
        touched.update(number // ROW_PIECES for number in span)
    # The attributes are those of rows that stay whole: they may not tell what is blanked.
    opening = texts.opening([row for number, row in enumerate(rows) if number not in touched], wording)
    spans = [range(span.start + len(opening), span.stop + len(opening)) for span in spans]
    if level == "entity":
        attributes = [number for number, piece in enumerate(opening) if piece.entity]
        spans = [range(number, number + 1) for number in attributes if rng.random() < BLANKED] + spans
    return blank(opening + body, spans, texts, level)


def blank(pieces, spans, texts, level="entity"):
    """The Example of a text whose spans, ranges of piece numbers, are replaced by a single [MASK] each."""
    ids = []
    intra = []
    places = []  # of the [MASK]s
    written = []  # the tokens of the spans
    ends = {span.start: span.stop for span in spans}
    number = 0
    while number < len(pieces):
        if number in ends:
            places.append(len(ids))
            ids.append(texts.marks[level])
            intra.append(0)
            written.append(tokens_of(pieces[number:ends[number]]))
            number = ends[number]
            continue
        piece = pieces[number]
        ids += piece.ids
        intra += [1 + place if piece.entity else 0 for place in range(len(piece.ids))]
        number += 1
    corrupted = len(ids)
    inter = list(range(corrupted))
    targets = [-100 for _ in range(corrupted)]
    for place, span in zip(places, written):
        ids += [texts.marks["start"], *span]
        inter += [place for _ in range(1 + len(span))]
        intra += texts.pool.intra(span)
        targets += [*span, texts.marks["end"]]
    return Example(ids, inter, intra, targets, corrupted)


def tokens_of(pieces):
    found = []
    for piece in pieces:
        found += piece.ids
    return found


class Trie:
    """Entities as a tree of tokens. Node 0 is the root; children: of each node, {token: node}."""

    def __init__(self, entities=()):
        self.children = [{}]
        self.parent = [0]
        self.token = [0]
        self.depth = [0]
        self.last = []  # the node with which each entity ends
        for ids in entities:
            self.add(ids)

    def add(self, ids):
        node = 0
        for token in ids:
            if token not in self.children[node]:
                self.children[node][token] = len(self.children)
                self.children.append({})
                self.parent.append(node)
                self.token.append(token)
                self.depth.append(self.depth[node] + 1)
            node = self.children[node][token]
        self.last.append(node)

    def intra(self, span):
        """Intra-positions of [START] and of a span's tokens, by the dynamic position mechanism (Fig. 2).

        A token that goes on with an entity gets the next one. Any other begins at 1 again.
        """
        node = 0
        found = [1]
        for token in span:
            following = None if node is None else self.children[node].get(token)
            if following is None:
                found.append(1)
                node = self.children[0].get(token)  # it may begin an entity
            else:
                found.append(found[-1] + 1)
                node = following
        return found

    @functools.cached_property
    def inner(self):
        """The nodes that have children, numbers in the order of the tree."""
        return [node for node, following in enumerate(self.children) if following]

    @functools.cached_property
    def row(self):
        """{inner node: its place among them}."""
        return {node: place for place, node in enumerate(self.inner)}

    @functools.cached_property
    def visible(self):
        """bool (inner, inner): a node sees itself and what it goes on from."""
        found = torch.eye(len(self.inner), dtype=torch.bool)
        for place, node in enumerate(self.inner[1:], 1):
            found[place] |= found[self.row[self.parent[node]]]
        return found

    def scores(self, log_p):
        """log p of each entity, float64 (entities,), of log_p (inner, vocabulary): what follows a node."""
        parents = [self.row[parent] for parent in self.parent[1:]]
        steps = log_p[parents, self.token[1:]].tolist()  # of each node behind its parent
        total = [0.0]  # of each node the sum of the steps that lead to it
        for parent, step in zip(self.parent[1:], steps):
            total.append(total[parent] + step)
        return np.array([total[node] for node in self.last])


def build_visibility(corrupted, length, attention):
    """bool (B, S, S): may row i attend to column j? "Span Order"; corrupted: int (B,).

    Everything sees the corrupted text, in both directions; a span's token sees the spans' tokens before it.
    """
    column = torch.arange(length, device=corrupted.device)
    visible = (column[:, None] >= column).expand(len(corrupted), -1, -1)
    if attention == "causal":
        return visible
    return visible | (column < corrupted[:, None])[:, None]


# -------- model: the LLM with LoRA

class LoRA(nn.Module):
    """W x + (alpha / r) B A x: a frozen linear layer and its low-rank change (Hu et al. 2021, section 4.1).

    B starts at 0, so that nothing changes at first. A (r, in), B (out, r) are float32.
    """

    def __init__(self, layer, rank, alpha):
        super().__init__()
        self.layer = layer
        # A layer of GPT-2 stores W transposed.
        size_out, size_in = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape
        device = layer.weight.device
        self.A = nn.Parameter(torch.randn(rank, size_in).to(device) / size_in ** 0.5)
        self.B = nn.Parameter(torch.zeros(size_out, rank, device=device))
        self.scale = alpha / rank

    def forward(self, x):
        low = nn.functional.linear(x, self.A.to(x.dtype))  # Shape: (..., r)
        return self.layer(x) + self.scale * nn.functional.linear(low, self.B.to(x.dtype))

    @torch.no_grad()
    def merged(self):
        """The layer with W + (alpha / r) B A in the place of W; LoRA's own layer stays as it is."""
        weight = self.layer.weight
        change = self.scale * self.B @ self.A
        change = change if isinstance(self.layer, nn.Linear) else change.T
        layer = copy.copy(self.layer)
        changed = nn.Parameter(weight + change.to(weight.dtype), requires_grad=False)
        layer._parameters = {**self.layer._parameters, "weight": changed}  # else the copy shares them
        return layer


def swap_layers(body, wanted, change):
    """Put change(layer) in the place of each layer of the body that is `wanted`; returns how many."""
    found = []
    for module in body.modules():
        for name, child in module.named_children():
            if wanted(child):
                found.append((module, name, child))
    for module, name, child in found:
        setattr(module, name, change(child))
    return len(found)


def is_linear(module):
    """Is this one of a transformer's projections: query, key, value, output, or of its MLP?"""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # which GPT-2 has


class RecSysLLM(nn.Module):
    """The LLM of a stage-02 likelihood, with LoRA on all projections and a table of intra-positions.

    characters: a token of the LLM for each of the MARKS; longest: the largest intra-position; rank 0: no
    LoRA, the LLM as it is.
    """

    def __init__(self, likelihood, characters, longest, rank, alpha, attention="two-way", intra=True):
        super().__init__()
        self.body = likelihood.body
        self.head = likelihood.head
        self.word_table = likelihood.word_table
        self.attention = attention
        self.vocabulary = len(self.word_table.weight)
        # In float32: bf16 rounds a logit of 17 to eighths, and what is compared are sums of such.
        self.head_weight = self.head.weight.float()
        self.head_bias = self.head.bias
        self.passes = 0  # texts that went through the LLM
        # DEVIATION(R4): the inter-position is the LLM's own position, and no table of it is learned. The
        # table of intra-positions starts at 0, so that the LLM is what it was.
        self.intra_table = nn.Embedding(longest + 1, likelihood.width, device=likelihood.device)
        nn.init.zeros_(self.intra_table.weight)
        self.intra_table.weight.requires_grad_(intra and rank > 0)
        self.end_character = characters[-1]
        # The vectors of the MARKS, the first four to be read, that of [END] to be written.
        self.mark_vectors = nn.Parameter(likelihood.vectors(characters), requires_grad=rank > 0)
        with torch.no_grad():
            self.mark_vectors[-1] = self.head.weight[characters[-1]]
        if rank:
            swap_layers(self.body, is_linear, lambda layer: LoRA(layer, rank, alpha))

    def learned(self):
        """{name: parameter} of all that is trained."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def states(self, ids, inter, intra, visible, cache=None):
        """Last hidden states (B, S, d). ids, inter, intra: int (B, S); visible: bool (B, S, S).

        cache: keys and values of the n tokens before these; those of the S tokens are added to it, and
        visible is (B, S, n + S).
        """
        self.passes += len(ids)
        words = self.word_table(ids.clamp(max=self.vocabulary - 1))
        marks = self.mark_vectors[(ids - self.vocabulary).clamp(min=0)].to(words.dtype)
        words = torch.where((ids < self.vocabulary)[..., None], words, marks)
        embedded = words + self.intra_table(intra.clamp(max=len(self.intra_table.weight) - 1)).to(words.dtype)
        lowest = torch.finfo(words.dtype).min
        mask = torch.zeros(visible.shape, dtype=words.dtype, device=ids.device).masked_fill(~visible, lowest)
        return self.body(inputs_embeds=embedded, attention_mask=mask[:, None], position_ids=inter,
                         past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def log_softmax(self, states):
        """log p of the next token: float32 (n, vocabulary + MARKS), of states (n, d). Only [END] of MARKS."""
        states = states.float()
        bias = None if self.head_bias is None else self.head_bias.float()
        words = nn.functional.linear(states, self.head_weight, bias)
        end = states @ self.mark_vectors[-1]
        if bias is not None:
            end = end + bias[self.end_character]
        never = torch.full((len(states), len(MARKS) - 1), -math.inf, device=states.device)
        return torch.cat([words, never, end[:, None]], dim=1).log_softmax(1)

    def nll(self, examples):
        """Eq. (1): -log p of each token of the examples' spans, in nats (tokens,)."""
        device = self.intra_table.weight.device
        padded = []
        for name, filler in (("ids", 0), ("inter", 0), ("intra", 0), ("targets", -100)):
            rows = [torch.tensor(getattr(example, name)) for example in examples]
            padded.append(nn.utils.rnn.pad_sequence(rows, True, filler).to(device))
        ids, inter, intra, targets = padded
        corrupted = torch.tensor([example.corrupted for example in examples], device=device)
        visible = build_visibility(corrupted, ids.shape[1], self.attention)
        states = self.states(ids, inter, intra, visible)  # Shape: (B, S, d)
        written = targets >= 0  # Shape: (B, S)
        found = self.log_softmax(states[written])
        return -found.gather(1, targets[written][:, None]).squeeze(1)


# -------- train

def train_epoch(model, optimizer, texts, histories, epoch, args):
    """One text of each user, minibatches of like length: the mean loss in nats a token of the spans."""
    rng = common.seeded(args.seed, 20, epoch)
    examples = [draw_example(texts, stretch(rows, args.titles, rng), rng) for rows in histories]
    length = np.array([len(example.ids) for example in examples])
    # Some chance in the order of lengths: the same texts do not always share a batch.
    order = np.argsort(length * rng.uniform(0.9, 1.1, len(length)), kind="stable")
    batches = [order[at:at + args.batch_size] for at in range(0, len(order), args.batch_size)]
    steps = args.epochs * len(batches)
    losses = []
    for number in common.progress(rng.permutation(len(batches)), f"epoch {epoch + 1}", "batch"):
        # The step size rises to --lr in the first tenth of all steps, then falls to 0.
        done = (epoch * len(batches) + len(losses)) / steps
        rate = args.lr * min((done + 1 / steps) / WARM_UP, (1 - done) / (1 - WARM_UP), 1)
        optimizer.param_groups[0]["lr"] = rate
        loss = model.nll([examples[at] for at in batches[number]]).mean()  # DEVIATION(R7): Eq. (1) is a sum
        if not loss.isfinite():
            raise common.UserError(f"training diverged in epoch {epoch + 1}", f"--lr {args.lr}", "lower --lr")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.learned().values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


# -------- inference: exact scores of entities, and generation

def question(texts, rows, wording, item=None):
    """The Example whose one blank is the next liked title (item None), or the verdict on an item."""
    pieces = texts.opening(rows, wording)
    for _, seen, label in rows:
        pieces += texts.sentence(seen, label, wording)
    number = len(pieces) + (0 if item is None else 2)  # of the row's title or verdict
    # What stands in the blank is not read: any title, any verdict does.
    pieces += texts.sentence(0 if item is None else item, 1, wording)
    return blank(pieces, [range(number, number + 1)], texts)


def trees_of(entities, end, most=MOST_NODES):
    """Entities (token lists), each with [END], as Tries of about `most` nodes: a list of (numbers, Trie).

    Most entities that begin alike stand in the same tree, equal ones always.
    """
    trees = []
    for number in sorted(range(len(entities)), key=lambda number: entities[number]):
        is_full = trees and len(trees[-1][1].children) > most
        if not trees or is_full and entities[number] != entities[trees[-1][0][-1]]:  # equal ones score alike
            trees.append(([], Trie()))
        numbers, tree = trees[-1]
        numbers.append(number)
        tree.add([*entities[number], end])
    return trees


@torch.no_grad()
def scores_behind(model, text, trees, root, inter, log_softmax, intra=1):
    """log p of each entity of the trees behind a text: float64 (entities,), exact.

    text: three lists, the ids, inter- and intra-positions of its tokens; root: the token behind it that the
    entity follows; inter: a function that gives the place of a node by its depth; intra: of the root; the
    nodes' own go up by it. The text goes through the LLM once, and all trees share its keys and values. Then
    one pass for each tree, in which every node stands once. A node sees the text, the root and the nodes that
    it goes on from, as if its entity were written there alone. Leaves need no pass: nothing follows them.
    """
    device = model.intra_table.weight.device

    def run(ids, inter, intra, visible, cache):
        inputs = [torch.tensor([values], device=device) for values in (ids, inter, intra)]
        return model.states(*inputs, visible[None].to(device), cache)[0]

    length = len(text[0])
    of_text = DynamicCache()
    run(*text, build_visibility(torch.tensor([length]), length, model.attention)[0], of_text)
    found = np.zeros(sum(len(numbers) for numbers, _ in trees))
    for numbers, tree in trees:
        nodes = tree.inner
        depths = [tree.depth[node] for node in nodes]
        visible = torch.cat([torch.ones(len(nodes), length, dtype=torch.bool), tree.visible], dim=1)
        states = run([root, *(tree.token[node] for node in nodes[1:])], [inter(depth) for depth in depths],
                     [intra * (1 + depth) for depth in depths], visible, copy.deepcopy(of_text))
        found[numbers] = tree.scores(log_softmax(states))
    return found


def log_probabilities(model, prompt, trees, texts):
    """log p of each entity of the trees in the place of the prompt's one blank: float64 (entities,).

    DEVIATION(R8): no other text than these entities can come out.
    """
    length = prompt.corrupted
    text = [values[:length] for values in (prompt.ids, prompt.inter, prompt.intra)]
    place = prompt.inter[-1]  # of the [MASK], which all of its span have
    return scores_behind(model, text, trees, texts.marks["start"], lambda depth: place, model.log_softmax)


@torch.no_grad()
def generate(model, prompt, trie, texts):
    """Write the prompt's blank, always the likeliest token that the trie allows: tokens before [END]."""
    device = model.intra_table.weight.device
    node = 0
    written = []
    while True:
        intra = [*prompt.intra[:prompt.corrupted], *trie.intra(written)]
        ids = [*prompt.ids[:prompt.corrupted], texts.marks["start"], *written]
        inter = [*prompt.inter[:prompt.corrupted], *(prompt.inter[-1] for _ in range(1 + len(written)))]
        allowed = list(trie.children[node])
        inputs = [torch.tensor([values], device=device) for values in (ids, inter, intra)]
        corrupted = torch.tensor([prompt.corrupted], device=device)
        state = model.states(*inputs, build_visibility(corrupted, len(ids), model.attention))[:, -1]
        token = allowed[int(model.log_softmax(state)[0, allowed].argmax())]
        if token == texts.marks["end"]:
            return written
        written.append(token)
        node = trie.children[node][token]


# -------- here the method ends; running it

def parse_arguments():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--lm", default="auto", help="as of stage 02: tiny, smollm2, a folder, ...; auto: tiny on the demo")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is fast")
    add("--rank", type=common.at_least(0), default=8, help="of LoRA (paper: 8); 0: the LLM without training")
    add("--alpha", type=common.at_least(1e-6, float), default=16.0, help="LoRA's weight")
    add("--epochs", type=common.at_least(1), default=8, help="texts of each user (paper: 8)")
    add("--lr", type=common.at_least(1e-12, float), default=2e-3, help="AdamW's largest step (paper: 1e-5)")
    add("--batch-size", type=common.at_least(1), default=16, help="texts a step (paper: 32 on each GPU)")
    add("--titles", type=common.at_least(1), default=10, help="most rows of a user in a text")
    add("--attention", choices=("two-way", "causal"), default="two-way",
        help="how the corrupted text is read: two-way as in the paper, or each token what is before it")
    add("--intra", action=argparse.BooleanOptionalAction, default=True, help="learn the intra-positions")
    add("--evaluate", choices=("test", "validation"), default="test", help="rows that are to be found")
    add("--test-users", type=common.at_least(1), help="most users whose next item is to be found")
    add("--rows", type=common.at_least(2), help="most rows whose verdict is to be found")
    add("--fresh", action="store_true", help="train anew, whatever recsysllm.pt holds")
    return parser.parse_args()


def open_texts(args, dataset, device):
    """(likelihood of stage 02, Texts), checked: histories fit, and the LLM has all tokens."""
    if args.lm == "auto" and dataset.name == "demo":
        args.lm = "tiny"
    tiny = args.lm == "tiny"
    lm = args.lm
    if args.dtype == "auto" and device.type == "cuda":
        args.dtype = "fp32" if tiny else "bf16"  # fp16 would lose small gradients
    if tiny:
        lm = str(args.run / "lm-verdicts")
        train_tiny(dataset, args.run / "lm-verdicts", args)
    as_in_02 = SimpleNamespace(run=args.run, lm=lm, dtype=args.dtype, mask="strict")
    likelihood, tokenizer, _ = infer.open_model(dataset, as_in_02, device, None, room=40)
    args.lm = "tiny" if tiny else as_in_02.lm
    args.dtype = as_in_02.dtype
    texts = Texts(tokenizer, dataset, len(likelihood.word_table.weight))
    if max(max(ids, default=0) for ids in [*texts.titles, *texts.values.values(),
                                           *texts.words.values()]) >= len(likelihood.word_table.weight):
        raise common.UserError("the tokenizer writes tokens that the model does not have", args.lm,
                               "take the model's own tokenizer")
    wordings = (*SEEN_WORDINGS, UNSEEN_WORDING)
    words = max(len(texts.words[wording.between]) + len(texts.words[wording.end]) for wording in wordings)
    sentence = texts.longest + words + max(map(len, texts.verdicts(wordings)))
    lead = max(len(texts.words[texts.lead(wording)]) for wording in wordings)
    attributes = sum(map(len, texts.prompts)) + len(texts.names) * texts.longest
    room = likelihood.room + likelihood.prompt_length - len(texts.begin) - lead - attributes
    fitting = room // sentence - 1  # Note: one less, for a title that is asked for may be longer than these
    if fitting < 1:
        raise common.UserError("the longest title does not fit into the LLM's window", args.lm,
                               "take another LLM")
    if fitting < args.titles:
        args.titles = fitting
        print(f"WARNING: the LLM's window holds {fitting} titles a text: --titles is lowered")
    return likelihood, texts


def train_tiny(dataset, folder, args):
    """The tiny LM of common.py, but that its invented people say in every wording what they like.

    A pretrained LLM knows what good and awful mean, the unseen words too. Read from left to right, nothing
    blanked; no row of the data set is in its sentences.
    """
    met = np.unique(dataset.rows(common.TRAIN)[:, 1])
    items = [dataset.items[item] for item in met]
    traits = [common.Trait(profile, items) for profile in dataset.profiles]
    if not any(trait.words for trait in traits):
        raise common.UserError("no item has a value for any profile", "items.json", "take another --lm")
    width, vocabulary, count = common.tiny_sizes(len(items))
    wordings = (*SEEN_WORDINGS, UNSEEN_WORDING)
    leads = [wording.lead or dataset.task_prompt for wording in wordings]
    prompts = [[profile["name"], profile["prompt"], profile.get("likes")] for profile in dataset.profiles]
    sizes = [width, vocabulary, count, common.TINY_FIT, common.LIKING]
    length = min(args.titles, int(np.bincount(dataset.rows(common.TRAIN)[:, 0]).max()))
    # 2: its people in each wording have words for both profiles and for either.
    key = common.fingerprint(items, prompts, leads, [2, str(wordings), args.seed, length, sizes])
    if common.is_kept(folder, key):
        return
    rng = common.seeded(args.seed, 26)
    people = common.make_sentences(traits, items, count, length, rng, rated=True)
    said = []  # in each wording, its people: (words, texts)
    for number, wording in enumerate(wordings):
        # Neighbours, not every fourth: who has a word for which profile goes round with a short period.
        own = people[number * count // len(wordings):(number + 1) * count // len(wordings)]
        said.append([])
        for words, texts in own:
            said[-1].append((words, [said_as(text, wording) for text in texts]))
    everything = list(itertools.chain(*said))
    tokenizer = common.tiny_tokenizer(traits, " ".join(leads), everything, vocabulary)
    rows = []
    for lead, some in zip(leads, said):
        ids, targets, _ = common.encode_sentences(tokenizer, traits, lead, some)
        rows += [row[real] for row, real in zip(ids, targets != -100)]
    ids = nn.utils.rnn.pad_sequence(rows, True, 0)
    targets = nn.utils.rnn.pad_sequence(rows, True, -100)
    model = common.new_tiny(len(tokenizer), width, ids.shape[1])
    print(f"training a tiny LM that knows verdicts on {len(ids):,d} sentences")
    common.fit_tiny(model, ids, targets, rng)
    common.save_tiny(folder, model.eval(), tokenizer, {"fingerprint": key, "sensitivity": {}})


def said_as(text, wording):
    """' A Title +;' in a wording."""
    label = int(text.endswith("+;"))
    return text[:-3] + wording.between + wording.verdicts[label] + wording.end


@torch.no_grad()
def check_two_way(model):
    """UserError where the LLM cannot look ahead, whatever mask it is given."""
    ids = torch.arange(2, 6, device=model.intra_table.weight.device)[None]
    changed = ids.clone()
    changed[0, -1] += 1
    positions = torch.arange(4, device=ids.device)[None]
    visible = torch.ones(1, 4, 4, dtype=torch.bool, device=ids.device)
    first, second = (model.states(some, positions, 0 * ids, visible)[0, 0] for some in (ids, changed))
    if torch.equal(first, second):
        raise common.UserError("this LLM cannot read in both directions", type(model.body).__name__,
                               "take another LLM, or --attention causal")


def fit(model, texts, histories, work, args):
    """Train epoch by epoch, each a file in `work`; a killed run goes on. Returns {losses, seconds}."""
    learned = model.learned()
    optimizer = torch.optim.AdamW(learned.values(), lr=args.lr, weight_decay=0.01)
    done = sorted(work.glob("epoch-*.pt"))
    facts = {"losses": [], "seconds": 0.0}
    if done:
        saved = common.load(work, done[-1].name, ("learned", "optimizer", "facts"))
        facts = saved["facts"]
        optimizer.load_state_dict(saved["optimizer"])
        copy_into(learned, saved["learned"])
        print(f"goes on after epoch {len(facts['losses'])} ({work})")
    for epoch in range(len(facts["losses"]), args.epochs):
        clock = time.perf_counter()
        facts["losses"].append(train_epoch(model, optimizer, texts, histories, epoch, args))
        facts["seconds"] += time.perf_counter() - clock
        if not all(value.isfinite().all() for value in learned.values()):
            raise common.UserError(f"training diverged in epoch {epoch + 1}", f"--lr {args.lr}", "lower --lr")
        print(f"epoch {epoch + 1}: {facts['losses'][-1]:.4f} nats a token of the spans")
        common.save_torch(work / f"epoch-{epoch:06d}.pt", {
            "learned": values_of(learned), "optimizer": optimizer.state_dict(), "facts": facts})
    return facts


def latest(rows, args):
    """The rows of a question: with the one that is asked for as many as a text of training has at most."""
    return rows[max(0, len(rows) - args.titles + 1):]


def evaluate(model, texts, task, rows, args):
    """{wording: {next_item, rating: figures, seconds and forward passes an answer}}."""
    dataset = texts.dataset
    title_trees = trees_of(texts.titles, texts.marks["end"])
    known = quantize.rows_by_user(dataset.rows(common.TRAIN), len(dataset.users))
    found = {}
    for name, wording in (("seen", SEEN_WORDINGS[0]), ("unseen", UNSEEN_WORDING)):
        verdict_trees = trees_of(texts.verdicts([wording]), texts.marks["end"])
        prompts = [question(texts, latest(rows_known, args), wording) for rows_known in task.known]
        scores, cost = timed(model, prompts, title_trees, texts, f"next items, {name} wording")
        ranking = task.figures(scores, args.seed) | cost
        prompts = [question(texts, latest(known[user], args), wording, item)
                   for user, item, _ in rows.tolist()]
        scores, cost = timed(model, prompts, verdict_trees, texts, f"verdicts, {name} wording")
        odds = scores[:, 1] - scores[:, 0]  # log odds of like against dislike
        rating = auc_figures(rows, odds) | cost
        found[name] = {"next_item": ranking, "rating": rating}
    return found


def left_to_right(likelihood, texts, task, args):
    """log p of each title, marked as liked, behind a user's text, as any LM reads: float64 (users, I).

    The control of the training: the LLM as it is, without blanks, marks and a mask of two directions. Note:
    to be called before make_model(), which puts LoRA into the likelihood's own body.
    """
    wording = SEEN_WORDINGS[0]
    liked = texts.words[wording.between] + texts.words[wording.verdicts[1]] + texts.words[wording.end]
    trees = trees_of([title + liked[:-1] for title in texts.titles], liked[-1])
    model = RecSysLLM(likelihood, texts.characters, 1, rank=0, alpha=1, attention="causal")

    def log_softmax(states):  # among the LLM's own words: it knows no [END]
        return model.log_softmax(states)[:, :model.vocabulary].log_softmax(1)

    scores = []
    for known in common.progress(task.known, "left to right", "user"):
        rows = latest(known, args)
        pieces = texts.opening(rows, wording)
        for _, item, label in rows:
            pieces += texts.sentence(item, label, wording)
        *ids, last = tokens_of(pieces)  # the last token is the root of each tree
        first = len(ids)
        text = ids, range(first), [0 for _ in ids]
        scores.append(scores_behind(
            model, text, trees, last, lambda depth, first=first: first + depth, log_softmax, intra=0))
    return np.stack(scores)


def timed(model, prompts, trees, texts, what):
    """(log probabilities (prompts, entities), {seconds, passes} of an answer)."""
    clock = time.perf_counter()
    before = model.passes
    scores = []
    for prompt in common.progress(prompts, what, "answer"):
        scores.append(log_probabilities(model, prompt, trees, texts))
    seconds = (time.perf_counter() - clock) / len(prompts)
    if not np.isfinite(scores).all():
        raise common.UserError("a score is not finite", what, "lower --lr, or take --dtype fp32")
    return np.stack(scores), {"seconds": seconds, "passes": (model.passes - before) / len(prompts)}


def auc_figures(rows, scores):
    users, _, labels = rows.T
    return {"auc": common.auc(labels, scores), "gauc": common.gauc(users, labels, scores)}


def dcn_figures(run, dataset, rows, at):
    """{ids: AUC, GAUC} of stage 04's DCN on these rows, repetition 0; {} before 04 ran.

    Of predictions/ only what the last results.json has a row of: others are of an earlier call of 04.
    """
    if not (run / "results.json").exists():
        return {}
    found = {}
    results = read_results(run, dataset)
    for row in results["rows"]:
        if row["model"] == "dcn" and row["ids"] in ("none", "userip") and row["seed"] == 0:
            name = f"dcn-{row['ids']}-0.npy"
            if not (run / "predictions" / name).exists():
                raise common.UserError(f"predictions/{name} is missing", run, "run 04_train_ctr.py again")
            scores = common.load(run / "predictions", name)
            fields = "" if row["fields"] == "ids" else f", {row['fields']}"
            if row["ids"] == "userip" and results["profile_input"] == "embedding":
                fields += ", theta itself"
            found[f"DCN {row['ids']}{fields}"] = auc_figures(rows, scores[at])
    return found


def show(results):
    """The tables in text."""
    metrics = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10")
    print(f"\n{'next item':38s}" + "".join(f"{metric:>9s}" for metric in metrics))
    for name, figures in results["next_item"].items():
        print(f"{name:38s}" + "".join(f"{figures[metric]:9.4f}" for metric in metrics))
    print(f"\n{'like or dislike':38s}{'AUC':>9s}{'GAUC':>9s}")
    for name, figures in results["rating"].items():
        gauc = figures["gauc"]
        print(f"{name:38s}{figures['auc']:9.4f}" + ("" if gauc is None else f"{gauc:9.4f}"))


def make_model(likelihood, texts, args):
    """The RecSysLLM of the flags, before training."""
    common.seeded(args.seed, 25)
    model = RecSysLLM(likelihood, texts.characters, 1 + texts.longest, args.rank, args.alpha, args.attention,
                      args.intra)
    if args.attention == "two-way":
        check_two_way(model)
    trained = sum(value.numel() for value in model.learned().values())
    print(f"parameters: LLM {common.count_parameters(model) - trained:,d} frozen, {trained:,d} trained")
    return model


def train(model, texts, key, args):
    """Fit the model, unless recsysllm.pt has this key; save what was learned. Returns {losses, seconds}.

    --rank 0 learns nothing, and leaves what was learned before where it is.
    """
    if not args.rank:
        return {"losses": [], "seconds": 0.0}
    learned = model.learned()
    path = args.run / "recsysllm.pt"
    work = args.run / f"epochs-{key[:12]}"
    if args.fresh:
        shutil.rmtree(work, ignore_errors=True)
        path.unlink(missing_ok=True)
    with contextlib.suppress(common.UserError):  # what is missing or damaged is made again
        saved = common.load(args.run, path.name, ("learned", "key", "facts"))
        if saved["key"] == key:
            print("recsysllm.pt has these settings: nothing to train (--fresh trains again)")
            copy_into(learned, saved["learned"])
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed at its end
            return saved["facts"]
    training = texts.dataset.rows(common.TRAIN)
    by_user = quantize.rows_by_user(training, len(texts.dataset.users))
    facts = fit(model, texts, [known for known in by_user if len(known)], work, args)
    common.save_torch(path, {"learned": values_of(learned), "key": key, "facts": facts,
                             "settings": settings_of(args),
                             "dataset_fingerprint": texts.dataset.fingerprint()})
    shutil.rmtree(work, ignore_errors=True)
    return facts


def settings_of(args):
    """The settings on which what is learned depends."""
    keys = ("lm", "dtype", "seed", "rank", "alpha", "epochs", "lr", "batch_size", "titles", "attention",
            "intra")
    return {key: getattr(args, key) for key in keys}


def values_of(learned):
    return {name: value.detach().cpu() for name, value in learned.items()}


@torch.no_grad()
def copy_into(learned, saved):
    for name, value in saved.items():
        learned[name].copy_(value)


def show_generated(model, texts, task, args):
    """What is generated for three users as the title that they like next."""
    trie = Trie([[*ids, texts.marks["end"]] for ids in texts.titles])
    for user, known in zip(task.users[:3], task.known):
        prompt = question(texts, latest(known, args), SEEN_WORDINGS[0])
        written = texts.tokenizer.decode(generate(model, prompt, trie, texts))
        liked = [texts.dataset.items[item]["title"] for item in next_item.liked_items(known, 4)]
        print(f"user {texts.dataset.users[user]} liked {'; '.join(liked)}; generated:{written}")


def main():
    args = parse_arguments()
    dataset = common.load_dataset(args.run)
    device = common.pick_device(args.device)
    likelihood, texts = open_texts(args, dataset, device)
    common.announce("recsysllm", args, "stage 01's files")
    split = common.TEST if args.evaluate == "test" else common.VALIDATION
    task = next_item.next_item_task(dataset, split, args.test_users, args.seed)
    rows = dataset.rows(split)
    at = np.sort(np.random.default_rng((args.seed, 24)).permutation(len(rows))[:args.rows])
    rows = rows[at]
    if len(set(rows[:, 2].tolist())) < 2:
        raise common.UserError(f"the {len(rows)} rows have one label alone", "--rows", "take more")
    print(f"to be answered: {len(task.users):,d} next items in two wordings and once from left to right, "
          f"{len(rows):,d} verdicts in two wordings (fewer by --test-users and --rows)")
    results = {"next_item": {}, "rating": {}}
    if split == common.TEST:  # first of all, for what is wrong with 04's files is to be said before the work
        results["rating"] |= dcn_figures(args.run, dataset, rows, at)
    vectors = next_item.title_vectors(likelihood, texts.begin, texts.titles)
    rivals = next_item.rival_scores(dataset, task, vectors, args.seed)
    rivals["the LLM untrained, left to right"] = left_to_right(likelihood, texts, task, args)
    for name, scores in rivals.items():
        results["next_item"][name] = task.figures(scores, args.seed)
    lm = common.lm_fingerprint(likelihood.model, texts.tokenizer)  # whatever the name of its folder
    sources = [Path(module).read_text("utf-8") for module in (__file__, common.__file__, infer.__file__)]
    key = common.fingerprint({**settings_of(args), "lm": lm}, dataset.fingerprint(), sources)
    model = make_model(likelihood, texts, args)
    trained = sum(value.numel() for value in model.learned().values())
    facts = train(model, texts, key, args)
    model.eval()
    if args.rank and args.dtype == "fp32":  # in bf16 the sum would lose the small change
        swap_layers(model.body, lambda module: isinstance(module, LoRA), LoRA.merged)
    own = evaluate(model, texts, task, rows, args)
    for wording, figures in own.items():
        for kind, found in figures.items():
            results[kind][f"RecSysLLM, {wording} wording"] = found
    show_generated(model, texts, task, args)
    common.save_json(args.run / "recsysllm.json", {
        **results, "settings": settings_of(args), "trained_parameters": trained, "users": len(task.users),
        "rows": len(rows), "items": len(dataset.items), "evaluated": args.evaluate, **facts,
        "peak_memory_mb": common.peak_memory_mb(device), "dataset_fingerprint": dataset.fingerprint()})
    show(results)
    print(f"\nwrote {'recsysllm.pt ' if args.rank else ''}recsysllm.json to {args.run}")


if __name__ == "__main__":
    common.guarded(main, "lower --batch-size or --titles")
