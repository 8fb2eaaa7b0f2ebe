"""Stage 03, second net: what the first tests let pass.

Adapters first: what a rewrite changes is changed there alone.
"""

import csv
import dataclasses
import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call_stage, copy_run, infer, likelihood_of, make_lm, prepare, quantize, whole_space
from sklearn.metrics import adjusted_mutual_info_score

import common

CPU = torch.device("cpu")


# ---------------------------------------------------------------- adapters

def problem_of(run):
    return quantize.read_problem(run)[0]


def squared_distance(space, theta):
    """||theta - the words' mean||^2 of each user, in the words' spread, as long as every direction kept."""
    spread = space.basis[:, :1].norm(dim=2)  # Shape: (M, 1)
    return (((theta - space.words_mean) / spread) ** 2).sum((1, 2))


def fit(name, problem, **changes):
    """What a quantizer makes of a problem: z (moved by vq), books, log weights, codes and the log."""
    args = SimpleNamespace(**{
        "seed": 0, "start": "words", "epochs": 1, "lr": 0.02, "batch_users": 128, "alpha": 1.0, "beta": 0.25,
        "llm_loss": False, "warm_up": 0, "paper": False, "quantizer": name, **changes})
    problem = dataclasses.replace(problem, z=problem.z.copy())
    quantizer = quantize.QUANTIZERS[name](problem, [4, 3], args, CPU)
    codes, log = quantizer.fit()
    return SimpleNamespace(z=problem.z, books=[book.numpy() for book in quantizer.codebooks],
                           log_weights=quantizer.log_weights, codes=codes, log=log)


def e_step(likelihood, books, log_weights, histories):
    """(mean log-likelihood, codes drawn from the responsibilities (U, M), M expected counts (K_m,))."""
    space = whole_space(len(books), 32)
    opened = likelihood, histories, space, None
    known = np.ones(len(histories), bool)
    problem = SimpleNamespace(open_likelihood=lambda device: opened, inferred=known)
    mixture = quantize.SoftCodeEM(problem, list(map(len, books)), None, CPU)
    mixture.open()
    mixture.codebooks, mixture.log_weights = books, log_weights
    torch.manual_seed(0)
    evidence, _, drawn, usage = mixture.e_step(np.zeros((len(histories), len(books)), dtype=np.int64))
    return evidence, drawn.numpy(), [count.numpy() for count in usage]


# ---------------------------------------------------------------- worlds

@pytest.fixture(scope="module")
def sparse(lm_folders, tmp_path_factory):
    """A run of stages 01 to 03 in which some users have no history."""
    run = tmp_path_factory.mktemp("run") / "sparse"
    call_stage(prepare, "--run", run, "--subsample-users", 100, "--max-per-user", 5, "--min-interactions", 1,
               "--positive-above", 4)
    call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 2, "--task-steps", 1, "--lr", 0.5)
    call_stage(quantize, "--run", run, "--quantizer", "kmeans")
    return run


def all_nll(problem, theta):
    """(users with a history, (n, K_1 K_2) -log P(y | a, b) of every pair of codes, row by row).

    theta: per profile its codes' soft tokens (K_m, d).
    """
    likelihood, histories, _, _ = problem.open_likelihood(CPU)
    users = [user for user, ids in enumerate(histories) if len(ids)]
    ids, lengths = infer.pad(histories, users, CPU)
    columns = []
    for a, b in itertools.product(range(4), range(3)):
        pair = torch.stack([theta[0][a], theta[1][b]]).expand(len(users), -1, -1)
        with torch.no_grad():
            columns.append(likelihood(pair, ids, lengths).double().numpy())
    return users, np.stack(columns, axis=1)


def theta_of(problem, books):
    """The soft tokens of codes, per profile (K_m, d)."""
    space = problem.space
    return [space.origin[m] + (space.shrink[m] * torch.as_tensor(book)) @ space.basis[m]
            for m, book in enumerate(books)]


# ---------------------------------------------------------------- the start

@pytest.mark.parametrize("name", [name for name in quantize.QUANTIZERS if name != "words"])
def test_codebooks_start_from_users_with_a_history_alone(inferred, name):
    problem = problem_of(inferred)
    known = np.arange(len(problem.z)) % 2 == 0
    far = problem.z.copy()
    far[~known] += 100 * np.random.default_rng(0).normal(size=far[~known].shape).astype(np.float32)
    found = fit(name, dataclasses.replace(problem, inferred=known, z=far), epochs=0)
    bound = np.abs(problem.z[known]).max()
    assert all(np.abs(book).max() <= bound + 1e-4 for book in found.books)


def test_a_random_start_is_uniform_noise_of_width_1_over_k(inferred):
    z = np.zeros((5, 2, 32), np.float32)
    one, two = (quantize.first_codebooks(z, [8, 4], "random", seed, None) for seed in (0, 1))
    for m, size in enumerate((8, 4)):
        assert one[m].shape == (size, 32) and 0.9 / size < one[m].abs().max() <= 1 / size
        assert abs(float(one[m].mean())) < 0.2 / size and not torch.equal(one[m], two[m])
    assert not torch.equal(one[0][:4] * 8, one[1] * 4)


# ---------------------------------------------------------------- Algorithm 1

@pytest.mark.parametrize("prior", [0.0, 30.0])
def test_the_joint_loss_moves_theta_down_the_gradient_of_eq_4_and_its_prior(inferred, prior):
    """With alpha = 0 the first step of Adam is the sign of l_llm's gradient, coordinate by coordinate."""
    problem = problem_of(inferred)
    problem.facts["prior"] = prior
    moved = fit("vq", problem, alpha=0.0, lr=1e-3, batch_users=1000, llm_loss=True).z - problem.z
    likelihood, histories, space, _ = problem.open_likelihood(CPU)
    z = torch.tensor(problem.z, requires_grad=True)
    nll = likelihood(space.theta(z), *infer.pad(histories, range(len(histories)), CPU))
    loss = nll + prior / 2 * squared_distance(space, space.theta(z))
    gradient, = torch.autograd.grad(loss.sum(), z)
    clear = gradient.abs().numpy() > 0.05 * float(gradient.abs().mean())
    assert clear.mean() > 0.7 and np.mean(np.sign(moved)[clear] == -np.sign(gradient.numpy())[clear]) > 0.995
    assert np.mean(np.abs(np.abs(moved[clear]) / 1e-3 - 1) < 0.05) > 0.95  # by --lr


def test_a_warmed_up_surrogate_knows_the_labels(inferred):
    problem = problem_of(inferred)
    cold, warm = (fit("vq", problem, lr=1e-9, warm_up=epochs).log[0] for epochs in (0, 30))
    assert warm["rec"] < 0.97 * cold["rec"]


def test_the_surrogate_sees_training_rows_alone(inferred):
    """Held-out rows, and those of cold users: their support rows made theta, and train no recommender."""
    problem = problem_of(inferred)
    rows = np.array(problem.dataset.interactions)
    cold = rows[:, 0] % 4 == 0
    rows[cold, 3] = np.where(rows[cold, 3] == common.TRAIN, common.SUPPORT, common.COLD)

    def with_rows(rows):
        return dataclasses.replace(problem, dataset=dataclasses.replace(problem.dataset, interactions=rows))

    poison, held = rows.copy(), rows[:, 3] != common.TRAIN
    poison[held, 2] ^= 1
    poison[held, 1] = 0
    one, two = (fit("vq", with_rows(found), warm_up=2) for found in (rows, poison))
    assert np.array_equal(one.z, two.z) and np.array_equal(one.codes, two.codes)
    assert one.log == two.log
    gap = np.abs(one.z - problem.z).max(axis=(1, 2))
    assert gap[::4].min() > 1e-5  # commitment moves who has no row, too
    poison[~held, 2] ^= 1
    assert fit("vq", with_rows(poison), warm_up=2).log != one.log


@pytest.fixture
def gradient(monkeypatch):
    """gradient(problem, **changes) -> (the log, theta's gradient (U, M * d) in the first step)."""
    leaves, vec_loss = [], quantize.vec_loss

    def noted(z, rows, *rest):
        leaves.append((z, [int(own[0, 0]) for own in rows]))
        return vec_loss(z, rows, *rest)

    monkeypatch.setattr(quantize, "vec_loss", noted)
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)

    def of(problem, **changes):
        leaves.clear()
        log = fit("vq", problem, batch_users=1000, **changes).log
        z, users = leaves[0]
        found = torch.zeros_like(z)
        found[users] = z.grad
        return log, found.flatten(1)
    return of


def test_the_gradients_of_eq_7_add_up(inferred, gradient):
    """L = l_llm + alpha l_vec."""
    problem = problem_of(inferred)
    problem.facts["prior"] = 3.0
    _, vec = gradient(problem, alpha=1.0)
    log, llm = gradient(problem, alpha=0.0, llm_loss=True)
    _, both = gradient(problem, alpha=0.3, llm_loss=True)
    assert min(float(llm.norm()), float(vec.norm())) > 0.01
    assert float((both - llm - 0.3 * vec).norm()) < 1e-3 * min(float(llm.norm()), float(vec.norm()))
    likelihood, histories, space, _ = problem.open_likelihood(CPU)
    z = torch.tensor(problem.z, requires_grad=True)
    nll = likelihood(space.theta(z), *infer.pad(histories, range(len(histories)), CPU))
    loss = (nll + 3.0 / 2 * squared_distance(space, space.theta(z))).mean()
    assert log[0]["llm"] == pytest.approx(loss.item(), rel=1e-4)
    wanted, = torch.autograd.grad(loss, z)
    assert float((llm - wanted.flatten(1)).norm()) < 1e-3 * float(llm.norm())


def test_each_profile_reaches_the_surrogate_through_its_own_projection():
    torch.manual_seed(0)
    surrogate, ids = quantize.Surrogate(5, 6, 3, 4).eval(), torch.tensor([[1, 2], [3, 4]])
    quantized = torch.randn(2, 3, 4, requires_grad=True)
    for silent in range(3):
        kept = surrogate.projections[silent].weight.detach().clone()
        surrogate.projections[silent].weight.data.zero_()
        gradient, = torch.autograd.grad(surrogate(ids, quantized).sum(), quantized)
        surrogate.projections[silent].weight.data.copy_(kept)
        assert gradient.abs().sum((0, 2)).gt(0).tolist() == [m != silent for m in range(3)]
    other = surrogate(torch.tensor([[1, 2], [2, 4]]), quantized)
    assert surrogate(ids, quantized)[0] == other[0] and surrogate(ids, quantized)[1] != other[1]


# ---------------------------------------------------------------- EM

def test_em_s_weights_follow_the_expected_counts(sparse):
    """A step size near 0 leaves the codes alone: what remains is EM for the weights, by enumeration."""
    problem = problem_of(sparse)
    found = fit("em", problem, epochs=2, lr=1e-12)
    _, nll = all_nll(problem, theta_of(problem, found.books))
    pairs = np.array(list(itertools.product(range(4), range(3))))
    weights, evidence, history = [np.full(4, 1 / 4), np.full(3, 1 / 3)], [], []
    for _ in range(3):
        joint = np.log(weights[0][pairs[:, 0]]) + np.log(weights[1][pairs[:, 1]]) - nll
        total = np.logaddexp.reduce(joint, axis=1)
        share = np.exp(joint - total[:, None])
        evidence.append(total.mean())
        history.append(weights)
        counts = [
            np.array([share[:, pairs[:, m] == k].sum() + 1 for k in range(size)])
            for m, size in ((0, 4), (1, 3))
        ]
        weights = [count / count.sum() for count in counts]
    assert [entry["log_likelihood"] for entry in found.log] == pytest.approx(evidence, abs=2e-3)
    best = history[int(np.argmax(evidence))]
    assert np.argmax(evidence) > 0 and max(np.abs(best[0] - 1 / 4)) > 0.005
    for log_weight, weight in zip(found.log_weights, best):
        assert log_weight.exp().tolist() == pytest.approx(weight.tolist(), abs=1e-3)


def test_em_keeps_the_likeliest_round(sparse, monkeypatch):
    problem = problem_of(sparse)
    monkeypatch.setattr(
        torch.optim, "Adam", functools.partial(torch.optim.Adam, maximize=True)
    )  # it gets worse
    found = fit("em", problem, epochs=2, lr=5.0)
    evidence = [entry["log_likelihood"] for entry in found.log]
    assert max(evidence) - evidence[-1] > 0.05
    users, nll = all_nll(problem, theta_of(problem, found.books))
    pairs = np.array(list(itertools.product(range(4), range(3))))
    prior = sum(weight.numpy()[pairs[:, m]] for m, weight in enumerate(found.log_weights))
    joint = prior - nll
    assert np.logaddexp.reduce(joint, axis=1).mean() == pytest.approx(max(evidence), abs=2e-3)
    assert np.mean(found.codes[users] == pairs[joint.argmax(1)]) > 0.99


def test_em_draws_codes_from_their_responsibilities(world):
    """Where all codes read alike the responsibilities are the weights, and counts are their multiples."""
    likelihood = likelihood_of(*make_lm("gpt2"), world[0])
    weights = [torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.25, 0.75])]
    books = [torch.randn(1, 32).repeat(3, 1), torch.randn(1, 32).repeat(2, 1)]
    histories = [np.arange(4, 8)] * 400 + [np.arange(0)]
    _, drawn, usage = e_step(likelihood, books, [weight.log() for weight in weights], histories)
    for m, weight in enumerate(weights):
        assert usage[m].tolist() == pytest.approx((400 * weight).tolist(), rel=1e-3)
        share = np.bincount(drawn[:400, m], minlength=len(weight)) / 400
        assert share.tolist() == pytest.approx(weight.tolist(), abs=0.09)


# ---------------------------------------------------------------- words as codes

def test_words_are_the_profile_s_own_and_weigh_minus_what_they_give_everybody(sparse):
    """c = argmax_c [log P(y | words c) + w_c], every combination enumerated."""
    problem = problem_of(sparse)
    found, (model, tokenizer) = fit("words", problem), make_lm("gpt2")
    for m, profile in enumerate(problem.dataset.profiles):
        texts = [f" {word}" for word in list(profile["words"])[:len(found.books[m])]]
        vectors = torch.stack([model.get_input_embeddings().weight[ids].mean(0)
                               for ids in common.pieces_of(tokenizer, texts)])
        assert torch.allclose(problem.space.vectors[m][:len(vectors)], vectors, atol=1e-4)
        nearest = problem.space.coordinates_of(vectors, m)
        assert torch.allclose(torch.as_tensor(found.books[m]), nearest, atol=1e-4)
    users, nll = all_nll(problem, problem.space.vectors)
    mean = -nll.mean(0).reshape(4, 3)
    assert found.log_weights[0].tolist() == pytest.approx(-mean.mean(1), abs=1e-3)
    assert found.log_weights[1].tolist() == pytest.approx(-mean.mean(0), abs=1e-3)
    joint = -nll - np.add.outer(mean.mean(1), mean.mean(0)).ravel()
    pairs = np.array(list(itertools.product(range(4), range(3))))
    assert np.mean(found.codes[users] == pairs[joint.argmax(1)]) > 0.99
    assert found.log[0]["log_likelihood"] == pytest.approx(np.logaddexp.reduce(joint, 1).mean(), abs=2e-3)


def test_k_means_begins_at_the_words_and_where_these_are_too_few_by_itself(sparse, monkeypatch):
    problem, begun = problem_of(sparse), []
    original = quantize.cluster.KMeans

    def noted(size, init, **rest):
        begun.append(init)
        return original(size, init=init, **rest)

    monkeypatch.setattr(quantize.cluster, "KMeans", noted)
    z, coordinates = problem.z[problem.inferred], [problem.space.word_z(m) for m in range(2)]
    quantize.first_codebooks(z, [3, 3], "words", 0, coordinates)
    assert np.array_equal(begun[0], coordinates[0][:3]) and np.array_equal(begun[1], coordinates[1])
    begun.clear()
    quantize.first_codebooks(z, [4, 4], "words", 0, coordinates)  # the background has three words
    quantize.first_codebooks(z, [4, 3], "kmeans", 0, coordinates)
    assert np.array_equal(begun[0], coordinates[0]) and begun[1:] == ["k-means++"] * 3


def test_a_code_is_named_after_the_word_towards_which_it_lies_from_the_users_mean():
    words = [["music", "fishing", "cooking"]]
    coordinates = [torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, -2.0]])]
    centre = torch.tensor([[5.0, 5.0]])
    book = torch.tensor([[5.1, 5.0], [5.0, 5.3], [4.0, 4.0], [6.0, 5.1], [5.0, 9.0]])
    assert quantize.name_codes([book], coordinates, words, centre) == [
        ["music", "fishing", "cooking", "music 2", "fishing 2"]]
    words = [["game", "game 2", "game 3"]]  # a second code of "game" may not take the name of a word
    assert quantize.name_codes([book], coordinates, words, centre) == [
        ["game", "game 2", "game 3", "game 4", "game 2 2"]]


@pytest.mark.parametrize("name", quantize.QUANTIZERS)
def test_every_quantizer_assigns_from_what_was_saved_alone(name, sparse, tmp_path):
    """New users get a code from codebooks.pt, whatever else the quantizer knew when it learned."""
    run = copy_run(sparse, tmp_path / "run")
    call_stage(quantize, "--run", run, "--quantizer", name, "--epochs", 1, "--warm-up", 1)
    before = np.load(run / "feature_bank.npy")
    saved = torch.load(run / "codebooks.pt")
    saved["users"] = [f"an earlier {user}" for user in saved["users"]]  # so that everybody is new
    torch.save(saved, run / "codebooks.pt")
    call_stage(quantize, "--run", run, "--keep-codebooks")
    after = np.load(run / "feature_bank.npy")
    known = before[:, 0] < len(saved["codebooks"][0])
    assert np.array_equal(known, after[:, 0] < len(saved["codebooks"][0]))
    same = (before == after)[known].all(1).mean()  # vq's own users were assigned by the z that it moved
    assert same > 0.8, f"--quantizer {name}: only {same:.0%} of the users get the code they had"


@pytest.mark.parametrize("name", quantize.QUANTIZERS)
def test_every_bank_has_names_and_they_stand_in_the_csv(name, sparse, tmp_path):
    run = copy_run(sparse, tmp_path / "run")
    call_stage(quantize, "--run", run, "--quantizer", name, "--epochs", 1, "--warm-up", 1)
    facts, bank = common.load(run, "quantize.json"), np.load(run / "feature_bank.npy")
    words = [profile["words"] for profile in facts["profiles"]]
    assert common.load(run, "codebooks.pt")["words"] == words and list(map(len, words)) == facts["codes"]
    known = [set(profile["words"]) for profile in common.load(run, "dataset.json")["profiles"]]
    for m, found in enumerate(words):
        assert len(set(found)) == len(found) and {word.split()[0] for word in found} <= known[m]
    with open(run / "feature_bank.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))[1:]
    expected = [[[*words[m], "unknown"][code] for m, code in enumerate(row)] for row in bank.tolist()]
    assert [codes for _, *codes in lines] == expected
    assert [user for user, *_ in lines] == common.load(run, "users.json")


def test_a_code_of_the_words_that_were_asked_is_called_by_its_word(sparse, tmp_path, monkeypatch):
    """Wherever the users' mean lies: no direction is looked at."""
    run = copy_run(sparse, tmp_path / "run")
    monkeypatch.setattr(quantize, "name_codes", None)
    call_stage(quantize, "--run", run, "--quantizer", "words")
    found = [profile["words"] for profile in common.load(run, "quantize.json")["profiles"]]
    assert found == [list(profile["words"]) for profile in common.load(run, "dataset.json")["profiles"]]


# ---------------------------------------------------------------- the bank

def test_users_without_a_history_get_the_unknown_code(sparse):
    bank, theta = np.load(sparse / "feature_bank.npy"), np.load(sparse / "profiles.npy")
    rows = np.load(sparse / "interactions.npy")
    liked = set(rows[(rows[:, 3] == 0) & (rows[:, 2] == 1), 0].tolist())
    unknown = [user for user in range(len(bank)) if user not in liked]
    assert len(unknown) >= 2 and bank.dtype == np.int16 and bank[unknown].tolist() == [[4, 3]] * len(unknown)
    books = common.load(sparse, "codebooks.pt")["codebooks"]
    for user in liked:
        nearest = [min(range(len(book)), key=lambda k: float(((theta[user, m] - book[k].numpy()) ** 2).sum()))
                   for m, book in enumerate(books)]
        assert bank[user].tolist() == nearest


def test_a_cold_user_s_code_is_that_of_his_support_rows(lm_folders, tmp_path):
    call_stage(prepare, "--run", tmp_path, "--subsample-users", 50, "--min-interactions", 1,
               "--cold-users", 0.3)
    call_stage(infer, "--run", tmp_path, "--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 1)
    call_stage(quantize, "--run", tmp_path, "--quantizer", "words")
    dataset, bank = common.load_dataset(tmp_path), np.load(tmp_path / "feature_bank.npy")
    saved, (model, tokenizer) = common.load(tmp_path, "codebooks.pt"), make_lm("gpt2")
    likelihood, texts, space = likelihood_of(model, tokenizer, dataset), {}, infer.open_space(tmp_path, CPU)
    likelihood.task = space.task
    for user, item, label in dataset.rows(common.SUPPORT).tolist():
        texts[user] = texts.get(user, "") + f" {dataset.items[item]['title']};" * label
    liked = sorted(user for user, text in texts.items() if text)
    assert len(liked) > 10
    for user in liked:
        ids, scores = torch.tensor([tokenizer.encode(texts[user])]), {}
        for a, b in itertools.product(range(4), range(3)):
            theta = torch.stack([space.vectors[0][a], space.vectors[1][b]])[None]
            with torch.no_grad():
                nll = float(likelihood(theta, ids, torch.tensor([ids.shape[1]])))
            scores[a, b] = float(saved["log_weights"][0][a] + saved["log_weights"][1][b]) - nll
        assert max(scores.values()) - scores[tuple(bank[user].tolist())] < 1e-2


def test_agreement_with_the_truth_is_of_known_users(sparse):
    bank, truth, facts = (
        np.load(sparse / "feature_bank.npy"),
        np.load(sparse / "truth.npy"),
        common.load(sparse, "quantize.json"),
    )
    known = bank[:, 0] < 4
    assert 0 < (~known).sum() < len(bank)
    expected = [adjusted_mutual_info_score(truth[known, m], bank[known, m]) for m in range(2)]
    assert facts["ami_truth"] == pytest.approx(expected)
    assert [profile["counts"] for profile in facts["profiles"]] == [
        np.bincount(bank[known, m]).tolist() for m in range(2)
    ]


def test_users_without_a_history_do_not_move(sparse):
    problem = problem_of(sparse)
    gap = np.abs(fit("vq", problem, lr=0.05).z - problem.z).max(axis=(1, 2))
    has_z = problem.inferred
    assert (~has_z).sum() >= 2 and gap[~has_z].max() < 1e-5 and gap[has_z].min() > 1e-4


def test_rows_of_users_without_a_history_train_no_surrogate(sparse):
    problem = problem_of(sparse)
    rows = np.array(problem.dataset.interactions)
    is_absent = ~problem.inferred[rows[:, 0]]
    assert (is_absent & (rows[:, 3] == common.TRAIN)).any()
    rows[is_absent, 2] ^= 1
    other = dataclasses.replace(problem, dataset=dataclasses.replace(problem.dataset, interactions=rows))
    one, two = (fit("vq", found, warm_up=2) for found in (problem, other))
    assert one.log == two.log and np.array_equal(one.z, two.z)


def test_kept_codebooks_leave_old_users_their_codes(sparse, tmp_path):
    """Also a code that would not be found again; who is not in the file gets the nearest."""
    run = copy_run(sparse, tmp_path / "run")
    before, saved = np.load(run / "feature_bank.npy"), torch.load(run / "codebooks.pt")
    old, new = np.flatnonzero(before[:, 0] < 4)[:2]
    saved["bank"][old, 0] = (before[old, 0] + 1) % 4
    del saved["users"][new]
    saved["bank"] = torch.cat([saved["bank"][:new], saved["bank"][new + 1:]])
    torch.save(saved, run / "codebooks.pt")
    call_stage(quantize, "--run", run, "--keep-codebooks")
    after = np.load(run / "feature_bank.npy")
    assert after[old].tolist() == [(before[old, 0] + 1) % 4, before[old, 1]]
    assert np.array_equal(np.delete(after, old, axis=0), np.delete(before, old, axis=0))
