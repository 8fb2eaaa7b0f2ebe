"""Stage 02: prompt, mask, likelihood, inference."""

import copy
import hashlib

import numpy as np
import pytest
import torch
from conftest import infer, likelihood_of, make_lm, random_theta, settings, small_world

Segment = infer.Segment


def hand_made(profiles=2, begin=False):
    """A prompt of made-up token ids with names of different lengths."""
    segments = [Segment("begin", [9])] if begin else []
    for m in range(profiles):
        segments += [Segment("name", list(range(3 + m)), m), Segment("theta", [0], m)]
    return segments + [Segment("task", [5, 6]), Segment("history", [7, 8, 9])]


@pytest.mark.parametrize("profiles", [1, 2, 3])
@pytest.mark.parametrize("begin", [False, True])
def test_strict_mask_equals_its_definition(profiles, begin):
    segments = hand_made(profiles, begin)
    kind = [segment.kind for segment in segments for _ in segment.ids]
    owner = [segment.profile for segment in segments for _ in segment.ids]
    strict, causal = infer.build_visibility(segments, "strict"), infer.build_visibility(segments, "causal")
    for row in range(len(kind)):
        for column in range(len(kind)):
            past = column <= row
            own = kind[row] in ("task", "history") or kind[column] == "begin" or owner[row] == owner[column]
            assert strict[row, column] == (past and own) and causal[row, column] == past


def test_mask_values_are_finite_and_every_row_sees_itself():
    visible = infer.build_visibility(hand_made(), "strict")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        mask = infer.additive_mask(visible, dtype)
        assert mask.dtype == dtype and torch.isfinite(mask).all() and (mask[0, 0].diagonal() == 0).all()
        assert torch.equal(mask[0, 0] == 0, visible)


def test_positions():
    segments = hand_made()  # name 3, theta, name 4, theta, task 2, history 3
    assert infer.build_positions(segments, "causal").tolist() == list(range(14))
    assert infer.build_positions(segments, "strict").tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 9, 10, 11, 12, 13]
    assert infer.build_positions(hand_made(begin=True), "strict").tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14]


def jacobian_between_profiles(likelihood, history):
    """d (random projection of the last hidden state at theta^2) / d theta^1, largest absolute value."""
    theta = random_theta(likelihood, 1).requires_grad_()
    at = [index for index, segment in enumerate(likelihood.segments) for _ in segment.ids if segment.kind == "theta" and segment.profile == 1]
    where = sum(len(segment.ids) for segment in likelihood.segments[:at[0]])
    state = likelihood.hidden(theta, history)[0, where]
    projected = state @ torch.randn(len(state), 8, generator=torch.Generator().manual_seed(1))
    rows = [torch.autograd.grad(value, theta, retain_graph=True)[0][0, 0] for value in projected]
    return float(torch.stack(rows).abs().max())


def test_a_profile_does_not_reach_another_under_the_strict_mask(lm, world):
    history = torch.arange(5)[None]
    assert jacobian_between_profiles(likelihood_of(*lm, world[0]), history) == 0.0
    assert jacobian_between_profiles(likelihood_of(*lm, world[0], mask="causal"), history) > 0.01


def test_swapping_profile_blocks_changes_no_theta_state(lm, world):
    likelihood = likelihood_of(*lm, world[0])
    theta, history = random_theta(likelihood, 1), torch.arange(6)[None]
    first = [segment for segment in likelihood.segments if segment.profile == 0]
    second = [segment for segment in likelihood.segments if segment.profile == 1]
    outside = [segment for segment in likelihood.segments if segment.profile is None]
    begin, task = [s for s in outside if s.kind == "begin"], [s for s in outside if s.kind == "task"]

    def theta_states(order, mask):
        swapped = infer.ProfileLikelihood(likelihood.model, begin + order + task, mask)
        states = swapped.hidden(theta, history)[0]
        places = [place for place, segment in enumerate(s for s in swapped.segments for _ in s.ids) if segment.kind == "theta"]
        owners = [segment.profile for segment in swapped.segments if segment.kind == "theta"]
        return {owner: states[place] for owner, place in zip(owners, places)}, swapped(theta, history, torch.tensor([6]))

    (one, nll_one), (two, nll_two) = theta_states(first + second, "strict"), theta_states(second + first, "strict")
    assert all(torch.allclose(one[m], two[m], atol=1e-6) for m in (0, 1)) and torch.allclose(nll_one, nll_two, atol=1e-3)
    (one, _), (two, _) = theta_states(first + second, "causal"), theta_states(second + first, "causal")
    assert not torch.allclose(one[1], two[1], atol=1e-3)


@pytest.mark.parametrize("mask", ["strict", "causal"])
def test_nll_against_a_loop_over_tokens(lm, world, mask):
    """Reference: the whole model, eager attention, one growing prefix per token, rules of the mask written out again."""
    model, tokenizer = lm
    likelihood = likelihood_of(model, tokenizer, world[0], mask)
    theta, history = random_theta(likelihood, 1), torch.tensor([[3, 14, 15, 9, 2, 6]])
    found = likelihood(theta, history, torch.tensor([6]))
    slow = copy.deepcopy(model)
    slow.config._attn_implementation = "eager"
    rows, spans, at = [], [], 0
    for segment in likelihood.segments:
        rows.append(theta[0, segment.profile, None] if segment.kind == "theta" else likelihood.words(torch.tensor(segment.ids)))
        spans += [(segment.kind, segment.profile)] * len(segment.ids)
    prompt = torch.cat(rows)
    total = 0.0
    for place in range(6):
        embedded = torch.cat([prompt, likelihood.words(history[0, :place])])[None]
        kinds = spans + [("history", None)] * place
        n = len(kinds)
        floats = torch.zeros(1, 1, n, n)
        for row in range(n):
            for column in range(n):
                blind = mask == "strict" and kinds[row][1] is not None and kinds[column][0] != "begin" and kinds[row][1] != kinds[column][1]
                if column > row or blind:
                    floats[0, 0, row, column] = torch.finfo(torch.float32).min
        starts = [row for row in range(n) if kinds[row][0] == "name" and kinds[row - 1][0] != "name"]
        positions, first = list(range(n)), starts[0]
        if mask == "strict":
            for row in range(n):
                if kinds[row][1] is not None:
                    positions[row] = first + row - max(start for start in starts if start <= row)
        logits = slow(inputs_embeds=embedded, attention_mask=floats, position_ids=torch.tensor([positions])).logits[0, -1]
        total -= float(logits.log_softmax(0)[history[0, place]])
        at += 1
    assert at == 6 and float(found) == pytest.approx(total, rel=1e-4)


def test_padding_and_chunking_change_nothing(lm, world):
    likelihood = likelihood_of(*lm, world[0])
    histories = [np.arange(4), np.arange(11), np.arange(7)]
    theta = random_theta(likelihood, 3)
    together = likelihood(theta, *infer.pad(histories, [0, 1, 2], "cpu"))
    alone = torch.cat([likelihood(theta[user:user + 1], *infer.pad(histories, [user], "cpu")) for user in range(3)])
    assert torch.allclose(together, alone, rtol=1e-5)
    likelihood.chunk = 2
    assert torch.allclose(together, likelihood(theta, *infer.pad(histories, [0, 1, 2], "cpu")), rtol=1e-5)


@pytest.mark.parametrize("chunk", [3, 100])
def test_token_nll_and_its_gradient_against_autograd(chunk):
    torch.manual_seed(0)
    hidden, weight, bias, targets = torch.randn(10, 6, requires_grad=True), torch.randn(17, 6), torch.randn(17), torch.randint(17, (10,))
    upstream = torch.randn(10)
    nll = infer.TokenNLL.apply(hidden, weight, bias, targets, chunk)
    mine, = torch.autograd.grad((nll * upstream).sum(), hidden)
    reference = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="none")
    theirs, = torch.autograd.grad((reference * upstream).sum(), hidden)
    assert torch.allclose(nll, reference, atol=1e-5) and torch.allclose(mine, theirs, atol=1e-5)


def solve(likelihood, users, seed=0, **changes):
    rng = np.random.default_rng(0)
    histories = [rng.integers(300, size=4 + user) for user in range(6)]
    start, spread = infer.starting_point(likelihood, changes.get("init", "slot"), np.random.default_rng(seed))
    return infer.infer_block(likelihood, start, spread, histories, users, [f"user-{user}" for user in range(6)], settings(**changes))


def test_inference_lowers_the_nll_and_leaves_the_llm_bit_identical(lm, world):
    likelihood = likelihood_of(*lm, world[0])

    def digest():
        return hashlib.sha256(b"".join(value.numpy().tobytes() for value in likelihood.model.state_dict().values())).hexdigest()

    untouched = digest()
    _, nll = solve(likelihood, [0, 1, 2], steps=15, prior=0.0, lr=0.3)
    assert nll.shape == (16, 3) and (nll[-1] < nll[0]).all() and digest() == untouched
    assert all(parameter.grad is None for parameter in likelihood.model.parameters())


def test_users_of_a_block_do_not_touch_each_other(lm, world):
    likelihood = likelihood_of(*lm, world[0])
    together, *_ = solve(likelihood, [0, 3, 5])
    alone, *_ = solve(likelihood, [3])
    assert np.allclose(together[1], alone[0], atol=2e-4)


def test_every_inference_setting_changes_theta(world):
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    results = {"default": solve(likelihood, [0, 1])[0]}
    for change in ({"steps": 5}, {"lr": 0.2}, {"prior": 0.0}, {"init": "vocab"}, {"init": "random"}):
        results[str(change)] = solve(likelihood, [0, 1], **change)[0]
    results["mask"] = solve(likelihood_of(likelihood.model, make_lm("gpt2")[1], world[0], "causal"), [0, 1])[0]
    results["seed of init random"] = solve(likelihood, [0, 1], init="random", seed=1)[0]
    names = list(results)
    for i, first in enumerate(names):
        for second in names[:i]:
            assert not np.allclose(results[first], results[second], atol=1e-6), (first, second)


def test_a_prior_keeps_theta_near_its_start(world):
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    start, _ = infer.starting_point(likelihood, "slot", None)
    loose, tight = (np.linalg.norm(solve(likelihood, [0, 1], steps=20, prior=prior)[0] - start.numpy()) for prior in (0.0, 50.0))
    assert tight < 0.5 * loose


def test_slot_start_is_the_expected_next_word(world):
    model, tokenizer = make_lm("gpt2")
    likelihood = likelihood_of(model, tokenizer, world[0])
    ids = torch.tensor([infer.pieces(tokenizer, [world[0].profiles[1]["prompt"]])[0]])
    probability = model(ids).logits[0, -1].softmax(0)
    best = probability.argsort(descending=True)[:infer.SLOT_WORDS]
    expected = sum(probability[word] * likelihood.words.weight[word] for word in best) / probability[best].sum()
    start, spread = infer.starting_point(likelihood, "slot", None)
    assert torch.allclose(start[1], expected, atol=1e-5) and (spread > 0).all()


def test_non_finite_loss_names_the_users(world):
    model, tokenizer = make_lm("gpt2")
    likelihood = likelihood_of(model, tokenizer, world[0])
    model.transformer.wte.weight[infer.pieces(tokenizer, [" Guitar"])[0][0]] = float("nan")
    histories = [np.array([5, 6]), np.array(infer.pieces(tokenizer, [" Guitar"])[0])]
    with pytest.raises(infer.UserError, match="not finite for users"):
        infer.infer_block(likelihood, torch.zeros(2, 32), torch.ones(2), histories, [0, 1], ["anna", "ben"], settings())


@pytest.mark.parametrize("history", ["liked", "all", "rated"])
def test_history_is_the_recent_training_titles_in_order(world, history):
    dataset, _ = world
    texts = infer.history_texts(dataset, 0, settings(history=history, max_history=3))
    for user in range(len(dataset.users)):
        rows = [row for row in dataset.interactions.tolist() if row[0] == user and row[3] == 0 and (history != "liked" or row[2])][-3:]
        mark = {0: " -", 1: " +"} if history == "rated" else {0: "", 1: ""}
        assert texts[user] == [f" {dataset.items[item]['title']}{mark[label]};" for _, item, label, _ in rows]


def test_histories_are_cut_at_whole_titles(world):
    _, tokenizer = make_lm("gpt2")
    texts = [[" Gold Guitar;", " Basic Rod;", " Mini Pan;"], []]
    lengths = [len(ids) for ids in infer.pieces(tokenizer, texts[0])]
    cut = infer.tokenize_histories(tokenizer, texts, lengths[1] + lengths[2] + lengths[0] - 1)
    assert tokenizer.decode(cut[0]) == " Basic Rod; Mini Pan;" and len(cut[1]) == 0


def test_pieces_join_to_the_text_of_the_whole():
    for kind in ("gpt2", "llama"):
        tokenizer = make_lm(kind)[1]
        parts = ["This user's hobby is", ", and his background is", " Gold Guitar;", " Naïve «Ωmega» 🎸;"]
        assert tokenizer.decode([token for ids in infer.pieces(tokenizer, parts) for token in ids]) == "".join(parts)


def test_blocks_hold_every_user_with_a_history_once_and_pad_little():
    rng = np.random.default_rng(0)
    histories = [np.zeros(length, dtype=np.int64) for length in rng.integers(0, 238, size=300)]
    blocks = infer.make_blocks(histories, None, 2048, 20)
    assert sorted(user for block in blocks for user in block) == [user for user in range(300) if len(histories[user])]
    padded = sum(len(block) * max(len(histories[user]) for user in block) for block in blocks)
    assert padded < 1.05 * sum(map(len, histories))
    big = infer.make_blocks(histories, None, 100_000, 20)  # a GPU's budget: still hardly any padding
    padded = sum(len(block) * max(20 + len(histories[user]) for user in block) for block in big)
    assert padded < 1.05 * sum(20 + len(ids) for ids in histories if len(ids))
    assert all(len(block) <= 5 for block in infer.make_blocks(histories, 5, 2048, 20))


def test_sentences_fit_their_words_and_some_tell_one_profile_only():
    dataset, _ = small_world()
    sentences = infer.make_sentences(dataset, dataset.items, 400, 8, np.random.default_rng(0), "liked")
    value = {f" {item['title']};": item["attributes"] for item in dataset.items}
    fit = np.mean([value[title]["hobby"][0] == words[0] for words, titles in sentences if 0 in words for title in titles])
    assert fit > 0.6 and {len(words) for words, _ in sentences} == {1, 2}
    marks = [title[-3:-1] for _, titles in infer.make_sentences(dataset, dataset.items, 50, 8, np.random.default_rng(0), "rated") for title in titles]
    assert set(marks) == {" +", " -"}


def test_long_short_history_takes_its_share_of_every_age():
    assert infer.sample_history(30, 10, "recent") == list(range(20, 30)) and infer.sample_history(7, 10, "long-short") == list(range(7))
    places = infer.sample_history(100, 20, "long-short")
    assert places[8:] == list(range(88, 100)) and sum(place < 44 for place in places) == 2 and sum(44 <= place < 88 for place in places) == 6
    for length in range(1, 60):
        for limit in range(1, length):
            places = infer.sample_history(length, limit, "long-short")
            assert len(places) == limit == len(set(places)) and places == sorted(places) and 0 <= places[0] and places[-1] == length - 1
