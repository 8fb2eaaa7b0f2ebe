"""Assignment 3: a quantizer that lets gradients through, Eq. (5).              pytest -m a3 tests/assignments

A codebook holds K vectors v_k. A soft token theta is replaced by the nearest of them, v_c. Replacing is a
step function: its derivative is zero almost everywhere, and the recommender behind it would teach theta
nothing. Van den Oord et al. (2017) copy the gradient of the output onto the input as if the quantizer were
the identity. With sg[.] the stop-gradient (`.detach()`), write

    quantized      value v_c, gradient of the identity with respect to theta
    codebook term  ||sg[theta] - v_c||^2    moves the code towards its users, and nothing else
    commitment     ||theta - sg[v_c]||^2    moves the user towards his code, and nothing else

Norms are sums over d, one number for each row of theta.

The tests look at values (codes against brute force) and then at gradients, term by term: what reaches theta,
what reaches the codebook, and what must not. A loss on `quantized` must leave the codebook alone: the
recommender speaks to theta, theta speaks to the codebook.

Then, on paper: with beta = .001, one learning rate for all (the paper's section 3.4) and alpha = .001, too,
of which it says nothing, how far does each term move things under Adam, whose step does not depend on the
size of a gradient? (Stage 03 moves z by Adagrad, DEVIATION(7), whose first step does not depend on it,
either.)
Then look: `cp -r runs/demo runs/try`, `python 03_quantize.py --paper --run runs/try`.
"""


def quantize(theta, codebook):
    """(quantized (B, d), codes (B,), codebook term (B,), commitment (B,)). theta (B, d), codebook (K, d).

    All are torch tensors, the codes of long, the others of float.
    """
    raise NotImplementedError("a3: find the nearest code, then think about what each .detach() cuts off")
