"""The assignments' own tests: pytest -m a1 checks your a1_mask.py, and so on. REFERENCE=1 puts the teacher's solution in the stub's place."""

import importlib
import itertools
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import likelihood_of, make_lm, random_theta, small_world

common, infer, ctr = (importlib.import_module(name) for name in ("common", "02_infer_profiles", "04_train_ctr"))
STUBS = {"a1": "a1_mask", "a2": "a2_nll", "a3": "a3_straight_through", "a4": "a4_cross_layer", "a5": "a5_code_assignment", "a6": "a6_new_model",
         "b1": "b1_wrong_order", "b2": "b2_leak"}


@pytest.fixture
def work(request):
    """The student's module for the task that the test is marked with, or the reference."""
    task = next(mark.name for mark in request.node.iter_markers() if mark.name in STUBS)
    if os.environ.get("REFERENCE"):
        return getattr(importlib.import_module("assignments.reference"), task)
    return importlib.import_module(f"assignments.{STUBS[task]}")


def segments_of(text):
    """'n1 n1 t1 n2 t2 k h h' -> segments: begin b, name n, theta t, task k, history h; the number says whose."""
    kinds = {"b": "begin", "n": "name", "t": "theta", "k": "task", "h": "history"}
    return [infer.Segment(kinds[word[0]], list(range(len(list(group)))), int(word[1:]) - 1 if word[1:] else None)
            for word, group in itertools.groupby(text.split())]


GRIDS = {
    "n1 n1 t1 n2 t2 k h h": "#....... ##...... ###..... ...#.... ...##... ######.. #######. ########",
    "b n1 t1 n2 n2 t2 k h": "#....... ##...... ###..... #..#.... #..##... #..###.. #######. ########",
    "n1 t1 n2 t2 n3 t3 h": "#...... ##..... ..#.... ..##... ....#.. ....##. #######",
    "n1 n1 t1 k k h": "#..... ##.... ###... ####.. #####. ######",
}


@pytest.mark.a1
@pytest.mark.parametrize("prompt", GRIDS)
def test_a1_grid(work, prompt):
    found = work.build_visibility(segments_of(prompt))
    assert found.dtype == torch.bool and ["".join(".#"[cell] for cell in row) for row in found.tolist()] == GRIDS[prompt].split()


@pytest.mark.a1
def test_a1_profiles_do_not_feel_each_other_and_the_history_feels_both(work, monkeypatch):
    likelihood = likelihood_of(*make_lm("gpt2"), small_world()[0])
    monkeypatch.setattr(infer, "build_visibility", lambda segments, mask: work.build_visibility(segments))
    theta = random_theta(likelihood, 1).requires_grad_()
    states = likelihood.hidden(theta, torch.arange(10, 16)[None])[0]
    ends = np.cumsum([len(segment.ids) for segment in likelihood.segments])
    first, second = (int(end) - 1 for end, segment in zip(ends, likelihood.segments) if segment.kind == "theta")
    projection = torch.randn(states.shape[1], generator=torch.Generator().manual_seed(0))

    def gradient(at):
        return torch.autograd.grad(states[at] @ projection, theta, retain_graph=True)[0][0].abs().amax(1).tolist()

    assert gradient(first)[1] == 0 and gradient(second)[0] == 0 and gradient(first)[0] > 0 and gradient(second)[1] > 0
    assert min(gradient(-1)) > 0


def nll_case(scale=1.0, users=3, prompt=4, length=5, d=6, words=11):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(users, prompt + length, d, generator=generator) * scale, torch.randn(words, d, generator=generator)
    return hidden, weight, prompt, torch.randint(words, (users, length), generator=generator), torch.tensor([5, 2, 1])[:users]


@pytest.mark.a2
def test_a2_against_loops(work):
    hidden, weight, prompt, ids, lengths = nll_case()
    expected = []
    for user in range(3):
        total = 0.0
        for t in range(int(lengths[user])):
            logits = [float(hidden[user, prompt - 1 + t] @ word) for word in weight]
            total -= logits[ids[user, t]] - math.log(sum(math.exp(value) for value in logits))
        expected.append(total)
    found = work.history_nll(hidden, weight, prompt, ids, lengths)
    assert found.shape == (3,) and found.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.a2
def test_a2_padding_changes_nothing(work):
    hidden, weight, prompt, ids, lengths = nll_case()
    other, states = ids.clone(), hidden.clone()
    for user, length in enumerate(lengths):
        other[user, length:] = 7
        states[user, prompt + length:] = 1e6
    first, second = work.history_nll(hidden, weight, prompt, ids, lengths), work.history_nll(states, weight, prompt, other, lengths)
    assert torch.allclose(first, second)


@pytest.mark.a2
def test_a2_stays_finite(work):
    hidden, weight, prompt, ids, lengths = nll_case(scale=1000.0)
    logits = hidden[:, prompt - 1:-1] @ weight.T
    expected = [float(torch.nn.functional.cross_entropy(logits[user, :length], ids[user, :length], reduction="sum"))
                for user, length in enumerate(lengths)]
    assert work.history_nll(hidden, weight, prompt, ids, lengths).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.a2
def test_a2_has_the_gradient_of_the_loss(work):
    hidden, weight, prompt, ids, lengths = nll_case()
    hidden.requires_grad_()
    work.history_nll(hidden, weight, prompt, ids, lengths).sum().backward()
    picked = hidden.grad.abs().sum(2) > 0
    assert [row.nonzero().flatten().tolist() for row in picked] == [list(range(prompt - 1, prompt - 1 + length)) for length in lengths]
    t = prompt + 1  # softmax minus one-hot, times the weight
    expected = ((weight @ hidden[0, t]).softmax(0) - torch.nn.functional.one_hot(ids[0, 2], len(weight))).detach() @ weight
    assert torch.allclose(hidden.grad[0, t], expected, atol=1e-5)


def vq_case():
    theta = torch.tensor([[0.9, 0.2], [-3.0, 1.0], [0.1, 0.3]], requires_grad=True)
    codebook = torch.tensor([[1.0, 0.0], [-2.0, 2.0]], requires_grad=True)
    return theta, codebook


@pytest.mark.a3
def test_a3_values(work):
    quantized, codes, codebook_term, commitment = work.quantize(*vq_case())
    assert codes.tolist() == [0, 1, 0] and torch.allclose(quantized, torch.tensor([[1.0, 0.0], [-2.0, 2.0], [1.0, 0.0]]))
    assert codebook_term.tolist() == pytest.approx([0.05, 2.0, 0.9]) and commitment.tolist() == pytest.approx([0.05, 2.0, 0.9])


@pytest.mark.a3
def test_a3_straight_through_is_the_identity(work):
    theta, codebook = vq_case()
    upstream = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    gradient, untouched = torch.autograd.grad((work.quantize(theta, codebook)[0] * upstream).sum(), (theta, codebook), allow_unused=True)
    assert torch.equal(gradient, upstream) and (untouched is None or not untouched.any())


@pytest.mark.a3
def test_a3_each_term_moves_its_own(work):
    theta, codebook = vq_case()
    by_theta, by_code = torch.autograd.grad(work.quantize(theta, codebook)[2].sum(), (theta, codebook), allow_unused=True)
    assert (by_theta is None or not by_theta.any()) and torch.allclose(by_code, torch.tensor([[2.0, -1.0], [2.0, 2.0]]))
    by_theta, by_code = torch.autograd.grad(work.quantize(theta, codebook)[3].sum(), (theta, codebook), allow_unused=True)
    assert torch.allclose(by_theta, torch.tensor([[-0.2, 0.4], [-2.0, -2.0], [-1.8, 0.6]])) and (by_code is None or not by_code.any())


@pytest.mark.a4
def test_a4_against_loops(work):
    generator = torch.Generator().manual_seed(0)
    x0, weights, biases = (torch.randn(*shape, generator=generator) for shape in ((4, 5), (3, 5), (3, 5)))
    expected = []
    for row in x0.tolist():
        x = row
        for w, b in zip(weights.tolist(), biases.tolist()):
            product = sum(left * right for left, right in zip(x, w))
            x = [first * product + bias + last for first, bias, last in zip(row, b, x)]
        expected.append(x)
    assert torch.allclose(work.cross(x0, weights, biases), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.a4
def test_a4_degree_and_identity(work):
    x0, weights = torch.rand(2, 3) + 0.5, torch.rand(2, 3) + 0.5
    assert torch.equal(work.cross(x0, torch.empty(0, 3), torch.empty(0, 3)), x0)
    assert torch.allclose(work.cross(x0, torch.zeros(2, 3), torch.ones(2, 3)), x0 + 2)
    for layers in (1, 2):
        large = [work.cross(scale * x0, weights[:layers], torch.zeros(layers, 3)) for scale in (1e3, 2e3)]
        assert torch.allclose((large[1] / large[0]).log2(), torch.full((2, 3), layers + 1.0), atol=0.01)


def bank_case():
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 2, 4)).astype(np.float32), [rng.normal(size=(size, 4)).astype(np.float32) for size in (5, 3)], rng.random(30) < 0.8


@pytest.mark.a5
def test_a5_against_brute_force(work):
    theta, books, known = bank_case()
    bank = work.feature_bank(theta, books, known)
    assert bank.dtype == np.int16 and bank.shape == (30, 2)
    for user, m in itertools.product(range(30), range(2)):
        distances = [sum((float(a) - float(b)) ** 2 for a, b in zip(theta[user, m], code)) for code in books[m]]
        assert bank[user, m] == (distances.index(min(distances)) if known[user] else len(books[m]))


@pytest.mark.a5
def test_a5_depends_on_the_user_alone_and_ties_go_to_the_lowest(work):
    theta, books, known = bank_case()
    assert np.array_equal(work.feature_bank(theta, books, known)[7:9], work.feature_bank(theta[7:9], books, known[7:9]))
    twins = [np.array([[1.0, 0], [-1, 0], [1, 0]], np.float32)]
    assert work.feature_bank(np.zeros((1, 1, 2), np.float32), twins, np.ones(1, bool)).tolist() == [[0]]


@pytest.mark.a5
def test_a5_perplexity(work):
    assert work.perplexity(np.zeros(9, int), 4) == pytest.approx(1)
    assert work.perplexity(np.arange(40) % 4, 4) == pytest.approx(4) and work.perplexity(np.arange(40) % 4, 64) == pytest.approx(4)
    assert work.perplexity(np.array([0, 0, 0, 1]), 2) == pytest.approx((4 / 3) ** 0.75 * 4 ** 0.25)


@pytest.mark.a6
def test_a6_against_loops(work):
    torch.manual_seed(0)
    model = work.FM([common.Field("user", 4), common.Field("item", 5), common.Field("code", 3)]).eval()
    torch.nn.init.normal_(model.bias)
    ids = torch.tensor([[0, 4, 2], [3, 1, 0]])
    e, w, b = model.embed(ids).tolist(), model.weights(ids).tolist(), model.bias.item()
    expected = [b + sum(w[row][i][0] for i in range(3)) + sum(x * y for i in range(3) for j in range(i) for x, y in zip(e[row][i], e[row][j]))
                for row in range(2)]
    assert model(ids).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.a6
def test_a6_linear_in_the_number_of_fields(work):
    """Neither a tensor of the size of all pairs nor a loop over them."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    model = work.FM([common.Field(f"field{i}", 2) for i in range(400)])
    with Watch():
        model(torch.ones(4, 400, dtype=torch.long))
    assert max(sizes) <= 4 * 400 * 8 and len(sizes) < 100


@pytest.mark.a6
def test_a6_learns_what_no_first_order_term_can(work, monkeypatch):
    rng = np.random.default_rng(0)
    users, items = np.divmod(np.arange(80 * 80), 80)
    label = (users + items) % 2  # even users like odd items, odd users even ones
    interactions = np.stack([users, items, label, rng.choice([0, 0, 0, 1, 2], size=6400)], axis=1).astype(np.int32)
    dataset = common.Dataset(interactions, list(range(80)), [{"id": i, "title": "", "attributes": {}} for i in range(80)], [], "")
    args = SimpleNamespace(seed=0, fields="ids", lr=0.02, weight_decay=0.0, epochs=15, patience=5, batch_size=256)
    monkeypatch.setitem(ctr.MODELS, "fm", work.FM)
    found = {name: ctr.run_one(dataset, name, "none", 0, ctr.Inputs(), args, torch.device("cpu"))[0]["test_auc"] for name in ("lr", "fm")}
    assert found["fm"] > 0.95 and found["lr"] < 0.6


@pytest.mark.b1
def test_b1_profiles_are_independent_and_hear_their_names(work):
    model, _ = make_lm("gpt2")
    for names in ([[1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4, 5], [6, 7]]):
        lm = work.PromptedLM(model, names, [8, 9])
        torch.manual_seed(0)
        leak, heard, overheard = work.influence(lm, torch.randn(1, 2, 32), torch.arange(10, 18)[None])
        assert leak == 0 and heard > 0 and overheard == 0


@pytest.mark.b1
def test_b1_task_and_history_still_see_everything(work):
    model, _ = make_lm("gpt2")
    visible = work.PromptedLM(model, [[1, 2], [3]], [4, 5]).visibility(3)
    assert visible.shape == (10, 10) and torch.equal(visible[5:], torch.ones(10, 10, dtype=torch.bool).tril()[5:])


@pytest.mark.b2
def test_b2_codes_do_not_know_the_test_rows(work):
    interactions = work.make_world(1.0)
    poisoned = interactions.copy()
    hidden = interactions[:, 3] != common.TRAIN
    poisoned[hidden, 2] ^= 1
    poisoned[hidden, 1] = (poisoned[hidden, 1] + 1) % work.CATEGORIES
    assert np.array_equal(work.profile_codes(interactions), work.profile_codes(poisoned))


@pytest.mark.b2
def test_b2_coin_flips_win_nothing_and_taste_still_does(work):
    coin_flips, taste = work.make_world(0.0), work.make_world(1.0)
    assert abs(work.evaluate(coin_flips, work.profile_codes(coin_flips)) - 0.5) < 0.025
    assert work.evaluate(taste, work.profile_codes(taste)) > 0.6
