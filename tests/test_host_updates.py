"""Updates on the host: the very bits of updates on the device, beside the compute that follows."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from commands import command
from half import HALF, options_of
from planned import Chain, model_of, plan_of
from stepping import batches, on_every_rank
from test_memory_run import measured, uncounted_bytes, without_batch
from torch import Tensor, nn
from training import EXAMPLES, even_plan, example, train_by_plan

from planner.cli.plan import main as lga_plan
from planner.errors import DeadlineError, UsageError
from planner.model_file import ModelFile
from planner.plan.types import Plan, PlanOptions
from planner.simulate.memory import worst_moments
from runtime.build import make_executor
from runtime.executor import Executor
from runtime.host_updates import HostUpdates
from runtime.local import LocalTransport, run_local

NUM_STEPS = 3
CLUSTER = """
hosts:
  - count: 1
    device:
      name: processor
      memory_bytes: 16e9
      reserved_bytes: 0
      peak_flops: {float32: 1e11}
      memory_bandwidth: 1e10
    link: loopback
network: loopback
backend: gloo
"""
MLP = str(EXAMPLES / "mlp.py")


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.1))


MODEL = replace(
    model_of(lambda: Chain(block)),
    build_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    build_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
)


class Tied(nn.Module):
    """The last layer's weight is the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.last(self.middle(self.first(x).relu()).relu()).relu())
        return output


PLAIN = PlanOptions(deadline_seconds=20)
OPTIONS = {
    "plain": PLAIN,
    "clip": replace(PLAIN, clip_norm=1e-2),
    "delayed clip": replace(PLAIN, clip_norm=1e-2, clip_delayed=True),
    "finite, clip and save": replace(PLAIN, check_finite=True, clip_norm=1e-2, save=True),
    **{precision.value: options_of(precision, save=True) for precision in HALF},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one stage": {"boundaries": (0, 9)},
    "stages": {"boundaries": (0, 2, 4, 6, 9)},
    "one micro-batch": {"boundaries": (0, 2, 5, 9), "num_micro_batches": 1, "recompute": True},
    "two ranks": {"boundaries": (0, 2, 4, 6, 9), "num_pipeline_ranks": 2},
    "two replicas, 0": {"boundaries": (0, 2, 5, 9), "num_replicas": 2, "partition": 0},
    "two replicas, 3": {"boundaries": (0, 2, 5, 9), "num_replicas": 2, "partition": 3},
    "two by two": {"boundaries": (0, 2, 4, 6, 9), "num_replicas": 2, "num_pipeline_ranks": 2},
}


def on_host(made: Plan) -> bool:
    return all(
        i.stream == "host" for p in made.programs for i in p if i.opcode.value == "UPDATE"
    )  # fmt: skip


def plan(layout: dict[str, Any], options: PlanOptions, model_file: ModelFile = MODEL) -> Plan:
    return plan_of(model_file, offload_state=True, options=options, **layout)


def pair(
    layout: dict[str, Any], options: PlanOptions = PLAIN, model_file: ModelFile = MODEL
) -> tuple[Plan, Plan]:
    """Updates on the device, and on the host."""
    found = tuple(
        plan(layout, replace(options, update_on_host=there), model_file) for there in (False, True)
    )
    assert [on_host(made) for made in found] == [False, True]
    return found[0], found[1]


def trained(made: Plan, model_file: ModelFile = MODEL) -> list[dict[str, Tensor]]:
    """Of each rank: losses, norms, weights, and what its optimizers keep."""
    given = [batches(made, model_file, step) for step in range(NUM_STEPS)]

    def run(executor: Executor) -> dict[str, Tensor]:
        results = [executor.step(given[step][executor.replica]) for step in range(NUM_STEPS)]
        found = {f"weight {name}": value for name, value in executor.state_dict().items()}
        for index, result in enumerate(results):
            norm = result.gradient_norm or 0.0
            found[f"norm {index}"] = torch.tensor([norm, *map(float, result.losses)])
        rank = executor._rank
        for unit in rank.optimizers:
            for name, slots in rank.host.values(f"host:moments:{unit}").items():
                found |= {f"{slot} {name}": torch.as_tensor(v) for slot, v in slots.items()}
        if made.options.save:
            shards = executor.checkpoint().shards
            found |= {f"saved {name}": value for name, value in shards.items()}
        return {name: value.clone() for name, value in found.items()}

    return on_every_rank(made, model_file, run)


def assert_equal(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        assert len(mine) > 3
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_on_the_host_leave_the_bits_of_those_on_the_device(
    layout: str, options: str
) -> None:
    device, host = pair(LAYOUTS[layout], OPTIONS[options])
    assert_equal(trained(device), trained(host))


@pytest.mark.parametrize("ranks", [1, 2])
def test_tied_weights_too(ranks: int) -> None:
    model_file = model_of(Tied)
    layout = {"boundaries": (0, 1, 3, 4), "num_pipeline_ranks": ranks}
    layout["stage_ranks"] = tuple(stage % ranks for stage in (0, 0, 1))
    device, host = pair(layout, OPTIONS["finite, clip and save"], model_file)
    assert_equal(trained(device, model_file), trained(host, model_file))


@pytest.mark.parametrize("build", [
    lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    lambda parameters: torch.optim.Adam(parameters, fused=True),
    lambda parameters: torch.optim.NAdam(parameters),
])  # fmt: skip
def test_other_optimizers_too(build: Any) -> None:
    model_file = replace(MODEL, build_optimizer=build)
    device, host = pair(LAYOUTS["two replicas, 3"], model_file=model_file)
    assert_equal(trained(device, model_file), trained(host, model_file))


def test_a_step_that_is_not_finite_updates_nothing() -> None:
    _, made = pair(LAYOUTS["stages"], OPTIONS["finite, clip and save"])
    batch = batches(made, MODEL, 0)[0]
    bad = {**batch, "x": torch.full_like(batch["x"], torch.inf)}

    def run(executor: Executor) -> bool:
        executor.step(batch)
        before = executor.checkpoint()
        copies = {name: value.clone() for name, value in before.shards.items()}
        result = executor.step(bad)
        assert result.finite is False
        assert result.not_finite
        after = executor.checkpoint().shards
        same = all(torch.equal(value, after[name]) for name, value in copies.items())
        executor.step(batch)
        later = executor.checkpoint().shards
        # A checkpoint that was handed out stays as it is.
        assert all(torch.equal(value, before.shards[name]) for name, value in copies.items())
        assert not all(torch.equal(value, later[name]) for name, value in copies.items())
        return same

    assert on_every_rank(made, MODEL, run) == [True]


@pytest.mark.parametrize("layout", ["one stage", "stages", "two replicas, 3"])
def test_a_gradient_observer_sees_what_it_sees_on_the_device(layout: str) -> None:
    found = []
    for made in pair(LAYOUTS[layout]):
        given = batches(made, MODEL, 0)

        def run(executor: Executor, given: Any = given) -> dict[str, Tensor]:
            seen: dict[str, Tensor] = {}
            threads = set()

            def watch(state: Any, gradient: Tensor) -> None:
                threads.add(threading.current_thread())
                seen[state.unit.name] = gradient.clone()
                gradient.mul_(0.5)

            executor._rank.observer = watch
            executor.step(given[executor.replica])
            assert threads == {threading.current_thread()}
            return {**seen, **executor.state_dict()}

        found.append(on_every_rank(made, MODEL, run))
    assert_equal(*found)


def test_checkpoints_are_of_either_kind(tmp_path: Path) -> None:
    """One plan writes, the other goes on, and it comes to what the writer would have."""
    device, host = pair(LAYOUTS["two replicas, 3"])
    given = [batches(device, MODEL, step) for step in range(3)]

    def steps(executor: Executor, which: range) -> dict[str, Tensor]:
        for step in which:
            executor.step(given[step][executor.replica])
        return {name: value.clone() for name, value in executor.state_dict().items()}

    whole = on_every_rank(device, MODEL, lambda executor: steps(executor, range(3)))
    for number, (writer, reader) in enumerate(((device, host), (host, device), (host, host))):
        path = tmp_path / str(number)

        def write(executor: Executor, path: Path = path) -> None:
            steps(executor, range(2))
            executor.save(path)

        def read(executor: Executor, path: Path = path) -> dict[str, Tensor]:
            executor.load(path)
            return steps(executor, range(2, 3))

        on_every_rank(writer, MODEL, write)
        assert_equal(on_every_rank(reader, MODEL, read), whole)


class Waits(torch.optim.SGD):
    """Its first step is over only when `until` is set."""

    until: threading.Event
    passed: list[bool]

    def step(self, closure: Any = None) -> Any:
        type(self).passed.append(type(self).until.wait(10.0))
        return super().step(closure)


def test_compute_goes_on_while_the_host_updates() -> None:
    """The last stage's update ends only when a later instruction of the program has run."""
    Waits.until, Waits.passed = threading.Event(), []
    model_file = replace(MODEL, build_optimizer=lambda parameters: Waits(parameters, lr=1e-2))
    _, made = pair(LAYOUTS["stages"], model_file=model_file)
    batch = batches(made, model_file, 0)[0]

    def run(executor: Executor) -> None:
        (program,) = made.programs
        lines = executor._lines[executor._rank.training]
        last = max(n for n, i in enumerate(program) if i.opcode.value == "BACKWARD")
        act = lines[last].act

        def act_and_tell() -> None:
            act()
            Waits.until.set()

        changed = (*lines[:last], lines[last]._replace(act=act_and_tell), *lines[last + 1 :])
        executor._lines[executor._rank.training] = changed
        executor.step(batch)

    on_every_rank(made, model_file, run)
    assert Waits.passed == [True] * 4


class Fails(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:  # noqa: ARG002 - as torch calls it
        raise ArithmeticError("no step today")


def test_an_error_of_the_optimizer_ends_the_step_in_its_own_thread() -> None:
    model_file = replace(MODEL, build_optimizer=lambda parameters: Fails(parameters, lr=1e-2))
    _, made = pair(LAYOUTS["stages"], model_file=model_file)
    batch = batches(made, model_file, 0)[0]

    def run(executor: Executor) -> None:
        with pytest.raises(ArithmeticError, match="no step today"):
            executor.step(batch)

    on_every_rank(made, model_file, run)
    assert not [t for t in threading.enumerate() if t.name == "host updates" and t.is_alive()]


def test_a_capturable_optimizer_is_refused() -> None:
    model_file = replace(
        MODEL, build_optimizer=lambda parameters: torch.optim.Adam(parameters, capturable=True)
    )
    _, made = pair(LAYOUTS["one stage"], model_file=model_file)
    with pytest.raises(UsageError, match="capturable"):
        on_every_rank(made, model_file, lambda _: None)


def test_a_job_that_does_not_end_is_not_waited_for_for_ever() -> None:
    updates, never = HostUpdates(0.05), threading.Event()
    pending = updates.submit(lambda: never.wait(5.0) and None, "UPDATE unit u")
    with pytest.raises(
        DeadlineError, match=r"UPDATE unit u: the host did not end it within .*0.05 s"
    ):
        pending.wait()
    never.set()
    updates.close()


def test_jobs_run_in_order_and_none_after_an_error() -> None:
    updates, ran = HostUpdates(5.0), list[int]()

    def fail() -> None:
        ran.append(1)
        raise TimeoutError("of the job itself")

    first = updates.submit(lambda: ran.append(0), "first")
    second, third = updates.submit(fail, "second"), updates.submit(lambda: ran.append(2), "third")
    first.wait()
    for pending in (second, third):
        with pytest.raises(TimeoutError, match="of the job itself"):
            pending.wait()
    assert ran == [0, 1]
    updates.close()
    updates.close()


@pytest.mark.parametrize("save", [False, True])
def test_with_a_folder_the_state_is_in_its_files(tmp_path: Path, save: bool) -> None:
    """The moments that the optimizer makes in its first step too, and steps stay the same."""
    wide = model_of(lambda: Chain(lambda: nn.Sequential(nn.Linear(8, 4096), nn.Linear(4096, 8))))
    _, made = pair({"boundaries": (0, 4, 9)}, replace(PLAIN, save=save), wide)
    given = [batches(made, wide, step)[0] for step in range(2)]

    def run(executor: Executor, *, has_files: bool = False) -> dict[str, Tensor]:
        for batch in given:
            executor.step(batch)
        host = executor._rank.host
        names = [name for name in host._values if name.startswith(("host:shard", "host:moments"))]
        assert len(names) == 4
        for name in names:
            for tensor in torch.utils._pytree.tree_leaves(host.values(name)):
                in_file = tensor.untyped_storage().filename is not None
                assert in_file == (has_files and tensor.nbytes >= 1 << 16), name
        return executor.state_dict()

    def with_files(transport: LocalTransport, world_rank: int) -> dict[str, Tensor]:
        cpu = torch.device("cpu")
        executor = make_executor(made, wide, transport, world_rank, cpu, tmp_path)
        return run(executor, has_files=True)

    assert_equal(run_local(made, with_files), on_every_rank(made, wide, run))


@pytest.mark.parametrize("options", ["plain", "finite, clip and save"])
@pytest.mark.parametrize("layout", ["one stage", "stages", "two ranks", "two replicas, 3"])
def test_memory_is_what_was_predicted(
    layout: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(8, 1024), nn.Linear(1024, 8)
    )
    model_file = replace(MODEL, build_model=lambda: Chain(wide))
    _, made = pair(LAYOUTS[layout], OPTIONS[options], model_file)
    bounds = [moment.memory.total_bytes for moment in worst_moments(without_batch(made))]
    for world_rank, found in enumerate(measured(made, model_file, monkeypatch)):
        rank = made.coordinates(world_rank)[0]
        assert found <= bounds[rank] + uncounted_bytes(made, rank)
        # On a CPU a copy is over at once, so what the bound has in flight is not there.
        assert found >= 0.8 * bounds[rank]


def test_neither_moments_nor_shards_stay_on_the_device() -> None:
    _, made = pair(LAYOUTS["stages"], OPTIONS["plain"])
    batch = batches(made, MODEL, 0)[0]
    pools = sum(b.num_bytes for b in made.buffers[0] if b.name.startswith(("sum:", "weights:")))

    def run(executor: Executor) -> int:
        executor.step(batch)
        return sum(tensor.nbytes for tensor in executor.resident_tensors())

    assert on_every_rank(made, MODEL, run)[0] <= pools + 64


def test_planned_and_run_by_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of both ways are the same to the last bit, with files and without."""
    device = even_plan("mlp", stages_per_rank=2, num_micro_batches=2, offload_state=True)
    wanted = train_by_plan(example("mlp")[0], device, num_steps=3).state
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.yaml").write_text(CLUSTER, encoding="utf-8")
    made = CliRunner().invoke(lga_plan, [
        MLP, "--gpus", "1", "--cluster", "here.yaml", "--time-limit", "2",
        "--global-batch", "4", "--micro-batches", "2", "--stages-per-rank", "2",
        "--update-on", "host", "--output", "host.yaml",
    ])  # fmt: skip
    assert made.exit_code == 0, made.output
    for more in ((), ("--offload-folder", "there")):
        words = ("--steps", "3", "--save", "it.pt", *more)
        found = command(tmp_path, "lga-run", "host.yaml", MLP, *words)
        assert found.returncode == 0, found.stderr
        state = torch.load(tmp_path / "it.pt", weights_only=True)
        assert state.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in state.items())
