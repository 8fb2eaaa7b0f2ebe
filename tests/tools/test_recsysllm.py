"""tools/recsysllm.py: texts, mask, positions, LoRA, scores against the long way round; what may be read."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    call_stage, copy_run, fork_stage, infer, likelihood_of, load_script, make_lm, next_item, ok, prepare,
    quantize)
from sklearn.metrics import ndcg_score
from test_pipeline import poisoned
from torch import nn

import common
from common import TEST, TRAIN

recsysllm = load_script("recsysllm")
Piece = recsysllm.Piece
QUICK = ("--epochs", 2, "--test-users", 6, "--rows", 30)


@pytest.fixture(scope="module")
def dataset(prepared):
    return common.load_dataset(prepared)


def open_world(dataset, kind):
    """(likelihood, Texts) of a small random LLM."""
    model, tokenizer = make_lm(kind)
    return (likelihood_of(model, tokenizer, dataset),
            recsysllm.Texts(tokenizer, dataset, len(model.get_input_embeddings().weight)))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def opened(request, dataset):
    return open_world(dataset, request.param)


@pytest.fixture(scope="module")
def texts(dataset):
    return open_world(dataset, "gpt2")[1]


def model_of(likelihood, learned=True, **changes):
    """A RecSysLLM on a copy of the LLM; learned: with what training could have left."""
    torch.manual_seed(1)
    flags = {"characters": [5, 6, 7, 8, 9], "rank": 2, "alpha": 4.0, "longest": 60, **changes}
    model = copy.deepcopy(likelihood.model)
    copied = SimpleNamespace(**{**vars(likelihood), "body": model.base_model,
                                "head": model.get_output_embeddings(), "vectors": likelihood.vectors,
                                "word_table": model.get_input_embeddings()})
    found = recsysllm.RecSysLLM(copied, **flags)
    if learned:
        with torch.no_grad():
            for value in found.learned().values():
                value.copy_(0.3 * torch.randn(value.shape))
    return found.eval()


def histories_of(dataset):
    rows = quantize.rows_by_user(dataset.rows(TRAIN), len(dataset.users))
    return [some for some in rows if len(some) > 3]


def draws(texts, dataset, count=60, length=6):
    rng = np.random.default_rng(0)
    histories = histories_of(dataset)
    return [recsysllm.draw_example(texts, histories[number % len(histories)][:length], rng)
            for number in range(count)]


def spans_of(example, texts):
    """The token lists of an example's spans; each is written one token late and ends in [END]."""
    starts = [place for place in range(example.corrupted, len(example.ids))
              if place == example.corrupted or example.inter[place] != example.inter[place - 1]]
    found = []
    for start, end in zip(starts, [*starts[1:], len(example.ids)]):
        found.append(example.ids[start + 1:end])
        assert example.ids[start] == texts.marks["start"]
        assert example.targets[start:end] == [*found[-1], texts.marks["end"]]
    return found


# -------- data phase

def test_stretches_are_drawn_from_windows_of_their_own_length_in_their_shares_and_in_order():
    rows = np.stack([np.zeros(100), np.arange(100), np.ones(100)], axis=1).astype(int)
    rng = np.random.default_rng(0)
    spans = []
    for _ in range(3000):
        places = recsysllm.stretch(rows, 5, rng)[:, 1]
        assert len(places) == 5 and (np.diff(places) > 0).all()
        spans.append(places[-1] - places[0])
    spans = np.array(spans)
    assert abs((spans == 4).mean() - 0.6) < 0.03  # consecutive rows
    assert abs(((spans > 4) & (spans < 15)).mean() - 0.3) < 0.03
    assert abs((spans >= 15).mean() - 0.1) < 0.02
    assert recsysllm.stretch(rows[:3], 5, rng)[:, 1].tolist() == [0, 1, 2]


def test_the_attributes_of_a_text_are_the_commonest_of_the_liked_rows(texts):
    values = [item["attributes"]["hobby"][0] for item in texts.dataset.items]
    music = [number for number, value in enumerate(values) if value == "music"]
    fishing = [number for number, value in enumerate(values) if value == "fishing"]
    rows = [(0, music[0], 1), (0, fishing[0], 0), (0, fishing[1], 0), (0, music[1], 1), (0, fishing[2], 1)]
    wording = recsysllm.SEEN_WORDINGS[0]
    pieces = texts.opening(rows, wording)
    assert pieces[2].entity and pieces[2].ids == texts.values["music"]
    assert not any(piece.entity for piece in texts.opening(rows[1:3], wording))
    for some, beginning in ((rows, "This user's hobby is music. This user only buys products that are "),
                            (rows[1:3], "Products that this user bought:")):
        ids = [token for piece in texts.opening(some, wording) for token in piece.ids]
        assert texts.tokenizer.decode(ids).strip().startswith(beginning)


# -------- blanks and positions

def test_the_example_of_the_docstring(texts):
    first, second = texts.titles[:2]
    wording = recsysllm.SEEN_WORDINGS[1]
    pieces = texts.sentence(0, 1, wording) + texts.sentence(1, 0, wording)
    found = recsysllm.blank(pieces, [range(0, 1), range(6, 7)], texts)
    was, end = (texts.words[text] for text in (" was", ";"))
    mask, start, stop = (texts.marks[name] for name in ("entity", "start", "end"))
    good, bad = (texts.words[text] for text in (" good", " bad"))
    text = [mask, *was, *good, *end, *second, *was, mask, *end]
    assert found.corrupted == len(text)
    assert found.ids == [*text, start, *first, start, *bad]
    assert found.targets == [-100] * len(text) + [*first, stop, *bad, stop]
    places = [0] * (1 + len(first)) + [text.index(mask, 1)] * (1 + len(bad))
    assert found.inter == [*range(len(text)), *places]
    inside = [*(0 for _ in (mask, *was)), *range(1, 1 + len(good)), *(0 for _ in end),
              *range(1, 1 + len(second)), *(0 for _ in (*was, mask, *end))]
    assert found.intra == [*inside, *range(1, 2 + len(first)), *range(1, 2 + len(bad))]


@pytest.mark.parametrize("level", recsysllm.LEVELS)
def test_blanks_are_whole_pieces_in_the_order_of_time(texts, dataset, level):
    rng = np.random.default_rng(0)
    rows = histories_of(dataset)[0][:4]
    body = []
    for _, item, label in rows:
        body += texts.sentence(item, label, recsysllm.SEEN_WORDINGS[0])
    total = sum(len(piece.ids) for piece in body)
    for _ in range(200):
        spans = recsysllm.blanks_of(body, level, rng)
        assert spans and all(one.stop <= other.start for one, other in zip(spans, spans[1:]))
        blanked = [number for span in spans for number in span]
        if level == "entity":
            assert all(body[number].entity for number in blanked) and {len(span) for span in spans} == {1}
        elif level == "sentence":
            assert all(span.start % 4 == 0 and len(span) == 4 for span in spans)
        else:
            tokens = sum(len(body[number].ids) for number in blanked)
            assert len(spans) == 1 and spans[0].stop == len(body)
            assert tokens <= total and tokens >= total / 2


def test_an_example_holds_the_whole_text_and_nothing_else(texts, dataset):
    """The spans in the place of their [MASK]s give back sentences of the user's rows, in their order."""
    rows = histories_of(dataset)[0][:5]
    rng = np.random.default_rng(0)
    names = {texts.marks[level] for level in recsysllm.LEVELS}
    for _ in range(100):
        example = recsysllm.draw_example(texts, rows, rng)
        spans = iter(spans_of(example, texts))
        whole = []
        for token in example.ids[:example.corrupted]:
            whole += next(spans) if token in names else [token]
        assert next(spans, None) is None
        endings = []
        for wording in recsysllm.SEEN_WORDINGS:
            body = []
            for _, item, label in rows:
                for piece in texts.sentence(item, label, wording):
                    body += piece.ids
            endings.append(whole[-len(body):] == body)
        assert sum(endings) == 1


def test_attributes_tell_nothing_of_what_is_blanked(texts, dataset):
    """They are those of the sentences that stay whole: where none does, there are none."""
    rows = histories_of(dataset)[0][:1]
    said = texts.prompts[0]
    for example in [recsysllm.draw_example(texts, rows, np.random.default_rng(seed)) for seed in range(30)]:
        ids = example.ids[:example.corrupted]
        assert not any(ids[at:at + len(said)] == said for at in range(len(ids)))


def test_the_dynamic_position_mechanism_by_hand():
    trie = recsysllm.Trie([[1, 2, 3], [1, 4], [5]])
    assert trie.intra([1, 2, 3]) == [1, 2, 3, 4]  # Fig. 1: [S] and an entity of three tokens
    assert trie.intra([5]) == [1, 2]
    assert trie.intra([9, 1, 4, 9, 9, 5, 1, 2]) == [1, 1, 1, 2, 1, 1, 1, 1, 2]
    assert trie.intra([1, 4, 1, 2, 3]) == [1, 2, 3, 1, 2, 3]
    assert trie.intra([1, 5]) == [1, 2, 1]


def with_test_row(dataset):
    """The data set and an item that is met in a test row alone."""
    new = {"id": "new", "title": "Gold " * 12, "attributes": {"hobby": ["Gold " * 15], "background": []}}
    row = np.array([[0, len(dataset.items), 1, TEST]], np.int32)
    return common.Dataset(np.concatenate([dataset.interactions, row]), dataset.users,
                          [*dataset.items, new], dataset.profiles, dataset.task_prompt)


def test_the_pool_of_entities_knows_titles_and_values_of_training_rows_alone(texts, dataset):
    model, tokenizer = make_lm("gpt2")
    changed = recsysllm.Texts(tokenizer, with_test_row(dataset), len(model.get_input_embeddings().weight))
    assert changed.longest == texts.longest and changed.pool.children == texts.pool.children
    assert len(changed.titles) == len(texts.titles) + 1


@pytest.mark.parametrize("attention", ["two-way", "causal"])
def test_visibility_by_loops(attention):
    corrupted, length = torch.tensor([3, 5]), 7
    found = recsysllm.build_visibility(corrupted, length, attention)
    for text in range(2):
        for row in range(length):
            for column in range(length):
                ahead = column < corrupted[text] and attention == "two-way"
                assert found[text, row, column] == (column <= row or ahead)


# -------- model

def test_nothing_changes_before_training_but_the_direction_of_reading(opened, texts):
    likelihood, _ = opened
    model = model_of(likelihood, learned=False, attention="causal")
    ids = torch.arange(10, 22)[None]
    positions = torch.arange(12)[None]
    visible = recsysllm.build_visibility(torch.tensor([5]), 12, "causal")
    assert torch.allclose(model.states(ids, positions, ids % 4, visible),
                          likelihood.body(ids).last_hidden_state, atol=1e-5)


def test_lora_is_on_every_projection_and_on_nothing_else(opened):
    likelihood, _ = opened
    model = model_of(likelihood)
    layers = 2 * (7 if "Llama" in type(model.body).__name__ else 4)
    assert sum(isinstance(module, recsysllm.LoRA) for module in model.modules()) == layers
    assert len(model.learned()) == 2 * layers + 2  # A, B; intra-positions, marks
    assert not isinstance(model.head, recsysllm.LoRA)
    for module in model.modules():
        if isinstance(module, recsysllm.LoRA):
            x = torch.randn(3, module.A.shape[1])
            expected = module.layer(x) + 4.0 / 2 * (module.B @ (module.A @ x.T)).T
            assert torch.allclose(module(x), expected, atol=1e-5)


def test_merged_or_not_gives_the_same_scores(opened, dataset):
    likelihood, texts = opened
    model = model_of(likelihood)
    examples = draws(texts, dataset, 8)
    before = model.nll(examples)
    layers = [module.layer for module in model.modules() if isinstance(module, recsysllm.LoRA)]
    kept = [layer.weight.clone() for layer in layers]
    assert (before - model_of(likelihood, learned=False).nll(examples)).abs().max() > 0.01
    changed = recsysllm.swap_layers(model.body, lambda module: isinstance(module, recsysllm.LoRA),
                                    recsysllm.LoRA.merged)
    assert changed and len(model.learned()) == 2
    assert torch.allclose(model.nll(examples), before, atol=1e-4)
    assert layers and all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, kept))


def test_padding_changes_nothing(opened, dataset):
    likelihood, texts = opened
    model = model_of(likelihood)
    examples = draws(texts, dataset, 6)
    alone = torch.cat([model.nll([example]) for example in examples])
    assert len({len(example.ids) for example in examples}) > 1
    assert torch.allclose(model.nll(examples), alone, atol=1e-4)


def test_a_span_sees_the_whole_text_and_the_spans_before_it_alone(opened, dataset):
    likelihood, texts = opened
    model = model_of(likelihood)
    example = max(draws(texts, dataset), key=lambda example: example.targets.count(texts.marks["end"]))
    before = model.nll([example])
    last_start = len(example.ids) - 1 - example.ids[::-1].index(texts.marks["start"])
    own = last_start - example.corrupted
    changed = copy.deepcopy(example)
    changed.ids[last_start] = 30  # in the last span
    after = model.nll([changed])
    assert torch.equal(before[:own], after[:own]) and not torch.allclose(before[own:], after[own:])
    changed = copy.deepcopy(example)
    changed.ids[example.corrupted - 1] = 30  # the last token of the corrupted text: the first span sees it
    assert (model.nll([changed])[0] - before[0]).abs() > 1e-6


def test_intra_positions_are_added_to_the_embeddings(opened, dataset):
    likelihood, texts = opened
    model = model_of(likelihood)
    example = draws(texts, dataset, 1)[0]
    moved = copy.deepcopy(example)
    moved.intra = [1 + place for place in example.intra]
    assert not torch.allclose(model.nll([example]), model.nll([moved]))
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted.intra_table.weight[1:] = model.intra_table.weight[:-1]
    assert torch.allclose(shifted.nll([moved]), model.nll([example]), atol=1e-5)
    assert "intra_table.weight" not in model_of(likelihood, intra=False).learned()
    assert not model_of(likelihood, learned=False).intra_table.weight.any()


# -------- inference

def brute_force(model, prompt, entities, texts):
    """log p of each entity, written behind the prompt alone."""
    found = []
    for ids in entities:
        whole = recsysllm.Example(
            [*prompt.ids[:prompt.corrupted], texts.marks["start"], *ids],
            [*prompt.inter[:prompt.corrupted], *(prompt.inter[-1] for _ in range(1 + len(ids)))],
            [*prompt.intra[:prompt.corrupted], *range(1, 2 + len(ids))],
            [-100] * prompt.corrupted + [*ids, texts.marks["end"]], prompt.corrupted)
        found.append(-model.nll([whole]).sum().item())
    return np.array(found)


@pytest.mark.parametrize("attention", ["two-way", "causal"])
@pytest.mark.parametrize("most", [12, 512])
def test_scores_along_the_trie_are_those_of_every_title_alone(opened, dataset, attention, most):
    likelihood, texts = opened
    model = model_of(likelihood, attention=attention)
    entities = texts.titles[:25] + [texts.titles[3], texts.titles[4][:-1]]  # the same twice, a beginning
    trees = recsysllm.trees_of(entities, texts.marks["end"], most)
    assert (len(trees) > 1) == (most == 12)
    assert sorted(number for numbers, _ in trees for number in numbers) == list(range(len(entities)))
    prompt = recsysllm.question(texts, histories_of(dataset)[0][:3], recsysllm.UNSEEN_WORDING)
    found = recsysllm.log_probabilities(model, prompt, trees, texts)
    assert np.allclose(found, brute_force(model, prompt, entities, texts), atol=2e-3)
    assert found[3] == pytest.approx(found[25], abs=1e-4) and np.exp(found[:25]).sum() < 1


def test_left_to_right_is_the_plain_llm_s_log_probability_of_each_liked_title(opened, dataset):
    """The long way round: the whole text of each title through the LLM alone, with its own causal mask."""
    likelihood, texts = opened
    wording = recsysllm.SEEN_WORDINGS[0]
    known = histories_of(dataset)[0][:3]
    task = SimpleNamespace(known=[known])
    found = recsysllm.left_to_right(likelihood, texts, task, SimpleNamespace(titles=10))[0]
    pieces = texts.opening(known, wording)
    for _, item, label in known:
        pieces += texts.sentence(item, label, wording)
    text = recsysllm.tokens_of(pieces)
    for item in (0, 7, 30):
        title = recsysllm.tokens_of(texts.sentence(item, 1, wording))
        with torch.no_grad():
            logits = likelihood.model(torch.tensor([text + title])).logits[0].float().log_softmax(1)
        own = sum(logits[len(text) - 1 + place, token].item() for place, token in enumerate(title))
        assert found[item] == pytest.approx(own, abs=2e-3), item


def test_people_of_every_wording_have_words_for_both_profiles_and_for_either(prepared, tmp_path, monkeypatch):
    told = []
    original = common.encode_sentences
    monkeypatch.setattr(common, "tiny_sizes", lambda items: (64, 768, 320))

    def encode(tokenizer, traits, lead, some):
        told.append([set(words) for words, _ in some])
        return original(tokenizer, traits, lead, some)

    monkeypatch.setattr(common, "encode_sentences", encode)
    monkeypatch.setattr(common, "fit_tiny", lambda *_: None)
    recsysllm.train_tiny(common.load_dataset(prepared), tmp_path / "lm", SimpleNamespace(seed=0, titles=5))
    assert len(told) == len(recsysllm.SEEN_WORDINGS) + 1
    for of_wording in told:
        for words in ({0, 1}, {0}, {1}):
            assert of_wording.count(words) > len(of_wording) / 6


def test_popularity_by_attributes_counts_shared_values_first(dataset):
    rows = dataset.rows(TRAIN)
    known = [rows[rows[:, 0] == user] for user in np.unique(rows[:, 0])[:6]]
    popular = next_item.popularity(dataset)
    for own, scores in zip(known, next_item.popularity_by_attributes(dataset, known)):
        shared = np.zeros(len(popular))
        for profile in dataset.profiles:
            values = [value for _, item, label in own if label
                      for value in dataset.items[item]["attributes"][profile["name"]]]
            most = max(map(values.count, values), default=0)
            best = min((value for value in values if values.count(value) == most), default=None)
            shared += [best in item["attributes"][profile["name"]] for item in dataset.items]
        order = np.lexsort((-popular, -shared))
        assert (np.diff(scores[order]) <= 1e-12).all()


def test_equal_titles_stand_in_one_tree():
    entities = [[7, place] for place in range(9)] + [[7, 2]]  # the third fills the first tree
    trees = recsysllm.trees_of(entities, end=99, most=6)
    assert len(trees) > 1
    assert [2 in numbers for numbers, _ in trees] == [9 in numbers for numbers, _ in trees]


def test_the_end_has_the_bias_of_its_character_where_the_head_has_one(opened):
    likelihood, texts = opened
    model = model_of(likelihood)
    states = torch.randn(3, likelihood.width)
    without = model.log_softmax(states)[:, texts.marks["end"]]
    model.head_bias = torch.zeros(model.vocabulary)
    assert torch.allclose(model.log_softmax(states)[:, texts.marks["end"]], without)
    model.head_bias[9] = 5.0  # of the last of the characters
    assert (model.log_softmax(states)[:, texts.marks["end"]] > without).all()


def test_a_question_has_one_blank_a_title_or_a_verdict(texts, dataset):
    rows = histories_of(dataset)[0][:3]
    wording = recsysllm.SEEN_WORDINGS[1]
    mask = texts.marks["entity"]
    title = recsysllm.question(texts, rows, wording)
    verdict = recsysllm.question(texts, rows, wording, item=7)
    between, yes, end = (texts.words[text] for text in (wording.between, wording.verdicts[1], wording.end))
    body = []
    for piece in texts.opening(rows, wording):
        body += piece.ids
    for _, item, label in rows:
        for piece in texts.sentence(item, label, wording):
            body += piece.ids
    assert title.ids[:title.corrupted] == [*body, mask, *between, *yes, *end]
    assert verdict.ids[:verdict.corrupted] == [*body, *texts.titles[7], *between, mask, *end]
    assert title.inter[-1] == title.ids.index(mask) and verdict.inter[-1] == verdict.ids.index(mask)


def test_a_question_is_no_longer_than_a_text_of_training():
    rows = np.arange(30).reshape(10, 3)
    assert recsysllm.latest(rows, SimpleNamespace(titles=4)).tolist() == rows[7:].tolist()
    assert recsysllm.latest(rows, SimpleNamespace(titles=20)).tolist() == rows.tolist()
    assert not len(recsysllm.latest(rows, SimpleNamespace(titles=1)))


def test_generation_never_leaves_the_entities_and_takes_the_likeliest_token(opened, dataset):
    likelihood, texts = opened
    model = model_of(likelihood)
    trie = recsysllm.Trie([[*ids, texts.marks["end"]] for ids in texts.titles])
    for rows in histories_of(dataset)[:5]:
        prompt = recsysllm.question(texts, rows[:4], recsysllm.SEEN_WORDINGS[0])
        written = recsysllm.generate(model, prompt, trie, texts)
        assert written in texts.titles
        beginnings = {ids[0] for ids in texts.titles}
        scores = {}
        for token in beginnings:
            tree = recsysllm.Trie([[token]])
            scores[token] = recsysllm.log_probabilities(model, prompt, [([0], tree)], texts)[0]
        assert written[0] == max(scores, key=scores.get)


# -------- evaluation and rivals

def test_ranks_leave_known_items_out_and_ties_to_chance():
    scores = np.array([[0.9, 0.5, 0.7, 0.1], [1.0, 1.0, 1.0, 1.0]])
    rng = np.random.default_rng(0)
    ranks = next_item.ranks_of(scores, np.array([1, 2]), [np.array([0]), np.array([], int)], rng)
    assert ranks[0] == 2
    many = [next_item.ranks_of(scores[1:], np.array([2]), [np.array([0])], rng)[0] for _ in range(600)]
    assert set(many) == {1, 2, 3} and abs(np.mean(many) - 2) < 0.15


def test_hit_ratio_and_ndcg_against_scikit_learn():
    rng = np.random.default_rng(0)
    scores = rng.random((30, 20))
    targets = rng.integers(20, size=30)
    ranks = next_item.ranks_of(scores, targets, [np.array([], int)] * 30, rng)
    figures = next_item.ranking_figures(ranks)
    relevant = np.eye(20)[targets]
    for k in (5, 10):
        assert figures[f"ndcg@{k}"] == pytest.approx(ndcg_score(relevant, scores, k=k))
        best = np.argsort(-scores, axis=1)[:, :k]
        assert figures[f"hr@{k}"] == np.mean([target in row for target, row in zip(targets, best)])


def test_the_task_is_each_users_last_liked_row_of_the_split(dataset):
    task = next_item.next_item_task(dataset, TEST, None, 0)
    for user, target, known in zip(task.users, task.targets, task.known):
        own = [(item, label) for other, item, label in dataset.rows(TEST).tolist() if other == user]
        assert target == [item for item, label in own if label][-1]
        assert known.tolist() == [row for row in dataset.rows(TRAIN).tolist() if row[0] == user]
    assert len(next_item.next_item_task(dataset, TEST, 5, 0).users) == 5


def cycle():
    """A data set in which item i + 1 always follows item i; two last rows, of validation and of test."""
    rows = []
    rng = np.random.default_rng(0)
    for user in range(80):
        first = rng.integers(12)
        for step in range(8):
            split = max(0, step - 5) if user < 8 or step == 7 else TRAIN  # few are scored in each epoch
            rows.append((user, (first + step) % 12, 1, split))
    return common.Dataset(np.array(rows, np.int32), list(range(80)), [{"title": ""}] * 12, [], "")


def test_sasrec_without_liked_validation_rows_keeps_its_last_epoch():
    toy = cycle()
    toy.interactions = toy.interactions[toy.interactions[:, 3] != 1]
    model = next_item.fit_sasrec(toy, seed=0, epochs=40)
    assert next_item.sasrec_scores(model, [np.array([[0, 3, 1], [0, 4, 1]])], 50)[0].argmax() == 5


def test_sasrec_looks_back_only_and_learns_a_cycle():
    toy = cycle()
    model = next_item.fit_sasrec(toy, seed=0, epochs=60)
    scores = next_item.sasrec_scores(model, [np.array([[0, item, 1] for item in (3, 4, 5)]),
                                             np.zeros((0, 3), int)], 50)
    assert scores[0].argmax() == 6 and not scores[1].any()
    known = [np.array([[0, 5, 1]]), np.zeros((0, 3), int)]
    task = next_item.NextItem(np.array([0, 1]), np.array([6, 6]), known)
    found = next_item.rival_scores(toy, task, np.eye(len(toy.items)), 0)
    assert np.array_equal(found["SASRec"][1], found["popularity"][1])  # who liked nothing yet
    with pytest.raises(common.UserError, match="a score is no number"):
        task.figures(np.full((2, 12), np.nan), 0)
    model.eval()
    with torch.no_grad():
        one, other = (model(torch.tensor([[1, 2, 3, last]])) for last in (4, 9))
    assert torch.equal(one[:, :3], other[:, :3]) and not torch.equal(one[:, 3], other[:, 3])


# -------- the script

@pytest.fixture(scope="module")
def quick(lm_folders):
    """Flags of a short run with a random GPT-2."""
    return ("--lm", lm_folders["gpt2"], *QUICK)


@pytest.fixture(scope="module")
def trained(prepared, quick, tmp_path_factory):
    run = copy_run(prepared, tmp_path_factory.mktemp("recsysllm") / "run")
    call_stage(recsysllm, "--run", run, *quick)
    return run


def results_of(run):
    return common.load(run, "recsysllm.json")


def learned_of(run):
    return common.load(run, "recsysllm.pt")["learned"]


def test_a_run_ends_in_finite_figures_for_every_row_and_a_loss_that_falls(trained):
    results = results_of(trained)
    assert set(results["next_item"]) == {
        "chance", "popularity", "popularity by attributes", "the title most similar to the last", "SASRec",
        "the LLM untrained, left to right", "RecSysLLM, seen wording", "RecSysLLM, unseen wording"}
    for figures in (*results["next_item"].values(), *results["rating"].values()):
        assert all(math.isfinite(value) for value in figures.values() if value is not None)
    assert results["losses"][1] < results["losses"][0]
    assert results["trained_parameters"] == sum(value.numel() for value in learned_of(trained).values())
    assert all(value.any() for name, value in learned_of(trained).items() if name.endswith(".B"))
    assert not list(trained.glob("epochs-*"))


def test_the_tiny_lm_has_read_every_wording_and_is_made_once(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "tiny_sizes", lambda items: (64, 768, 320))
    run = copy_run(prepared, tmp_path / "run")
    call_stage(recsysllm, "--run", run, "--epochs", 1, "--test-users", 2, "--rows", 20)
    assert "training a tiny LM" in capsys.readouterr().out
    before = (run / "lm-verdicts" / "model.safetensors").read_bytes()

    def again():
        args = SimpleNamespace(seed=0, titles=10)  # as above
        recsysllm.train_tiny(common.load_dataset(run), run / "lm-verdicts", args)
        assert (run / "lm-verdicts" / "model.safetensors").read_bytes() == before
        return "training a tiny LM" in capsys.readouterr().out

    assert not again()
    for name, text in (("tiny.json", "{"), ("model.safetensors", "damaged")):
        (run / "lm-verdicts" / name).write_text(text)
        assert again()
    _, tokenizer = common.load_language_model(str(run / "lm-verdicts"), torch.float32, torch.device("cpu"))
    for wording in (*recsysllm.SEEN_WORDINGS, recsysllm.UNSEEN_WORDING):
        for verdict in wording.verdicts:
            assert len(common.pieces_of(tokenizer, [verdict])[0]) == 1  # a word of its own


def test_the_tiny_lm_reads_no_title_of_test_rows(dataset, tmp_path, monkeypatch, capsys):
    """Its weights are kept where an item is added that test rows alone hold: it would not be read."""
    monkeypatch.setattr(common, "tiny_sizes", lambda items: (64, 768, 320))
    args = SimpleNamespace(seed=0, titles=5)
    for world, is_trained in ((dataset, True), (with_test_row(dataset), False)):
        recsysllm.train_tiny(world, tmp_path / "lm", args)
        assert ("training a tiny LM" in capsys.readouterr().out) == is_trained


def test_a_title_of_an_invented_person_is_said_in_a_wording():
    wording = recsysllm.UNSEEN_WORDING
    assert recsysllm.said_as(" Gold Pan +;", wording) == " Gold Pan is great."
    assert recsysllm.said_as(" Gold Pan -;", wording) == " Gold Pan is awful."
    assert recsysllm.said_as(" Gold Pan -;", recsysllm.SEEN_WORDINGS[0]) == " Gold Pan -;"


def test_marks_are_read_as_their_own_vectors_and_the_end_alone_is_written(opened):
    likelihood, texts = opened
    model = model_of(likelihood)
    assert torch.equal(model_of(likelihood, learned=False).mark_vectors[0], likelihood.word_table.weight[5])
    ids = torch.tensor([[10, texts.marks["sentence"], 11]])
    places = torch.arange(3)[None]
    visible = torch.ones(1, 3, 3, dtype=torch.bool)
    before = model.states(ids, places, 0 * ids, visible)
    written = model.log_softmax(before[0])
    logits = torch.cat([model.head(before[0]), (before[0] @ model.mark_vectors[-1])[:, None]], dim=1)
    expected = logits.log_softmax(1)
    assert torch.allclose(written[:, texts.marks["end"]], expected[:, -1], atol=1e-5)
    assert torch.allclose(written[:, :model.vocabulary], expected[:, :-1], atol=1e-5)
    assert not written[:, model.vocabulary:-1].exp().any()
    for name in recsysllm.MARKS:
        with torch.no_grad():
            changed = copy.deepcopy(model)
            changed.mark_vectors[list(recsysllm.MARKS).index(name)] += 1
        moved = not torch.equal(changed.states(ids, places, 0 * ids, visible), before)
        assert moved == (name == "sentence")


def test_training_leaves_every_weight_of_the_llm_as_it_was(opened, dataset):
    likelihood, texts = opened
    model = model_of(likelihood)
    before = {name: value.clone() for name, value in model.named_parameters()}
    args = SimpleNamespace(seed=0, titles=4, batch_size=8, epochs=1, lr=0.01)
    optimizer = torch.optim.AdamW(model.learned().values(), lr=0.01)
    recsysllm.train_epoch(model, optimizer, texts, histories_of(dataset)[:30], 0, args)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) != value.requires_grad, name


def kill_in_the_second_epoch(run, flags, monkeypatch):
    train_epoch = recsysllm.train_epoch

    def killed(model, optimizer, texts, histories, epoch, args):
        if epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(model, optimizer, texts, histories, epoch, args)

    with monkeypatch.context() as patched:
        patched.setattr(recsysllm, "train_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            call_stage(recsysllm, "--run", run, *flags)


def test_training_that_diverges_ends_in_one_line(prepared, quick, tmp_path):
    run = copy_run(prepared, tmp_path / "run")
    with pytest.raises(common.UserError, match="diverged in epoch .*lower --lr"):
        call_stage(recsysllm, "--run", run, *quick, "--lr", 1e30)
    assert not (run / "recsysllm.pt").exists()


def test_training_ends_at_the_first_loss_that_is_no_number(prepared, quick, tmp_path, monkeypatch):
    run = copy_run(prepared, tmp_path / "run")
    calls = []

    def nll(model, examples):
        calls.append(len(examples))
        return torch.full((len(examples),), torch.nan, requires_grad=True)

    monkeypatch.setattr(recsysllm.RecSysLLM, "nll", nll)
    with pytest.raises(common.UserError, match="diverged in epoch 1"):
        call_stage(recsysllm, "--run", run, *quick)
    assert len(calls) == 1


def test_a_killed_run_goes_on_to_the_same_bits(trained, prepared, quick, tmp_path, monkeypatch):
    run = copy_run(prepared, tmp_path / "run")
    train_epoch = recsysllm.train_epoch
    kill_in_the_second_epoch(run, quick, monkeypatch)
    assert [path.name for path in run.glob("epochs-*/*")] == ["epoch-000000.pt"]
    epochs = []
    monkeypatch.setattr(recsysllm, "train_epoch", lambda *args: epochs.append(args[4]) or train_epoch(*args))
    call_stage(recsysllm, "--run", run, *quick)
    assert epochs == [1]
    for name, value in learned_of(trained).items():
        assert torch.equal(value, learned_of(run)[name]), name
    assert results_of(run)["losses"] == results_of(trained)["losses"]


def test_a_damaged_epoch_is_said_once_and_made_again(prepared, quick, tmp_path, monkeypatch):
    run = copy_run(prepared, tmp_path / "run")
    kill_in_the_second_epoch(run, quick, monkeypatch)
    last, = run.glob("epochs-*/*")
    last.write_bytes(last.read_bytes()[:99])
    with pytest.raises(common.UserError, match="run the same command again"):
        call_stage(recsysllm, "--run", run, *quick)
    call_stage(recsysllm, "--run", run, *quick)
    assert len(results_of(run)["losses"]) == 2


def test_what_is_trained_is_evaluated_again_without_training(trained, quick, tmp_path, monkeypatch, capsys):
    run = copy_run(trained, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(recsysllm, "train_epoch", None)  # nobody may call it
        call_stage(recsysllm, "--run", run, *quick)
        assert "nothing to train" in capsys.readouterr().out
        for kind in ("next_item", "rating"):
            for row, figures in results_of(trained)[kind].items():
                found = results_of(run)[kind][row]
                assert {**figures, "seconds": 0} == {**found, "seconds": 0}, row
        call_stage(recsysllm, "--run", run, *quick, "--rows", 20)
        assert results_of(run)["rows"] == 20
        with pytest.raises(TypeError):
            call_stage(recsysllm, "--run", run, *quick, "--fresh")
    (run / "recsysllm.pt").write_bytes((trained / "recsysllm.pt").read_bytes()[:99])
    call_stage(recsysllm, "--run", run, *quick)
    assert all(torch.equal(value, learned_of(run)[name]) for name, value in learned_of(trained).items())


def test_poisoned_validation_and_test_rows_change_nothing_that_is_learned(quick, tmp_path):
    call_stage(prepare, "--run", tmp_path / "clean", "--subsample-users", 60, "--min-interactions", 1)
    assert poisoned(tmp_path / "clean", tmp_path / "poisoned") > 0
    for run in ("clean", "poisoned"):
        call_stage(recsysllm, "--run", tmp_path / run, *quick)
    for name, value in learned_of(tmp_path / "clean").items():
        assert torch.equal(value, learned_of(tmp_path / "poisoned")[name]), name


@pytest.mark.parametrize("flags", [
    ("--rank", 0), ("--rank", 3), ("--alpha", 3), ("--epochs", 1), ("--lr", 0.0001), ("--batch-size", 5),
    ("--titles", 3), ("--attention", "causal"), ("--no-intra",), ("--seed", 1)])
def test_every_flag_of_training_changes_the_losses(trained, quick, tmp_path, flags):
    """Also where something else was trained in this folder before."""
    run = copy_run(trained, tmp_path / "run")
    call_stage(recsysllm, "--run", run, *quick, "--test-users", 1, "--rows", 10, *flags)
    assert results_of(run)["losses"] != results_of(trained)["losses"]


def test_every_flag_of_the_evaluation_changes_a_number(trained, quick, tmp_path):
    run = copy_run(trained, tmp_path / "run")
    call_stage(recsysllm, "--run", run, *quick, "--evaluate", "validation", "--test-users", 4, "--rows", 20)
    before, after = results_of(trained), results_of(run)
    assert (after["users"], after["rows"], after["evaluated"]) == (4, 20, "validation")
    assert (before["users"], before["rows"], before["evaluated"]) == (6, 30, "test")
    row = "RecSysLLM, seen wording"
    assert before["losses"] == after["losses"] and before["rating"][row] != after["rating"][row]


def test_the_rows_of_stage_04_are_shown_where_they_are(inferred, quick, tmp_path, monkeypatch):
    run = copy_run(inferred, tmp_path / "run")
    fork_stage("04_train_ctr.py", "--run", run, "--seeds", 1, "--epochs", 2, "--ids", "none,userip")
    call_stage(recsysllm, "--run", run, *quick)
    rating = results_of(run)["rating"]
    rows = common.load_dataset(run).rows(TEST)
    at = np.sort(np.random.default_rng((0, 24)).permutation(len(rows))[:30])
    expected = common.auc(rows[at, 2], np.load(run / "predictions" / "dcn-none-0.npy")[at])
    assert rating["DCN none"]["auc"] == pytest.approx(expected) and "DCN userip" in rating
    results = common.load(run, "results.json")
    common.save_json(run / "results.json", {**results, "profile_input": "embedding"})
    found = recsysllm.dcn_figures(run, common.load_dataset(run), rows[at], at)
    assert set(found) == {"DCN none", "DCN userip, theta itself"}
    (run / "predictions" / "dcn-none-0.npy").rename(run / "aside.npy")
    with monkeypatch.context() as patch, pytest.raises(
            common.UserError, match="dcn-none-0.npy is missing .*run 04_train_ctr.py again"):
        patch.setattr(next_item, "rival_scores", None)  # it is said before the long work
        call_stage(recsysllm, "--run", run, *quick)
    (run / "aside.npy").rename(run / "predictions" / "dcn-none-0.npy")
    bank = np.load(run / "feature_bank.npy")
    np.save(run / "feature_bank.npy", bank[::-1])
    with pytest.raises(common.UserError, match="results.json was made from another feature_bank.npy"):
        call_stage(recsysllm, "--run", run, *quick)
    np.save(run / "feature_bank.npy", bank)
    ok(fork_stage("04_train_ctr.py", "--run", run, "--seeds", 1, "--epochs", 2, "--ids", "none",
                  "--fields", "attributes"))  # dcn-userip-0.npy is then of a run before
    assert set(recsysllm.dcn_figures(run, common.load_dataset(run), rows[at], at)) == {"DCN none, attributes"}
    call_stage(prepare, "--run", run, "--subsample-users", 120, "--seed", 1)
    with pytest.raises(common.UserError, match="results.json was made from another dataset"):
        call_stage(recsysllm, "--run", run, *quick)


@pytest.mark.parametrize("flags, word", [
    (("--run", "nowhere"), "dataset.json is missing"), (("--epochs", 0), "out of range"),
    (("--rows", 2, "--seed", 3), "one label alone"), (("--lm", "no/such/folder"), "cannot be loaded")])
def test_bad_input_is_one_line_and_exit_2(trained, quick, tmp_path, flags, word):
    run = copy_run(trained, tmp_path / "run")
    done = fork_stage("tools/recsysllm.py", "--run", run, *quick, *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and word in done.stderr, done.stderr


def test_an_llm_that_cannot_look_ahead_is_refused(opened):
    likelihood, _ = opened
    model = model_of(likelihood)
    recsysllm.check_two_way(model)

    class Backwards(nn.Module):
        def forward(self, **inputs):
            mask = torch.ones_like(inputs["attention_mask"]).tril().log()
            return likelihood.body(**{**inputs, "attention_mask": mask})

    model.body = Backwards()
    with pytest.raises(common.UserError, match="both directions"):
        recsysllm.check_two_way(model)


def test_the_command_line_works(trained, quick, tmp_path):
    run = copy_run(trained, tmp_path / "run")
    done = ok(fork_stage("tools/recsysllm.py", "--run", run, *quick, "--fresh"))
    assert "generated:" in done.stdout and "SASRec" in done.stdout


def test_on_a_gpu_training_llama_needs_twice_the_room_of_inferring_with_it(prepared, monkeypatch):
    """LoRA keeps activations of 16 texts at once, where stage 02 cuts its blocks by memory."""
    card = torch.device("cuda")
    dataset = SimpleNamespace(name="films")
    args = SimpleNamespace(lm="auto", dtype="bf16", run=prepared, mask="strict")
    seen = []
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(total_memory=24 * 2**30))
    monkeypatch.setattr(infer, "lm_folder", lambda name: seen.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recsysllm.open_texts(args, dataset, card)
    with pytest.raises(ZeroDivisionError):
        infer.open_model(dataset, args, card, None)
    assert seen == ["gpt2", "llama2-7b"]
