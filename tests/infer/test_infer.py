"""Stage 02: prompt, mask, likelihood, inference."""

import copy
import hashlib

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import infer, likelihood_of, make_lm, random_theta, settings, small_world, space_of

import common

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
    strict = infer.build_positions(segments, "strict")
    assert strict.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 9, 10, 11, 12, 13]
    strict = infer.build_positions(hand_made(begin=True), "strict")
    assert strict.tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14]


def jacobian_between_profiles(likelihood, history):
    """d (random projection of the last hidden state at theta^2) / d theta^1, largest absolute value."""
    theta = random_theta(likelihood, 1).requires_grad_()
    at = next(index for index, segment in enumerate(likelihood.segments)
              if segment.kind == "theta" and segment.profile == 1)
    where = sum(len(segment.ids) for segment in likelihood.segments[:at])
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
        per_token = [segment for segment in swapped.segments for _ in segment.ids]
        found = {segment.profile: states[place] for place, segment in enumerate(per_token)
                 if segment.kind == "theta"}
        return found, swapped(theta, history, torch.tensor([6]))

    one, nll_one = theta_states(first + second, "strict")
    two, nll_two = theta_states(second + first, "strict")
    assert all(torch.allclose(one[m], two[m], atol=1e-6) for m in (0, 1))
    assert torch.allclose(nll_one, nll_two, atol=1e-3)
    (one, _), (two, _) = theta_states(first + second, "causal"), theta_states(second + first, "causal")
    assert not torch.allclose(one[1], two[1], atol=1e-3)


@pytest.mark.parametrize("mask", ["strict", "causal"])
def test_nll_against_a_loop_over_tokens(lm, world, mask):
    """Reference: the whole model, eager attention, one growing prefix per token, rules written out."""
    model, tokenizer = lm
    likelihood = likelihood_of(model, tokenizer, world[0], mask)
    theta, history = random_theta(likelihood, 1), torch.tensor([[3, 14, 15, 9, 2, 6]])
    found = likelihood(theta, history, torch.tensor([6]))
    slow = copy.deepcopy(model)
    slow.config._attn_implementation = "eager"
    rows, spans = [], []
    for segment in likelihood.segments:
        words = likelihood.word_table(torch.tensor(segment.ids))
        rows.append(theta[0, segment.profile, None] if segment.kind == "theta" else words)
        spans += [(segment.kind, segment.profile)] * len(segment.ids)
    prompt = torch.cat(rows)
    total = 0.0
    for place in range(6):
        embedded = torch.cat([prompt, likelihood.word_table(history[0, :place])])[None]
        kinds = spans + [("history", None)] * place
        n = len(kinds)
        floats = torch.zeros(1, 1, n, n)
        for row in range(n):
            for column in range(n):
                other = kinds[column][0] != "begin" and kinds[row][1] != kinds[column][1]
                if column > row or (mask == "strict" and kinds[row][1] is not None and other):
                    floats[0, 0, row, column] = torch.finfo(torch.float32).min
        starts = [row for row in range(n) if kinds[row][0] == "name" and kinds[row - 1][0] != "name"]
        positions, first = list(range(n)), starts[0]
        if mask == "strict":
            for row in range(n):
                if kinds[row][1] is not None:
                    positions[row] = first + row - max(start for start in starts if start <= row)
        output = slow(inputs_embeds=embedded, attention_mask=floats, position_ids=torch.tensor([positions]))
        total -= float(output.logits[0, -1].log_softmax(0)[history[0, place]])
    assert float(found) == pytest.approx(total, rel=1e-4)


def test_padding_and_chunking_change_nothing(lm, world):
    likelihood = likelihood_of(*lm, world[0])
    histories = [np.arange(4), np.arange(11), np.arange(7)]
    theta = random_theta(likelihood, 3)
    together = likelihood(theta, *infer.pad(histories, [0, 1, 2], "cpu"))
    alone = torch.cat([likelihood(theta[user:user + 1], *infer.pad(histories, [user], "cpu"))
                       for user in range(3)])
    assert torch.allclose(together, alone, rtol=1e-5)
    likelihood.chunk = 2
    assert torch.allclose(together, likelihood(theta, *infer.pad(histories, [0, 1, 2], "cpu")), rtol=1e-5)


@pytest.mark.parametrize("chunk", [3, 100])
def test_token_nll_and_its_gradient_against_autograd(chunk):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(10, 6, requires_grad=True), torch.randn(17, 6), torch.randn(17)
    targets, upstream = torch.randint(17, (10,)), torch.randn(10)
    nll = infer.TokenNLL.apply(hidden, weight, bias, targets, chunk)
    mine, = torch.autograd.grad((nll * upstream).sum(), hidden)
    reference = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="none")
    theirs, = torch.autograd.grad((reference * upstream).sum(), hidden)
    assert torch.allclose(nll, reference, atol=1e-5) and torch.allclose(mine, theirs, atol=1e-5)


def problem(lm, dataset, mask="strict", rank=16):
    """(likelihood, space, histories of six users of different lengths)."""
    likelihood, rng = likelihood_of(*lm, dataset, mask), np.random.default_rng(0)
    return likelihood, space_of(likelihood, lm[1], dataset, rank), [rng.integers(300, size=4 + user)
                                                                    for user in range(6)]


def solve(lm, dataset, users, mask="strict", **changes):
    """z (B, M, r) of these users."""
    likelihood, space, histories = problem(lm, dataset, mask, changes.get("rank", 16))
    return infer.infer_block(likelihood, space, histories, users, settings(**changes), dataset.users)["z"]


def test_inference_lowers_the_nll_of_each_user_and_leaves_the_llm_bit_identical(lm, world):
    likelihood, space, histories = problem(lm, world[0])

    def digest():
        state = likelihood.model.state_dict().values()
        return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state)).hexdigest()

    untouched = digest()
    infer.fit_task(likelihood, space, histories, settings(steps=15))
    ids, lengths = infer.pad(histories, [0, 1, 2], "cpu")
    z, path = infer.descend(likelihood, space, ids, lengths, settings(steps=15, prior=0.0))
    assert path.shape == (16, 3) and (likelihood(space.theta(z), ids, lengths) < path[0]).all()
    assert digest() == untouched
    assert all(parameter.grad is None for parameter in likelihood.model.parameters())


def test_a_solved_block_holds_z_and_the_nll_of_every_step_summed_over_its_users(lm, world):
    likelihood, space, histories = problem(lm, world[0])
    block = infer.infer_block(likelihood, space, histories, [1, 4], settings(steps=5), world[0].users)
    ids, lengths = infer.pad(histories, [1, 4], "cpu")
    z, path = infer.descend(likelihood, space, ids, lengths, settings(steps=5))
    assert torch.equal(block["z"], z) and z.dtype == torch.float32 and block["tokens"] == 5 + 8
    assert block["nll"] == pytest.approx(path.sum(1).tolist(), rel=1e-5) and block["seconds"] > 0
    assert block["nll"][-1] == pytest.approx(float(likelihood(space.theta(z), ids, lengths).sum()), rel=1e-5)


def test_users_of_a_block_do_not_touch_each_other(lm, world):
    together, alone = solve(lm, world[0], [0, 3, 5]), solve(lm, world[0], [3])
    # Rounding differs between blocks of three and of one, and later steps enlarge it to some .002.
    assert np.allclose(together[1], alone[0], atol=5e-3)


class Poisoned(infer.ProfileLikelihood):
    """A likelihood that is NaN for the block's second user."""

    def __call__(self, theta, history_ids, lengths):
        nll = super().__call__(theta, history_ids, lengths)
        return torch.where(torch.arange(len(nll)) == 1, float("nan"), nll)


def test_a_non_finite_likelihood_is_one_line_that_names_its_users_alone(world):
    model, tokenizer = make_lm("gpt2")
    _, space, histories = problem((model, tokenizer), world[0])
    likelihood = Poisoned(model, infer.prompt_segments(tokenizer, world[0]))
    with pytest.raises(common.UserError, match=r"not finite for 1 users, among them u3 .*--dtype"):
        raw_ids = [f"u{user}" for user in range(len(histories))]
        infer.infer_block(likelihood, space, histories, [0, 3, 5], settings(), raw_ids)


def test_a_task_prompt_whose_gradient_is_not_finite_is_one_line(world):
    model, tokenizer = make_lm("gpt2")
    likelihood, space, histories = problem((model, tokenizer), world[0])
    likelihood.word_table.weight.fill_(float("nan"))
    with pytest.raises(common.UserError, match=r"the task prompt's gradient is not finite.*--dtype"):
        infer.fit_task(likelihood, space, histories, settings(steps=15))


@pytest.mark.parametrize("poisoned", ["one a block", "all"])
def test_users_whose_likelihood_is_not_finite_are_left_out_of_the_evaluation(poisoned, world, capsys):
    """fp16 may overflow for one user; what was inferred of all is kept all the same."""
    model, tokenizer = make_lm("gpt2")
    sound, space, histories = problem((model, tokenizer), world[0])
    likelihood = Poisoned(model, infer.prompt_segments(tokenizer, world[0]))
    z = np.zeros((len(histories), *space.basis.shape[:2]), np.float32)
    blocks = infer.make_blocks(histories, 2, None, likelihood.prompt_length)
    left = [block[0] for block in blocks]  # the second of each has no likelihood
    if poisoned == "all":
        likelihood.word_table.weight.fill_(float("nan"))
        left = []
    found, _, out = infer.nll_per_token(likelihood, space, lambda block: {"own": z[block]}, histories, 2)
    count = sum(map(len, blocks))
    assert out == count - len(left)
    assert f"WARNING: the likelihood of the titles of {count - len(left)} of {count} users" in \
        capsys.readouterr().out
    if left:
        def variants(block):
            return {"own": z[block]}

        expected, _, none = infer.nll_per_token(sound, space, variants, infer.only(histories, left), 2)
        assert found["own"] == pytest.approx(expected["own"], abs=1e-5) and none == 0
    else:
        assert found == {}


def test_of_a_large_vocabulary_the_logits_of_fewer_tokens_are_held_at_once(world, monkeypatch):
    model, tokenizer = make_lm("gpt2")
    plain, space, histories = problem((model, tokenizer), world[0])
    monkeypatch.setattr(infer, "LOGITS", 3 * len(plain.head.weight) + 1)
    small = infer.ProfileLikelihood(model, plain.segments)
    assert small.chunk == 3 and infer.ProfileLikelihood(model, plain.segments, chunk=2).chunk == 2
    padded = infer.pad(histories, [0, 3, 5], plain.device)
    theta = space.words_mean.expand(3, -1, -1)
    assert torch.allclose(small(theta, *padded), plain(theta, *padded))


@pytest.mark.parametrize("history", ["liked", "all", "rated"])
def test_history_is_the_recent_training_titles_in_order(world, history):
    dataset, _ = world
    texts = infer.history_texts(dataset, common.TRAIN, settings(history=history, max_history=3))
    for user in range(len(dataset.users)):
        rows = [row for row in dataset.interactions.tolist()
                if row[0] == user and row[3] == 0 and (history != "liked" or row[2])][-3:]
        mark = {0: " -", 1: " +"} if history == "rated" else {0: "", 1: ""}
        assert texts[user] == [f" {dataset.items[item]['title']}{mark[label]};" for _, item, label, _ in rows]


def test_a_cold_user_is_inferred_from_his_support_rows_and_from_no_other():
    dataset, _ = small_world(cold_users=0.3)
    texts = infer.history_texts(dataset, common.SEEN, settings(history="all", max_history=100))
    cold = np.unique(dataset.rows(common.SUPPORT)[:, 0])
    assert len(cold) > 20
    for user, found in enumerate(texts):
        rows = dataset.interactions[dataset.interactions[:, 0] == user]
        rows = rows[np.isin(rows[:, 3], (0, 3))]
        assert found == [f" {dataset.items[item]['title']};" for item in rows[:, 1]]
        assert set(rows[:, 3]) <= ({3} if user in cold else {0})


def test_the_tiny_lm_reads_items_of_training_rows_alone(tmp_path, monkeypatch):
    dataset, _ = small_world(cold_users=0.3)
    only_support = next(item for item in dataset.rows(common.SUPPORT)[:, 1])
    dataset.interactions, seen = dataset.interactions.copy(), []
    _, items, _, splits = dataset.interactions.T
    splits[(items == only_support) & (splits == common.TRAIN)] = common.VALIDATION
    monkeypatch.setattr(common, "make_sentences", lambda traits, items, *_: seen.extend(items) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        common.train_tiny(dataset, tmp_path / "lm-tiny", 12,
                          SimpleNamespace(seed=0, history="liked", tiny_sentences=64))
    expected = {dataset.items[item]["title"] for item in dataset.rows(common.TRAIN)[:, 1]}
    assert {item["title"] for item in seen} == expected
    assert dataset.items[only_support]["title"] not in expected


def test_pieces_join_to_the_text_of_the_whole():
    for kind in ("gpt2", "llama"):
        tokenizer = make_lm(kind)[1]
        parts = ["This user's hobby is", ", and this background is", " Gold Guitar;", " Naïve «Ωmega» 🎸;"]
        joined = [token for ids in common.pieces_of(tokenizer, parts) for token in ids]
        assert tokenizer.decode(joined) == "".join(parts)


def test_blocks_hold_every_user_with_a_history_once_and_pad_little():
    rng = np.random.default_rng(0)
    histories = [np.zeros(length, dtype=np.int64) for length in rng.integers(0, 238, size=300)]
    blocks = infer.make_blocks(histories, None, 2048, 20)
    assert sorted(np.concatenate(blocks)) == [user for user in range(300) if len(histories[user])]
    padded = sum(len(block) * max(len(histories[user]) for user in block) for block in blocks)
    assert padded < 1.05 * sum(map(len, histories))
    big = infer.make_blocks(histories, None, 100_000, 20)  # a GPU's budget: still hardly any padding
    padded = sum(len(block) * max(20 + len(histories[user]) for user in block) for block in big)
    assert padded < 1.05 * sum(20 + len(ids) for ids in histories if len(ids))
    assert all(len(block) <= 5 for block in infer.make_blocks(histories, 5, 2048, 20))


@pytest.mark.parametrize("total", [16, 80])
def test_a_gpu_s_token_budget_is_of_its_whole_memory_not_of_what_is_free_now(monkeypatch, world, total):
    """Else a run that goes on beside another process would cut other blocks and start from the beginning."""
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    likelihood.device = SimpleNamespace(type="cuda")
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(total_memory=total * 2**30))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: asked.append(1))
    width, layers, weights = 32, 2, 4 * common.count_parameters(likelihood.model)
    expected = (total * 2**30 - weights) // 2 // (infer.ACTIVATIONS * width * layers * 4)
    assert infer.token_budget_of(likelihood) == expected and not asked


def test_sentences_of_each_length_tell_one_profile_or_both():
    dataset, _ = small_world()
    traits = [common.Trait(profile, dataset.items) for profile in dataset.profiles]
    for length in (1, 2, 4, 5, 9, 12, 20):  # whatever is told of people, some have as many titles as users
        people = common.make_sentences(traits, dataset.items, 84, length, np.random.default_rng(0), False)
        assert {tuple(told) for told, texts in people if len(texts) == length} == {(0, 1), (0,), (1,)}, length


def test_a_sentence_is_its_words_the_task_and_its_titles_and_only_titles_count_as_history():
    dataset, _ = small_world()
    tokenizer = make_lm("gpt2")[1]
    traits = [common.Trait(profile, dataset.items) for profile in dataset.profiles]
    sentences = [({0: "music", 1: "ordinary"}, [" Gold Guitar;"]),
                 ({1: "luxurious"}, [" Mini Pan;", " Basic Rod;"])]
    ids, targets, history = common.encode_sentences(tokenizer, traits, dataset.task_prompt, sentences)
    for row, (words, titles) in enumerate(sentences):
        prompt = "".join(f"{traits[m].prompt} {word}" for m, word in words.items()) + dataset.task_prompt
        real = targets[row] >= 0
        assert tokenizer.decode(ids[row][real]) == prompt + "".join(titles)
        assert torch.equal(ids[row][real], targets[row][real])
        assert tokenizer.decode(history[row][history[row] >= 0]) == "".join(titles)
