"""Assignment 2: the likelihood of a history, Eq. (4).                          pytest -m a2 tests/assignments

The LLM has read the prompt (P tokens) and a user's history (H tokens). Its last hidden states are (B, P + H,
d), one row a user. A hidden state times the output layer's weight (V, d) gives the logits of the token that
comes NEXT. Write the negative log-likelihood of each user's history,

    l_llm(u) = - sum_t log P(y_t | prompt, y_1 ... y_(t-1)),

in nats, one number a user. Four things go wrong in practice, and a test watches each:

  * off by one: which hidden state predicts the first history token? Which predicts nothing of interest?
  * padding: user u has lengths[u] tokens; what stands to their right is filler and must not count, whatever
    it holds, neither in the loss nor in its gradient. It may even be NaN, and 0 x NaN is NaN: it does not
    help to blank out a loss that was computed from filler;
  * sums, not averages: log P of a text is a sum over its tokens. Against a prior (02 --prior) 30 titles must
    weigh more than 3, and stage 03 adds this loss to others;
  * overflow: exp of a logit of 1,000 is infinity, its log-likelihood is not.

The vocabulary projection is nearly a third of the work of a GPT-2. Count: how many of the (P + H) B rows do
you need to project? Stage 02's `TokenNLL` goes one step further and never holds all of their logits at once;
read it after you have passed.
"""


def history_nll(hidden, weight, prompt_length, history_ids, lengths):
    """float (B,): nats of each user's history.

    All are torch tensors. hidden: float (B, P + H, d); weight: float (V, d); prompt_length: P; history_ids:
    long (B, H), right-padded; lengths: long (B,).
    """
    raise NotImplementedError("a2: return one number a user")
