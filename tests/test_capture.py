"""What a CUDA graph asks of `act` and `update`, looked at on the CPU, operation by operation: tested without a GPU, too.

A captured function may not read a number back to the host (the GPU would have to be waited for), may not bring one from
there (a replay would bring the old one), and may not make tensors whose sizes depend on values.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agents import make_agent, make_observations

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


# (the script, arguments of its agent, how many draws an update has, and how many acting)
CAPTURED = [
    *((name, {"bf16": bf16}, 1, 0) for name in ("dqn_atari", "sr_dqn_atari") for bf16 in (False, True)),
    *(("rde_dqn_atari", {"num_agents": count, "bf16": bf16}, 1, 1) for count in (1, 3) for bf16 in (False, True)),
    ("rde_dqn_atari", {"num_agents": 3, "selection": "advantage"}, 1, 1),
    *(("rde_dqn", {"num_agents": count, **more}, 1, 1 if count > 1 else 0) for count in (1, 3)
      for more in ({}, {"bf16": True}, {"tau": 0.1, "target_update_interval": 0})),
    ("rde_drq_atari", {}, 5, 1), ("rde_drq_atari", {"num_agents": 1, "num_atoms": 1}, 5, 1),
    ("rde_drq_atari", {"anneal": True}, 5, 1), ("rde_drq_atari", {"augmentation": False, "bf16": True}, 1, 1),
    # Two heads, one head, and without a bonus: dueling DQN. The bonus draws its step.
    *(("rnd_dqn_atari", {"batch_size": 4, "bf16": bf16, **more}, 1 if "intrinsic_coef" in more else 2, 0)
      for bf16 in (False, True) for more in ({}, {"num_heads": 1}, {"intrinsic_coef": 0.0})),
    # SAC's draws noise twice. Acting, too, and to choose an agent if there are several; by advantage also random actions.
    *((name, {"num_agents": count, "bf16": bf16}, 3, 1 + (count > 1)) for name in ("rde_sac_dmc", "rde_sac_safety")
      for count in (1, 3) for bf16 in (False, True)),
    ("rde_sac_dmc", {"num_agents": 3, "selection": "advantage"}, 3, 3),
]  # fmt: skip


@pytest.mark.parametrize("name, arguments, draws_of_update, draws_of_acting", CAPTURED)
def test_update_and_acting_can_be_captured_and_draw_from_their_own_generators(
    name, arguments, draws_of_update, draws_of_acting
):
    agent, selection = make_agent(name, **arguments), torch.Generator().manual_seed(2)
    for _ in range(2):  # the first one sets up the optimizer
        watch = watched(agent.update, agent.buffer.generator)
    assert watch.cannot_be_captured == [] and watch.num_draws == draws_of_update and watch.num_operations > 100
    generators = [selection, torch.Generator()][: 2 if "sac" in name else 1 if "rde" in name else 0]
    counted, observations = {"counted": True} if "rde" in name else {}, make_observations(name, 2)
    watch = watched(lambda: agent.act(observations, *generators, **counted), selection)
    assert watch.cannot_be_captured == [] and watch.num_draws == draws_of_acting and watch.num_operations > 10


def test_what_keeps_the_bonus_up_to_date_can_be_captured():
    agent, observations = make_agent("rnd_dqn_atari", batch_size=4), make_observations("rnd_dqn_atari", 1)
    agent.update()  # sets up the optimizers
    calls = [lambda: agent.rnd.count_frames(observations), agent.prepare]
    calls += [lambda flag=flag: agent.rnd.follow(observations, count_returns=flag) for flag in (True, False)]
    watches = [watched(call, agent.buffer.generator) for call in calls]
    assert [watch.cannot_be_captured for watch in watches] == [[]] * 4
    assert [watch.num_draws for watch in watches] == [0, 2, 0, 0]


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
