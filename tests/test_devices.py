"""The CUDA path where there is no GPU: whole runs of the scripts on a pretended one.

Everything is computed on the CPU, but of every tensor it is known on which device it would be. What mixes devices fails, and so
does what a CUDA graph cannot capture; a captured graph is replayed operation by operation, with the numbers that it captured.
What this cannot show: the numbers and the speed of CUDA's kernels, and CUDA's own opinion. That is for test_cuda.py.
"""

import contextlib
import copy
import functools
import pathlib
import signal

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from agents import shortened
from conftest import ROOT, equal, load_script, model, put_environments, restored_signal_handlers, rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NOT_FROM_CUDA = {"numpy", "__array__"}
# Reads a number back to the host; brings one from there; makes tensors whose sizes depend on values.
CANNOT_BE_CAPTURED = {"_local_scalar_dense", "is_nonzero", "equal", "lift_fresh", "lift_fresh_copy", "lift", "nonzero",
                      "masked_select", "_unique2", "unique_dim", "repeat_interleave", "bincount"}  # fmt: skip
MOVES = {"to": None, "cpu": CPU, "cuda": CUDA}


class WrongDevice(AssertionError):
    """Where a GPU would raise an error, wait, or go on with old numbers."""


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise WrongDevice(otherwise)


def tensors_in(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Storages(dict):
    """Storages, which all views of a tensor share. References that are weak, but keep an address from being used again."""

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return super().__contains__(self.address(tensor))

    def change(self, tensor: torch.Tensor, contained: bool) -> None:
        self.pop(self.address(tensor), None)
        if contained:
            with torch._C.DisableTorchFunction():
                self[self.address(tensor)] = StorageWeakRef(tensor.untyped_storage())

    @staticmethod
    def address(tensor: torch.Tensor) -> int:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata


class Operations(TorchDispatchMode):
    """Every operation, those of backward passes and optimizers among them, between the tensors of host and GPU."""

    def __init__(self):
        super().__init__()
        self.on_gpu, self.under_way = Storages(), Storages()  # under way: on the host, copied to asynchronously
        self.makes_on_gpu = False  # where a tensor is that an operation makes from nothing
        self.graph: Graph | None = None  # that is being captured
        self.graphs: list[Graph] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        inputs = tensors_in((args, kwargs))
        of_gpu, of_host = ([x for x in inputs if (x in self.on_gpu) == on_gpu] for on_gpu in (True, False))
        if self.graph is not None:
            indices = args[1] if name in ("index", "index_put_") else []
            by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
            require(name not in CANNOT_BE_CAPTURED and not by_mask, f"{name} cannot be captured")
            require(not (of_gpu and of_host), f"{name} cannot be captured with a tensor of the host")
        if of_gpu and of_host and name != "copy_":  # CUDA takes a single number from the host as an operand
            numbers = torch.Tag.pointwise in function.tags and all(x.dim() == 0 for x in of_host)
            in_place_on_host = function._schema.is_mutable and inputs[0] not in self.on_gpu
            require(numbers and not in_place_on_host, f"{name} mixes devices")
        require(name == "copy_" or not any(x in self.under_way for x in of_host), f"{name} reads what has not arrived yet")

        result = function(*args, **kwargs)
        before = {Storages.address(x) for x in inputs}
        for x in tensors_in(result):
            if Storages.address(x) not in before:
                self.on_gpu.change(x, bool(of_gpu) if inputs else self.makes_on_gpu)
        if name == "copy_" and of_gpu and of_host:
            self.under_way.change(args[0], args[0] not in self.on_gpu and args[2:] == (True,))
        if self.graph is not None:
            self.graph.operations.append((function, args, kwargs, result))
        return result


class Calls(TorchFunctionMode):
    """Every call of PyTorch: devices that are asked for or given, generators, and what leaves PyTorch."""

    def __init__(self, operations: Operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, function, types, args=(), kwargs=None):
        operations, kwargs = self.operations, dict(kwargs or {})
        on_gpu, captured = operations.on_gpu, operations.graph is not None
        inputs, name = [x in on_gpu for x in tensors_in((args, kwargs))], function.__name__
        if function in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__):
            return inputs[0] == (function == torch.Tensor.is_cuda.__get__)
        if function == torch.Tensor.device.__get__:
            return CUDA if inputs[0] else CPU
        if name in ("device", "_parse_to"):  # torch.device(...), and Module.to, which reads its arguments
            return function(*args, **kwargs)
        if function == torch.Tensor.grad.__set__:
            require(len(set(inputs)) == 1, "a gradient is on another device than its parameter")
        if name in NOT_FROM_CUDA or name == "tolist" and captured:
            require(not inputs[0], f"{name} of a tensor on the GPU")
        require(name != "tolist" or args[0] not in operations.under_way, "tolist reads what has not arrived yet")
        if name == "pin_memory":
            require(not inputs[0] and not captured, "pin_memory is for the host, outside of graphs")
            return args[0].clone()
        kwargs.pop("pin_memory", None)

        # The device that is asked for: the CPU gets the call, and the result is noted as being where it was asked for.
        device = MOVES.get(name) or kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
        if name == "to" and device is None:
            device = next((x for x in args if isinstance(x, str)), None)
        if device is not None:
            wanted = torch.device(device).type == "cuda"
            args = [CPU if isinstance(x, (torch.device, str)) else x for x in args]
            kwargs |= {"device": CPU} if kwargs.get("device") else {}
            from_values = name in ("tensor", "as_tensor", "asarray")
            require(not captured or not from_values or not wanted, f"{name} brings values from the host into a graph")
        operations.makes_on_gpu = wanted if device is not None else any(inputs)
        if (generator := kwargs.get("generator")) is not None:
            require((generator.device.type == "cuda") == operations.makes_on_gpu, f"{name}: generator of another device")
            require(not captured or generator in operations.graph.generators, f"{name}: a generator that no graph knows")

        result = torch.Tensor.clone(*args) if name in ("cpu", "cuda") and inputs != [wanted] else function(*args, **kwargs)
        if device is not None and isinstance(result, torch.Tensor):
            if name in MOVES and inputs[0] != wanted:
                require(not captured, f"{name} leads out of or into a graph")
                result = result.clone() if result is args[0] else result
            on_gpu.change(result, wanted)
            operations.under_way.change(result, inputs == [True] and not wanted and bool(kwargs.get("non_blocking")))
        if name == "__deepcopy__":
            on_gpu.change(result, inputs[0])
        return result


class Graph:
    """In the place of torch.cuda.CUDAGraph. The capture computes, and therefore the first replay does not."""

    def __init__(self, operations: Operations):
        self.operations, self.generators, self.num_replays = [], [], 0
        operations.graphs.append(self)

    def register_generator_state(self, generator) -> None:
        require(generator.device.type == "cuda", "a graph needs generators of the GPU")
        self.generators.append(generator)

    def replay(self) -> None:
        self.num_replays += 1
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
            for function, args, kwargs, outputs in self.operations if self.num_replays > 1 else []:
                for captured, new in zip(tensors_in(outputs), tensors_in(function(*args, **kwargs)), strict=True):
                    if Storages.address(captured) != Storages.address(new):
                        captured.copy_(new)


class Event:
    def __init__(self, operations: Operations):
        self.under_way = operations.under_way

    def record(self) -> None:
        self.waits_for = list(self.under_way)

    def synchronize(self) -> None:
        for address in self.waits_for:
            self.under_way.pop(address, None)


class Stream:
    def __init__(self, captures: bool = False):
        self.is_capturing = lambda: captures

    def wait_stream(self, stream) -> None:
        pass

    def record_event(self) -> Event:
        event = torch.cuda.Event()
        event.record()
        return event


class GeneratorType(type(torch.Generator)):
    def __instancecheck__(cls, value) -> bool:
        return isinstance(value, torch._C.Generator)


class Generator(torch.Generator, metaclass=GeneratorType):
    """A generator of a device that this machine may lack: it draws on the CPU."""

    def __new__(cls, device=CPU):
        return super().__new__(cls, CPU)

    def __init__(self, device=CPU):
        self.pretended = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self.pretended


@contextlib.contextmanager
def pretended_gpu():
    """Yields the mode that looks at the operations."""
    operations, autocast, group = Operations(), torch.autocast, torch._C._group_tensors_by_device_and_dtype

    @contextlib.contextmanager
    def capture(graph):
        operations.graph = graph
        try:
            yield
        finally:
            operations.graph = None

    def autocast_of_cpu(device_type: str, *args, **kwargs):
        require(device_type == "cuda", "autocast for the CPU")
        return autocast("cpu", *args, **kwargs)

    def group_by_pretended_device(tensors, with_indices):
        """PyTorch groups in C++, which sees the CPU. clip_grad_norm_ and optimizers copy to the device that it says."""
        groups = group(tensors, with_indices).items()
        return {(lists[0][0].device, dtype): (lists, indices) for (_, dtype), (lists, indices) in groups}

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "Generator", Generator)
        monkeypatch.setattr(torch, "autocast", autocast_of_cpu)
        monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", group_by_pretended_device)
        # Optimizers, fused and capturable ones too, ask the tensors for their device, and are content with the answer. What
        # they ask beside: whether there is a capture, in which a step that is not capturable is refused.
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: CUDA)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda: Stream(operations.graph is not None))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a pretended GPU")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(operations))
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(operations))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", capture)
        with Calls(operations), operations:
            yield operations


# ------------------------------------------------------------------------------------------------------- whole runs

SMALL = {
    "total_timesteps": 60, "learning_starts": 20, "replay_ratio": 0.5, "batch_size": 4, "buffer_size": 30, "eval_interval": 0,
    "eval_episodes": 1, "checkpoint_interval": 0,
}  # fmt: skip
ATARI = SMALL | {"env_id": "BreakoutNoFrameskip-v4"}
SCRIPTS = {
    "dqn_atari": ATARI | {"exploration_fraction": 0.3},
    "sr_dqn_atari": ATARI | {"exploration_fraction": 0.3},
    "rde_dqn_atari": ATARI | {"exploration_fraction": 0.3},
    "rnd_dqn_atari": ATARI | {"exploration_steps": 20},
    "rde_drq_atari": ATARI | {"exploration_steps": 20, "n_step": 3, "width": 0.25},
    "rde_dqn": SMALL | {"env_id": "CartPole-v1", "max_episode_steps": 24, "hidden_dim": 8, "exploration_fraction": 0.3},
    "rde_sac_dmc": SMALL | {"env_id": "cartpole-swingup", "hidden_dim": 8},
    "rde_sac_safety": SMALL | {"env_id": "SafetyHopperVelocity-v1", "hidden_dim": 8},
}


@pytest.fixture(autouse=True)
def handlers_of_signals():
    with restored_signal_handlers():
        yield


def with_short_episodes(script):
    """The script's environments, whose episodes are cut off after 24 steps."""
    make_env = script.make_env
    if hasattr(script, "AtariGame"):
        return functools.partial(make_env, max_num_frames_per_episode=4 * 24 + 30)
    return lambda *args, **options: shortened(make_env(*args, **options), 24)


def run(script, runs_dir: pathlib.Path, stop_at: int | None = None, **arguments) -> tuple[list, list, dict]:
    """A run by the script's own loop, stopped as by a signal and continued at a step: its games, evaluations and weights."""
    args = script.Args(**SCRIPTS[script.__name__] | arguments, runs_dir=str(runs_dir))
    count_step, runs = script.Run.count_step, []

    def count_step_and_stop(run) -> None:
        count_step(run)
        runs.append(run)
        if run.global_step == stop_at:
            run.stopped_by = signal.SIGTERM

    with pytest.MonkeyPatch.context() as monkeypatch:
        put_environments(monkeypatch, script, with_short_episodes(script))
        if hasattr(script, "random_observations"):  # of which plasticity needs not so many here
            few = lambda env_id, real=script.random_observations.__wrapped__: real(env_id, 8)
            monkeypatch.setattr(script, "random_observations", functools.cache(few))
        monkeypatch.setattr(script.Run, "count_step", count_step_and_stop)
        if stop_at is None:
            script.train(args)
        else:
            with pytest.raises(SystemExit):
                script.train(args)
            runs[-1].lock.close()
            script.train(args)
        runs[-1].lock.close()
    path = pathlib.Path(runs[-1].path)
    return rows(path, "episodes.csv"), rows(path, "evaluations.csv"), model(path)


def assert_equal(ours, theirs) -> None:
    assert ours[:2] == theirs[:2] and min(map(len, ours[:2])) > 0
    assert equal(ours[2], theirs[2])


# With resets at gradient steps 10, of an agent of several, and 15.
RUNS = {
    "dqn bf16": ("dqn_atari", {"replay_ratio": 0.29, "bf16": True}),
    "sr": ("sr_dqn_atari", {"reset_interval": 10, "reset_depth": "last2"}),
    "rde of 3, full": ("rde_dqn_atari", {"reset_interval": 30, "reset_depth": "full", "num_agents": 3, "num_envs": 2}),
    "rde bf16, by advantage": ("rde_dqn_atari", {"reset_interval": 20, "bf16": True, "selection": "advantage"}),
    "rnd": ("rnd_dqn_atari", {"num_envs": 2}),
    "rnd with one head, bf16": ("rnd_dqn_atari", {"num_heads": 1, "bf16": True}),
    "rnd without a bonus": ("rnd_dqn_atari", {"intrinsic_coef": 0.0}),
    "drq by advantage": ("rde_drq_atari", {"reset_interval": 20, "selection": "advantage", "augmentation": False}),
    "drq annealed, of numbers": ("rde_drq_atari", {"reset_interval": 20, "anneal": True, "num_atoms": 1, "bf16": True}),
    "rde with mlps": ("rde_dqn", {"reset_interval": 20, "target_update_interval": 7}),
    "rde with mlps, rmsprop": ("rde_dqn", {"optimizer": "rmsprop", "tau": 0.01, "target_update_interval": 0, "bf16": True}),
    "rde with mlps of 1": ("rde_dqn", {"reset_interval": 10, "num_agents": 1}),
    "rde with mlps, by advantage": ("rde_dqn", {"reset_interval": 20, "selection": "advantage"}),
    "sac safety bf16": ("rde_sac_safety", {"reset_interval": 20, "bf16": True}),
    "sac safety by advantage": ("rde_sac_safety", {"reset_interval": 20, "selection": "advantage", "critic_norm": "layer"}),
    "sac of 1": ("rde_sac_dmc", {"num_agents": 1, "reset_interval": 10}),
    "sac with norms": ("rde_sac_dmc", {"reset_interval": 20, "num_envs": 2, "critic_norm": "layer"}),
    "sac by advantage": ("rde_sac_dmc", {"reset_interval": 20, "num_envs": 2, "selection": "advantage"}),
    "sac bf16": ("rde_sac_dmc", {"reset_interval": 20, "bf16": True}),
    "sac not captured": ("rde_sac_dmc", {"reset_interval": 20, "cuda_graphs": False}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_gpu_is_that_on_the_cpu(tmp_path, name):
    """And one that was stopped in between."""
    script, arguments = load_script(RUNS[name][0]), RUNS[name][1]
    on_cpu = run(script, tmp_path / "cpu", **arguments)
    with pretended_gpu() as gpu:
        on_gpu = run(script, tmp_path / "gpu", stop_at=44, **arguments)
    assert_equal(on_gpu, on_cpu)
    replays = [graph.num_replays for graph in gpu.graphs]
    assert bool(replays) == arguments.get("cuda_graphs", True) and all(number > 1 for number in replays)


# ------------------------------------------------------------------------------------- what has to be noticed is noticed


def mutant(tmp_path: pathlib.Path, name: str, old: str, new: str):
    """A copy of the script with a change, as a module."""
    text, path = (ROOT / f"{name}.py").read_text(), tmp_path / f"{name}.py"
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    script = load_script(name, path)
    script.__name__ = name
    return script


OLD_NUMBERS = {
    "observations in a new tensor": ("upload(observations, device_observations)",
                                     "device_observations = torch.from_numpy(observations).to(run.device)"),
    "the judge in a new tensor": ("self.oldest.fill_(min(", "self.oldest = torch.empty_like(self.oldest).fill_(min("),
    "the buffer's size as a number of Python's": ("(draws * self.size).long()",
                                                  "(draws * min(self.num_added, self.capacity)).long()"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", OLD_NUMBERS)
def test_a_graph_that_goes_on_with_old_numbers_is_noticed(tmp_path, mistake):
    script = mutant(tmp_path, "rde_sac_dmc", *OLD_NUMBERS[mistake])
    on_cpu = run(script, tmp_path / "cpu", reset_interval=20)
    with pretended_gpu():
        captured = run(script, tmp_path / "captured", reset_interval=20)
    with pytest.raises(AssertionError):
        assert_equal(captured, on_cpu)


ONES, GENERATOR = np.ones(3, np.float32), Generator(CUDA)


def step_of_adam(x: torch.Tensor, **options) -> None:
    parameter = torch.nn.Parameter(x.clone())
    parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam([parameter], fused=True, **options).step()


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + torch.ones(3), lambda x: torch.ones(3) + x, lambda x: x.add_(torch.ones(3)),
        lambda x: torch.ones(()).add_(x[0]), lambda x: x[torch.tensor([0])], lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: torch.stack([x, torch.ones(3)]), lambda x: torch._foreach_add_([x], [torch.ones(3)]),
        lambda x: x.__setitem__(torch.tensor([0], device=CUDA), torch.ones(1)), lambda x: x @ torch.ones(3),
        lambda x: torch.where(x > 0, x, torch.ones(3)), lambda x: x[:2].view(2, 1) * torch.ones(2),
        lambda x: x.numpy(), lambda x: np.asarray(x), lambda x: x.pin_memory(), lambda x: x.detach().requires_grad_().numpy(),
        lambda x: x.normal_(generator=torch.Generator()), lambda x: torch.rand(3, generator=torch.Generator(CUDA)),
        lambda x: torch.rand(3, device=CUDA, generator=torch.Generator()), lambda x: torch.nn.Linear(3, 1)(x),
        lambda x: setattr(torch.ones(3), "grad", x),
        lambda x: torch.ones(3).copy_(x, non_blocking=True).numpy(), lambda x: torch.ones(3).copy_(x, non_blocking=True) + 1,
        lambda x: x.to("cpu", non_blocking=True).numpy(), lambda x: x.to("cpu", non_blocking=True) + 1,
        lambda x: torch.autocast("cpu", torch.bfloat16),
    ],
)  # fmt: skip
def test_what_mixes_devices_is_noticed(operation):
    with pretended_gpu(), pytest.raises(WrongDevice):
        operation(torch.ones(3, device=CUDA))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: bool(x[0] > 0), lambda x: x.tolist(), lambda x: x.cpu(),
        lambda x: x.to("cpu"), lambda x: x.to(CPU), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x * torch.ones(()),
        lambda x: x.copy_(torch.from_numpy(ONES)), lambda x: torch.from_numpy(ONES).to(x.device),
        lambda x: x * torch.tensor(2.0), lambda x: torch.tensor(2.0, device=CUDA),
        lambda x: torch.as_tensor(ONES, device=CUDA), lambda x: x.new_tensor([1.0]),
        lambda x: torch.ones(3).cuda(), lambda x: torch.ones(3).copy_(x), lambda x: x[[0, 1]],
        lambda x: x.normal_(generator=GENERATOR), lambda x: torch.ones(3).pin_memory(), step_of_adam,
    ],
)  # fmt: skip
def test_what_cannot_be_captured_is_noticed(operation):
    refused = (WrongDevice, RuntimeError) if operation is step_of_adam else WrongDevice  # by PyTorch, as not capturable
    with pretended_gpu(), pytest.raises(refused), torch.cuda.graph(torch.cuda.CUDAGraph()):
        operation(torch.ones(3, device=CUDA))


def test_what_is_right_is_let_through():
    """And is where it would be."""
    with pretended_gpu():
        x, host = torch.ones(3, device="cuda"), torch.ones(3)
        assert isinstance(torch.default_generator, torch.Generator)
        network = torch.nn.Linear(3, 1).to(CUDA)
        network(x).sum().backward()
        layers = copy.deepcopy(network)
        on_gpu = [
            x[1:], x.view(3, 1), x.double(), x + 1, x * host[0], host.to(x.device), host.cuda(), host.to("cuda", torch.float64),
            torch.where(x > 0, x * 2, 0.0), torch.rand(3, device=CUDA, generator=torch.Generator(CUDA)),
            torch.empty_like(x), torch.zeros(2, device=x.device), host.new_zeros(3, device=CUDA), x.detach(), x.to(CUDA),
            *network.parameters(), *layers.parameters(), *(p.grad for p in network.parameters()), copy.deepcopy(x),
        ]  # fmt: skip
        on_host = [
            host, host + 1, x.cpu(), x.to("cpu"), x.cpu()[1:], torch.empty_like(x, device="cpu", pin_memory=True),
            host.clone().copy_(x), torch.zeros(2), torch.from_numpy(ONES), host.pin_memory(),
            *copy.deepcopy(network).cpu().parameters(),
        ]  # fmt: skip
        for tensors, is_cuda, device in ((on_gpu, True, CUDA), (on_host, False, CPU)):
            assert [(x.is_cuda, x.is_cpu, x.device) for x in tensors] == [(is_cuda, not is_cuda, device)] * len(tensors)

        copies = [torch.ones(3).copy_(x, non_blocking=True), x.to("cpu", non_blocking=True)]
        torch.cuda.current_stream().record_event().synchronize()
        assert all(copied.numpy().tolist() == x.tolist() == [1, 1, 1] for copied in copies) and x.sum().item() == 3


def test_a_graph_is_replayed_with_new_numbers():
    with pretended_gpu():
        generator, graph = torch.Generator("cuda").manual_seed(1), torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        x, factor, total = torch.ones(2, device=CUDA), 2, torch.zeros(2, device=CUDA)
        with torch.cuda.graph(graph):
            draws = torch.rand(2, device=CUDA, generator=generator)
            y = torch.where(x > 0, x * factor, 0.0) + torch.arange(2, device=CUDA)
            total[1:] += y[1:]
        seen = []
        for factor in (3, 4):  # a number of Python's, which the graph does not look at again
            graph.replay()
            seen.append((y.tolist(), total.tolist(), draws.tolist()))
            x += 1
        again = torch.Generator("cuda").manual_seed(1)
        expected = [torch.rand(2, device=CUDA, generator=again).tolist() for _ in range(2)]
        assert seen == [([2, 3], [0, 3], expected[0]), ([4, 5], [0, 8], expected[1])]
