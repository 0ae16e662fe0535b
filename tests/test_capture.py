"""What a CUDA graph asks of `act` and `update`, looked at on the CPU, operation by operation: so it is tested without a GPU, too.

A captured function may not read a number back to the host (the GPU would have to be waited for), may not bring one from
there (a replay would bring the old one), and may not make tensors whose sizes depend on values.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ATARI_SCRIPTS, load_script

CPU = torch.device("cpu")
READS_BACK = {"_local_scalar_dense", "is_nonzero", "equal"}
COMES_FROM_THE_HOST = {"lift_fresh", "lift_fresh_copy", "lift"}
SIZE_DEPENDS_ON_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave", "bincount"}


class Watch(TorchDispatchMode):
    """Counts the operations, and notes those that cannot be captured and how often numbers are drawn."""

    def __init__(self):
        super().__init__()
        self.num_operations, self.num_draws, self.cannot_be_captured = 0, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        indices = args[1] if name in ("index", "index_put_") else []
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in READS_BACK | COMES_FROM_THE_HOST | SIZE_DEPENDS_ON_VALUES or by_mask:
            self.cannot_be_captured.append(name)
        if torch.Tag.nondeterministic_seeded in function.tags:
            self.num_draws += 1
        self.num_operations += 1
        return function(*args, **kwargs)


def watched(function, generator: torch.Generator | None = None) -> Watch:
    """Also looks that numbers are drawn from the generator, if there is one, and never from PyTorch's global one."""
    own_state, global_state = generator and generator.get_state(), torch.get_rng_state()
    with Watch() as watch:
        function()
    assert torch.equal(torch.get_rng_state(), global_state)
    assert generator is None or torch.equal(generator.get_state(), own_state) == (watch.num_draws == 0)
    return watch


def atari_agent(name: str, **arguments):
    script = load_script(name)
    generator = torch.Generator().manual_seed(1)
    buffer = script.ReplayBuffer(100, 1, CPU, generator)
    rng = np.random.default_rng(1)
    buffer.start_episode(0, rng.integers(0, 256, (84, 84), dtype=np.uint8))
    for _ in range(50):
        buffer.add(0, int(rng.integers(6)), 1.0, rng.integers(0, 256, (84, 84), dtype=np.uint8), False)
    return script.Agent(script.Args(buffer_size=100, batch_size=4, **arguments), 6, buffer, CPU), generator


def sac_agent(num_agents: int, **arguments):
    script = load_script("rde_sac_dmc")
    generator = torch.Generator().manual_seed(1)
    buffer = script.ReplayBuffer(100, 5, 2, CPU, generator)
    for _ in range(50):
        buffer.add(np.ones(5), np.zeros(2), 1.0, False, np.ones(5))
    args = script.Args(num_agents=num_agents, hidden_dim=8, batch_size=4, **arguments)
    return script.Agent(args, 5, 2, buffer, CPU), generator


AGENTS = [(atari_agent, name, {}) for name in ATARI_SCRIPTS]
AGENTS += [(atari_agent, "rde_dqn_atari", {"num_agents": 3}), (sac_agent, 1, {}), (sac_agent, 3, {})]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("make, what, arguments", AGENTS)
def test_update_can_be_captured_and_draws_from_its_own_generator(make, what, arguments, bf16):
    agent, generator = make(what, bf16=bf16, **arguments)
    for _ in range(2):  # the first one sets up the optimizer
        watch = watched(agent.update, generator)
    assert watch.cannot_be_captured == []
    assert watch.num_draws == (3 if make is sac_agent else 1)
    assert watch.num_operations > 100


@pytest.mark.parametrize("make, what, arguments", AGENTS)
def test_acting_can_be_captured_and_draws_from_its_own_generator(make, what, arguments):
    agent, _ = make(what, **arguments)
    selection = torch.Generator().manual_seed(2)
    observations = torch.ones(2, 5) if make is sac_agent else torch.zeros(2, 4, 84, 84, dtype=torch.uint8)
    # One agent of DQN is greedy, and draws nothing. SAC's draws its noise, and nothing to choose an agent with.
    num_draws = {"dqn_atari": 0, "sr_dqn_atari": 0, "rde_dqn_atari": 1, 1: 1, 3: 2}[what]
    watch = watched(lambda: agent.act(observations, *[selection] * bool(num_draws)), selection)
    assert watch.cannot_be_captured == []
    assert watch.num_draws == num_draws
    assert watch.num_operations > 10


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: bool(x[0] > 0), lambda x: x[x > 0], lambda x: x.nonzero(),
        lambda x: x * torch.tensor(2.0), lambda x: x + torch.from_numpy(np.ones(3)).clone()[torch.tensor([0, 1, 2])],
        lambda x: x.masked_select(x > 0), lambda x: x.__setitem__(x > 1, torch.zeros(1)),
    ],
)  # fmt: skip
def test_the_watch_notices(operation):
    assert watched(lambda: operation(torch.arange(3.0))).cannot_be_captured
