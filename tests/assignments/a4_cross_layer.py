"""Assignment 4: the cross network of DCN.                                      pytest -m a4 tests/assignments

Wang et al. (2017), Eq. (3): with x_0 the embeddings of all fields of a row, side by side, layer l computes

    x_(l+1) = x_0 (x_l . w_l) + b_l + x_l

where x_l . w_l is one number a row. Each layer raises the degree of the polynomial in x_0 by one, at the
price of 2 n parameters.

Write it for a batch, first as it stands. Then look closer: every x_l is a number times x_0 plus a vector that
is the same for all rows. Find the recursion for that number and that vector and you need a single matrix
product for all layers. The project's own `CrossNetwork` is the plain loop; `FoldedDCN` in
tests/bench/bench_serving.py is built on the recursion. Either way of writing it passes.

The tests compare with an explicit loop over rows and coordinates, check the degree of the polynomial, that
zero layers are the identity, and the gradient.

Then, on paper: why can a DCN with weights of zero not leave this point where a second-order term is all that
matters? (See the note in `FieldEmbedding` on what happens when embeddings start too small.)
"""


def cross(x0, weights, biases):
    """float (B, n) for x0 (B, n), weights (L, n) and biases (L, n) (torch tensors); gradients pass."""
    raise NotImplementedError("a4: apply L cross layers")
