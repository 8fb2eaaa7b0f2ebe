"""Assignment 1: who may look at whom.                                          pytest -m a1 tests/assignments

The prompt of a user is a list of segments, in this order:

    [begin]  name of profile 1, theta^1, name of profile 2, theta^2, ...  task  history

The paper draws the attention mask in Fig. 4 (there column j attends to row i) and says that the latent
profiles are independent of each other. Read section 2.3 (where it lets theta attend to "interactions", read:
the interactions attend to theta, for they come later) and decide for every pair of tokens whether the one in
row i may attend to that in column j:

  * nobody sees a token to the right; everybody sees himself;
  * the begin token (some LLMs have one) says nothing about a profile: everybody to its right may see it;
  * theta^m sees its own name x^m, and no other profile's name or theta;
  * and the name x^m? Suppose the name of profile 2 could see theta^1. Which path leads from theta^1 to
    theta^2, layer by layer? Close it. Names do not see each other's names either: though that would tell
    nothing of a user, profile 2 would then know that it comes second, and their order must not matter;
  * task and history come after all profiles and have to be explained by all of them.

The tests compare grids for prompts of several shapes, and then put your mask into a real transformer: the
Jacobian of one profile's last hidden state with respect to the other's theta must be exactly zero, while the
history must feel both.

Then, on paper: what would `--mask causal` (a plain lower triangle) change? Which tests would still pass?
"""

def build_visibility(segments):
    """bool (S, S), True where row i may attend to column j.

    segments: list with .kind ("begin", "name", "theta", "task" or "history"), .ids (list of its token ids; S
    is their total number) and .profile (0 .. M - 1 for name and theta, else None).
    """
    size = sum(len(segment.ids) for segment in segments)
    raise NotImplementedError(f"a1: return a bool tensor of {size} x {size}")
