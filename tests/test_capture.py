"""What a CUDA graph asks of `act` and `update`, looked at on the CPU, operation by operation: tested without a GPU, too.

A captured function may not read a number back to the host (the GPU would have to be waited for), may not bring one from
there (a replay would bring the old one), and may not make tensors whose sizes depend on values.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agents import OBSERVATION_DIM, dqn_agent, sac_agent
from conftest import load_script

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


AGENTS = [(name, {}) for name in ("dqn_atari", "sr_dqn_atari")] + [("rde_dqn_atari", {"num_agents": n}) for n in (1, 3)]
AGENTS += [("rde_sac_dmc", {"num_agents": n}) for n in (1, 3)]
BY_ADVANTAGE = [(name, {"num_agents": 3, "selection": "advantage"}) for name in ("rde_dqn_atari", "rde_sac_dmc")]


def make_agent(name: str, **arguments):
    if name == "rde_sac_dmc":
        return sac_agent(load_script(name), stored=50, hidden_dim=8, batch_size=4, **arguments)
    return dqn_agent(load_script(name), size=100, stored=50, batch_size=4, **arguments)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name, arguments", AGENTS)
def test_update_can_be_captured_and_draws_from_its_own_generator(name, arguments, bf16):
    agent = make_agent(name, bf16=bf16, **arguments)
    for _ in range(2):  # the first one sets up the optimizer
        watch = watched(agent.update, agent.buffer.generator)
    assert watch.cannot_be_captured == []
    assert watch.num_draws == (3 if name == "rde_sac_dmc" else 1)
    assert watch.num_operations > 100


@pytest.mark.parametrize("name, arguments", AGENTS + BY_ADVANTAGE)
def test_acting_can_be_captured_and_draws_from_its_own_generator(name, arguments):
    agent, selection = make_agent(name, **arguments), torch.Generator().manual_seed(2)
    observations = torch.ones(2, OBSERVATION_DIM) if name == "rde_sac_dmc" else torch.zeros(2, 4, 84, 84, dtype=torch.uint8)
    # One agent of DQN is greedy, and draws nothing. SAC's draws its noise, and nothing to choose an agent with; by advantage
    # several also draw random actions.
    by_advantage = arguments.get("selection") == "advantage"
    num_draws = {"rde_dqn_atari": 1, "rde_sac_dmc": 1 + (arguments.get("num_agents") == 3) + by_advantage}.get(name, 0)
    generators = {"rde_dqn_atari": [selection], "rde_sac_dmc": [selection, torch.Generator()]}.get(name, [])
    watch = watched(lambda: agent.act(observations, *generators), selection)
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
