"""The teacher's solutions: the project's own classes behind the assignments' interfaces."""

import functools
import importlib
from types import SimpleNamespace

import numpy as np
import torch
from assignments import a8_gauc, b1_wrong_order, b2_leak, b3_random_control
from conftest import load_script

common, infer, quantize, ctr = (importlib.import_module(name) for name in (
    "common", "02_infer_profiles", "03_quantize", "04_train_ctr"))
controls = load_script("controls")


def history_nll(hidden, weight, prompt_length, history_ids, lengths):
    states = hidden[:, prompt_length - 1:-1]
    real = torch.arange(history_ids.shape[1]) < lengths[:, None]
    nll = infer.TokenNLL.apply(states[real], weight, None, history_ids[real], 4)
    return torch.zeros(len(hidden)).index_add(0, real.nonzero()[:, 0], nll)


def quantize_one(theta, codebook):
    quantizer = quantize.VectorQuantizer(codebook)
    quantizer.__dict__["_parameters"]["codebook"] = codebook  # the test's own leaf: it wants the gradients
    quantized, codebook_term, commitment = quantizer(theta)
    return quantized, quantize.nearest(theta, quantizer.codebook), codebook_term, commitment


def cross(x0, weights, biases):
    network = common.CrossNetwork(x0.shape[1], len(weights))
    # By their names, so that gradients reach the test's own tensors.
    return torch.func.functional_call(network, {"weight": weights, "bias": biases}, x0)


def feature_bank(theta, books, known):
    codes = quantize.assign_all(torch.from_numpy(theta), [torch.from_numpy(book) for book in books])
    return quantize.bank_of(codes, known, [len(book) for book in books])


class FM(ctr.Recommender):
    def forward(self, ids):
        return self.first_order(ids) + ctr.factorization(self.embed(ids))


class PrefixSums(FM):
    """Each field with the sum of the fields before it: linear as well."""

    def forward(self, ids):
        e = self.embed(ids)
        before = e.cumsum(1) - e
        return self.first_order(ids) + (before * e).sum((1, 2))


class PromptedLM(b1_wrong_order.PromptedLM):
    def visibility(self, history_length):
        segments = []
        for m, name in enumerate(self.names):
            segments += [infer.Segment("name", name, m), infer.Segment("theta", [0], m)]
        segments += [infer.Segment("task", self.task), infer.Segment("history", [0] * history_length)]
        return infer.build_visibility(segments, "strict")


def profile_codes(interactions):
    train = interactions[interactions[:, 3] == common.TRAIN]
    everybody = np.unique(interactions[:, 0])
    assert np.array_equal(np.unique(train[:, 0]), everybody)  # else somebody would get no code
    return b2_leak.profile_codes(train)


def make_bank(dataset):
    """Two of tools/controls.py's banks side by side: the share of likes, and clusters of liked attributes."""
    sizes = [profile["codes"] for profile in dataset.profiles]
    problem, device = SimpleNamespace(dataset=dataset), torch.device("cpu")
    columns = [column for control in (controls.generosity, controls.metadata)
               for column in control(problem, sizes, device, 0)]
    return np.stack([codes for codes, _ in columns], axis=1), [int(size) for _, size in columns]


def write_bank(run, name):
    dataset = common.load_dataset(run)
    codes, sizes = make_bank(dataset)
    common.save_npy(run / f"feature_bank_{name}.npy", codes.astype(np.int16))
    common.save_json(run / f"feature_bank_{name}.json", {
        "codes": sizes, "dataset_fingerprint": dataset.fingerprint(), "made_by": "assignment 7"})


def prior_of_words(vectors, counts, rank):
    origin, basis = infer.gaussian_of(vectors, infer.word_weights(counts), rank)
    space = infer.Space(origin[None], basis[None], origin[None], None, [], [vectors])
    return origin, basis, space.word_z(0)


def gradient_in_z(gradient, basis, z, prior):
    """By autograd through the project's own Space."""
    origin = torch.zeros_like(basis[:1])
    space = infer.Space(origin, basis[None], origin, None, [], [])
    z = z[:, None].detach().requires_grad_()
    loss = (space.theta(z) * gradient[:, None]).sum() + prior / 2 * (z ** 2).sum()
    return torch.autograd.grad(loss, z)[0][:, 0]


def random_codes(codes, sizes, rng):
    return ctr.codes_of("random", {"userip": (codes, sizes)}, rng)[0]


# Answers to what the tasks ask on paper, in short.
# a1: under --mask causal x^2 and theta^2 see x^1 and theta^1. theta^1 then reaches theta^2, also through
#     x^2: profiles depend on each other and on their order. The grid of one profile stays green, for there
#     both masks are one, and so would the history's part of the Jacobian test; all else fails.
# a3: Adam divides a gradient by its size, so a weight before all of a parameter's gradient changes nothing:
#     the codebook, which the codebook term alone moves, goes .001 a step in each coordinate, whatever alpha
#     is. Weights count where gradients meet. In z they do: the commitment has alpha beta = 1e-6 beside
#     l_llm's 1 and is not felt, nor is the recommender with alpha = 1e-3. Codes follow users by .001 a step.
# a4: the head's gradient is the mean of (residual x_L), the cross weights' that of (residual (h . x_0) x_0),
#     with h the head's weights. At h = 0, w = 0 the second is 0, and the first is 0 where no first-order
#     term tells anything: a saddle. Small embeddings make both small by powers of their size.
# a8: none that orders items for a user: within a user these ids change nothing. Decisions between users do
#     get better, such as to whom a coupon or a banner is shown at all.
# a9: rank 1 leaves one direction for four hobbies: a user is a place on a line, and hobbies whose words
#     project to the same place are one. A word that stands twice has twice the weight (2 root(c), where one
#     word of count 2 c would have root(2 c)): the mean moves towards it, and other words count less.
a1 = SimpleNamespace(build_visibility=functools.partial(infer.build_visibility, mask="strict"))
a2 = SimpleNamespace(history_nll=history_nll)
a3 = SimpleNamespace(quantize=quantize_one)
a4 = SimpleNamespace(cross=cross)
a5 = SimpleNamespace(feature_bank=feature_bank, perplexity=quantize.perplexity)
a6 = SimpleNamespace(FM=FM)
also_right = {"a6": {"prefix sums": SimpleNamespace(FM=PrefixSums)}}  # other solutions that must pass
a7 = SimpleNamespace(make_bank=make_bank, write_bank=write_bank)
a8 = SimpleNamespace(gauc=common.gauc, make_world=a8_gauc.make_world,
                     ANSWER={"AUC prefers": "A", "GAUC prefers": "B", "GAUC of A": 0.5})
a9 = SimpleNamespace(prior_of_words=prior_of_words, gradient_in_z=gradient_in_z)
b1 = SimpleNamespace(PromptedLM=PromptedLM, influence=b1_wrong_order.influence)
b2 = SimpleNamespace(**{**vars(b2_leak), "profile_codes": profile_codes})
b3 = SimpleNamespace(**{**vars(b3_random_control), "random_codes": random_codes})
