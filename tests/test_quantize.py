"""Stage 03: the VQ layer, Eq. (5)-(7), Algorithm 1, EM and the feature bank."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call_stage, copy_run, infer, likelihood_of, make_lm, quantize, random_rows
from torch import nn

import common


def test_nearest_code_against_explicit_loops():
    torch.manual_seed(0)
    theta, quantizer = torch.randn(30, 5), quantize.VectorQuantizer(torch.randn(4, 5))
    expected = [min(range(4), key=lambda k: sum((theta[n, j] - quantizer.codebook[k, j]).item() ** 2 for j in range(5))) for n in range(30)]
    assert quantizer.assign(theta).tolist() == expected


def test_straight_through_value_is_the_code_and_gradient_the_identity():
    theta, quantizer = torch.randn(6, 3, requires_grad=True), quantize.VectorQuantizer(torch.randn(2, 3))
    quantized, codes, _, _ = quantizer(theta)
    assert torch.allclose(quantized, quantizer.codebook[codes])
    weight = torch.randn(6, 3)
    to_theta, to_codebook = torch.autograd.grad((quantized * weight).sum(), [theta, quantizer.codebook], allow_unused=True)
    assert torch.equal(to_theta, weight) and (to_codebook is None or not to_codebook.any())


class LinearSurrogate(nn.Module):
    """A stand-in with a logit that can be worked out by hand: the sum of all quantized coordinates."""

    def forward(self, ids, quantized):
        return quantized.sum((1, 2))


def hand_case(alpha=1.0, beta=0.5, llm=None):
    """Two users, K = 2, d = 2: theta = (1, 0), (0, 3); codes v = (1, 1), (0, 2); rows: user 0 likes, user 1 dislikes twice."""
    theta = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]], requires_grad=True)
    quantizers = nn.ModuleList([quantize.VectorQuantizer(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))])
    rows, offsets = quantize.rows_by_user(np.array([[1, 0, 0], [0, 0, 1], [1, 1, 0]]), 2)
    loss, parts = quantize.joint_loss(theta, np.array([0, 1]), quantizers, LinearSurrogate(), torch.from_numpy(rows), offsets, llm,
                                      SimpleNamespace(alpha=alpha, beta=beta))
    return theta, quantizers[0].codebook, loss, parts


def test_joint_loss_of_a_hand_computed_case():
    _, _, loss, parts = hand_case()
    # distances: user 0 to v_0: 0 + 1 = 1; user 1 to v_1: 0 + 1 = 1. Logits: 1 + 1 = 2 and 0 + 2 = 2.
    rec = (np.log1p(np.exp(-2)) + 2 * np.log1p(np.exp(2))) / 2
    assert parts == pytest.approx({"codebook": 1.0, "commitment": 1.0, "rec": rec})
    assert float(loss.detach()) == pytest.approx(1 + 0.5 + rec)
    _, _, loss, parts = hand_case(alpha=0.1, llm=lambda theta, users: theta.sum((1, 2)) * 2)
    assert parts["llm"] == pytest.approx(4.0) and float(loss.detach()) == pytest.approx(0.1 * (1.5 + rec) + 4.0)


def test_each_term_of_eq_5_reaches_the_tensors_it_should():
    theta, codebook, loss, _ = hand_case(beta=0.5)
    loss.backward()
    sigma = 1 / (1 + np.exp(-2))
    # codebook: 2 (v - theta) / users, from the first term alone. theta: beta * 2 (theta - v) / users + d rec through the identity.
    assert codebook.grad.tolist() == [pytest.approx([0.0, 1.0]), pytest.approx([0.0, -1.0])]
    assert theta.grad[0, 0].tolist() == pytest.approx([(sigma - 1) / 2, -0.5 + (sigma - 1) / 2])
    assert theta.grad[1, 0].tolist() == pytest.approx([2 * sigma / 2, 0.5 + 2 * sigma / 2])


def joint(users=range(8), **changes):
    torch.manual_seed(0)
    args = SimpleNamespace(**{"alpha": 1.0, "beta": 0.25, "lr": 0.05, "batch_users": 3, "epochs": 2, **changes})
    z = torch.randn(10, 2, 4)
    table = nn.Embedding(10, 8, sparse=True, _weight=z.flatten(1).clone())
    quantizers = nn.ModuleList(quantize.VectorQuantizer(torch.randn(3, 4)) for _ in range(2))
    surrogate = quantize.Surrogate(10, 12, 2, 4)
    rows, offsets = quantize.rows_by_user(random_rows(60, 10, 12), 10)
    llm = (lambda theta, users: (theta ** 2).sum((1, 2))) if changes.get("llm") else None
    quantize.train_jointly(table, quantizers, surrogate, torch.from_numpy(rows), offsets, np.array(list(users)), llm, args, np.random.default_rng(0))
    return z, table.weight.detach().view(10, 2, 4), torch.stack([q.codebook.detach() for q in quantizers])


def test_algorithm_1_moves_present_users_only():
    before, after, _ = joint()
    assert torch.equal(before[8:], after[8:]) and (before[:8] != after[:8]).flatten(1).any(1).all()


def test_every_joint_setting_changes_the_outcome():
    base = joint()
    for change in ({"alpha": 0.5, "llm": True}, {"beta": 1.0}, {"lr": 0.01}, {"batch_users": 8}, {"epochs": 3}, {"llm": True}):
        other = joint(**change)
        assert not torch.equal(base[1], other[1]), change
    assert torch.equal(base[1], joint()[1])


def test_first_codebooks_find_groups_and_refuse_more_codes_than_theta():
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 5, (4, 16))
    theta = (centres[np.arange(200) % 4] + rng.normal(0, 0.1, (200, 16)))[:, None]
    found = quantize.first_codebooks(theta, [4], "kmeans", 0)[0].numpy()
    assert sorted(np.linalg.norm(found - centre, axis=1).min() < 0.2 for centre in centres) == [True] * 4
    with pytest.raises(quantize.UserError, match="5 codes for 2 distinct"):
        quantize.first_codebooks(np.repeat(np.eye(2)[:, None], 3, 0), [5], "kmeans", 0)


def test_em_e_step_against_enumeration_and_its_coordinate_form(world, monkeypatch):
    model, tokenizer = make_lm("gpt2")
    likelihood = likelihood_of(model, tokenizer, world[0])
    torch.manual_seed(0)
    books, weights = [torch.randn(3, 32), torch.randn(2, 32)], [torch.tensor([0.2, 0.5, 0.3]).log(), torch.tensor([0.6, 0.4]).log()]
    histories = [np.arange(5), np.arange(3, 12)]
    mixture = quantize.CodeMixture(likelihood, books, weights, histories)
    _, share, evidence, best = mixture.responsibilities([0, 1], torch.zeros(2, 2, dtype=torch.long))
    for user in (0, 1):
        joint_ = {}
        for a, b in itertools.product(range(3), range(2)):
            theta = torch.stack([books[0][a], books[1][b]])[None]
            nll = likelihood(theta, torch.from_numpy(histories[user])[None], torch.tensor([len(histories[user])]))
            joint_[a, b] = float(weights[0][a] + weights[1][b] - nll)
        total = np.logaddexp.reduce(list(joint_.values()))
        assert float(evidence[user]) == pytest.approx(total, abs=1e-3)
        assert share[user].tolist() == pytest.approx([np.exp(value - total) for value in joint_.values()], abs=1e-3)
        assert tuple(best[user].tolist()) == max(joint_, key=joint_.get)
    monkeypatch.setattr(quantize, "COMBINATIONS", 1)
    coordinate = quantize.CodeMixture(likelihood, books, weights, histories)
    codes = best
    *_, again = coordinate.responsibilities([0, 1], codes)  # the best combination is a fixed point of the coordinate updates
    assert torch.equal(again, best)


def test_health_figures_and_collapse_warning(capsys):
    codes = np.array([[0, 1]] * 50 + [[1, 1]] * 50)
    theta = np.array([[[0.0, 0.0], [1.0, 0.0]], [[3.0, 0.0], [1.0, 0.0]]], dtype=np.float32).repeat(50, axis=0)
    books = [torch.tensor([[0.0, 1.0], [3.0, 0.0], [9.0, 9.0], [9.0, 9.0]]), torch.tensor([[5.0, 0.0], [0.0, 0.0], [3.0, 0.0]])]
    report = quantize.health(codes, theta, books, ["a", "b"])
    assert report[0]["active"] == 2 and report[0]["perplexity"] == pytest.approx(2.0) and report[0]["max_share"] == 0.5
    assert report[1]["counts"] == [0, 100, 0] and report[1]["perplexity"] == pytest.approx(1.0)
    assert report[0]["distance_ratio"] == pytest.approx((1 / 3 + 0) / 2) and report[1]["distance_ratio"] == pytest.approx(0.5)
    quantize.show(report, None)
    assert capsys.readouterr().out.count("WARNING") == 1


def test_bank_is_eq_6_over_all_users_and_the_csv_agrees(inferred):
    bank, facts = np.load(inferred / "feature_bank.npy"), json.loads((inferred / "quantize.json").read_text())
    stored = torch.load(inferred / "codebooks.pt", weights_only=True)
    users = json.loads((inferred / "users.json").read_text())
    lines = (inferred / "feature_bank.csv").read_text().splitlines()
    assert bank.dtype == np.int16 and bank.shape == (len(users), 2) and [len(book) for book in stored["codebooks"]] == facts["codes"] == [4, 3]
    assert lines[0] == "user_id,hobby,background" and lines[1:] == [f"{user},{a},{b}" for user, (a, b) in zip(users, bank.tolist())]
    lines = (inferred / "feature_bank.user").read_text().splitlines()
    assert lines[0] == "user_id:token\thobby:token\tbackground:token"
    assert lines[1:] == [f"{user}\t{a}\t{b}" for user, (a, b) in zip(users, bank.tolist())]
    interactions = np.load(inferred / "interactions.npy")
    liked = set(interactions[(interactions[:, 3] == 0) & (interactions[:, 2] == 1), 0].tolist())
    for user, codes in enumerate(bank.tolist()):
        assert (codes == [4, 3]) == (user not in liked)


def test_plain_k_means_is_eq_6_on_theta_and_the_start_of_algorithm_1(inferred, tmp_path):
    run, found = copy_run(inferred, tmp_path / "run"), []
    for flags in (("--quantizer", "kmeans"), ("--epochs", 0)):
        call_stage(quantize, "--run", run, *flags)
        found.append(np.load(run / "feature_bank.npy"))
        theta, stored = np.load(run / "profiles.npy"), torch.load(run / "codebooks.pt", weights_only=True)
        for m in range(2):
            distance = ((theta[:, m, None] - stored["codebooks"][m].numpy()) ** 2).sum(2)
            known = found[-1][:, m] < len(stored["codebooks"][m])
            assert np.array_equal(distance.argmin(1)[known], found[-1][known, m])
    assert np.mean(found[0] == found[1]) > 0.99


def problem_of(run):
    return quantize.read_problem(run)[0]


def test_assignment_is_a_pure_function_of_theta_and_codebooks(inferred):
    problem, order = problem_of(inferred), np.random.default_rng(0).permutation(120)
    quantizer = quantize.QUANTIZERS["kmeans"](problem, [4, 3], SimpleNamespace(seed=0), torch.device("cpu"))
    codes, _ = quantizer.fit()
    theta = problem.theta.copy()
    assert np.array_equal(quantizer.assign(), codes) and np.array_equal(problem.theta, theta)
    problem.theta = theta[order]
    assert np.array_equal(quantizer.assign(), codes[order])


def test_em_assigns_by_the_history_alone_and_its_likelihood_rises(inferred):
    problem = problem_of(inferred)
    args = SimpleNamespace(seed=0, start="kmeans", epochs=2, lr=0.05)
    quantizer = quantize.QUANTIZERS["em"](problem, [4, 3], args, torch.device("cpu"))
    codes, log = quantizer.fit()
    evidence = [entry["log_likelihood"] for entry in log]
    assert evidence[0] < evidence[1] < evidence[2]
    problem.theta = np.zeros_like(problem.theta)  # a new user has no theta: forward passes suffice
    assert np.array_equal(quantizer.assign()[problem.known], codes[problem.known])


def test_collapse_is_reported_when_it_is_forced(inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    theta = np.load(run / "profiles.npy")
    theta[:, 0] += 5  # far from every code that starts near 0
    np.save(run / "profiles.npy", theta)
    facts = json.loads((run / "profiles.json").read_text())
    (run / "profiles.json").write_text(json.dumps(facts | {"fingerprint": common.fingerprint(theta)}))
    call_stage(quantize, "--run", run, "--paper", "--epochs", 1, "--no-llm-loss")
    assert "WARNING: the codebook of hobby has collapsed; try --start kmeans" in capsys.readouterr().out
    assert json.loads((run / "quantize.json").read_text())["profiles"][0]["max_share"] > 0.9


def test_paper_sets_defaults_that_a_flag_overrides(monkeypatch):
    monkeypatch.setattr("sys.argv", ["03_quantize.py", "--paper", "--beta", "0.5"])
    args = quantize.parse_arguments()
    assert (args.alpha, args.beta, args.lr, args.batch_users, args.start, args.warm_up) == (1e-3, 0.5, 1e-3, 128, "random", 0)


def test_every_flag_of_stage_03_changes_a_number(inferred, tmp_path):
    def numbers(*args):
        run = copy_run(inferred, tmp_path / "run")
        call_stage(quantize, "--run", run, "--epochs", 2, "--warm-up", 1, "--batch-users", 40, *args)
        return json.dumps({key: value for key, value in json.loads((run / "quantize.json").read_text()).items()
                           if key in ("loss", "profiles", "fingerprint")})
    base = numbers()
    assert base == numbers()
    for flags in (("--alpha", 3), ("--beta", 2), ("--no-llm-loss",), ("--assign", "likelihood"), ("--quantizer", "kmeans"), ("--start", "random"),
                  ("--epochs", 3), ("--warm-up", 2), ("--lr", 0.2), ("--batch-users", 20), ("--paper",), ("--codes", "3,3"), ("--seed", 1)):
        assert numbers(*flags) != base, flags


def test_likelihood_of_stage_03_is_that_of_stage_02(inferred):
    facts = json.loads((inferred / "profiles.json").read_text())
    likelihood, histories, start, spread, _ = problem_of(inferred).open_likelihood(torch.device("cpu"))
    assert spread.tolist() == pytest.approx(facts["spread"])
    theta, users = np.load(inferred / "profiles.npy"), [user for user, ids in enumerate(histories) if len(ids)]
    assert infer.mean_nll(likelihood, lambda block: theta[block], histories, users, 2000) == pytest.approx(facts["train_nll"]["after"], abs=1e-4)
