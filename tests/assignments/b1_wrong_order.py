"""Find the planted bug 1: "it trains, so it is right".                         pytest -m b1 tests/assignments

Below is a small, complete prompt with soft tokens and the strict mask of Fig. 4, written in one go and never
tested. The loss falls nicely. Run it to see what a careful colleague saw:

    python tests/assignments/b1_wrong_order.py

    nats per token of the history: 4.81 before, 4.00 after 20 steps
    effect of theta^1 on the last hidden state of theta^2: 0.92   (Fig. 4: must be 0)
    effect of the name of profile 1 on that of theta^1:    0.00   (must not be 0)
    effect of the name of profile 1 on that of theta^2:    0.00   (must be 0)

Nothing here crashes and no shape is wrong. Find the line, say in a sentence why the loss falls all the same,
and mend it. Then look at how stage 02 makes this class of bug impossible: how many lists say in which order
the prompt stands there, and how many here?
"""

import torch


class PromptedLM:
    """Hidden states of a frozen LM on [x^1, theta^1, ..., x^M, theta^M, task, history].

    model: causal LM of transformers. names: M lists of token ids; task: list of token ids.
    """

    def __init__(self, model, names, task):
        self.model, self.names, self.task = model, names, task
        self.words = model.get_input_embeddings()
        self.prompt_length = sum(map(len, names)) + len(names) + len(task)

    def embeddings(self, theta, history_ids):
        """theta (B, M, d), history_ids (B, H) -> (B, S, d)."""
        parts = []
        for m, name in enumerate(self.names):
            parts += [self.words(torch.tensor(name)).expand(len(theta), -1, -1), theta[:, m:m + 1]]
        parts += [self.words(torch.tensor(self.task)).expand(len(theta), -1, -1), self.words(history_ids)]
        return torch.cat(parts, dim=1)

    def visibility(self, history_length):
        """bool (S, S): profiles see their own name and themselves, task and history all before them."""
        owners = [m for m, name in enumerate(self.names) for _ in name]
        owners += list(range(len(self.names)))
        owners += [None] * (len(self.task) + history_length)
        places = range(len(owners))
        return torch.tensor([[column <= row and owners[row] in (None, owners[column]) for column in places]
                             for row in places])

    def hidden(self, theta, history_ids):
        """Last hidden states (B, S, d)."""
        visible = self.visibility(history_ids.shape[1])
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
        positions = torch.arange(len(visible))[None]
        return self.model.base_model(inputs_embeds=self.embeddings(theta, history_ids), attention_mask=mask,
                                     position_ids=positions, use_cache=False).last_hidden_state

    def nll(self, theta, history_ids):
        """Nats of the histories (B,)."""
        states = self.hidden(theta, history_ids)[:, self.prompt_length - 1:-1]
        logits = self.model.get_output_embeddings()(states)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), history_ids, reduction="none").sum(1)


def influence(lm, theta, history):
    """(largest derivative of theta^2's last hidden state with respect to theta^1; change of theta^1's when
    the name of profile 1 changes; and of theta^2's)."""
    theta = theta.detach().requires_grad_()
    first = len(lm.names[0])  # where theta^1 stands
    second = first + 1 + len(lm.names[1])
    states = lm.hidden(theta, history)[0]
    # Note: after LayerNorm a plain sum is constant
    projection = torch.randn(states.shape[1], generator=torch.Generator().manual_seed(1))
    gradient, = torch.autograd.grad(states[second] @ projection, theta)
    renamed = PromptedLM(lm.model, [[token + 10 for token in lm.names[0]], *lm.names[1:]], lm.task)
    renamed.visibility = lm.visibility
    moved = (states - renamed.hidden(theta, history)[0]).abs().amax(1)
    return gradient[0, 0].abs().max().item(), moved[first].item(), moved[second].item()


def show():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=2, n_head=2,
                                       initializer_range=0.2, bos_token_id=None, eos_token_id=None)).eval()
    lm = PromptedLM(model.requires_grad_(False), names=[[1, 2, 3], [4, 5, 6, 7]], task=[8, 9])
    history, theta = torch.randint(10, 60, (1, 12)), torch.zeros(1, 2, 32, requires_grad=True)
    optimizer, path = torch.optim.AdamW([theta], lr=0.1), []
    for _ in range(20):
        loss = lm.nll(theta, history).sum()
        path.append(loss.item() / 12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    leak, heard, overheard = influence(lm, theta, history)
    print(f"nats per token of the history: {path[0]:.2f} before, {path[-1]:.2f} after 20 steps")
    print(f"effect of theta^1 on the last hidden state of theta^2: {leak:.2f}   (Fig. 4: must be 0)")
    print(f"effect of the name of profile 1 on that of theta^1:    {heard:.2f}   (must not be 0)")
    print(f"effect of the name of profile 1 on that of theta^2:    {overheard:.2f}   (must be 0)")


if __name__ == "__main__":
    show()
