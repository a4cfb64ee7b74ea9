"""An actor-critic over capsules of 2019, on a small pole."""

from heinsen_routing import *

torch.manual_seed(3)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6 * 4)
        self.route = Routing(d_cov=1, d_inp=4, d_out=4, n_inp=6, n_out=2)
        self.value = nn.Linear(8, 1)

    def forward(self, state):
        mu = self.embed(state).tanh().view(-1, 6, 1, 4)
        a, mu, sig2 = self.route(mu.mean((-2, -1)), mu)
        return a + mu.sum((-2, -1)), self.value(mu.flatten(1)).squeeze(-1)


policy = Policy()
optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
state, history = torch.zeros(1, 4) + 0.05, []
for step in range(30):
    logits, value = policy(state)
    action = logits.argmax(1)
    push = action * 2.0 - 1
    x, v, angle, turn = state.unbind(1)
    v, turn = v + 0.02 * push, turn + 0.02 * (math.sin(float(angle)) * 9.8 - 1.5 * push)
    state = torch.stack([x + 0.02 * v, v, angle + 0.02 * turn, turn], 1).detach()
    reward = 1 - state[:, 2].abs()
    history.append((logits.log_softmax(1)[0, action], value, reward))
    if len(history) == 5:
        returns, R = [], torch.zeros(1)
        for _, _, r in reversed(history):
            returns.insert(0, R := r + 0.9 * R)
        loss = sum(-log_p * (R - value.detach()) + (R - value) ** 2 for (log_p, value, _), R in zip(history, returns))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        history = []
result = {"loss": loss.detach(), "state": state, **policy.state_dict()}
