"""The assignments' own tests: pytest -m a1 checks your a1_mask.py, and so on.

REFERENCE=1 puts the teacher's solution in the stub's place, WRONG=1 each of the wrong ones in wrong.py.
"""

import importlib
import itertools
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call_stage, copy_run, likelihood_of, make_lm, prepare, random_theta, small_world
from sklearn.metrics import adjusted_mutual_info_score, roc_auc_score
from torch.nn.functional import cross_entropy, one_hot

common, infer, ctr = (importlib.import_module(name) for name in (
    "common", "02_infer_profiles", "04_train_ctr"))
STUBS = {"a1": "a1_mask", "a2": "a2_nll", "a3": "a3_straight_through", "a4": "a4_cross_layer",
         "a5": "a5_code_assignment", "a6": "a6_new_model", "a7": "a7_own_ids", "a8": "a8_gauc",
         "a9": "a9_words_prior",
         "b1": "b1_wrong_order", "b2": "b2_leak", "b3": "b3_random_control"}


def task_of(marks):
    return next(mark.name for mark in marks if mark.name in STUBS)


def pytest_generate_tests(metafunc):
    """A test that asks for somebody's work gets the student's, the reference, or all wrong ones by name."""
    if "work" in metafunc.fixturenames:
        task, whose = task_of(metafunc.definition.iter_markers()), ["yours"]
        if os.environ.get("REFERENCE"):
            whose = ["reference", *importlib.import_module("assignments.reference").also_right.get(task, ())]
        if os.environ.get("WRONG"):
            whose = list(getattr(importlib.import_module("assignments.wrong"), task, {}))
        metafunc.parametrize("work", whose, indirect=True)


@pytest.fixture
def work(request):
    """What the task that the test is marked with asks for: a module or a namespace."""
    task = task_of(request.node.iter_markers())
    if request.param == "reference":
        return getattr(importlib.import_module("assignments.reference"), task)
    if request.param == "yours":
        return importlib.import_module(f"assignments.{STUBS[task]}")
    if os.environ.get("REFERENCE"):
        return importlib.import_module("assignments.reference").also_right[task][request.param]
    return getattr(importlib.import_module("assignments.wrong"), task)[request.param]


def segments_of(text):
    """'n1 n1 t1 n2 t2 k h h' -> segments: begin b, name n, theta t, task k, history h; the number: whose."""
    kinds = {"b": "begin", "n": "name", "t": "theta", "k": "task", "h": "history"}
    return [infer.Segment(kinds[word[0]], [*range(len([*group]))], int(word[1:]) - 1 if word[1:] else None)
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
    size = len(GRIDS[prompt].split())
    assert isinstance(found, torch.Tensor) and found.shape == (size, size), f"a torch tensor ({size}, {size})"
    assert found.dtype == torch.bool, "a tensor of bool"
    yours = ["".join(".#"[cell] for cell in row) for row in found.tolist()]
    expected = GRIDS[prompt].split()
    assert yours == expected, f"row by row of {prompt}: yours {yours}, expected {expected}"


@pytest.mark.a1
def test_a1_profiles_do_not_feel_each_other_and_the_history_feels_both(work, monkeypatch):
    likelihood = likelihood_of(*make_lm("gpt2"), small_world()[0])
    monkeypatch.setattr(infer, "build_visibility", lambda segments, mask: work.build_visibility(segments))
    theta = random_theta(likelihood, 1).requires_grad_()
    states = likelihood.hidden(theta, torch.arange(10, 16)[None])[0]
    ends = np.cumsum([len(segment.ids) for segment in likelihood.segments])
    first, second = (int(end) - 1 for end, segment in zip(ends, likelihood.segments)
                     if segment.kind == "theta")
    projection = torch.randn(states.shape[1], generator=torch.Generator().manual_seed(0))

    def gradient(at):
        found, = torch.autograd.grad(states[at] @ projection, theta, retain_graph=True)
        return found[0].abs().amax(1).tolist()

    assert gradient(first)[1] == 0 and gradient(second)[0] == 0
    assert gradient(first)[0] > 0 and gradient(second)[1] > 0
    assert min(gradient(-1)) > 0


def nll_case(scale=1.0, users=3, prompt=4, length=5, d=6, words=11):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(users, prompt + length, d, generator=generator) * scale
    weight = torch.randn(words, d, generator=generator)
    ids = torch.randint(words, (users, length), generator=generator)
    return hidden, weight, prompt, ids, torch.tensor([5, 2, 1])[:users]


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
        states[user, prompt + length:] = torch.nan
    states.requires_grad_()
    first = work.history_nll(hidden, weight, prompt, ids, lengths)
    second = work.history_nll(states, weight, prompt, other, lengths)
    assert torch.allclose(first, second)
    second.sum().backward()
    for user, length in enumerate(lengths):
        assert (states.grad[user, prompt + length:] == 0).all(), (
            "what stands in the padding has a gradient (NaN, if its loss was computed and then blanked out)")


@pytest.mark.a2
def test_a2_stays_finite(work):
    hidden, weight, prompt, ids, lengths = nll_case(scale=1000.0)
    logits = hidden[:, prompt - 1:-1] @ weight.T
    expected = [float(cross_entropy(logits[user, :length], ids[user, :length], reduction="sum"))
                for user, length in enumerate(lengths)]
    found = work.history_nll(hidden, weight, prompt, ids, lengths)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.a2
def test_a2_has_the_gradient_of_the_loss(work):
    hidden, weight, prompt, ids, lengths = nll_case()
    hidden.requires_grad_()
    work.history_nll(hidden, weight, prompt, ids, lengths).sum().backward()
    picked = hidden.grad.abs().sum(2) > 0
    wanted = [list(range(prompt - 1, prompt - 1 + length)) for length in lengths]
    assert [row.nonzero().flatten().tolist() for row in picked] == wanted
    t = prompt + 1  # softmax minus one-hot, times the weight
    error = (weight @ hidden[0, t]).softmax(0) - one_hot(ids[0, 2], len(weight))
    assert torch.allclose(hidden.grad[0, t], error.detach() @ weight, atol=1e-5)


def vq_case():
    theta = torch.tensor([[0.9, 0.2], [-3.0, 1.0], [0.1, 0.3]], requires_grad=True)
    codebook = torch.tensor([[1.0, 0.0], [-2.0, 2.0]], requires_grad=True)
    return theta, codebook


def gradients(output, *inputs):
    """Gradient of the sum of output with respect to each input, zeros where there is no path."""
    found = torch.autograd.grad(output.sum(), inputs, allow_unused=True)
    return [torch.zeros_like(wanted) if part is None else part for part, wanted in zip(found, inputs)]


@pytest.mark.a3
def test_a3_values(work):
    quantized, codes, codebook_term, commitment = work.quantize(*vq_case())
    assert codes.dtype == torch.long, "codes are numbers of code vectors: long"
    assert codes.tolist() == [0, 1, 0]
    assert torch.allclose(quantized, torch.tensor([[1.0, 0.0], [-2.0, 2.0], [1.0, 0.0]]))
    for term in (codebook_term, commitment):
        assert term.tolist() == pytest.approx([0.05, 2.0, 0.9])


@pytest.mark.a3
def test_a3_the_nearest_of_many_by_brute_force(work):
    generator = torch.Generator().manual_seed(0)
    theta, codebook = torch.randn(60, 3, generator=generator), torch.randn(9, 3, generator=generator)
    quantized, codes, *_ = work.quantize(theta, codebook)
    for row, found, value in zip(theta.tolist(), codes.tolist(), quantized):
        distances = [sum((a - b) ** 2 for a, b in zip(row, code)) for code in codebook.tolist()]
        assert found == distances.index(min(distances)) and torch.allclose(value, codebook[found], atol=1e-6)


@pytest.mark.a3
def test_a3_straight_through_is_the_identity(work):
    theta, codebook = vq_case()
    upstream = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    gradient, untouched = gradients(work.quantize(theta, codebook)[0] * upstream, theta, codebook)
    assert torch.equal(gradient, upstream), "theta does not get the gradient of quantized as it is"
    assert not untouched.any(), "a loss on quantized reached the codebook"


@pytest.mark.a3
def test_a3_each_term_moves_its_own(work):
    theta, codebook = vq_case()
    by_theta, by_code = gradients(work.quantize(theta, codebook)[2], theta, codebook)
    assert not by_theta.any(), "the codebook term moves theta"
    expected = torch.tensor([[2.0, -1.0], [2.0, 2.0]])
    assert torch.allclose(by_code, expected), "how the codebook term moves code vectors"
    by_theta, by_code = gradients(work.quantize(theta, codebook)[3], theta, codebook)
    assert not by_code.any(), "the commitment moves the codebook"
    expected = torch.tensor([[-0.2, 0.4], [-2.0, -2.0], [-1.8, 0.6]])
    assert torch.allclose(by_theta, expected), "how the commitment moves theta"


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


@pytest.mark.a4
def test_a4_lets_gradients_through(work):
    """Of one layer: d/dx_0 of sum(x_0 (x_0 . w) + x_0)."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(2, 3, generator=generator).requires_grad_()
    weights = torch.rand(1, 3, generator=generator).requires_grad_()
    found = gradients(work.cross(x0, weights, torch.zeros(1, 3)), x0, weights)
    total = x0.sum(1, keepdim=True)
    assert torch.allclose(found[0], x0 @ weights.T + 1 + total * weights), "the gradient in x_0"
    assert torch.allclose(found[1], (total * x0).sum(0, keepdim=True)), "the gradient in the weights"


def bank_case():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(30, 2, 4)).astype(np.float32)
    return theta, [rng.normal(size=(size, 4)).astype(np.float32) for size in (5, 3)], rng.random(30) < 0.8


@pytest.mark.a5
def test_a5_against_brute_force(work):
    theta, books, known = bank_case()
    bank = work.feature_bank(theta, books, known)
    assert bank.dtype == np.int16 and bank.shape == (30, 2)
    for user, m in itertools.product(range(30), range(2)):
        distances = [sum((float(a) - float(b)) ** 2 for a, b in zip(theta[user, m], code))
                     for code in books[m]]
        assert bank[user, m] == (distances.index(min(distances)) if known[user] else len(books[m]))


@pytest.mark.a5
def test_a5_depends_on_the_user_alone_and_ties_go_to_the_lowest(work):
    theta, books, known = bank_case()
    some = work.feature_bank(theta[7:9], books, known[7:9])
    assert np.array_equal(work.feature_bank(theta, books, known)[7:9], some)
    twins = [np.array([[1.0, 0], [-1, 0], [1, 0]], np.float32)]
    assert work.feature_bank(np.zeros((1, 1, 2), np.float32), twins, np.ones(1, bool)).tolist() == [[0]]


@pytest.mark.a5
def test_a5_perplexity(work):
    assert work.perplexity(np.zeros(9, int), 4) == pytest.approx(1)
    for size in (4, 64):
        assert work.perplexity(np.arange(40) % 4, size) == pytest.approx(4)
    assert work.perplexity(np.array([0, 0, 0, 1]), 2) == pytest.approx((4 / 3) ** 0.75 * 4 ** 0.25)


@pytest.mark.a6
def test_a6_against_loops(work):
    torch.manual_seed(0)
    model = work.FM([common.Field("user", 4), common.Field("item", 5), common.Field("code", 3)]).eval()
    torch.nn.init.normal_(model.bias)
    ids = torch.tensor([[0, 4, 2], [3, 1, 0]])
    e, w, b = model.embed(ids).tolist(), model.weights(ids).tolist(), model.bias.item()
    expected = []
    for row in range(2):
        pairs = itertools.combinations(e[row], 2)
        expected.append(b + sum(w[row][i][0] for i in range(3))
                        + sum(x * y for first, second in pairs for x, y in zip(first, second)))
    found = model(ids)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    reached = torch.autograd.grad(found.sum(), list(model.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in reached), "bias, weights and embeddings all learn"


@pytest.mark.a6
def test_a6_linear_in_the_number_of_fields(work):
    """No tensor of the size of all pairs nor a loop over them. A loop over the fields is linear too."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    model = work.FM([common.Field(f"field{i}", 2) for i in range(400)])
    with Watch():
        model(torch.ones(4, 400, dtype=torch.long))
    assert max(sizes) <= 4 * 400 * 8 and sum(sizes) <= 50 * 4 * 400 * 8 and len(sizes) < 20 * 400


@pytest.mark.a6
def test_a6_learns_what_no_first_order_term_can(work, monkeypatch):
    rng = np.random.default_rng(0)
    users, items = np.divmod(np.arange(80 * 80), 80)
    label = (users + items) % 2  # even users like odd items, odd users even ones
    split = rng.choice([0, 0, 0, 1, 2], size=6400)
    interactions = np.stack([users, items, label, split], axis=1).astype(np.int32)
    described = [{"id": item, "title": "", "attributes": {}} for item in range(80)]
    dataset = common.Dataset(interactions, list(range(80)), described, [], "")
    args = SimpleNamespace(seed=0, fields="ids", lr=0.02, weight_decay=0.0, epochs=15, patience=5,
                           batch_size=256, user_dropout=0.0)
    monkeypatch.setitem(ctr.MODELS, "fm", work.FM)
    found = {name: ctr.run_one(dataset, name, "none", 0, ctr.Inputs({}), args, torch.device("cpu"))["row"]
             for name in ("lr", "fm")}
    assert found["fm"]["test_auc"] > 0.95 and found["lr"]["test_auc"] < 0.6


@pytest.fixture(scope="module")
def bank_world():
    """A demo of 120 users, a fifth of them cold; the first and the last have test rows alone, the second cold
    rows alone."""
    dataset, _ = small_world(cold_users=0.2)
    interactions = dataset.interactions.copy()
    for user, split in ((0, common.TEST), (1, common.COLD), (len(dataset.users) - 1, common.TEST)):
        interactions[interactions[:, 0] == user, 3] = split
    return common.Dataset(interactions, *list(vars(dataset).values())[1:])


def changed(dataset, splits, seed=0):
    """The same data set with other users, items and labels in the rows of these splits.

    Users are drawn among those who have such rows: nobody comes to have rows of a split who had none.
    """
    interactions = dataset.interactions.copy()
    chosen = np.isin(interactions[:, 3], splits)
    rng = np.random.default_rng(seed)
    interactions[chosen, 0] = rng.choice(np.unique(interactions[chosen, 0]), size=chosen.sum())
    interactions[chosen, 1] = rng.integers(len(dataset.items), size=chosen.sum())
    interactions[chosen, 2] = rng.integers(2, size=chosen.sum())
    return common.Dataset(interactions, *list(vars(dataset).values())[1:])


def seen(dataset, splits):
    """bool (U,): who has a row in one of these splits."""
    return np.isin(np.arange(len(dataset.users)), dataset.rows(splits)[:, 0])


@pytest.mark.a7
def test_a7_codes_are_small_integers_and_strangers_are_unknown(work, bank_world):
    codes, sizes = work.make_bank(bank_world)
    assert codes.shape == (len(bank_world.users), len(sizes)), "a row for each user, a column for each size"
    assert codes.dtype.kind in "iu", "codes are integers"
    assert len(sizes) >= 1 and all(2 <= size <= 32766 and size == int(size) for size in sizes)
    assert (codes >= 0).all() and (codes <= sizes).all(), "a code is 0 to K_m - 1, or K_m: unknown"
    strangers = ~seen(bank_world, common.SEEN)
    assert strangers[[0, 1, -1]].all()
    assert (codes[strangers] == sizes).all(), "without a training or support row a user has K_m everywhere"
    rows = bank_world.rows(common.SEEN)
    liking = np.unique(rows[rows[:, 2] == 1, 0])
    assert (codes[liking] < sizes).all(), "somebody who likes something is unknown"


@pytest.mark.a7
def test_a7_the_same_rows_give_the_same_codes(work, bank_world):
    """Whatever the codes say: it is said of the user whose rows it was made from."""
    half = len(bank_world.users) // 2
    one = bank_world.interactions[bank_world.interactions[:, 0] < half]
    twins = one + np.array([half, 0, 0, 0], one.dtype)
    rest = list(vars(bank_world).values())[1:]
    codes, _ = work.make_bank(common.Dataset(np.concatenate([one, twins]), *rest))
    assert np.array_equal(codes[:half], codes[half:2 * half]), "two users with the same rows have other codes"


@pytest.mark.a7
def test_a7_no_other_row_changes_a_code(work, bank_world):
    codes, sizes = work.make_bank(bank_world)
    hidden = (common.VALIDATION, common.TEST, common.COLD)
    poisoned, its_sizes = work.make_bank(changed(bank_world, hidden))
    assert np.array_equal(codes, poisoned) and list(sizes) == list(its_sizes), (
        "other validation, test or cold rows, other codes (or something random that is not seeded)")


@pytest.mark.a7
def test_a7_training_and_support_rows_do(work, bank_world):
    codes, sizes = work.make_bank(bank_world)
    for split in (common.TRAIN, common.SUPPORT):
        own = seen(bank_world, split)
        assert (codes[own] < sizes).any(), "nobody who has such rows is known"
        other, _ = work.make_bank(changed(bank_world, split))
        assert (codes[own] != other[own]).any(), "other rows, the same codes"


@pytest.mark.a7
def test_a7_stage_04_takes_the_bank_and_its_card(work, tmp_path_factory):
    run = tmp_path_factory.mktemp("a7") / "run"
    call_stage(prepare, "--run", run, "--subsample-users", 60)
    dataset, before = common.load_dataset(run), {path.name for path in run.iterdir()}
    work.write_bank(run, "mine")
    written = {path.name for path in run.iterdir()} - before
    assert written == {"feature_bank_mine.npy", "feature_bank_mine.json"}
    card = json.loads((run / "feature_bank_mine.json").read_text())
    bank, (codes, sizes) = np.load(run / "feature_bank_mine.npy"), work.make_bank(dataset)
    assert bank.dtype == np.int16, "the file holds int16"
    assert np.array_equal(bank, codes), "two calls, two banks: seed what is random"
    assert {"codes", "dataset_fingerprint", "made_by"} <= card.keys(), "the card lacks an entry"
    assert card["codes"] == list(sizes) and card["made_by"]
    assert card["dataset_fingerprint"] == dataset.fingerprint(), "the card is of another data set"
    call_stage(ctr, "--run", run, "--ids", "none,random-mine,mine", "--seeds", 1, "--epochs", 1)
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [row["ids"] for row in rows] == ["none", "random-mine", "mine"]
    other = copy_run(run, run.with_name("other"))
    call_stage(prepare, "--run", other, "--subsample-users", 60, "--seed", 1)
    with pytest.raises(common.UserError, match="made from another dataset"):
        call_stage(ctr, "--run", other, "--ids", "none,mine", "--seeds", 1, "--epochs", 1)


def gauc_by_loops(users, labels, scores):
    total = weight = 0
    for user in set(users.tolist()):
        own = users == user
        if len(set(labels[own].tolist())) == 2:
            total += own.sum() * roc_auc_score(labels[own], scores[own])
            weight += own.sum()
    return total / weight if weight else None


def gauc_case(seed, levels):
    """Users of 1 to 40 rows, a third of them of one label; scores of a few levels, so that there are ties."""
    rng = np.random.default_rng(seed)
    users = np.repeat(rng.permutation(10**6)[:60], rng.integers(1, 41, size=60))
    order = rng.permutation(len(users))
    labels, scores = rng.integers(2, size=len(users)), rng.integers(levels, size=len(users)) / levels
    labels[np.isin(users, np.unique(users)[::3])] = seed % 2
    return users[order], labels[order], scores[order] + 0.25 * labels[order]


@pytest.mark.a8
@pytest.mark.parametrize("seed, levels", [(0, 3), (1, 3), (2, 10**6)])
def test_a8_against_an_explicit_loop(work, seed, levels):
    case = gauc_case(seed, levels)
    assert work.gauc(*case) == pytest.approx(gauc_by_loops(*case), abs=1e-9)


@pytest.mark.a8
def test_a8_by_hand(work):
    users = np.array([7, 7, 7, 7, -3, -3, 5, 5, 5, 5, 5])
    labels = np.array([1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    scores = np.array([.9, .5, .5, .1, .8, .2, .1, .2, .3, .4, .5])
    # 7 has a tie among his four pairs, -3 one pair in the wrong order, 5 has no pair
    assert work.gauc(users, labels, scores) == pytest.approx((4 * 3.5 / 4 + 2 * 0) / 6)
    assert work.gauc(users[6:], labels[6:], scores[6:]) is None
    assert work.gauc(users[:6], labels[:6], np.zeros(6)) == pytest.approx(0.5)


@pytest.mark.a8
def test_a8_what_must_not_matter(work):
    users, labels, scores = gauc_case(0, 4)  # sums of quarters are exact
    expected, order = work.gauc(users, labels, scores), np.random.default_rng(1).permutation(len(users))
    assert expected is not None and 0.5 < expected < 1
    assert work.gauc(users[order], labels[order], scores[order]) == pytest.approx(expected)
    assert work.gauc(-users, labels, scores) == pytest.approx(expected)
    shifted = scores + users % 17  # each user's scores by another number
    assert work.gauc(users, labels, shifted) == pytest.approx(expected)
    assert work.gauc(users, labels, -scores) == pytest.approx(1 - expected)


@pytest.mark.a8
def test_a8_why_auc_alone_rewards_knowing_generosity(work):
    users, labels, a, b = work.make_world()
    auc, within = ({name: function(scores) for name, scores in (("A", a), ("B", b))} for function in (
        lambda scores: roc_auc_score(labels, scores), lambda scores: work.gauc(users, labels, scores)))
    answer = work.ANSWER
    assert answer["AUC prefers"] == max(auc, key=auc.get), "the one that orders rows of different users"
    assert answer["GAUC prefers"] == max(within, key=within.get), "the one that orders a user's own rows"
    assert answer["GAUC of A"] == pytest.approx(within["A"], abs=0.005), "all of a user's rows have one score"


def words_case(n=5, d=7):
    """(vectors (n, d), counts (n,)) of words, one of them far more common than the others."""
    generator = torch.Generator().manual_seed(3)
    return 3 + torch.randn(n, d, generator=generator), torch.tensor([100.0, 4.0, 9.0, 1.0, 25.0])[:n]


@pytest.mark.a9
def test_a9_mean_and_covariance_against_loops(work):
    vectors, counts = words_case()
    origin, basis, _ = work.prior_of_words(vectors, counts, 16)
    total = sum(math.sqrt(count) for count in counts)
    mean = sum(math.sqrt(count) / total * vector for count, vector in zip(counts, vectors))
    covariance = sum(math.sqrt(count) / total * torch.outer(vector - mean, vector - mean)
                     for count, vector in zip(counts, vectors))
    assert torch.allclose(origin, mean, atol=1e-4), "the origin is the weighted mean, weights the roots"
    assert origin.shape == (7,), "the origin is one vector"
    assert basis.shape == (4, 7), "five words differ in four directions"
    assert torch.allclose(basis.T @ basis, covariance, atol=1e-4), "basis^T basis is the covariance"


@pytest.mark.a9
def test_a9_the_directions_that_are_kept_are_the_longest(work):
    vectors, counts = words_case()
    _, full, _ = work.prior_of_words(vectors, counts, 16)
    origin, basis, coordinates = work.prior_of_words(vectors, counts, 2)
    assert basis.shape == (2, 7) and coordinates.shape == (5, 2)
    kept = torch.linalg.eigvalsh(full.T @ full)[-2:].sum()
    assert float(basis.pow(2).sum()) == pytest.approx(float(kept), rel=1e-3), "the two of the most variance"
    assert float((basis[0] @ basis[1]).abs()) < 1e-3, "principal directions are orthogonal"
    assert basis[0].norm() > basis[1].norm(), "the longest first"
    nearest = torch.linalg.lstsq(basis.T, (vectors - origin).T).solution.T
    assert torch.allclose(coordinates, nearest, atol=1e-3), "the coordinates of the nearest point"


@pytest.mark.a9
def test_a9_a_word_s_coordinates_put_theta_on_the_word(work):
    vectors, counts = words_case()
    origin, basis, coordinates = work.prior_of_words(vectors, counts, 16)
    assert torch.allclose(origin + coordinates @ basis, vectors, atol=1e-3)
    share = counts.sqrt() / counts.sqrt().sum()
    spread = (share[:, None] * coordinates ** 2).sum(0)
    assert torch.allclose(spread, torch.ones(4), atol=1e-3), "in z words have variance 1, as the prior has"


@pytest.mark.a9
@pytest.mark.parametrize("prior", [0.0, 2.0])
def test_a9_gradient_in_z_against_finite_differences(work, prior):
    generator = torch.Generator().manual_seed(0)
    origin, basis, z = (torch.randn(*shape, generator=generator).double() for shape in ((7,), (4, 7), (3, 4)))

    def loss(z):
        return (origin + z @ basis).sin().sum(1) + prior / 2 * (z ** 2).sum(1)

    found = work.gradient_in_z((origin + z @ basis).cos(), basis, z, prior)
    for at in range(4):
        step = torch.zeros_like(z)
        step[:, at] = 1e-5
        slope = (loss(z + step) - loss(z - step)) / 2e-5
        assert torch.allclose(found[:, at], slope, atol=1e-5), f"direction {at}"


@pytest.mark.b1
def test_b1_profiles_are_independent_and_hear_their_names(work):
    model, _ = make_lm("gpt2")
    for names in ([[1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4, 5], [6, 7]]):
        lm = work.PromptedLM(model, names, [8, 9])
        torch.manual_seed(0)
        leak, heard, overheard = work.influence(lm, torch.randn(1, 2, 32), torch.arange(10, 18)[None])
        assert leak == 0 and heard > 0 and overheard == 0


@pytest.mark.b1
def test_b1_the_grid_is_the_strict_mask(work):
    model, _ = make_lm("gpt2")
    visible = work.PromptedLM(model, [[1, 2], [3]], [4, 5]).visibility(3)
    assert visible.shape == (10, 10)
    assert torch.equal(visible[5:], torch.ones(10, 10, dtype=torch.bool).tril()[5:])
    own = torch.ones(5, 5, dtype=torch.bool).tril()
    own[3:, :3] = False  # x^1 x^1 theta^1 are not for x^2 theta^2
    assert torch.equal(visible[:5, :5], own) and not visible[:5, 5:].any()


@pytest.mark.b2
def test_b2_codes_do_not_know_the_test_rows(work):
    interactions = work.make_world(1.0)
    poisoned = interactions.copy()
    hidden = interactions[:, 3] != common.TRAIN
    poisoned[hidden, 2] ^= 1
    poisoned[hidden, 1] = (poisoned[hidden, 1] + 1) % work.CATEGORIES
    codes = [work.profile_codes(rows) for rows in (interactions, poisoned)]
    assert np.array_equal(*codes), "a row that is not of training changed a code (validation rows do, too)"


@pytest.mark.b2
def test_b2_coin_flips_win_nothing_and_taste_still_does(work):
    coin_flips, taste = work.make_world(0.0), work.make_world(1.0)
    assert abs(work.evaluate(coin_flips, work.profile_codes(coin_flips)) - 0.5) < 0.025
    assert work.evaluate(taste, work.profile_codes(taste)) > 0.6


@pytest.mark.b3
def test_b3_the_control_is_uniform_over_as_many_codes_as_the_real_ones(work):
    codes = np.stack([np.arange(60_000) % 3, np.arange(60_000) % 7], axis=1)  # of 5 codes two are not used
    drawn = work.random_codes(codes, (5, 7), np.random.default_rng(0))
    assert drawn.shape == codes.shape and np.asarray(drawn).dtype.kind in "iu"
    for column, size in zip(drawn.T, (5, 7)):
        counts = np.bincount(column, minlength=size)
        assert len(counts) == size and np.allclose(counts / len(column), 1 / size, atol=0.01)
    assert abs(adjusted_mutual_info_score(*drawn.T)) < 0.001  # no profile's code tells the other's
    assert not np.array_equal(drawn, work.random_codes(codes, (5, 7), np.random.default_rng(1)))


@pytest.mark.b3
def test_b3_controls_that_know_nothing_cost_the_same(work):
    found = [ctr_table(work, 0.0, seed) for seed in range(5)]
    for row in ("shuffled", "profile"):
        assert abs(np.mean([table[row] - table["random"] for table in found])) < 0.008


@pytest.mark.b3
def test_b3_types_that_decide_still_win(work):
    found = ctr_table(work, 0.5, 0)
    assert found["profile"] > found["none"] + 0.02 > found["random"] + 0.02


def ctr_table(work, taste, seed):
    """work.table() with work.random_codes, also where that is another module's."""
    interactions, codes = work.make_world(taste, seed)
    rng = np.random.default_rng(seed + 100)
    rows = {"none": codes[:, :0], "random": work.random_codes(codes, work.SIZES, rng), "profile": codes,
            "shuffled": work.shuffled_codes(codes, work.SIZES, rng)}
    return {name: work.evaluate(interactions, own) for name, own in rows.items()}
