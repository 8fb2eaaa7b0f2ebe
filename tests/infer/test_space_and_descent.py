"""Stage 02, second net: what the first tests let pass.

Adapters first: what a rewrite changes is changed there alone.
"""

import contextlib
import copy
import functools
import gc
import json
import types
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import (call_stage, copy_run, infer, likelihood_of, make_lm, prepare, prepare_args,
                      random_theta, settings, space_of, whole_space)

import common

# ---------------------------------------------------------------- adapters


def solve_block(likelihood, space, histories, users, **changes):
    """(z (B, M, r), NLL summed over the users at the start and after each step)."""
    part = infer.infer_block(likelihood, space, histories, users, settings(**changes), range(len(histories)))
    assert part["tokens"] == sum(len(histories[user]) for user in users) and part["seconds"] > 0
    return part["z"], np.array(part["nll"])


def sentences_of(dataset, count, length, history="liked"):
    """Invented people: [({m: word}, [title text])]."""
    rated, rng = history == "rated", np.random.default_rng(0)
    return common.make_sentences(traits_of(dataset), dataset.items, count, length, rng, rated)


def traits_of(dataset):
    return [common.Trait(profile, dataset.items) for profile in dataset.profiles]


def sensitivity_of(model, tokenizer, dataset):
    """{profile: nats per history token that a wrong word costs} on fresh sentences of up to 8 titles."""
    fresh, rng = sentences_of(dataset, 400, 8), np.random.default_rng(0)
    return common.sensitivity(model, tokenizer, traits_of(dataset), dataset.task_prompt, fresh, rng)


# ---------------------------------------------------------------- worlds

@pytest.fixture(scope="module")
def sparse(lm_folders, tmp_path_factory):
    """(run, [(theta, ids, lengths, nll)] evaluated behind the last descent); some users have no history."""
    run, calls = tmp_path_factory.mktemp("run") / "sparse", []
    call_stage(prepare, "--run", run, "--subsample-users", 100, "--max-per-user", 5, "--min-interactions", 1,
               "--positive-above", 4)
    original = infer.ProfileLikelihood.__call__

    def recorded(self, theta, ids, lengths):
        nll = original(self, theta, ids, lengths)
        if torch.is_grad_enabled() and (theta.requires_grad or self.task.requires_grad):
            # The descent goes on: what was evaluated before is no part of the end.
            calls.clear()
        else:
            calls.append((theta.clone(), ids.clone(), lengths.clone(), nll.clone()))
        return nll

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer.ProfileLikelihood, "__call__", recorded)
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 2, "--task-steps", 1,
                   "--lr", 0.5)
    return run, calls


def reopened(run):
    """(dataset, likelihood, tokenizer, space) of a run with the fixtures' GPT-2."""
    model, tokenizer = make_lm("gpt2")
    dataset, space = common.load_dataset(run), infer.open_space(run, "cpu")
    likelihood = likelihood_of(model, tokenizer, dataset)
    likelihood.task = space.task
    return dataset, likelihood, tokenizer, space


def texts_of(dataset, split):
    """{user: ' A Title; Another;'} of the liked rows of a split, by a loop over the file."""
    texts = {}
    for user, item, label, part in dataset.interactions.tolist():
        if label == 1 and part == split:
            texts[user] = texts.get(user, "") + f" {dataset.items[item]['title']};"
    return texts


@pytest.fixture(scope="module")
def tiny(prepared, tmp_path_factory):
    """(run, record) of stage 02 with a tiny LM of few sentences; the record holds what its training did."""
    run = copy_run(prepared, tmp_path_factory.mktemp("run") / "tiny")
    record = types.SimpleNamespace(rates=[], norms=[], decay=[], batches=[], targets=[])
    from transformers import GPT2LMHeadModel
    step, forward, loss = torch.optim.AdamW.step, GPT2LMHeadModel.forward, torch.nn.functional.cross_entropy

    def recorded_step(self, *args, **kwargs):
        gradients = [
            p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        record.rates.append(self.param_groups[0]["lr"])
        record.norms.append(float(torch.cat(gradients).norm()))
        return step(self, *args, **kwargs)

    def recorded_forward(self, input_ids=None, **kwargs):
        if torch.is_grad_enabled() and self.training:
            record.batches.append(input_ids.clone())
        return forward(self, input_ids, **kwargs)

    def recorded_loss(logits, targets, **kwargs):
        if logits.requires_grad:
            record.targets.append(targets.clone())
        return loss(logits, targets, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recorded_step)
        patch.setattr(GPT2LMHeadModel, "forward", recorded_forward)
        patch.setattr(torch.nn.functional, "cross_entropy", recorded_loss)
        call_stage(infer, "--run", run, "--lm", "tiny", "--tiny-sentences", 320, "--steps", 1,
                   "--task-steps", 1)
    record.rates, record.norms = record.rates[:len(record.batches)], record.norms[:len(record.batches)]
    return run, record


# ---------------------------------------------------------------- the prompt and its start

def test_the_prompt_is_eq_3_token_for_token(lm, world):
    model, tokenizer = lm
    segments = infer.prompt_segments(tokenizer, world[0])
    kinds = [(segment.kind, segment.profile) for segment in segments if segment.kind != "begin"]
    assert kinds == [("name", 0), ("theta", 0), ("name", 1), ("theta", 1), ("task", None)]
    assert [len(segment.ids) for segment in segments if segment.kind == "theta"] == [1, 1]
    whole = "".join(profile["prompt"] for profile in world[0].profiles) + world[0].task_prompt
    words = [token for segment in segments if segment.kind != "theta" for token in segment.ids]
    assert words == tokenizer(whole)["input_ids"]  # the begin token too, where the tokenizer puts one


def test_the_words_space_against_an_explicit_covariance(lm, world):
    """Origin and covariance by loops in float64; a word's coordinates give back its vector."""
    model, tokenizer = lm
    dataset, likelihood = copy.deepcopy(world[0]), likelihood_of(model, tokenizer, world[0])
    dataset.profiles[0]["words"] = {"music": 9, "fishing": 4, "gold guitar": 1, "rod": 25}  # of some tokens
    space = space_of(likelihood, tokenizer, dataset)
    table = model.get_input_embeddings().weight.double().numpy()
    for m, profile in enumerate(dataset.profiles):
        vectors = np.stack([table[ids].mean(0) for ids in
                            common.pieces_of(tokenizer, [f" {word}" for word in profile["words"]])])
        weight = np.sqrt(list(profile["words"].values()))
        weight /= weight.sum()
        mean = sum(share * vector for share, vector in zip(weight, vectors))
        covariance = sum(share * np.outer(vector - mean, vector - mean)
                         for share, vector in zip(weight, vectors))
        assert np.allclose(space.origin[m].numpy(), mean, atol=1e-5)
        basis = space.basis[m].double().numpy()
        assert np.allclose(basis.T @ basis, covariance, atol=1e-6)
        for word, z in enumerate(space.word_z(m).double().numpy()):
            assert np.allclose(mean + z @ basis, vectors[word], atol=1e-4)
        assert space.words[m] == list(profile["words"])
    z = torch.randn(5, 2, space.basis.shape[1]) * (space.basis.abs().sum(2) > 0)
    assert torch.allclose(space.project(space.theta(z)), z, atol=1e-4)


def test_fewer_directions_than_words_keep_the_most_of_their_variance(world):
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    full, less = (space_of(likelihood, make_lm("gpt2")[1], world[0], rank) for rank in (16, 2))
    assert less.basis.shape[1] == 2 and torch.allclose(less.origin, full.origin)
    values = torch.linalg.eigvalsh(full.basis[0].T @ full.basis[0])[-2:].sum()
    assert float(less.basis[0].pow(2).sum()) == pytest.approx(float(values), rel=1e-4)
    assert torch.equal(full.basis[1, 2:], torch.zeros(1, 32))  # three words have two directions


def test_rank_0_is_the_whole_space_with_an_isotropic_prior(world):
    """theta = origin + spread z, as much variance in all as the words have."""
    likelihood, (_, tokenizer) = likelihood_of(*make_lm("gpt2"), world[0]), make_lm("gpt2")
    words, whole = (space_of(likelihood, tokenizer, world[0], rank) for rank in (16, 0))
    for m in range(2):
        spread = float(words.basis[m].pow(2).sum() / 32) ** 0.5
        assert torch.allclose(whole.basis[m], spread * torch.eye(32), atol=1e-5)
        vectors = whole.origin[m] + spread * whole.word_z(m)
        expected = words.origin[m] + words.word_z(m) @ words.basis[m]
        assert torch.allclose(vectors, expected, atol=1e-4)


def some_theta(users=60, noise=0.05, seed=0):
    """(start, z (users, 2, 32)): users who differ along two directions of each profile, and by noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(2, 32, 2, generator=generator))[0].mT  # Shape: (2, 2, 32)
    along = torch.randn(users, 2, 2, generator=generator) * torch.tensor([3.0, 1.0])
    z = 0.7 + torch.einsum("umk,mkd->umd", along, directions)
    return whole_space(2, 32), z + noise * torch.randn(users, 2, 32, generator=generator), directions


def test_a_space_is_squeezed_to_the_directions_in_which_users_differ():
    """Against numpy's principal components; the mean user is its origin, a kept z gives theta back."""
    start, z, directions = some_theta()
    start.basis = 0.3 * start.basis
    space = infer.squeeze(start, z, 2)
    assert torch.allclose(space.origin, start.theta(z.mean(0, keepdim=True))[0], atol=1e-5)
    for m in range(2):
        centred = (z[:, m] - z[:, m].mean(0)).double().numpy()
        values, vectors = np.linalg.eigh(centred.T @ centred)
        for k in range(2):
            along = vectors[:, -1 - k] @ space.basis[m, k].double().numpy()
            assert abs(along) == pytest.approx(0.3, rel=1e-3)
        lengths = space.basis[m].norm(dim=1)
        assert torch.allclose(lengths, torch.full((2,), 0.3), rtol=1e-4)  # z keeps its unit
        wanted = 1 - values[-9] / values[[-1, -2]]  # what the 9th direction varies is not believed
        assert torch.allclose(space.shrink[m], torch.tensor(wanted).float(), atol=1e-4)
    kept = space.project(start.theta(z))
    gap = (space.theta(kept) - start.theta(z)).norm(dim=2) / start.theta(z).norm(dim=2)
    assert gap.max() < 0.2  # what is dropped is the noise
    assert torch.allclose(space.project(space.theta(kept)), space.shrink * kept, atol=1e-4)
    assert torch.allclose(kept.mean(0), torch.zeros(2, 2), atol=1e-4)
    more = infer.squeeze(start, z, 20)  # from there on the first that is dropped
    variance = torch.linalg.svdvals((z - z.mean(0)).transpose(0, 1)) ** 2
    assert torch.allclose(more.shrink, 1 - variance[:, 20:21] / variance[:, :20], atol=1e-4)
    few = infer.squeeze(start, z[:9], 16)  # of whom nothing is dropped
    assert few.basis.shape[1] == 8 and torch.equal(few.shrink, torch.ones(2, 8))
    whole = infer.whole_space(space)
    assert torch.allclose(whole.basis, start.basis, atol=1e-5) and torch.equal(whole.origin, start.origin)


def test_directions_are_of_users_drawn_at_random_whatever_their_histories_and_blocks(world, monkeypatch):
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    rng = np.random.default_rng(0)
    histories = [rng.integers(300, size=length) for length in rng.permutation(60)]
    histories += 60 * [histories[0][:0]]  # they tell no direction
    monkeypatch.setattr(infer, "DIRECTION_USERS", 20)

    def plan(**changes):
        blocks, count = infer.plan_blocks(
            likelihood, histories, settings(**{"users": None, "space": "users", "rank": 16, **changes}))
        assert sorted(sum(blocks, [])) == [user for user in range(120) if len(histories[user])]  # all, once
        return blocks, sorted(sum(blocks[:count], []))

    for size in (1, 7, 1000):  # also where a block has room for everybody
        blocks, first = plan(block_size=size)
        assert len(first) == 20 and max(map(len, blocks)) <= size
        assert np.mean([len(histories[user]) for user in first]) == pytest.approx(30, abs=8)
    assert first == plan(block_size=7)[1] != plan(seed=1)[1]
    for changes in ({"rank": 0}, {"space": "words"}, {"users": "file"}):  # no directions are wanted
        assert plan(**changes)[1] == []
    monkeypatch.setattr(infer, "DIRECTION_USERS", 100)
    assert len(plan()[1]) == 59  # all there are


def test_the_users_who_tell_directions_are_not_those_whom_stage_01_drew_to_be_cold(world, monkeypatch):
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    source = prepare.load_demo(prepare_args())
    monkeypatch.setattr(infer, "DIRECTION_USERS", 200)
    shares = []
    for seed in range(4):
        dataset, _ = prepare.build(source, prepare_args(seed=seed, cold_users=0.2))
        cold = np.unique(dataset.rows(common.COLD)[:, 0])
        histories = [np.zeros(3, np.int32) for _ in dataset.users]
        blocks, count = infer.plan_blocks(
            likelihood, histories, settings(users=None, space="users", rank=16, seed=seed))
        shares.append(np.isin(sum(blocks[:count], []), cold).mean())
    assert np.mean(shares) == pytest.approx(0.2, abs=0.06), shares


def test_without_words_the_llm_s_own_are_taken_and_function_words_do_not_win(world, monkeypatch):
    """A likelihood that expects 'the' everywhere and 'Guitar' only where the prompt says hobby."""
    model, tokenizer = make_lm("gpt2")
    likelihood = likelihood_of(model, tokenizer, world[0])
    hobby, = common.pieces_of(tokenizer, [" hobby"])
    music, user, bought = (common.pieces_of(tokenizer, [word])[0][0]
                              for word in (" music", " user", " bought"))

    def expect(tokens):
        logits = torch.zeros(1, tokens.shape[1], len(tokenizer))
        logits[..., bought] = 6.0  # likely after anything
        if set(hobby) <= set(tokens[0].tolist()):
            logits[..., music], logits[..., user] = 5.0, 4.0
        return types.SimpleNamespace(logits=logits)

    likelihood.model = expect
    found = infer.likeliest_words(likelihood, tokenizer, 0)
    assert found[:2] == ["music", "user"] and len(set(found)) == len(found)
    with monkeypatch.context() as patch:  # "unknown" would read as if nothing had been inferred
        decode = tokenizer.decode
        patch.setattr(tokenizer, "decode", lambda ids: "unknown" if ids == [user] else decode(ids))
        assert infer.likeliest_words(likelihood, tokenizer, 0) == [word for word in found if word != "user"]
    space = infer.fit_space(likelihood, tokenizer, [{**one, "words": {}} for one in world[0].profiles])
    assert space.words[0] == found  # and all weigh the same
    assert torch.allclose(space.origin[0], space.vectors[0].mean(0), atol=1e-6)
    likelihood.model = lambda tokens: types.SimpleNamespace(logits=torch.zeros(1, tokens.shape[1], 5))
    with pytest.raises(common.UserError, match="0 words of its own .*--hobby-words"):
        infer.likeliest_words(likelihood, tokenizer, 0)  # its five tokens are no words


# ---------------------------------------------------------------- the task prompt

def test_a_prompt_without_a_task_has_nothing_to_learn(world, tmp_path):
    dataset = copy.deepcopy(world[0])
    dataset.task_prompt = ""
    model, tokenizer = make_lm("gpt2")
    likelihood = likelihood_of(model, tokenizer, dataset)
    args = settings(task_steps=5, users=None, space="users", rank=16)
    space = infer.make_wide(tmp_path, likelihood, tokenizer, some_histories(), dataset, args)
    assert space.task.shape == (0, 32)
    z, path = solve_block(likelihood, space, some_histories(), [0, 1], steps=2)
    assert (path[-1] < path[0]).all() and z.isfinite().all()



def some_histories(sizes=(3, 7, 7, 4, 5, 6)):
    rng = np.random.default_rng(3)
    return [rng.integers(300, size=length) for length in sizes]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_task_prompt_is_adam_s_on_everybody_s_likelihood(kind, world, monkeypatch):
    """Against Adam by hand, over all users in one block, without anybody held out."""
    monkeypatch.setattr(infer, "TASK_JUDGES", 0)
    monkeypatch.setattr(infer, "TASK_CHECK", 99)
    model, tokenizer = make_lm(kind)
    likelihood, histories = likelihood_of(model, tokenizer, world[0]), some_histories()
    space = space_of(likelihood, tokenizer, world[0])
    text, steps = likelihood.task.clone(), 5
    calls = []
    original = torch.optim.Adam.step

    def step(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls.append(self.param_groups[0]["params"][0].detach().clone())
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    infer.fit_task(likelihood, space, histories, settings(steps=20, task_steps=steps))

    def nll(task):
        likelihood.task = task
        theta = space.origin.expand(6, -1, -1)
        return likelihood(theta, *infer.pad(histories, range(6), "cpu")).sum()

    task, first, second = text.clone(), torch.zeros_like(text), torch.zeros_like(text)
    first_rate = infer.TASK_RATE * float(text.std())
    for number in range(steps):
        rate = first_rate * (1 - number / steps)
        task = task.detach().requires_grad_()
        gradient, = torch.autograd.grad(nll(task), task)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient ** 2
        unbiased = first / (1 - 0.9 ** (number + 1)), second / (1 - 0.999 ** (number + 1))
        task = (task - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)).detach()
        assert torch.allclose(calls[number], task, atol=0.02 * first_rate)
    assert len(calls) == steps and nll(task) < nll(text)


def test_the_task_prompt_is_the_one_under_which_users_held_out_are_likeliest(world, monkeypatch):
    """Where Adam climbs, what it ends with is no better than the text for those held out."""
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    space, histories = space_of(likelihood, make_lm("gpt2")[1], world[0]), [np.arange(5, 11)] * 20
    text = likelihood.task.clone()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "Adam", functools.partial(torch.optim.Adam, maximize=True))
        far = infer.fit_task(likelihood, space, histories, settings(steps=20))
    assert torch.equal(far, text) and torch.equal(likelihood.task, text)
    near = infer.fit_task(likelihood, space, histories, settings(steps=20))
    assert not torch.equal(near, text) and torch.equal(likelihood.task, near)


def test_the_task_prompt_is_reproducible_and_costs_no_more_than_the_users(world, monkeypatch):
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    space = space_of(likelihood, make_lm("gpt2")[1], world[0])
    histories, text = [np.arange(5, 11 - user % 2) for user in range(6)], likelihood.task

    def fit(users=6, **changes):
        likelihood.task = text
        return infer.fit_task(likelihood, space, histories[:users], settings(**{"steps": 40, **changes}))

    base = fit()
    assert torch.equal(fit(), base) and not torch.allclose(fit(users=5), base, atol=1e-4)
    assert torch.allclose(fit(block_size=2), base, atol=1e-4)  # how, not what
    assert torch.equal(fit(task_steps=0), text) and torch.equal(fit(steps=1), text)  # 6 x 1 is too little
    monkeypatch.setattr(infer, "TASK_USERS", 3)
    few = fit()
    assert not torch.allclose(few, base, atol=1e-4) and not torch.allclose(few, fit(seed=1), atol=1e-4)


def test_the_task_prompt_takes_as_many_gradients_as_the_users_allow(world, monkeypatch):
    """Of 60 users x 3 steps = 180 gradients 7 steps of 24 users, though 48 steps were asked for."""
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    space = space_of(likelihood, make_lm("gpt2")[1], world[0])
    call = infer.ProfileLikelihood.__call__
    gradients = []

    def counted(self, theta, ids, lengths):
        if torch.is_grad_enabled():
            gradients.append(len(lengths))
        return call(self, theta, ids, lengths)

    monkeypatch.setattr(infer.ProfileLikelihood, "__call__", counted)
    infer.fit_task(likelihood, space, [np.arange(5, 11)] * 60, settings(steps=3, task_steps=48))
    assert sum(gradients) == 7 * infer.TASK_USERS == 168


# ---------------------------------------------------------------- the descent

def by_hand(likelihood, space, ids, steps, lr, prior):
    """Each profile's own steps (Barzilai and Borwein) on Eq. (4) and prior / 2 ||z||^2, halved on a rise."""
    lengths = torch.tensor([ids.shape[1]])

    def evaluate(z):
        z = z.detach().requires_grad_()
        nll = likelihood(space.theta(z[None]), ids, lengths)[0]
        loss = nll + prior / 2 * (z ** 2).sum()
        return float(nll.detach()), float(loss.detach()), torch.autograd.grad(loss, z)[0]

    def longest(gradient):
        size = lr / float(gradient.abs().max())  # the largest coordinate moves by lr
        return min(size, 1 / prior) if prior else size

    z = torch.zeros(space.basis.shape[:2])
    nll, loss, gradient = evaluate(z)
    path, sizes = [nll], [longest(part) for part in gradient]
    for _ in range(steps):
        trial = torch.stack([part - size * slope for part, size, slope in zip(z, sizes, gradient)])
        trial_nll, trial_loss, trial_gradient = evaluate(trial)
        if trial_loss < loss:
            for m in range(len(z)):
                move, change = trial[m] - z[m], trial_gradient[m] - gradient[m]
                sizes[m] = longest(trial_gradient[m])
                if move @ change > 0:
                    sizes[m] = min(sizes[m], float(move @ move / (move @ change)))
            z, nll, loss, gradient = trial, trial_nll, trial_loss, trial_gradient
        else:
            sizes = [size / 2 for size in sizes]
        path.append(nll)
    return z, path


@pytest.mark.parametrize("prior, lr", [(0.0, 0.2), (4.0, 0.2), (0.05, 40.0)])  # what bounds a step
def test_a_block_is_descent_on_eq_4_and_the_prior_of_each_user(world, prior, lr):
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    rng = np.random.default_rng(0)
    histories = [rng.integers(300, size=6 + 3 * user) for user in range(3)]
    space = space_of(likelihood, make_lm("gpt2")[1], world[0])
    z, path = solve_block(likelihood, space, histories, [0, 1, 2], steps=8, lr=lr, prior=prior)
    expected = [by_hand(likelihood, space, torch.from_numpy(ids)[None], 8, lr, prior) for ids in histories]
    for user, (wanted, _) in enumerate(expected):
        assert torch.allclose(z[user], wanted, atol=2e-3), (z[user] - wanted).abs().max()
    assert path == pytest.approx([sum(values) for values in zip(*(nll for _, nll in expected))], rel=1e-3)


class Valley:
    """A likelihood with a narrow valley: sum(|z - 0.3|) * slope, which every long step overshoots."""

    def __init__(self, space, slope):
        self.space, self.slope, self.visited = space, slope, []

    def __call__(self, theta, ids, lengths):
        z = self.space.project(theta)
        self.visited.append(z.detach().clone())
        return self.slope * (z - 0.3).abs().sum((1, 2))


@pytest.mark.parametrize("slope", [1.0, 100.0])
def test_the_best_point_is_kept_and_a_step_too_long_is_halved(slope):
    torch.manual_seed(0)
    space = whole_space(1, 4)
    likelihood = Valley(space, slope)
    ids, lengths = torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 3])
    z, path = infer.descend(likelihood, space, ids, lengths, settings(steps=12, lr=5.0, prior=0.0))
    assert (path[1:] <= path[:-1]).all() and (path[-1] < path[0]).all()  # never above what was reached
    values = torch.stack([slope * (seen - 0.3).abs().sum((1, 2)) for seen in likelihood.visited])
    assert (values[1] > values[0]).all()  # the first step does overshoot
    assert torch.allclose(path[-1], values.min(0).values) and torch.allclose(
        slope * (z - 0.3).abs().sum((1, 2)), path[-1], atol=1e-4)
    steps = [(seen[0, 0, 0] - 0).item() for seen in likelihood.visited[1:3]]
    assert steps[1] == pytest.approx(steps[0] / 2)  # taken back and halved


def test_a_point_whose_gradient_overflowed_is_taken_back_and_at_the_start_it_is_said():
    """As fp16 may: the likelihood is finite there, its gradient is not."""
    space = whole_space(1, 4)

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z ** 2 - z

        @staticmethod
        def backward(ctx, upstream):
            z, = ctx.saved_tensors
            return torch.where(z < limit, 2 * z - 1, torch.inf) * upstream

    def overflowing(theta, ids, lengths):
        return Overflow.apply(space.project(theta)).sum((1, 2))

    ids, lengths = torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 3])
    limit = 0.4
    z, path = infer.descend(overflowing, space, ids, lengths, settings(steps=6, lr=0.5, prior=0.0))
    assert z.isfinite().all() and path.isfinite().all() and (path[-1] < path[0]).all()
    limit = -1.0
    with pytest.raises(common.UserError, match="not finite for 2 users, among them a, b"):
        histories = [np.arange(3)] * 2
        args = settings(steps=2, prior=0.0)
        infer.infer_block(Bad(overflowing), space, histories, [0, 1], args, ["a", "b"])


class Bad:
    """A likelihood on the CPU that is a function."""

    device, dtype = "cpu", torch.float16

    def __init__(self, function):
        self.function = function

    def __call__(self, *inputs):
        return self.function(*inputs)


def test_one_word_spans_nothing_so_the_llm_s_own_are_taken(world):
    likelihood, tokenizer = likelihood_of(*make_lm("gpt2"), world[0]), make_lm("gpt2")[1]
    dataset = copy.deepcopy(world[0])
    first = infer.likeliest_words(likelihood, tokenizer, 0)[0]
    dataset.profiles[0]["words"] = {first: 400}
    space = space_of(likelihood, tokenizer, dataset)
    assert len(space.words[0]) > 1 and space.words[1] == list(dataset.profiles[1]["words"])
    # They weigh all the same, also the one that some items have.
    assert torch.allclose(space.origin[0], space.vectors[0].mean(0), atol=1e-6)


def test_fp16_finds_the_z_of_fp32_with_the_same_prior(world):
    """Whatever keeps fp16 gradients above underflow must not weigh the likelihood anew against the prior."""
    def found(dtype):
        model, tokenizer = make_lm("gpt2")
        space = space_of(likelihood_of(model, tokenizer, world[0]), tokenizer, world[0])
        likelihood = likelihood_of(model.to(dtype), tokenizer, world[0])
        histories = [np.arange(5, 17), np.arange(40, 48)]
        z, _ = solve_block(likelihood, space, histories, [0, 1], steps=15, prior=5.0)
        assert z.dtype == torch.float32
        return z.flatten(1)

    half, full = found(torch.float16), found(torch.float32)
    assert (torch.nn.functional.cosine_similarity(half, full) > 0.97).all()
    assert (half.norm(dim=1) / full.norm(dim=1)).tolist() == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize("what", ["theta", "task"])
@pytest.mark.parametrize("loudness", [3e-7, 1e3])
def test_small_and_large_gradients_survive_fp16(loudness, what, world):
    """A quiet last layer norm makes them so small that without a scale fp16 would round them away, a loud one
    so large that the scale would make them infinite: Llama-2-7B's shape does, with random weights."""
    def gradient(dtype):
        model, tokenizer = make_lm("gpt2")
        model.transformer.ln_f.weight.data.fill_(loudness)
        space = space_of(likelihood_of(model, tokenizer, world[0]), tokenizer, world[0])
        likelihood = likelihood_of(model.to(dtype), tokenizer, world[0])
        theta = space.origin.expand(2, -1, -1).clone().requires_grad_(what == "theta")
        likelihood.task = likelihood.task.clone().requires_grad_(what == "task")
        nll = likelihood(theta, *infer.pad([np.arange(5, 17), np.arange(40, 48)], [0, 1], "cpu"))
        (nll.sum() / 128).backward()  # as stage 03 does: it must not take the scale away again
        return 128 * (theta if what == "theta" else likelihood.task).grad.flatten(1)

    half, full = gradient(torch.float16), gradient(torch.float32)
    assert (torch.nn.functional.cosine_similarity(half, full) > 0.98).all()
    assert float(half.norm() / full.norm()) == pytest.approx(1, abs=0.05)


def test_the_graph_of_an_fp16_llm_is_freed_by_backward(world):
    """Else the next step's would stand beside it: twice the memory of a block."""
    model, tokenizer = make_lm("gpt2")
    likelihood = likelihood_of(model.half(), tokenizer, world[0])
    theta = random_theta(likelihood, 2).requires_grad_()
    nll = likelihood(theta, *infer.pad([np.arange(5, 17), np.arange(40, 48)], [0, 1], "cpu"))
    graph = weakref.ref(nll.grad_fn.nll)  # its end
    assert graph().requires_grad
    nll.sum().backward()
    gc.collect()
    assert graph() is None and nll.requires_grad and theta.grad.abs().sum() > 0


# ---------------------------------------------------------------- the artifacts

def test_users_without_a_history_hold_0_the_population(sparse, capsys):
    run, _ = sparse
    dataset, z, facts = (
        common.load_dataset(run),
        np.load(run / "profiles.npy"),
        common.load(run, "profiles.json"),
    )
    known = sorted(texts_of(dataset, common.TRAIN))
    unknown = sorted(set(range(len(dataset.users))) - set(known))
    assert len(unknown) >= 2 and facts["users_without_profile"] == len(unknown)
    assert common.load(run, "profiles_users.json")["inferred"] == known
    assert z.dtype == np.float32 and z.shape == (len(dataset.users), 2, 8)
    assert (z[unknown] == 0).all() and z[known].any(axis=(1, 2)).all()
    for count in (len(unknown), 0):
        infer.report(facts | {"users_without_profile": count})
        assert (f"{len(unknown)} users have no profile" in capsys.readouterr().out) == (count > 0)


def test_each_row_is_the_z_of_its_own_user(sparse):
    run, _ = sparse
    (dataset, likelihood, tokenizer, space), z = reopened(run), np.load(run / "profiles.npy")
    texts = texts_of(dataset, common.TRAIN)
    whole = infer.whole_space(space)
    assert space.shrink.shape == z.shape[1:] and space.shrink.min() < 0.9 < 1.0 >= space.shrink.max()
    for user in sorted(texts)[::9]:
        ids = [np.array(tokenizer.encode(texts[user]))]
        alone, _ = solve_block(likelihood, whole, ids, [0], steps=2, prior=0.0)
        assert np.allclose(space.project(whole.theta(alone))[0].numpy(), z[user], atol=0.02)


def test_training_nll_is_a_token_s_mean_before_and_after(sparse, lm_folders, tmp_path):
    """Of the descent, which --rank 0 keeps whole."""
    run = copy_run(sparse[0], tmp_path / "run")
    call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 2, "--task-steps", 1, "--rank", 0)
    (dataset, likelihood, tokenizer, space) = reopened(run)
    z = torch.from_numpy(np.load(run / "profiles.npy"))
    sums, tokens, theta = np.zeros(2), 0, space.theta(z)
    for user, text in texts_of(dataset, common.TRAIN).items():
        ids = torch.tensor([tokenizer.encode(text)])
        sums += [
            float(likelihood(profile[None], ids, torch.tensor([ids.shape[1]])))
            for profile in (space.origin, theta[user])
        ]
        tokens += ids.shape[1]
    facts = common.load(run, "profiles.json")
    assert [facts["train_nll"]["before"], facts["train_nll"]["after"]] == pytest.approx(
        (sums / tokens).tolist(), rel=1e-4
    )


def test_heldout_nll_is_of_validation_titles_under_own_the_population_s_and_another_s_theta(sparse):
    run, calls = sparse
    (dataset, _, tokenizer, space), z = reopened(run), np.load(run / "profiles.npy")
    theta = space.theta(torch.from_numpy(z)).numpy()
    trained, wanted = texts_of(dataset, common.TRAIN), texts_of(dataset, common.VALIDATION)
    known = sorted(trained)
    owners = {}  # tokens of a validation text -> whose it is
    for user, text in wanted.items():
        if user in known:
            owners.setdefault(tuple(tokenizer.encode(text)), []).append(user)
    assert len(owners) > 5
    def owner(vector, m):
        """Whose profile m this is; None: nobody's."""
        close = [user for user in known if np.allclose(theta[user, m], vector[m], atol=1e-6)]
        return close[0] if close else None

    sums, tokens, seen, lent = {}, Counter(), Counter(), []
    for thetas, ids, lengths, nlls in calls:
        for vector, row, length, nll in zip(thetas.numpy(), ids, lengths.tolist(), nlls.tolist()):
            text = tuple(row[:length].tolist())
            givers = [owner(vector, m) for m in (0, 1)]
            at_the_end = givers[0] is not None and text == tuple(tokenizer.encode(trained[givers[0]]))
            if text not in owners or at_the_end:
                continue  # a training history, at the end of the descent
            mine = [giver in owners[text] for giver in givers]
            kind = {(True, True): "own", (False, True): "hobby", (True, False): "background"}.get(
                tuple(mine), "shuffled" if givers[0] is not None else "population")
            assert kind != "population" or np.allclose(vector, space.origin.numpy(), atol=1e-6)
            if kind == "population" and seen[kind, text] == len(owners[text]):
                continue  # a training history of the same titles, under what is kept of theta
            seen[kind, text] += 1
            lent += [givers[0]] * (kind == "shuffled")
            sums[kind] = sums.get(kind, 0.0) + nll
            tokens[kind] += length
    assert seen == {(kind, text): len(users) for kind in sums for text, users in owners.items()}
    assert len(set(lent)) == len(lent) and len(sums) == 5  # no theta is lent twice
    found = common.load(run, "profiles.json")["heldout_nll"]
    assert found == pytest.approx({kind: total / tokens[kind] for kind, total in sums.items()}, rel=1e-5)


def test_the_error_of_a_heldout_difference_is_that_of_a_bootstrap_over_users():
    """Users are drawn with replacement a thousand times: how far does the difference of the means spread?"""
    rng = np.random.default_rng(0)
    n = 400
    lengths = rng.integers(4, 40, n)
    own = lengths * rng.normal(3, 0.3, n)
    extra = {"population": lengths * rng.normal(0.02, 0.5, n), "shuffled": 20 + rng.normal(0, 9, n)}
    histories = [np.full(length, user) for user, length in enumerate(lengths)]  # a token tells the user

    class Likelihood:
        prompt_length, width, device, dtype = 3, 8, torch.device("cpu"), torch.float32

        def __call__(self, theta, ids, lengths):
            users = ids[:, 0].numpy()
            kind = "own" if (theta == 1 + ids[:, :1, None]).all() else (
                "population" if not theta.any() else "shuffled")
            return torch.tensor(own[users] + (extra[kind][users] if kind in extra else 0))

    z = np.repeat(1.0 + np.arange(n), 2).reshape(n, 1, 2)  # of user u: u + 1 in each coordinate
    few = [ids if user < infer.ENOUGH - 1 else ids[:0] for user, ids in enumerate(histories)]
    space = types.SimpleNamespace(theta=lambda z: z)
    assert infer.heldout_nll(Likelihood(), space, z, few, range(n), [{"name": "hobby"}], rng)[1] == {}
    profiles = [{"name": "hobby"}]
    means, errors, _ = infer.heldout_nll(Likelihood(), space, z, histories, range(n), profiles, rng)
    assert list(means) == ["own", "population", "shuffled"] and list(errors) == ["population", "shuffled"]
    for name, values in extra.items():
        assert means[name] - means["own"] == pytest.approx(values.sum() / lengths.sum(), abs=1e-6)
        drawn = rng.integers(n, size=(1000, n))
        spread = (values[drawn].sum(1) / lengths[drawn].sum(1)).std()
        assert errors[name] == pytest.approx(spread, rel=0.15)


def test_an_lm_that_rescales_its_logits_is_refused(prepared, tmp_path):
    from transformers import CohereConfig, CohereForCausalLM
    run, (_, tokenizer) = copy_run(prepared, tmp_path / "run"), make_lm("gpt2")
    torch.manual_seed(0)
    CohereForCausalLM(
        CohereConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            logit_scale=0.0625,
            initializer_range=0.5,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(common.UserError, match="rescales its logits"):
        call_stage(infer, "--run", run, "--lm", tmp_path / "lm", "--steps", 1, "--task-steps", 1)


def test_new_users_are_not_put_beside_rows_that_somebody_changed(sparse, lm_folders, tmp_path):
    run = copy_run(sparse[0], tmp_path / "run")
    (run / "new.txt").write_text(common.load(run, "users.json")[0] + "\n")
    flags = ["--run", run, "--lm", lm_folders["gpt2"], "--steps", 2, "--task-steps", 1, "--lr", 0.5,
             "--users", run / "new.txt"]
    call_stage(infer, *flags)
    np.save(run / "profiles.npy", np.load(run / "profiles.npy") + 1)
    with pytest.raises(common.UserError, match="profiles.npy was made from another"):
        call_stage(infer, *flags, "--fresh")


def test_what_failed_is_said_with_its_figures():
    heldout = {"own": 1.0, "population": 1.1, "shuffled": 1.2, "hobby": 1.15}
    errors = dict.fromkeys(("population", "shuffled", "hobby"), 0.01)
    kept = {"own": 1.6, "population": 1.9, "error": 0.1, "users": 5}
    good = {"train_nll_steps": [2.0, 1.5], "train_nll_kept": kept, "heldout_nll": heldout,
            "heldout_error": errors}
    assert infer.warnings_of(good) == []
    assert infer.warnings_of(good | {"heldout_nll": None, "heldout_error": None}) == []
    line, = infer.warnings_of(good | {"train_nll_steps": [2.0, 1.9, 2.25]})
    assert "2.0000" in line and "2.2500" in line
    line, = infer.warnings_of(good | {"train_nll_kept": kept | {"own": 1.7123}})
    assert "1.7123" in line and "1.9000" in line and "5 users" in line
    few = {"heldout_error": None, "train_nll_kept": kept | {"error": None}}  # too few users to tell an error
    assert infer.warnings_of(good | few) == []
    line, = infer.warnings_of(good | few | {"heldout_nll": heldout | {"shuffled": 0.9999}})
    assert "1.0000" in line and "0.9999" in line
    assert infer.warnings_of(good | {"train_nll_kept": {"error": None, "users": 0}}) == []  # nobody new
    for name in ("population", "shuffled", "hobby"):
        for value, error in ((0.9876, 0.001), (1.0, 0.0), (1.0123, 0.0062)):  # worse, equal, within noise
            line, = infer.warnings_of(good | {"heldout_nll": heldout | {name: value},
                                              "heldout_error": errors | {name: error}})
            assert f"{value:.4f}" in line and "1.0000" in line and (name != "hobby" or "hobby" in line)
        assert infer.warnings_of(good | {"heldout_nll": heldout | {name: 1.0123},
                                         "heldout_error": errors | {name: 0.0061}}) == []


def test_what_is_kept_of_theta_is_tried_on_the_users_own_histories(sparse, tmp_path, monkeypatch):
    """The NLL under theta of the saved z, which is not that of the descent: squeezed and shrunk."""
    run = copy_run(sparse[0], tmp_path / "run")
    few = common.load(run, "profiles.json")
    with monkeypatch.context() as patched:
        patched.setattr(infer, "KEPT_USERS", 5)
        flags = [f"--{key.replace('_', '-')}={few[key]}" for key in ("lm", "steps", "lr", "prior")]
        call_stage(infer, "--run", run, *flags, "--fresh")
    found = common.load(run, "profiles.json")["train_nll_kept"]
    assert found["users"] == 5 and found["error"] is None and found["own"] != few["train_nll_kept"]["own"]
    run = sparse[0]
    dataset, likelihood, tokenizer, space = reopened(run)
    facts = common.load(run, "profiles.json")
    texts = infer.history_texts(dataset, common.SEEN, settings(**facts))
    histories = infer.tokenize_histories(tokenizer, texts, likelihood.room)
    z = np.load(run / "profiles.npy")
    users = [user for user, ids in enumerate(histories) if len(ids)]
    assert facts["train_nll_kept"]["users"] == len(users) < infer.KEPT_USERS
    for name, coordinates in (("own", z), ("population", 0 * z)):
        total = 0.0
        for user in users:
            theta = space.theta(torch.from_numpy(coordinates[[user]]))
            with torch.no_grad():
                total += likelihood(theta, *infer.pad(histories, [user], torch.device("cpu"))).item()
        tokens = sum(map(len, histories))
        assert facts["train_nll_kept"]["error"] > 0
        assert facts["train_nll_kept"][name] == pytest.approx(total / tokens, rel=1e-5)


def test_warnings_stand_in_what_stage_02_prints(prepared, lm_folders, tmp_path, capsys):
    """A random LLM knows nothing of users: on titles not seen theirs is no better than another's."""
    run = copy_run(prepared, tmp_path / "run")
    call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 1, "--prior", 0, "--lr", 5)
    facts = common.load(run, "profiles.json")
    heldout, errors = facts["heldout_nll"], facts["heldout_error"]
    failed = [name for name, error in errors.items() if heldout[name] - heldout["own"] <= 2 * error]
    printed = capsys.readouterr().out
    assert failed and printed.count("WARNING: on titles not seen") == len(failed)
    for profile in common.load_dataset(run).profiles:
        assert f"words of {profile['name']}: {', '.join(profile['words'])}" in printed


# ---------------------------------------------------------------- histories and blocks

def test_a_history_that_just_fits_is_whole_and_nothing_older_than_a_dropped_title_stays():
    tokenizer = make_lm("gpt2")[1]
    titles = [" Rod;", " Gold Guitar Premium Violin;", " Gold Guitar Classic Pan;"]
    lengths = [len(tokenizer.encode(title)) for title in titles]
    assert tokenizer.decode(infer.tokenize_histories(tokenizer, [titles], sum(lengths))[0]) == "".join(titles)
    room = lengths[2] + lengths[0]  # beside the newest for the oldest, not for the middle
    (cut,) = infer.tokenize_histories(tokenizer, [titles], room)
    assert lengths[0] < lengths[1] <= room and tokenizer.decode(cut) == titles[2]
    assert [len(ids) for ids in infer.tokenize_histories(tokenizer, [[]], 9)] == [0]


def test_of_many_users_some_are_drawn_to_be_judged(prepared, lm_folders, tmp_path, monkeypatch, capsys):
    judged = []
    heldout_nll = infer.heldout_nll
    monkeypatch.setattr(infer, "heldout_nll", lambda *args: judged.append(args[4]) or heldout_nll(*args))
    found = []
    for most in (10**9, 10**8, 12):
        monkeypatch.setattr(infer, "HELDOUT_USERS", most)
        run = copy_run(prepared, tmp_path / str(most))
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 0)
        found.append(common.load(run, "profiles.json"))
    everybody = common.load(run, "profiles_users.json")["inferred"]
    assert judged[0] == everybody and len(judged[2]) == 12 and set(judged[2]) < set(everybody)
    assert np.diff(judged[2]).max() > 1  # not the first ones
    assert found[0]["heldout_nll"] == found[1]["heldout_nll"] != found[2]["heldout_nll"]
    assert f"validation NLL per token of 12 of {len(everybody)} users: own" in capsys.readouterr().out


def test_a_title_that_fits_nowhere_is_left_out_alone():
    tokenizer = make_lm("gpt2")[1]
    titles = [" Rod;", " Pan;", " Gold Guitar Premium Violin;"]  # the newest is the long one
    room = len(tokenizer.encode(titles[2])) - 1
    (kept,) = infer.tokenize_histories(tokenizer, [titles], room)
    assert tokenizer.decode(kept) == " Rod; Pan;"


def test_no_block_is_larger_than_its_budget_and_the_longest_come_first():
    rng = np.random.default_rng(0)
    histories = [np.zeros(length, dtype=np.int64) for length in rng.integers(1, 240, size=200)]
    for budget in (600, 3000):
        blocks = infer.make_blocks(histories, None, budget, 20)
        sizes = [len(block) * (20 + max(len(histories[user]) for user in block)) for block in blocks]
        assert max(sizes) <= budget and max(map(len, blocks)) > 1
        longest = [max(len(histories[user]) for user in block) for block in blocks]
        assert longest == sorted(longest, reverse=True)
    assert [len(block) for block in infer.make_blocks(histories[:9], None, 1, 20)] == [
        1
    ] * 9  # never less than one user


# ---------------------------------------------------------------- the tiny LM

def uneven():
    """Items whose hobby is rare, middling or common (4, 16, 64 of them), two backgrounds across."""
    hobbies = ["rare"] * 4 + ["middling"] * 16 + ["common"] * 64
    items = [{"title": f"T{i}", "attributes": {"hobby": [hobby], "background": [("rich", "poor")[i % 2]]}}
             for i, hobby in enumerate(hobbies)]
    return common.Dataset(np.zeros((0, 4), np.int32), [], items, [prepare.HOBBY, prepare.BACKGROUND], "?")


def test_invented_people_are_drawn_by_square_roots_and_like_what_fits_three_times_in_four():
    dataset = uneven()
    hobby = {f" {item['title']};": item["attributes"]["hobby"][0] for item in dataset.items}
    people = sentences_of(dataset, 4000, 20)
    told = [words[0] for words, _ in people if 0 in words]
    for word, share in (("rare", 2 / 14), ("middling", 4 / 14), ("common", 8 / 14)):
        assert np.mean([name == word for name in told]) == pytest.approx(share, abs=0.04)
        fits = [hobby[title] == word for words, titles in people if words == {0: word} for title in titles]
        assert len(fits) > 500 and np.mean(fits) == pytest.approx(0.75, abs=0.05), word
    assert {len(titles) for _, titles in people} == {1, 2, 3, 5, 8, 12, 20}
    alone = [tuple(words) for words, _ in people if len(words) == 1]
    assert len(alone) == 2000 and alone.count((0,)) == 1000 and all(len(words) <= 2 for words, _ in people)


def test_marks_of_invented_people_follow_the_words_told_of_them():
    dataset = uneven()
    hobby = {item["title"]: item["attributes"]["hobby"][0] for item in dataset.items}
    liked = {True: [], False: []}
    for words, titles in sentences_of(dataset, 2000, 8, history="rated"):
        for text in titles if set(words) == {0} else ():
            title, mark = text[1:-1].rsplit(" ", 1)
            liked[hobby[title] == words[0]].append(mark == "+")
    odds = {fits: np.log(np.mean(marks) / (1 - np.mean(marks))) for fits, marks in liked.items()}
    assert odds[True] == pytest.approx(1.4, abs=0.25) and odds[False] == pytest.approx(-1.4, abs=0.25)


def test_words_of_the_user_s_own_train_no_other_tiny_lm(prepared, tmp_path):
    """What could name a profile decides where theta may lie, not what the LM reads."""
    run, made = copy_run(prepared, tmp_path / "run"), []
    for words in ("music,fishing,cooking", "music,rods"):
        call_stage(prepare, "--run", run, "--subsample-users", 120, "--hobby-words", words)
        call_stage(infer, "--run", run, "--lm", "tiny", "--tiny-sentences", 64, "--steps", 1,
                   "--task-steps", 1)
        lm = run / "lm-tiny" / "model.safetensors"
        made.append((lm.stat().st_mtime_ns, np.load(run / "profiles.npy")))
    assert made[0][0] == made[1][0] and not np.array_equal(made[0][1], made[1][1])
    assert infer.open_space(run, "cpu").words[0] == ["music", "rods"]


class KnowsTheWords(torch.nn.Module):
    """A language model that reads the profile words in a text and expects the titles that fit them."""

    def __init__(self, tokenizer, dataset):
        super().__init__()
        self.tokenizer, self.size, self.likely = tokenizer, len(tokenizer), {}
        for item in dataset.items:
            for values in item["attributes"].values():
                self.likely.setdefault(values[0], set()).update(tokenizer.encode(f" {item['title']};"))

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.size)
        for row, ids in enumerate(input_ids.tolist()):
            text = self.tokenizer.decode(ids)
            for word, tokens in self.likely.items():
                if word in text:
                    logits[row, :, sorted(tokens)] += 1.0
        return types.SimpleNamespace(logits=logits)


def test_a_wrong_word_costs_an_lm_that_reads_it(world):
    dataset, tokenizer = world[0], make_lm("gpt2")[1]
    found = sensitivity_of(KnowsTheWords(tokenizer, dataset), tokenizer, dataset)
    assert set(found) == {"hobby", "background"} and all(value > 0.05 for value in found.values()), found


def test_the_tiny_lm_is_trained_on_next_tokens_for_three_epochs(tiny):
    _, record = tiny
    assert len(record.batches) == 3 * 320 // 32 and all(len(batch) == 32 for batch in record.batches)
    for batch, targets in zip(record.batches, record.targets):
        targets = targets.view(32, -1)
        real = batch[:, 1:] != 0  # 0 pads; no text holds that token, a "!"
        assert torch.equal(targets, batch[:, 1:].masked_fill(~real, -100))
        assert real.any(0).all() and real[:, 0].all()  # no column of padding alone
    shares = [float((targets != -100).float().mean()) for targets in record.targets]
    assert 0.9 < np.mean(shares) < 1  # batches of like length
    rows = [
        tuple(map(int, row))
        for batch in record.batches
        for row in torch.nn.functional.pad(batch, (0, 400 - batch.shape[1]))
    ]
    assert {rows.count(row) % 3 for row in set(rows)} == {0}  # each text thrice


def test_the_tiny_lm_s_step_size_rises_falls_and_its_gradients_are_clipped(tiny):
    _, record = tiny
    steps = len(record.rates)
    assert max(record.rates) == pytest.approx(3e-3, rel=0.05) and np.argmax(record.rates) <= 0.15 * steps
    assert record.rates[0] < 1e-3 and record.rates[-1] < 1e-4
    assert 0.99 < max(record.norms) < 1.001


def resplit(run, rows):
    """Put other rows into a run, as if stage 01 had made them so."""
    dataset, facts = common.load_dataset(run), common.load(run, "dataset.json")
    dataset.interactions = rows
    np.save(run / "interactions.npy", rows)
    (run / "dataset.json").write_text(json.dumps(facts | {"fingerprint": dataset.fingerprint()}))
    return dataset


@pytest.mark.parametrize("other", [common.VALIDATION, common.SUPPORT])
def test_the_tiny_lm_knows_titles_and_lengths_of_training_rows_only(prepared, tmp_path, other):
    """An item that nobody met in training, and the longest histories, stand in rows of another split."""
    run = copy_run(prepared, tmp_path / "run")
    rows = np.load(run / "interactions.npy")
    train = rows[:, 3] == common.TRAIN
    liked = np.bincount(rows[train & (rows[:, 2] == 1), 0])
    longest = np.flatnonzero(liked == liked.max())
    rows[train & ((rows[:, 1] == 0) | np.isin(rows[:, 0], longest)), 3] = other
    dataset, left = resplit(run, rows), rows[rows[:, 3] == common.TRAIN]
    length = max(np.bincount(left[left[:, 2] == 1, 0]))
    assert length < liked.max() < 20
    seen, texts = set(left[:, 1].tolist()), []
    from tokenizers import ByteLevelBPETokenizer
    original = ByteLevelBPETokenizer.train_from_iterator
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        def stop(self, lines, *args, **kwargs):
            texts.extend(lines)
            original(self, texts, *args, **kwargs)
            raise KeyboardInterrupt
        patch.setattr(ByteLevelBPETokenizer, "train_from_iterator", stop)
        call_stage(infer, "--run", run, "--lm", "tiny", "--tiny-sentences", 2000, "--steps", 1,
                   "--task-steps", 1)
    text = "".join(texts)
    known = [f" {item['title']};" in text for item in dataset.items]
    assert known[min(seen)] and not any(known[item] for item in range(len(known)) if item not in seen)
    assert max(line.count(";") for line in texts) == length


def test_theta_of_a_cold_user_is_that_of_his_support_rows(lm_folders, tmp_path):
    call_stage(prepare, "--run", tmp_path, "--subsample-users", 60, "--min-interactions", 1,
               "--cold-users", 0.3)
    call_stage(infer, "--run", tmp_path, "--lm", lm_folders["gpt2"], "--steps", 2, "--task-steps", 1,
               "--lr", 0.5)
    (dataset, likelihood, tokenizer, space), z = reopened(tmp_path), np.load(tmp_path / "profiles.npy")
    trained, support, cold = (texts_of(dataset, split) for split in
                              (common.TRAIN, common.SUPPORT, common.COLD))
    assert len(support) > 12 and set(cold) & set(support) and not set(support) & set(trained)
    assert common.load(tmp_path, "profiles_users.json")["inferred"] == sorted([*trained, *support])
    whole = infer.whole_space(space)
    for user in sorted(support)[::3]:
        ids = [np.array(tokenizer.encode(support[user]))]
        alone, _ = solve_block(likelihood, whole, ids, [0], steps=2, prior=0.0)
        assert np.allclose(space.project(whole.theta(alone))[0].numpy(), z[user], atol=0.02)
