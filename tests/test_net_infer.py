"""Stage 02, second net: what the first tests let pass.

Adapters first: what a rewrite changes is changed there alone.
"""

import contextlib
import gc
import json
import types
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import (call_stage, copy_run, infer, likelihood_of, make_lm, prepare, quantize, random_theta,
                      settings)

import common

# ---------------------------------------------------------------- adapters


def solve_block(likelihood, start, spread, histories, users, **changes):
    """(theta (B, M, d), NLL summed over the users before each step and at the end)."""
    part = infer.infer_block(likelihood, start, spread, histories, users, settings(**changes))
    assert part["tokens"] == sum(len(histories[user]) for user in users) and part["seconds"] > 0
    return part["theta"], np.array(part["nll"])


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
        if theta.requires_grad:  # the descent goes on: what was evaluated before is no part of the end
            calls.clear()
        else:
            calls.append((theta.clone(), ids.clone(), lengths.clone(), nll.clone()))
        return nll

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer.ProfileLikelihood, "__call__", recorded)
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 2, "--lr", 0.5)
    return run, calls


def reopened(run):
    """(dataset, likelihood, tokenizer) of a run with the fixtures' GPT-2."""
    model, tokenizer = make_lm("gpt2")
    dataset = common.load_dataset(run)
    return dataset, likelihood_of(model, tokenizer, dataset), tokenizer


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
        call_stage(infer, "--run", run, "--lm", "tiny", "--tiny-sentences", 320, "--steps", 1)
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


def test_the_slot_start_and_its_spread_against_loops(lm, world):
    model, tokenizer = lm
    start, spread = infer.starting_point(likelihood_of(model, tokenizer, world[0]), "slot", None)
    table = model.get_input_embeddings().weight.double().numpy()
    for m, profile in enumerate(world[0].profiles):
        ids = tokenizer(profile["prompt"])["input_ids"]  # with the begin token, where there is one
        share = model(torch.tensor([ids])).logits[0, -1].double().softmax(0).tolist()
        best = sorted(range(len(share)), key=lambda word: -share[word])[:infer.SLOT_WORDS]
        total = sum(share[word] for word in best)
        mean = sum(share[word] / total * table[word] for word in best)
        variance = sum(share[word] / total * (table[word] - mean) ** 2 for word in best)  # of each coordinate
        assert np.allclose(start[m].numpy(), mean, atol=1e-4)
        assert float(spread[m]) == pytest.approx(np.sqrt(variance.mean()), rel=1e-3)


def test_the_other_starts_are_the_mean_of_all_words_and_noise(world):
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    words = likelihood.words.weight
    start, _ = infer.starting_point(likelihood, "vocab", None)
    assert torch.allclose(start[0], words.mean(0), atol=1e-6) and torch.equal(start[0], start[1])
    noise, _ = infer.starting_point(likelihood, "random", np.random.default_rng(0))
    assert 0.09 < noise.abs().max() <= 0.1 and not torch.equal(noise[0], noise[1])


# ---------------------------------------------------------------- the descent

def by_hand(likelihood, start, spread, ids, steps, lr, prior):
    """Barzilai and Borwein's steps on Eq. (4) and prior / 2 ||z||^2, theta = start + spread z, for a user."""
    z, path, last = torch.zeros_like(start), [], None
    lengths = torch.tensor([ids.shape[1]])
    for _ in range(steps):
        z = z.detach().requires_grad_()
        nll = likelihood((start + spread[:, None] * z)[None], ids, lengths)[0]
        path.append(float(nll.detach()))
        gradient, = torch.autograd.grad(nll, z)
        gradient = gradient + prior * z.detach()  # of prior / 2 z^2
        size = lr / float(gradient.abs().max())  # the largest coordinate moves by lr
        if prior:
            size = min(size, 1 / prior)
        if last is not None:
            step, change = (z.detach() - last[0]).flatten(), (gradient - last[1]).flatten()
            if step @ change > 0:
                size = min(size, float(step @ step / (step @ change)))
        last = z.detach(), gradient
        z = z.detach() - size * gradient
    theta = start + spread[:, None] * z
    return theta, path + [float(likelihood(theta[None], ids, lengths)[0])]


@pytest.mark.parametrize("prior, lr", [(0.0, 0.2), (4.0, 0.2), (0.05, 40.0)])  # what bounds a step
def test_a_block_is_descent_on_eq_4_and_the_prior_of_each_user(world, prior, lr):
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    rng = np.random.default_rng(0)
    histories = [rng.integers(300, size=6 + 3 * user) for user in range(3)]
    start, spread = infer.starting_point(likelihood, "slot", None)
    theta, path = solve_block(likelihood, start, spread, histories, [0, 1, 2], steps=8, lr=lr, prior=prior)
    expected = [
        by_hand(likelihood, start, spread, torch.from_numpy(ids)[None], 8, lr, prior) for ids in histories
    ]
    for user, (wanted, _) in enumerate(expected):
        off = (theta[user] - wanted).abs() / spread[:, None]
        assert off.max() < 1e-3, off.max()
    assert path == pytest.approx([sum(values) for values in zip(*(nll for _, nll in expected))], rel=1e-3)


def test_fp16_finds_the_theta_of_fp32_with_the_same_prior(world):
    """Whatever keeps fp16 gradients above underflow must not weigh the likelihood anew against the prior."""
    def theta(dtype):
        model, tokenizer = make_lm("gpt2")
        likelihood = likelihood_of(model.to(dtype), tokenizer, world[0])
        histories = [np.arange(5, 17), np.arange(40, 48)]
        start, spread = infer.starting_point(likelihood_of(*make_lm("gpt2"), world[0]), "slot", None)
        solved, _ = solve_block(likelihood, start, spread, histories, [0, 1], steps=15, lr=0.1, prior=5.0)
        assert solved.dtype == torch.float32
        return ((solved - start) / spread[:, None]).flatten(1)

    half, full = theta(torch.float16), theta(torch.float32)
    assert (torch.nn.functional.cosine_similarity(half, full) > 0.97).all()
    assert (half.norm(dim=1) / full.norm(dim=1)).tolist() == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize("loudness", [3e-7, 1e3])
def test_small_and_large_gradients_survive_fp16(loudness, world):
    """A quiet last layer norm makes them so small that without a scale fp16 would round them away, a loud one
    so large that the scale would make them infinite: Llama-2-7B's shape does, with random weights."""
    def gradient(dtype):
        model, tokenizer = make_lm("gpt2")
        model.transformer.ln_f.weight.data.fill_(loudness)
        likelihood = likelihood_of(model.to(dtype), tokenizer, world[0])
        start, _ = infer.starting_point(likelihood_of(*make_lm("gpt2"), world[0]), "slot", None)
        theta = start.expand(2, -1, -1).clone().requires_grad_()
        nll = likelihood(theta, *infer.pad([np.arange(5, 17), np.arange(40, 48)], [0, 1], "cpu"))
        (nll.sum() / 128).backward()  # as stage 03 does: it must not take the scale away again
        return 128 * theta.grad.flatten(1)

    half, full = gradient(torch.float16), gradient(torch.float32)
    assert (torch.nn.functional.cosine_similarity(half, full) > 0.98).all()


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

def population(run):
    """theta (M, d) that all users share, where each started."""
    return torch.tensor(common.load(run, "profiles.json")["start"])


def test_users_without_a_history_hold_the_population_s_theta(sparse):
    run, _ = sparse
    dataset, theta, facts = (
        common.load_dataset(run),
        np.load(run / "profiles.npy"),
        common.load(run, "profiles.json"),
    )
    known = sorted(texts_of(dataset, common.TRAIN))
    unknown = sorted(set(range(len(dataset.users))) - set(known))
    assert len(unknown) >= 2 and facts["users_without_history"] == len(unknown)
    assert common.load(run, "profiles_users.json")["inferred"] == known
    shared = population(run).numpy()
    assert np.abs(shared).max() > 0.01 and (theta[unknown] == shared).all()
    assert not (theta[known] == shared).all(axis=(1, 2)).any()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_population_s_theta_is_adam_s_on_everybody_s_likelihood(kind, world):
    """Against Adam by hand, over all users in one block; and no other theta for all is as likely."""
    rng, likelihood = np.random.default_rng(3), likelihood_of(*make_lm(kind), world[0])
    histories = [rng.integers(300, size=length) for length in (3, 7, 7, 4)]
    start, spread = infer.starting_point(likelihood, "slot", None)
    found = infer.fit_population(likelihood, start, spread, [histories[0][:0], *histories], settings(seed=0))

    def nll(theta):
        return likelihood(theta.expand(4, -1, -1), *infer.pad(histories, [0, 1, 2, 3], "cpu")).sum()

    z, first, second = torch.zeros_like(start), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(infer.POPULATION_STEPS):
        z.requires_grad_()
        gradient, = torch.autograd.grad(nll(start + spread[:, None] * z), z)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient ** 2
        rate = 0.1 * (1 - step / infer.POPULATION_STEPS)
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        z = (z - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)).detach()
    assert torch.allclose(found, start + spread[:, None] * z, atol=0.02 * float(spread.min()))
    other = found + 0.1 * spread[:, None] * (-1) ** torch.arange(32)
    assert nll(found) < nll(start) and nll(found) < nll(other)


def test_the_population_is_fitted_on_everybody_in_blocks_of_any_size(world, monkeypatch):
    rng, likelihood = np.random.default_rng(3), likelihood_of(*make_lm("gpt2"), world[0])
    histories = [rng.integers(300, size=5) for _ in range(6)]
    start, spread = infer.starting_point(likelihood, "slot", None)

    def fit(users=6, **changes):
        return infer.fit_population(likelihood, start, spread, histories[:users], settings(**changes))

    base = fit()
    assert torch.equal(fit(), base) and not torch.allclose(fit(users=5), base, atol=1e-4)
    assert torch.allclose(fit(block_size=2), base, atol=1e-4)  # how, not what
    monkeypatch.setattr(infer, "POPULATION_USERS", 3)
    few = fit()
    assert not torch.allclose(few, base, atol=1e-4) and not torch.allclose(few, fit(seed=1), atol=1e-4)


def test_each_row_is_the_theta_of_its_own_user(sparse):
    run, _ = sparse
    (dataset, likelihood, tokenizer), theta = reopened(run), np.load(run / "profiles.npy")
    start, spread = population(run), infer.starting_point(likelihood, "slot", None)[1]
    texts = texts_of(dataset, common.TRAIN)
    for user in sorted(texts)[::9]:
        ids = [np.array(tokenizer.encode(texts[user]))]
        alone, _ = solve_block(likelihood, start, spread, ids, [0], steps=2, lr=0.5)
        assert np.allclose(alone[0].numpy(), theta[user], atol=0.02 * float(spread.min()))


def test_training_nll_is_a_token_s_mean_before_and_after(sparse):
    run, _ = sparse
    (dataset, likelihood, tokenizer), theta = reopened(run), torch.from_numpy(np.load(run / "profiles.npy"))
    start, sums, tokens = population(run), np.zeros(2), 0
    for user, text in texts_of(dataset, common.TRAIN).items():
        ids = torch.tensor([tokenizer.encode(text)])
        sums += [
            float(likelihood(profile[None], ids, torch.tensor([ids.shape[1]])))
            for profile in (start, theta[user])
        ]
        tokens += ids.shape[1]
    facts = common.load(run, "profiles.json")
    assert [facts["train_nll"]["before"], facts["train_nll"]["after"]] == pytest.approx(
        (sums / tokens).tolist(), rel=1e-4
    )


def test_heldout_nll_is_of_validation_titles_under_own_the_population_s_and_another_s_theta(sparse):
    run, calls = sparse
    (dataset, _, tokenizer), theta = reopened(run), np.load(run / "profiles.npy")
    trained, wanted = texts_of(dataset, common.TRAIN), texts_of(dataset, common.VALIDATION)
    known = sorted(trained)
    owners = {}  # tokens of a validation text -> whose it is
    for user, text in wanted.items():
        if user in known:
            owners.setdefault(tuple(tokenizer.encode(text)), []).append(user)
    assert len(owners) > 5
    owner = {theta[user].tobytes(): user for user in known}
    sums, tokens, seen, lent = dict.fromkeys(("own", "population", "shuffled"), 0.0), 0, Counter(), []
    for thetas, ids, lengths, nlls in calls:
        for row, (vector, length, nll) in enumerate(zip(thetas.numpy(), lengths.tolist(), nlls.tolist())):
            text = tuple(ids[row, :length].tolist())
            giver = owner.get(vector.tobytes())
            if text not in owners or giver is not None and text == tuple(tokenizer.encode(trained[giver])):
                continue  # his training history, at the end of the descent
            kind = "own" if giver in owners[text] else "population" if giver is None else "shuffled"
            assert kind != "population" or np.array_equal(vector, population(run).numpy())
            seen[kind, text] += 1
            lent += [giver] * (kind == "shuffled")
            sums[kind] += nll
            tokens += length
    assert seen == {(kind, text): len(users) for kind in sums for text, users in owners.items()}
    assert len(set(lent)) == len(lent)  # no theta is lent twice
    found = common.load(run, "profiles.json")["heldout_nll"]
    assert found == pytest.approx({kind: total / (tokens / 3) for kind, total in sums.items()}, rel=1e-5)


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
        call_stage(infer, "--run", run, "--lm", tmp_path / "lm", "--steps", 1)


def test_new_users_are_not_put_beside_rows_that_somebody_changed(sparse, lm_folders, tmp_path):
    run = copy_run(sparse[0], tmp_path / "run")
    (run / "new.txt").write_text(common.load(run, "users.json")[0] + "\n")
    flags = ["--run", run, "--lm", lm_folders["gpt2"], "--steps", 2, "--lr", 0.5, "--users", run / "new.txt"]
    call_stage(infer, *flags)
    np.save(run / "profiles.npy", np.load(run / "profiles.npy") + 1)
    with pytest.raises(common.UserError, match="profiles.npy was made from another"):
        call_stage(infer, *flags, "--fresh")


# ---------------------------------------------------------------- histories and blocks

def test_a_history_that_just_fits_is_whole_and_nothing_older_than_a_dropped_title_stays():
    tokenizer = make_lm("gpt2")[1]
    titles = [" Rod;", " Gold Guitar Premium Violin;", " Pan;"]
    lengths = [len(tokenizer.encode(title)) for title in titles]
    assert tokenizer.decode(infer.tokenize_histories(tokenizer, [titles], sum(lengths))[0]) == "".join(titles)
    (cut,) = infer.tokenize_histories(
        tokenizer, [titles], lengths[2] + lengths[0]
    )  # room for the oldest, not for the middle
    assert lengths[1] > lengths[0] and tokenizer.decode(cut) == " Pan;"


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
        call_stage(infer, "--run", run, "--lm", "tiny", "--tiny-sentences", 2000, "--steps", 1)
    text = "".join(texts)
    known = [f" {item['title']};" in text for item in dataset.items]
    assert known[min(seen)] and not any(known[item] for item in range(len(known)) if item not in seen)
    assert max(line.count(";") for line in texts) == length


def test_theta_of_a_cold_user_is_that_of_his_support_rows(lm_folders, tmp_path):
    call_stage(prepare, "--run", tmp_path, "--subsample-users", 60, "--min-interactions", 1,
               "--cold-users", 0.3)
    call_stage(infer, "--run", tmp_path, "--lm", lm_folders["gpt2"], "--steps", 2, "--lr", 0.5)
    (dataset, likelihood, tokenizer), theta = reopened(tmp_path), np.load(tmp_path / "profiles.npy")
    trained, support, cold = (texts_of(dataset, split) for split in
                              (common.TRAIN, common.SUPPORT, common.COLD))
    assert len(support) > 12 and set(cold) & set(support) and not set(support) & set(trained)
    assert common.load(tmp_path, "profiles_users.json")["inferred"] == sorted([*trained, *support])
    start, spread = population(tmp_path), infer.starting_point(likelihood, "slot", None)[1]
    for user in sorted(support)[::3]:
        ids = [np.array(tokenizer.encode(support[user]))]
        alone, _ = solve_block(likelihood, start, spread, ids, [0], steps=2, lr=0.5)
        assert np.allclose(alone[0].numpy(), theta[user], atol=0.02 * float(spread.min()))


def test_stage_03_refuses_another_tiny_lm(tiny, tmp_path):
    run = copy_run(tiny[0], tmp_path / "run")
    folder = copy_run(tiny[0] / "lm-tiny", run / "lm-tiny")
    model, _ = common.load_language_model(str(folder), torch.float32, torch.device("cpu"))
    model.base_model.ln_f.bias.data += 0.01
    model.save_pretrained(folder)
    with pytest.raises(common.UserError, match="02_infer_profiles.py"):
        call_stage(quantize, "--run", run, "--epochs", 1, "--warm-up", 0)


def test_noise_to_start_from_is_new_for_each_seed(prepared, lm_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "fit_population", lambda likelihood, start, *_: start)
    found = []
    for seed in (0, 1):
        run = copy_run(prepared, tmp_path / str(seed))
        call_stage(
            infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 1, "--init", "random", "--seed", seed
        )
        found.append(np.load(run / "profiles.npy"))
    assert not np.allclose(found[0], found[1], atol=1e-3)
