"""The paper's LLM baselines on the same LM, split and recommender as ours: minimal, honest stand-ins.

    python tools/baselines.py --run runs/demo kar     # then 04 --ids none,random,kar,random-kar-text,kar-text
    python tools/baselines.py --run runs/demo pepler  # then 04 --ids none,random-pepler,pepler,random,userip
    python tools/baselines.py --run runs/demo rella   # of a run with 02 --history rated
KAR (arXiv 2306.10933): the LLM is asked about a user, the history in front of the question; tools/lm_both.py
makes a tiny LM that has read so. PEPLER (arXiv 2202.07371): a soft token a user and one an item, trained to
make the item's text likely and to predict the rating. ReLLa (arXiv 2308.11131): the user's titles most like
the target are in the prompt, yes against no is the score. Missing: instruction tuning, world knowledge, size.
Training and support rows are read, by PEPLER training rows alone: a cold user has no soft token, and in the
bank the unknown code. Validation rows choose epoch and scale. The tiny LM has read every text with a profile
in front, and ReLLa's prompt has none; KAR's text (kar-text) answers the first profile's question alone.
PEPLER's own scores are made without user dropout or L2: their rival is the factorization, not the DCN.
Writes: feature_bank_NAME.npy .json; baselines_METHOD.json, costs, and AUC of what scores pairs by itself;
        kar/, the run with KAR's theta, for 03 --no-llm-loss and 04 --profile-input embedding
"""

import math
import shutil
import time

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
import controls
from stages import common, infer, quantize

SLOT_WORDS = 12  # KAR: the likeliest words that it averages
ANSWER = 4  # tokens of KAR's answer
TITLES = 10  # titles in a prompt of ReLLa's
# PEPLER: weight of the rating's loss (demo, validation AUC: 1 .54, 10 .69, 100 .70, 1000 .66); Adam
WEIGHT = 100.0
LR = 0.005
BATCH = 128
EPOCHS = 60  # at most, as in stage 04
PATIENCE = 10  # epochs without a gain that end the training, as in stage 04


class World:
    """A run opened once: problem (03), frozen likelihood (02), histories, tokenizer, sizes K_m."""

    def __init__(self, args):
        self.args = args
        self.device = common.pick_device(args.device)
        self.problem, _ = quantize.read_problem(args.run)
        self.dataset = self.problem.dataset
        self.sizes = controls.sizes_of(args.run, self.dataset)
        opened = self.problem.open_likelihood(self.device)
        self.likelihood, self.histories, self.space, self.tokenizer = opened
        self.start = self.space.origin
        segments = self.likelihood.segments
        self.begin = segments[0].ids if segments[0].kind == "begin" else []
        self.names = [segment.ids for segment in segments if segment.kind == "name"]
        self.task = segments[-1].ids
        self.passes = 0
        self.clock = time.perf_counter()

    def states(self, rows, pool, skip=0):
        """float32 (n, d): each token list's last hidden state, or the mean one; NaN of an empty list.

        skip: so many tokens at the beginning are not in the mean.
        """
        rows = [np.array(row) for row in rows]
        found = torch.full((len(rows), self.start.shape[1]), torch.nan)
        for block in infer.make_blocks(rows, None, infer.token_budget_of(self.likelihood), 0):
            ids, lengths = infer.pad(rows, block, self.device)  # on the right, where no token looks
            states = self.likelihood.body(ids, use_cache=False).last_hidden_state.float()
            self.passes += len(block)
            place = torch.arange(ids.shape[1], device=self.device)
            first = skip if pool == "mean" else lengths[:, None] - 1
            wanted = (first <= place) & (place < lengths[:, None])
            pooled = (states * wanted[..., None]).sum(1) / wanted.sum(1, keepdim=True)
            infer.check_finite(pooled, "a hidden state", self.likelihood.dtype)
            found[block] = pooled.cpu()
        return found

    def expected(self, rows, summary):
        """What the LM expects after each token list: summary(float32 logits (some, vocabulary)), joined.

        All logits of all lists would not fit into a GPU's memory.
        """
        states = self.states(rows, "last").to(self.device, self.likelihood.dtype)
        chunks = states.split(self.likelihood.chunk)
        return torch.cat([summary(self.likelihood.head(some).float()) for some in chunks])

    def report(self, name, unit, count, scores=()):
        """Figures of (kind, rows, scores, probabilities), and the cost since the last report.

        AUC and GAUC are of the scores, the logloss of the probabilities; count: users or pairs it was for.
        """
        row = {"ids": name, "lm_passes": self.passes, "of": count, "unit": unit,
               "seconds": round(time.perf_counter() - self.clock, 1)}
        for kind, rows, own, probabilities in scores:
            users, _, labels = rows.T
            row[f"{kind}_auc"] = common.auc(labels, own)
            row[f"{kind}_gauc"] = common.gauc(users, labels, own)
            row[f"{kind}_logloss"] = common.logloss(labels, probabilities)
        print(*(f"{key} {value}" for key, value in row.items()), sep=", ")
        self.passes = 0
        self.clock = time.perf_counter()
        return row

    def evaluated(self):
        """(kind, rows) of validation, which chooses epoch and scale, then of what nothing may learn from."""
        if not len(self.dataset.rows(common.VALIDATION)):
            raise common.UserError("there are no validation rows, which choose epoch and scale",
                                   self.args.run, "give more data, or fewer cold users")
        found = []
        for kind, split in (("validation", common.VALIDATION), ("test", common.TEST), ("cold", common.COLD)):
            rows = self.dataset.rows(split)[:self.args.rows]
            if len(rows):
                found.append((kind, rows))
        if min(len(set(rows[:, 2])) for _, rows in found) < 2:
            where = f"--rows {self.args.rows}" if self.args.rows else "interactions.npy"
            raise common.UserError("the scored rows have one label alone", where, "take more")
        return found


# -------- KAR

@torch.no_grad()
def kar_slot(world, histories):
    """theta^m = sum_w p(w | history, x^m) e_w over the LM's likeliest words: float32 (n, M, d).

    The same LM and profile prompt as ours, the direction reversed: without the task prompt and other
    profiles.
    """
    words = world.likelihood.vectors()

    def mean_word(logits):
        probability, index = logits.softmax(1).topk(SLOT_WORDS)
        probability = probability / probability.sum(1, keepdim=True)
        return (probability[..., None] * words[index]).sum(1)

    theta = [world.expected([world.begin + list(ids) + name for ids in histories], mean_word)
             for name in world.names]
    return torch.stack(theta, dim=1).cpu().numpy()


@torch.no_grad()
def kar_text(world, histories, answer):
    """Mean hidden state over history, "This user's hobby is" and `answer` greedy tokens: (n, d)."""
    rows = [world.begin + list(ids) + world.names[0] if len(ids) else [] for ids in histories]
    asked = [row for row in rows if row]
    for _ in range(answer):
        for row, token in zip(asked, world.expected(asked, lambda logits: logits.argmax(1)).tolist()):
            row.append(token)  # Note: asked and rows share their lists
    return world.states(rows, "mean").numpy()


def save_theta(world, theta):
    """RUN/kar: stage 01's files, the tiny LM and KAR's theta in the whole space, as 02 would have left it."""
    space = infer.whole_space(world.space)
    z = space.project(torch.from_numpy(theta).to(world.device)).cpu().numpy()
    z[~world.problem.inferred] = 0  # as 02 leaves those of whom nothing is known
    run = world.args.run / "kar"
    changed = {"fingerprint": common.fingerprint(z), "heldout_nll": None, "heldout_error": None,
               "train_nll_kept": None, "space_fingerprint": infer.space_fingerprint(space)}
    aside = world.args.run / "kar-unfinished"
    shutil.rmtree(aside, ignore_errors=True)  # of a killed run
    later = shutil.ignore_patterns(
        "kar", "kar-unfinished", "lm-both", "lm-verdicts", "*bank*", "quantize.*", "results.*", "pred*",
        "*.pt", "profiles.*", "ctr_*", "recsysllm.*", "baselines_*", "figures", "scores.csv", "rows-*",
        "epochs-*", "blocks-*")
    shutil.copytree(world.args.run, aside, ignore=later)
    common.save_npy(aside / "profiles.npy", z)
    common.save_torch(aside / "space.pt", infer.saved_space(space))
    common.save_json(aside / "profiles.json", world.problem.facts | changed)
    shutil.rmtree(run, ignore_errors=True)
    aside.replace(run)


def kar(world):
    seed = world.args.seed
    known = world.problem.inferred
    theta = kar_slot(world, world.histories)
    save_theta(world, theta)
    columns = zip(theta.swapaxes(0, 1), world.sizes)
    banks = {"kar": [(controls.clusters(vectors, known, size, seed), size) for vectors, size in columns]}
    figures = [world.report("kar", "user", len(known))]
    for name, answer in (("kar-text", ANSWER), ("kar-text0", 0)):
        vectors = kar_text(world, world.histories, answer)
        banks[name] = controls.text_clusters(vectors, world.sizes, seed)[:1]
        figures.append(world.report(name, "user", len(known)))
    return banks, figures


# -------- PEPLER

class Pepler(nn.Module):
    """A soft token (d,) and a bias a user and an item, U(-.1, .1) and 0; the last index is nobody, 0."""

    def __init__(self, users, items, width):
        super().__init__()
        self.user, self.item = (nn.Embedding(size + 1, width + 1, sparse=True) for size in (users, items))
        for table in (self.user, self.item):
            nn.init.uniform_(table.weight, -0.1, 0.1)
            table.weight.data[:, -1] = 0  # the bias
            table.weight.data[-1] = 0  # nobody

    def forward(self, users, items):
        """(soft tokens (n, 2, d), logits (n,) = theta_u . phi_i / sqrt(d) + b_u + b_i)."""
        both = torch.stack([self.user(users), self.item(items)], dim=1)
        soft = both[..., :-1]
        bias = both[..., -1]
        return soft, soft.prod(1).sum(1) / soft.shape[2] ** 0.5 + bias.sum(1)


def pepler_loss(model, world, titles, users, items, labels, with_lm=True):
    """PEPLER's joint loss: nats a token of the item's title behind theta_u phi_i + weight * BCE(y, logit)."""
    soft, logits = model(users, items)
    loss = WEIGHT * nn.functional.binary_cross_entropy_with_logits(logits, labels)
    if with_lm:
        text = map(torch.tensor, [titles[item] for item in items.tolist()])
        text = nn.utils.rnn.pad_sequence(list(text), batch_first=True, padding_value=-100).to(world.device)
        begin = torch.tensor(world.begin, dtype=torch.long, device=world.device).expand(len(users), -1)
        parts = [world.likelihood.word_table(begin), soft, world.likelihood.word_table(text.clamp(min=0))]
        inputs = torch.cat([part.to(world.likelihood.dtype) for part in parts], dim=1)
        states = world.likelihood.body(inputs_embeds=inputs, use_cache=False).last_hidden_state
        states = states[:, len(world.begin) + 1:-1]  # the state before a token tells it; theta_u tells none
        world.passes += len(users)
        expected = world.likelihood.head(states).float().flatten(0, 1)
        loss = loss + nn.functional.cross_entropy(expected, text.flatten(), ignore_index=-100)
    return loss


@torch.no_grad()
def pepler_scores(model, dataset, rows):
    """Probabilities of rows (n, 3); a user without a training row is nobody."""
    trained = np.isin(rows[:, 0], dataset.rows(common.TRAIN)[:, 0])
    pairs = np.stack([np.where(trained, rows[:, 0], len(dataset.users)), rows[:, 1]])
    return torch.sigmoid(model(*torch.from_numpy(pairs).long().to(model.user.weight.device))[1]).cpu().numpy()


def fit_pepler(world, titles, with_lm):
    """Minibatches of rows, sparse Adam, the epoch of the best validation AUC - logloss."""
    dataset = world.dataset
    rng = common.seeded(world.args.seed, 10)
    done = []
    model = Pepler(len(dataset.users), len(dataset.items), world.start.shape[1]).to(world.device)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=LR)
    rows = dataset.rows(common.TRAIN)
    validation = dataset.rows(common.VALIDATION)
    for _ in common.progress(range(EPOCHS), "PEPLER", "epoch"):
        shuffled = rng.permutation(rows)
        length = [len(titles[item]) for item in shuffled[:, 1]]  # of like length: hardly any padding
        batches = np.array_split(shuffled[np.argsort(length, kind="stable")], math.ceil(len(rows) / BATCH))
        for at in rng.permutation(len(batches)):
            users, items, labels = torch.from_numpy(batches[at].T.copy()).long().to(world.device)
            optimizer.zero_grad()
            pepler_loss(model, world, titles, users, items, labels.float(), with_lm).backward()
            optimizer.step()
        scores = pepler_scores(model, dataset, validation)
        infer.check_finite(torch.from_numpy(scores), "PEPLER's score", world.likelihood.dtype)
        done.append(common.auc(validation[:, 2], scores) - common.logloss(validation[:, 2], scores))
        if done[-1] == max(done):
            state = {name: table.clone() for name, table in model.state_dict().items()}
        elif max(done) not in done[-PATIENCE:]:
            break
    model.load_state_dict(state)
    return model


def pepler(world):
    dataset = world.dataset
    figures = []
    size = math.prod(world.sizes)
    evaluated = world.evaluated()[1:]
    if world.likelihood.dtype == torch.float16:  # stage 02 scales its gradients, PEPLER's loss is not scaled
        raise common.UserError("fp16 would round PEPLER's small gradients to 0", world.args.run,
                               "run 02 with --dtype bf16 or fp32")
    titles = common.pieces_of(world.tokenizer, [f" {item['title']};" for item in dataset.items])
    for name, with_lm in (("matrix factorization of the same width", False), ("pepler's own scores", True)):
        model = fit_pepler(world, titles, with_lm)
        scores = []
        for kind, rows in evaluated:
            probabilities = pepler_scores(model, dataset, rows)
            scores.append((kind, rows, probabilities, probabilities))
        figures.append(world.report(name, "pair", len(dataset.rows(common.TRAIN)), scores))
    users = model.user.weight.detach()[:-1].cpu().numpy()
    known = np.isin(np.arange(len(users)), dataset.rows(common.TRAIN)[:, 0])
    return {"pepler": [(controls.clusters(users, known, size, world.args.seed), size)]}, figures


# -------- ReLLa

def retrieve(vectors, item, own, count, how):
    """Places in own (item, label), oldest first, of `count` rows: the most similar to item, or the latest."""
    places = [at for at, (other, _) in enumerate(own) if other != item]  # never the target itself
    if how != "recent":
        cosine = vectors[[own[at][0] for at in places]] @ vectors[item]
        places = sorted(places[at] for at in np.argsort(-cosine, kind="stable")[:count])
    return places[max(0, len(places) - count):]


def rella_scores(world, rows, how, count, vectors, texts, rng):
    """logit(" +") - logit(" -") after task, `count` rated titles of the user, the target's title: (n,).

    Where these do not fit into the LLM's window, the oldest of the titles are left out.
    """
    window = infer.window_of(world.likelihood.model)
    own = quantize.rows_by_user(world.dataset.rows(common.SEEN), len(world.dataset.users))
    readers = rng.permutation(len(own))[rows[:, 0]] if how == "another user" else rows[:, 0]
    minus, plus = common.pieces_of(world.tokenizer, [" -;", " +;"])
    differ = next(at for at, (first, second) in enumerate(zip(minus, plus)) if first != second)
    prompts = []
    for reader, item in zip(readers, rows[:, 1].tolist()):
        seen = own[reader][:, 1:].tolist()
        target = texts[2][item] + minus[:differ]
        room = window - len(world.begin + world.task + target)
        said = []
        for place in reversed(retrieve(vectors, item, seen, count, how)):
            other, label = seen[place]
            longer = texts[label][other] + said
            if len(longer) > room:
                break
            said = longer
        prompts.append(world.begin + world.task + said + target)
    both = world.expected(prompts, lambda logits: logits[:, [minus[differ], plus[differ]]])
    return both.diff(dim=1)[:, 0].cpu().numpy()


@torch.no_grad()
def rella(world):
    args = world.args
    dataset = world.dataset
    figures = []
    if world.problem.facts["history"] != "rated":
        raise common.UserError("this LM has not read rated titles", args.run, "run 02 with --history rated")
    texts = []  # of all titles: disliked, liked, alone
    for mark in (" -;", " +;", ""):
        titles = [f" {item['title']}{mark}" for item in dataset.items]
        texts.append(common.pieces_of(world.tokenizer, titles))
    states = world.states([world.begin + ids for ids in texts[2]], "mean", skip=len(world.begin))
    vectors = nn.functional.normalize(states, dim=1).numpy()
    splits = world.evaluated()
    known = splits[0][1]  # validation rows, on which Platt's scale is fitted
    evaluated = splits[1:]
    for how, count in (("similar", TITLES), ("recent", TITLES), ("another user", TITLES), ("recent", 0)):
        rng = np.random.default_rng((args.seed, 11))
        def score(rows):
            return rella_scores(world, rows, how, count, vectors, texts, rng)[:, None]  # noqa: B023
        platt = LogisticRegression(C=1e6).fit(score(known), known[:, 2])
        scores = []
        for kind, rows in evaluated:
            own = score(rows)
            scores.append((kind, rows, own[:, 0], platt.predict_proba(own)[:, 1]))
        pairs = len(known) + sum(len(rows) for _, rows in evaluated)
        figures.append(world.report(f"rella, {how}: {count} titles", "pair", pairs, scores))
    return {}, figures


def main():
    methods = {"kar": kar, "pepler": pepler, "rella": rella}
    parser = common.Parser(__doc__)
    parser.add_argument("method", choices=methods, help="which")
    parser.add_argument("--rows", type=common.at_least(1),
                        help="pepler, rella: score the first so many rows of a split")
    args = parser.parse_args()
    if args.rows and args.method == "kar":
        parser.error("kar scores no rows: leave out --rows")
    world = World(args)
    banks, figures = methods[args.method](world)
    for name, columns in banks.items():
        controls.save_bank(args.run, name, columns, world.dataset,
                           f"tools/baselines.py {args.method} --seed {args.seed}",
                           profiles_fingerprint=world.problem.facts["fingerprint"])
    common.save_json(world.args.run / f"baselines_{world.args.method}.json", {
        "rows": figures, "seed": world.args.seed, "dataset_fingerprint": world.dataset.fingerprint()})


if __name__ == "__main__":
    common.guarded(main)
