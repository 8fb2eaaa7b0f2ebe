"""Stage 03: the VQ layer, Eq. (5)-(7), Algorithm 1, EM and the feature bank."""

import csv
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (assert_bytes_equal, call_stage, copy_run, infer, likelihood_of, make_lm, ok, quantize,
                      random_rows, run_stage, space_of)
from torch import nn

import common


CPU = torch.device("cpu")


def test_nearest_code_against_explicit_loops():
    torch.manual_seed(0)
    theta, quantizer = torch.randn(30, 5), quantize.VectorQuantizer(torch.randn(4, 5))
    distances = [[sum((theta[n, j] - quantizer.codebook[k, j]).item() ** 2 for j in range(5))
                  for k in range(4)] for n in range(30)]
    expected = [found.index(min(found)) for found in distances]
    assert quantize.nearest(theta, quantizer.codebook).tolist() == expected


def test_nearest_does_not_depend_on_the_origin_nor_on_how_many_ask_at_once():
    """Users may differ by a ten-thousandth of where they all lie: |a|^2 + |b|^2 - 2ab would be noise."""
    generator = torch.Generator().manual_seed(0)
    theta, codebook = (1 + 2e-4 * torch.randn(size, 64, generator=generator) for size in (500, 7))
    exact = ((theta[:, None].double() - codebook.double()) ** 2).sum(2).argmin(1)
    assert torch.equal(quantize.nearest(theta, codebook), exact) and len(exact.unique()) == 7
    assert torch.equal(quantize.nearest(theta[:3], codebook), exact[:3])


@pytest.mark.parametrize("assign", [False, True])
def test_by_words_who_has_no_history_now_has_the_code_nearest_to_his_theta(inferred, monkeypatch, assign):
    """After 01 was run again an old user may have no training like; his z is still there."""
    problem, _ = quantize.read_problem(inferred)
    user = int(np.flatnonzero(problem.inferred)[3])
    likelihood, histories, *rest = problem.open_likelihood(torch.device("cpu"))
    histories[user] = []
    monkeypatch.setattr(problem, "open_likelihood", lambda device: (likelihood, histories, *rest))
    quantizer = quantize.Words(problem, [4, 3], SimpleNamespace(seed=0), torch.device("cpu"))
    codes = quantizer.fit()[0]
    if assign:
        problem.z[user] = torch.stack([book[2] for book in quantizer.codebooks]).numpy()
        codes = quantizer.assign()
    nearest = quantize.assign_all(torch.tensor(problem.z), quantizer.codebooks)
    assert codes[user].tolist() == nearest[user].tolist() and (not assign or codes[user].tolist() == [2, 2])
    assert (codes != nearest).any()  # who has a history gets the likeliest


def test_straight_through_value_is_the_code_and_gradient_the_identity():
    theta, quantizer = torch.randn(6, 3, requires_grad=True), quantize.VectorQuantizer(torch.randn(2, 3))
    quantized, _, _ = quantizer(theta)
    # The value is theta + (code - theta): the code but for rounding, of the size of theta.
    codes = quantizer.codebook[quantize.nearest(theta, quantizer.codebook)]
    assert torch.allclose(quantized, codes, rtol=0, atol=1e-5)
    weight = torch.randn(6, 3)
    to_theta, to_codebook = torch.autograd.grad((quantized * weight).sum(), [theta, quantizer.codebook],
                                                allow_unused=True)
    assert torch.equal(to_theta, weight) and (to_codebook is None or not to_codebook.any())


class LinearSurrogate(nn.Module):
    """A stand-in with a logit that can be worked out by hand: the sum of all quantized coordinates."""

    def forward(self, ids, quantized):
        return quantized.sum((1, 2))


def hand_made():
    """K = 2, d = 2: theta = (1, 0), (0, 3); codes v = (1, 1), (0, 2); user 0 likes, user 1 dislikes twice."""
    theta = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
    quantizers = nn.ModuleList([quantize.VectorQuantizer(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))])
    return theta, quantizers, quantize.rows_by_user(np.array([[1, 0, 0], [0, 0, 1], [1, 1, 0]]), 2)


def hand_case(beta):
    theta, quantizers, rows = hand_made()
    loss, parts = quantize.vec_loss(theta.requires_grad_(), rows, quantizers, LinearSurrogate(), beta)
    return theta, quantizers[0].codebook, loss, parts


def test_rows_of_each_user_stand_together_also_of_those_who_have_none():
    rows = np.array([[3, 0, 1], [1, 5, 0], [3, 2, 0], [1, 4, 1]])
    found = [part.tolist() for part in quantize.rows_by_user(rows, 5)]
    assert found == [[], [[1, 5, 0], [1, 4, 1]], [], [[3, 0, 1], [3, 2, 0]], []]


def test_loss_of_eq_5_of_a_hand_computed_case():
    _, _, loss, parts = hand_case(beta=0.5)
    # distances: user 0 to v_0: 0 + 1 = 1; user 1 to v_1: 0 + 1 = 1. Logits: 1 + 1 = 2 and 0 + 2 = 2.
    rec = (np.log1p(np.exp(-2)) + 2 * np.log1p(np.exp(2))) / 2
    assert parts == pytest.approx({"codebook": 1.0, "commitment": 1.0, "rec": rec})
    assert float(loss.detach()) == pytest.approx(1 + 0.5 + rec)


def test_each_term_of_eq_5_reaches_the_tensors_it_should():
    theta, codebook, loss, _ = hand_case(beta=0.5)
    loss.backward()
    sigma = 1 / (1 + np.exp(-2))
    # codebook: 2 (v - theta) / users, from the first term alone.
    # theta: beta * 2 (theta - v) / users + d rec through the identity.
    assert codebook.grad.tolist() == [pytest.approx([0.0, 1.0]), pytest.approx([0.0, -1.0])]
    assert theta.grad[0, 0].tolist() == pytest.approx([(sigma - 1) / 2, -0.5 + (sigma - 1) / 2])
    assert theta.grad[1, 0].tolist() == pytest.approx([2 * sigma / 2, 0.5 + 2 * sigma / 2])


def quadratic():
    """A stand-in for the LLM's loss: the mean over users of ||theta||^2."""
    def llm(theta, users):
        loss, llm.seen = (theta ** 2).sum() / len(users), theta
        loss.backward()
        return loss.item()
    return llm


def test_the_two_terms_of_eq_7_add_up_and_alpha_weighs_the_first_alone(monkeypatch):
    """Optimisers that do not move, but note the gradients that they are given: theta's, the codebook's."""
    noted = []

    class Recorder:
        def __init__(self, parameters, **_):
            self.parameters = list(parameters)

        def zero_grad(self):
            for parameter in self.parameters:
                parameter.grad = None

        def step(self):
            noted.extend(parameter.grad.to_dense() for parameter in self.parameters)

    monkeypatch.setattr(torch.optim, "Adam", Recorder)
    theta, quantizers, rows = hand_made()
    args = SimpleNamespace(alpha=0.1, beta=0.5, lr=1.0, batch_users=2, epochs=1)
    llm, rng = quadratic(), np.random.default_rng(0)
    order = np.random.default_rng(0).permutation(2)
    log = quantize.train_jointly(theta.detach().clone(), quantizers, LinearSurrogate(), rows, np.arange(2),
                                 llm, args, rng)
    leaf, codebook, loss, _ = hand_case(beta=0.5)
    (0.1 * loss + (leaf ** 2).sum() / 2).backward()
    assert torch.allclose(llm.seen.grad, leaf.grad[order])
    assert torch.allclose(noted[0], codebook.grad)
    assert log[0]["llm"] == pytest.approx(5.0) and log[0]["codebook"] == pytest.approx(1.0)


def joint(users=range(8), llm=None, **changes):
    torch.manual_seed(0)
    args = SimpleNamespace(**{"alpha": 1.0, "beta": 0.25, "lr": 0.05, "batch_users": 3, "epochs": 2,
                              **changes})
    z = torch.randn(10, 2, 4)
    moved = z.clone()
    quantizers = nn.ModuleList(quantize.VectorQuantizer(torch.randn(3, 4)) for _ in range(2))
    surrogate = quantize.Surrogate(10, 12, 2, 4)
    rows = quantize.rows_by_user(random_rows(60, 10, 12), 10)
    quantize.train_jointly(moved, quantizers, surrogate, rows, np.array(list(users)), llm, args,
                           np.random.default_rng(0))
    return z, moved, torch.stack([q.codebook.detach() for q in quantizers])


def test_algorithm_1_moves_present_users_only():
    before, after, _ = joint()
    assert torch.equal(before[8:], after[8:]) and (before[:8] != after[:8]).flatten(1).any(1).all()


def test_a_gradient_that_overflows_is_said_in_one_line():
    def overflowing(own, batch):
        own.grad[0, 0, 0] = torch.inf
        return 1.0  # the loss itself is finite

    with pytest.raises(common.UserError, match="lower --lr"):
        joint(llm=overflowing, epochs=1)


def test_a_user_s_step_does_not_depend_on_how_many_came_before_him():
    """Adagrad by hand: a first step of --lr for everybody; Adam, with one count of steps, halves it."""
    before, after, _ = joint(range(10), quadratic(), alpha=0.0, batch_users=1, epochs=1)
    assert torch.allclose((after - before).abs(), torch.full_like(after, 0.05), atol=1e-5)
    _, twice, _ = joint(range(10), quadratic(), alpha=0.0, batch_users=1, epochs=2)
    first, second = 2 * before, 2 * after
    wanted = after - 0.05 * second / (first ** 2 + second ** 2).sqrt()
    assert torch.allclose(twice, wanted, atol=1e-5)


def test_every_joint_setting_changes_the_outcome():
    base = joint()
    for change in ({"alpha": 0.5, "llm": quadratic()}, {"beta": 1.0}, {"lr": 0.01}, {"batch_users": 8},
                   {"epochs": 3}, {"llm": quadratic()}):
        other = joint(**change)
        assert not torch.equal(base[1], other[1]), change
    assert torch.equal(base[1], joint()[1])


def stub_problem(world, histories, prior=1.0, kind="words"):
    """(what a quantizer asks of a Problem, with a random LLM and these histories; likelihood; space).

    kind: 02's --space.
    """
    model, tokenizer = make_lm("gpt2")
    likelihood = likelihood_of(model, tokenizer, world[0])
    space = space_of(likelihood, tokenizer, world[0])
    if kind == "users":
        wide = space_of(likelihood, tokenizer, world[0], rank=0)
        generator = torch.Generator().manual_seed(1)
        space = infer.squeeze(wide, 3 + torch.randn(30, *wide.basis.shape[:2], generator=generator), 4)
    z = np.zeros((len(histories), *space.basis.shape[:2]), dtype=np.float32)
    opened = likelihood, histories, space, tokenizer
    known = np.array([len(ids) > 0 for ids in histories])
    facts = {"prior": prior, "space": kind, "rank": 16}
    problem = quantize.Problem(None, None, z, known, facts, space)
    problem.open_likelihood = lambda _: opened
    return problem, likelihood, space


@pytest.mark.parametrize("prior, kind", [(0.0, "words"), (2.5, "words"), (2.5, "users")])
def test_the_llm_s_term_of_eq_7_and_its_gradient_against_autograd_of_the_plain_sum(
        prior, kind, world, monkeypatch):
    """The prior is stage 02's: its centre is the words' mean, where z need not be 0."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(300, size=length) for length in (4, 9, 0, 30, 31, 9, 2)]
    problem, likelihood, space = stub_problem(world, histories, prior, kind)
    monkeypatch.setattr(infer, "token_budget_of", lambda _: 120)  # of 6 users a block holds one or two
    blocks, make_blocks = [], infer.make_blocks
    monkeypatch.setattr(infer, "make_blocks", lambda *args: [blocks.append(block) or block
                                                             for block in make_blocks(*args)])
    torch.manual_seed(0)
    z = torch.randn(7, *space.basis.shape[:2], requires_grad=True)
    users = np.array([5, 0, 3, 6, 1, 4])
    llm = problem.open_llm_loss(CPU)
    own = z[users].detach().requires_grad_()
    value = llm(own, users)
    assert len(blocks) >= 3
    plain = 0.0
    for user in users:
        ids = torch.tensor(histories[user])[None]
        believed = space.shrink * z[user]
        theta = torch.stack([space.origin[m] + believed[m] @ space.basis[m] for m in range(2)])
        nll = likelihood(theta[None], ids, torch.tensor([ids.shape[1]])).sum()
        from_centre = z[user] * (space.basis.norm(dim=2) > 0)  # profiles of few words have some of length 0
        if kind == "users":  # all directions are as long as the words' spread
            spread = space.basis[:, :1].norm(dim=2)
            from_centre = (theta - space.words_mean) / spread
        plain = plain + nll + prior / 2 * (from_centre ** 2).sum()
    gradient, = torch.autograd.grad(plain / len(users), z)
    assert value == pytest.approx(plain.item() / len(users), rel=1e-5)
    assert torch.allclose(own.grad, gradient[users], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("learn", ["vq", "em"])
def test_a_likelihood_that_is_not_finite_is_one_line_with_the_flag_of_stage_02(learn, world):
    problem, likelihood, space = stub_problem(world, [np.arange(4), np.arange(5, 9)])

    class Overflowing(infer.ProfileLikelihood):
        def __call__(self, *inputs):
            return super().__call__(*inputs) * torch.nan

    likelihood.__class__ = Overflowing
    with pytest.raises(common.UserError, match="not finite.*run 02 with --dtype bf16 or fp32"):
        if learn == "em":
            args = SimpleNamespace(seed=0, start="kmeans", epochs=1, lr=0.1)
            problem.z[1] = 1.0
            quantize.SoftCodeEM(problem, [2, 2], args, CPU).fit()
        else:
            z = torch.zeros(2, *space.basis.shape[:2], requires_grad=True)
            problem.open_llm_loss(CPU)(z, np.array([0, 1]))


def test_first_codebooks_find_groups_and_refuse_more_codes_than_theta():
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 5, (4, 16))
    theta = (centres[np.arange(200) % 4] + rng.normal(0, 0.1, (200, 16)))[:, None]
    found = quantize.first_codebooks(theta, [4], "kmeans", 0, None)[0].numpy()
    assert sorted(np.linalg.norm(found - centre, axis=1).min() < 0.2 for centre in centres) == [True] * 4
    with pytest.raises(quantize.UserError, match="5 codes are more than the 2 distinct"):
        quantize.first_codebooks(np.repeat(np.eye(2)[:, None], 3, 0), [5], "kmeans", 0, None)


def brute_force(likelihood, space, histories, books, log_weights):
    """Per user {combination of codes: log pi_c + log P(y_u | c)}, a user and a combination at a time."""
    found = []
    for ids in histories:
        joint_ = {}
        for codes in itertools.product(*(range(len(book)) for book in books)):
            z = torch.stack([book[code] for book, code in zip(books, codes)])[None]
            nll = likelihood(space.theta(z), torch.tensor(ids)[None], torch.tensor([len(ids)]))
            joint_[codes] = float(sum(weight[code] for weight, code in zip(log_weights, codes)) - nll)
        found.append(joint_)
    return found


HISTORIES = [np.arange(5), np.arange(0), np.arange(3, 12), np.arange(40, 44)]


def test_em_e_step_against_enumeration(world):
    problem, likelihood, space = stub_problem(world, HISTORIES)
    quantizer = quantize.SoftCodeEM(problem, [3, 2], None, CPU)
    quantizer.open()
    torch.manual_seed(0)
    quantizer.codebooks = [torch.randn(3, 3), torch.randn(2, 3)]
    quantizer.log_weights = [torch.tensor([0.2, 0.5, 0.3]).log(), torch.tensor([0.6, 0.4]).log()]
    evidence, codes, drawn, usage = quantizer.e_step(np.full((4, 2), 1))
    histories = [HISTORIES[user] for user in (0, 2, 3)]
    expected = brute_force(likelihood, space, histories, quantizer.codebooks, quantizer.log_weights)
    totals = [np.logaddexp.reduce(list(joint_.values())) for joint_ in expected]
    assert evidence == pytest.approx(np.mean(totals), abs=1e-3)
    assert [tuple(codes[user]) for user in (0, 2, 3)] == [max(joint_, key=joint_.get) for joint_ in expected]
    assert codes[1].tolist() == drawn[1].tolist() == [1, 1]  # without a history a user keeps the codes he had
    for m, size in enumerate((3, 2)):
        counts = [sum(np.exp(value - total) for joint_, total in zip(expected, totals)
                      for codes, value in joint_.items() if codes[m] == code) for code in range(size)]
        assert usage[m].tolist() == pytest.approx(counts, abs=1e-3)


def test_em_learns_nothing_from_users_who_have_no_z(world):
    problem, *_ = stub_problem(world, HISTORIES)
    problem.inferred[2] = False  # with a history: 02 --users was not asked for this user
    quantizer = quantize.SoftCodeEM(problem, [3, 2], None, CPU)
    quantizer.open()
    assert sorted(user for block in quantizer.blocks for user in block) == [0, 3]


@pytest.mark.parametrize("name", ["em", "words"])
def test_more_combinations_than_em_can_try_are_one_line_that_says_so(name, world):
    problem, *_ = stub_problem(world, HISTORIES)
    words = r"102 combinations .* \(--codes.*\); .* product of at most 100"
    with pytest.raises(common.UserError, match=words):
        quantize.QUANTIZERS[name](problem, [17, 6], None, CPU).open()
    quantize.QUANTIZERS[name](problem, [20, 5], None, CPU).open()


def test_words_can_be_asked_again_and_no_more_of_them_than_there_are(world):
    problem, *_ = stub_problem(world, HISTORIES)
    quantizer = quantize.Words(problem, [4, 3], SimpleNamespace(seed=0), CPU)
    codes, _ = quantizer.fit()
    assert np.array_equal(quantizer.assign(), codes)
    with pytest.raises(common.UserError, match="5 codes are more than the 4 words of profile 1 .--codes"):
        quantize.Words(problem, [5, 3], SimpleNamespace(seed=0), CPU).fit()


def test_random_codes_of_k_means_are_random(inferred):
    args = SimpleNamespace(seed=0, start="random")
    quantizer = quantize.KMeans(problem_of(inferred), [4, 3], args, CPU)
    quantizer.fit()
    assert all(float(book.abs().max()) <= 1 / len(book) for book in quantizer.codebooks)


def test_names_of_words_stand_in_quantize_json_and_beside_the_bank(inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    owners = json.loads((run / "profiles_users.json").read_text())
    owners["inferred"].remove(7)  # as if he had no history
    facts = json.loads((run / "profiles.json").read_text())
    facts |= {"users_fingerprint": common.fingerprint(owners)}
    (run / "profiles_users.json").write_text(json.dumps(owners))
    (run / "profiles.json").write_text(json.dumps(facts))
    call_stage(quantize, "--run", run, "--quantizer", "words")
    facts, bank = json.loads((run / "quantize.json").read_text()), np.load(run / "feature_bank.npy")
    words = [profile["words"] for profile in facts["profiles"]]
    assert [len(found) for found in words] == facts["codes"] == [4, 3]
    assert words[0][0] in capsys.readouterr().out
    assert torch.load(run / "codebooks.pt")["words"] == words
    users, header = json.loads((run / "users.json").read_text()), ["user_id", "hobby", "background"]
    with open(run / "feature_bank.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    names = [[*found, "unknown"] for found in words]
    named = [[names[0][a], names[1][b]] for a, b in bank.tolist()]
    assert lines == [header, *([user, *row] for user, row in zip(users, named))]
    assert bank[7].tolist() == [4, 3] and lines[8][1:] == ["unknown", "unknown"]
    call_stage(quantize, "--run", run, "--keep-codebooks")  # names stay with their codebooks
    assert np.array_equal(np.load(run / "feature_bank.npy"), bank)
    facts = json.loads((run / "quantize.json").read_text())
    assert [profile["words"] for profile in facts["profiles"]] == words


def test_agreement_does_not_depend_on_the_numbers_of_codes_and_compares_profiles_with_each_other():
    truth = np.array([[a, b] for a in range(4) for b in range(3)] * 5)
    renamed = np.stack([(truth[:, 0] + 1) % 4, 2 - truth[:, 1]], axis=1)
    found = quantize.agreement(renamed, truth)
    assert found["ami_truth"] == pytest.approx([1, 1]) and found["nmi_truth"] == pytest.approx([1, 1])
    assert found["nmi_across"] == pytest.approx([0], abs=1e-9)
    same = quantize.agreement(truth[:, [0, 0]], truth)
    assert same["nmi_across"] == pytest.approx([1]) and same["ami_truth"][1] < 0.01


def test_health_figures_and_collapse_warning(capsys):
    codes = np.array([[0, 1]] * 50 + [[1, 1]] * 50)
    report = quantize.health(codes, [4, 3], [{"name": "a"}, {"name": "b"}])
    for profile, words in zip(report, ("abcd", "efg")):
        profile["words"] = list(words)
    assert report[0]["active"] == 2 and report[0]["max_share"] == 0.5
    assert report[0]["perplexity"] == pytest.approx(2.0)
    assert report[1]["counts"] == [0, 100, 0] and report[1]["perplexity"] == pytest.approx(1.0)
    assert [len(profile["counts"]) for profile in report] == [4, 3]
    quantize.show(report, None)
    assert capsys.readouterr().out.count("WARNING") == 1


def test_another_process_writes_the_same_bytes_and_nothing_but_its_report(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    process = ok(run_stage("03_quantize.py", "--run", run, "--epochs", 1, "--warm-up", 1))
    assert process.stderr == "" and "\r" not in process.stdout  # no bar, no warning: a log stays a log
    assert_bytes_equal(run / "feature_bank.npy", inferred / "feature_bank.npy")
    facts = [json.loads((path / "quantize.json").read_text()) for path in (run, inferred)]
    for key in ("codebooks_fingerprint", "loss"):
        assert facts[0][key] == facts[1][key]


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
    quantizer = quantize.KMeans(problem, [4, 3], SimpleNamespace(seed=0, start="kmeans"), CPU)
    codes, _ = quantizer.fit()
    z = problem.z.copy()
    assert np.array_equal(quantizer.assign(), codes) and np.array_equal(problem.z, z)
    problem.z = z[order]
    assert np.array_equal(quantizer.assign(), codes[order])


def test_em_assigns_by_the_history_alone_and_its_likelihood_rises(inferred):
    problem = problem_of(inferred)
    args = SimpleNamespace(seed=0, start="kmeans", epochs=2, lr=0.05)
    quantizer = quantize.SoftCodeEM(problem, [4, 3], args, CPU)
    codes, log = quantizer.fit()
    evidence = [entry["log_likelihood"] for entry in log]
    assert evidence[0] < evidence[1] < evidence[2]
    problem.z = np.zeros_like(problem.z)  # a new user has no z: forward passes suffice
    assert np.array_equal(quantizer.assign()[problem.inferred], codes[problem.inferred])


def test_collapse_is_reported_when_it_is_forced(inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    theta = np.load(run / "profiles.npy")
    theta[:, 0] += 5  # far from every code that starts near 0
    np.save(run / "profiles.npy", theta)
    facts = json.loads((run / "profiles.json").read_text())
    (run / "profiles.json").write_text(json.dumps(facts | {"fingerprint": common.fingerprint(theta)}))
    call_stage(quantize, "--run", run, "--paper", "--start", "random", "--epochs", 1, "--no-llm-loss")
    printed = capsys.readouterr().out
    assert "WARNING: the codebook of hobby has collapsed: " in printed
    assert " codes=4,3 " in printed  # the settings that it says are those of this run
    facts = json.loads((run / "quantize.json").read_text())
    assert facts["profiles"][0]["max_share"] > 0.9 and facts["nmi_across"] == [pytest.approx(0.0, abs=0.1)]


def test_a_code_that_is_not_finite_is_refused_and_the_old_bank_stays(inferred, tmp_path, monkeypatch):
    """As of somebody's own clustering that found fewer clusters than K."""
    class Fewer(quantize.KMeans):
        def fit(self):
            codes, log = super().fit()
            self.codebooks[1][2] = float("nan")
            return codes, log

    run = copy_run(inferred, tmp_path / "run")
    call_stage(quantize, "--run", run, "--quantizer", "kmeans")
    before = (run / "quantize.json").read_bytes()
    monkeypatch.setitem(quantize.QUANTIZERS, "fewer", Fewer)
    with pytest.raises(common.UserError, match="a code vector is not finite .--quantizer fewer."):
        call_stage(quantize, "--run", run, "--quantizer", "fewer")
    assert (run / "quantize.json").read_bytes() == before


def test_a_quantizer_of_one_s_own_that_leaves_no_codebooks_is_one_line(inferred, tmp_path, monkeypatch):
    """As one that sets them under another name."""
    class Unnamed(quantize.KMeans):
        def fit(self):
            codes, log = super().fit()
            self.books, self.codebooks = self.codebooks, None
            return codes, log

    monkeypatch.setitem(quantize.QUANTIZERS, "unnamed", Unnamed)
    with pytest.raises(common.UserError, match="fit.. left no codebooks .--quantizer unnamed."):
        call_stage(quantize, "--run", copy_run(inferred, tmp_path / "run"), "--quantizer", "unnamed")


@pytest.mark.parametrize("flags, reads", [
    (["--quantizer", "kmeans"], False), (["--quantizer", "vq", "--no-llm-loss"], False),
    (["--quantizer", "vq", "--epochs", 0], False), (["--quantizer", "vq"], True),
    (["--quantizer", "em"], True)])
def test_stage_03_says_whether_it_reads_the_llm(flags, reads, inferred, monkeypatch):
    said = []
    monkeypatch.setattr(quantize, "announce", lambda stage, args, what: said.append(what) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call_stage(quantize, "--run", inferred, *flags)
    assert ("the LLM" in said[0]) == reads and "truth.npy" in said[0]


def test_two_collapsed_codebooks_do_not_agree():
    """scikit-learn gives two constants an NMI of 1."""
    codes, truth = np.zeros((9, 2), dtype=int), np.arange(9)[:, None] % 3 * np.ones(2, dtype=int)
    assert quantize.agreement(codes, truth)["nmi_across"] == [0.0]
    assert quantize.agreement(truth, truth)["nmi_across"] == [pytest.approx(1.0)]


def test_paper_sets_defaults_that_a_flag_overrides(monkeypatch):
    monkeypatch.setattr("sys.argv", ["03_quantize.py", "--paper", "--beta", "0.5"])
    args = quantize.parse_arguments()
    assert (args.alpha, args.beta, args.lr, args.batch_users) == (1e-3, 0.5, 1e-3, 128)
    assert (args.start, args.warm_up, args.llm_loss) == ("words", 0, True)  # of the start it says nothing


def test_every_flag_of_stage_03_changes_a_number(inferred, tmp_path):
    def numbers(*args):
        run = copy_run(inferred, tmp_path / "run")
        call_stage(quantize, "--run", run, "--epochs", 2, "--warm-up", 1, "--batch-users", 40,
                   "--no-llm-loss", *args)  # which costs most of the time
        facts = json.loads((run / "quantize.json").read_text())
        return json.dumps([facts[key] for key in ("loss", "profiles", "fingerprint")])

    base = numbers()
    assert base == numbers()
    # The weight of l_vec beside l_llm: alone it changes nothing, for Adagrad divides a gradient by its size.
    with_llm = numbers("--llm-loss")
    assert with_llm != base and numbers("--llm-loss", "--alpha", 3) != with_llm
    for flags in (("--beta", 2), ("--quantizer", "kmeans"), ("--quantizer", "words"),
                  ("--quantizer", "em", "--codes", "2,2"), ("--start", "random"), ("--epochs", 3),
                  ("--warm-up", 2), ("--lr", 0.2), ("--batch-users", 20), ("--paper",),
                  ("--codes", "3,3"), ("--seed", 1)):
        assert numbers(*flags) != base, flags
    em = ("--assign", "likelihood", "--codes", "4,2", "--epochs", 1)
    base = numbers(*em)
    for flags in (("--start", "kmeans"), ("--start", "random"), ("--lr", 0.2), ("--epochs", 2)):
        assert numbers(*em, *flags) != base, flags


def test_likelihood_of_stage_03_is_that_of_stage_02(inferred, lm_folders, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 3, "--task-steps", 1, "--rank", 0)
    facts = json.loads((run / "profiles.json").read_text())
    likelihood, histories, space, _ = problem_of(run).open_likelihood(CPU)
    z, nll, tokens = np.load(run / "profiles.npy"), 0.0, 0
    for block in infer.make_blocks(histories, 16, None, likelihood.prompt_length):
        ids, lengths = infer.pad(histories, block, CPU)
        nll += float(likelihood(space.theta(torch.tensor(z[block])), ids, lengths).sum())
        tokens += int(lengths.sum())
    assert nll / tokens == pytest.approx(facts["train_nll"]["after"], abs=1e-4)
