"""One rank's run: join the others, verify if asked, train, report, save."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from planner.console import console as shared_console
from planner.errors import UsageError, VerifyError
from planner.export.timeline_file import write_timeline
from planner.model_file import ModelFile
from planner.plan.types import Plan
from planner.timeline import Timeline
from runtime.build import build_model, make_executor
from runtime.data import Batches, Position, position_of
from runtime.executor import Executor
from runtime.memory import peak_memory
from runtime.options import RunOptions
from runtime.report import (
    Measured,
    Progress,
    not_finite_message,
    print_comparison,
    print_verdict,
)
from runtime.session import device_of, distributed_session
from runtime.transport import Transport
from runtime.verify import Difference, compare

__all__ = ["run_rank"]


def run_rank(plan: Plan, model_file: ModelFile, options: RunOptions) -> None:
    """Everything that one process of `lga-run` or `torchrun -m runtime` does.

    Raises:
        UsageError: the batch, the dataset, the optimizer, the world size or an option is wrong.
        VerifyError: on rank 0, when a gradient or loss differs by more than its tolerance.
        RunError: a rank was lost or a deadline passed.
    """
    if options.timeline_path is not None and options.verify and options.num_steps == 1:
        raise UsageError(
            "--timeline is of the last step trained, but --verify takes the only one",
            hint="--steps=4, so that the step that measures memory is not the last",
        )
    if options.save_every is not None:
        _make_folder(options.checkpoint_folder)
    device = device_of(plan)
    with distributed_session(plan, device) as (transport, world_rank):
        verdict = _run(plan, model_file, options, transport, world_rank, device)
    if world_rank == 0 and verdict:
        raise VerifyError(
            verdict,
            hint="see whether the model draws random numbers outside torch or keeps state between "
            "calls; if not, this is a bug in the plan or the runtime: report it",
        )


def _run(
    plan: Plan,
    model_file: ModelFile,
    options: RunOptions,
    transport: Transport,
    world_rank: int,
    device: torch.device,
) -> str:
    """What verification found wrong, empty if nothing."""
    console = shared_console if world_rank == 0 else Console(quiet=True)
    executor = make_executor(
        plan,
        model_file,
        transport,
        world_rank,
        device,
        options.offload_folder,
        options.compile_backend,
    )
    if executor.compile_report is not None:
        for line in (str(executor.compile_report), *executor.compile_report.explain()):
            console.print(line, highlight=False, soft_wrap=True)
    start = Position()
    if options.resume_path is not None:
        info = executor.load(options.resume_path)
        start = position_of(info.data)
        console.print(f"resumed after step {info.num_steps} from {info.path}")
    batches = Batches(model_file, plan, start)
    if batches.is_random:
        console.print("no build_dataset in the model file: training on random batches")
    first_step = executor.num_steps
    if options.verify:
        _, found = compare(plan, model_file, batches, executor, 0)
        failure = print_verdict(console, _gather_differences(found))
        if failure:
            executor.close()
            return failure
        first_step = 1
    measured = _train(plan, options, batches, executor, console, first_step)
    if measured is not None:
        of_ranks = _gather(measured)
        is_compiled = executor.compile_report is not None
        print_comparison(console, plan, of_ranks, is_compiled=is_compiled)
        if options.timeline_path is not None and world_rank == 0:
            write_timeline(plan, _whole_timeline(of_ranks), options.timeline_path)
            console.print(f"timeline of the last step written to {options.timeline_path}")
    if options.save_path is not None:
        _save(executor, model_file, options.save_path, world_rank, console)
    executor.close()
    return ""


def _train(
    plan: Plan,
    options: RunOptions,
    batches: Batches,
    executor: Executor,
    console: Console,
    first_step: int,
) -> Measured | None:
    """Train the remaining steps; the second measures memory, so its time does not count.

    On a CPU what compiled code allocates cannot be followed.
    """
    measures_memory = executor.compile_report is None or executor.device.type != "cpu"
    seconds: list[float] = []
    peak_bytes, last = None, None
    with Progress(console, plan, options.num_steps, options.log_every) as progress:
        for step in range(first_step, options.num_steps):
            batch = batches.batch(step, executor.replica) if executor.loads_batch else {}
            if options.timeline_path is not None and step == options.num_steps - 1:
                _start_together(executor.device)
            start = time.perf_counter()
            if measures_memory and step == min(first_step + 1, options.num_steps - 1):
                with peak_memory(executor.resident_tensors(), executor.device) as peak:
                    result = executor.step(batch)
                peak_bytes = peak.num_bytes
            else:
                result = executor.step(batch)
                _finish(executor.device)
                if step > first_step + 1:
                    seconds.append(time.perf_counter() - start)
            loss = executor.mean_loss(result)
            progress.advance(step + 1, loss, time.perf_counter() - start)
            if result.finite is False:
                console.print(not_finite_message(step + 1, result))
            if _is_due(options, step + 1):
                folder = options.checkpoint_folder / f"step-{step + 1:06}"
                executor.save(folder, asdict(batches.position(step + 1)))
                console.print(f"checkpoint written to {folder}")
            last = result
    if last is None:
        return None
    is_wanted = options.timeline_path is not None and not executor.replica
    return Measured(
        rank=executor.rank,
        step_seconds=statistics.median(seconds) if seconds else None,
        peak_bytes=peak_bytes,
        timeline=last.timeline if is_wanted else None,
    )


def _make_folder(folder: Path) -> None:
    """Now rather than after the steps that a checkpoint is for."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write checkpoints to {folder}: {error.strerror}",
            hint="give another folder: --checkpoints",
        ) from None


def _is_due(options: RunOptions, num_steps: int) -> bool:
    """Whether a checkpoint is wanted after so many steps."""
    every = options.save_every
    return every is not None and (num_steps % every == 0 or num_steps == options.num_steps)


def _finish(device: torch.device) -> None:
    """A step is over for the clock when the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_together(device: torch.device) -> None:
    """Leave at about the same moment on every rank, so that their clocks can be compared."""
    dist.all_reduce(torch.zeros(1, device=device))


def _whole_timeline(measured: Sequence[Measured]) -> Timeline:
    """One timeline of all pipeline ranks; each counts from the start of its own step."""
    parts = [found.timeline for found in measured if found.timeline is not None]
    events = (event for part in parts for event in part.events)
    in_order = sorted(events, key=lambda event: (event.rank, event.index))
    return Timeline(source="measured", events=tuple(in_order))


def _gather(measured: Measured) -> list[Measured]:
    found: list[Measured] = [measured] * dist.get_world_size()
    dist.all_gather_object(found, measured)
    return found


def _gather_differences(mine: list[Difference]) -> list[Difference]:
    found: list[list[Difference]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return [difference for differences in found for difference in differences]


def _save(
    executor: Executor, model_file: ModelFile, path: Path, world_rank: int, console: Console
) -> None:
    """Write the whole model's state_dict from rank 0, aside first, then renamed."""
    state = executor.state_dict()
    mine = state if executor.replica == 0 else {}
    found: list[Mapping[str, Tensor]] | None = None
    if world_rank == 0:
        found = [{}] * dist.get_world_size()
    dist.gather_object(mine, found)
    if found is None:
        return
    model = build_model(model_file, executor.plan.options.seed, torch.device("cpu"))
    trained = {name: value.cpu() for part in found for name, value in part.items()}
    model.load_state_dict(trained, strict=False)  # tied names and unused parameters come along
    whole = model.state_dict()
    aside = path.with_name(f".{path.name}.partial")
    torch.save(whole, aside)
    aside.replace(path)
    console.print(f"weights of {len(whole)} tensors written to {path}")
