"""Training in mixed precision: plain lines of torch, the same by a plan, and the comparison.

The reference is written out, and shares nothing with the runtime but the keys of dropout: a model
in half precision, float32 masters that it is copied from, gradients of each micro-batch added up in
float32, and torch's own rule of the loss scale.
"""

import math
from typing import Any

import torch
from stepping import CPU, batches, on_every_rank
from torch import Tensor, nn
from training import NUM_STEPS, relative_rms

from planner.model_file import ModelFile
from planner.plan.types import Plan, PlanOptions
from planner.precision import Precision
from runtime.executor import Executor
from runtime.random import KeyedRandom, seeded
from runtime.reference import loss_of_model

__all__ = ["HALF", "Plain", "assert_same", "options_of"]

HALF = (Precision.BFLOAT16, Precision.FLOAT16)
Gradients = dict[str, Tensor]


def options_of(precision: Precision, **more: Any) -> PlanOptions:
    is_scaled = precision is Precision.FLOAT16
    more = {"check_finite": is_scaled, **more}
    return PlanOptions(deadline_seconds=60, precision=precision, **more)


class Plain:
    """Plain accumulation in mixed precision."""

    def __init__(
        self, model_file: ModelFile, plan: Plan, kept: tuple[type[nn.Module], ...] = ()
    ) -> None:
        """`kept` are the classes of modules that stay in float32."""
        self.plan, self.model_file = plan, model_file
        with seeded(plan.options.seed, CPU):
            self.model = model_file.build_model().train()
        precision = plan.options.precision
        own = precision is Precision.MODEL
        self.dtype = torch.float32 if own else getattr(torch, precision.value)
        self.masters = {
            name: nn.Parameter(p.detach().clone())
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        built = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.model.to(self.dtype)
        for module in (m for m in self.model.modules() if isinstance(m, kept)):
            module.float()
            for name, buffer in self.model.named_buffers():
                if any(buffer is mine for mine in module.buffers()):
                    buffer.copy_(built[name])
            inner = module.forward
            module.forward = lambda x, inner=inner: inner(x.float()).to(self.dtype)  # type: ignore[method-assign, misc]
        build = model_file.build_optimizer or torch.optim.AdamW
        self.optimizer = build(list(self.masters.values()))
        build_scheduler = model_file.build_scheduler
        self.scheduler = build_scheduler(self.optimizer) if build_scheduler else None
        self.scale, self.num_good, self.factor = 2.0**16, 0, 1.0
        self.is_scaled = plan.options.precision is Precision.FLOAT16

    def step(self, number: int, given: list[dict[str, Tensor]]) -> tuple[list[Tensor], Gradients]:
        """Losses, and the gradients before they are clipped."""
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        sums = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        random, losses = KeyedRandom(self.plan.options.seed), list[Tensor]()
        size, count = self.plan.micro_batch_size, self.plan.num_micro_batches
        for name, parameter in parameters.items():
            parameter.data.copy_(self.masters[name])
        for replica, batch in enumerate(given):
            for m in range(count):
                rows = {k: self.cast(v[m * size : (m + 1) * size]) for k, v in batch.items()}
                random.begin(step=number, replica=replica, micro_batch=m)
                self.model.zero_grad(set_to_none=True)
                with random:
                    loss = loss_of_model(self.model, self.model_file)(rows)
                    part = loss * self.scale if self.is_scaled else loss
                    (part / (count * len(given))).backward()
                losses.append(loss.detach())
                for name, parameter in parameters.items():
                    if parameter.grad is not None:
                        sums[name] += parameter.grad.float()
        return losses, self.update(sums)

    def update(self, sums: Gradients) -> Gradients:
        if self.is_scaled:
            sums = {name: total / self.scale for name, total in sums.items()}
        found = {name: total.clone() for name, total in sums.items()}
        finite = all(bool(total.isfinite().all()) for total in sums.values())
        if finite or not self.plan.options.check_finite:
            for name, master in self.masters.items():
                master.grad = sums[name]
            if self.plan.options.clip_delayed:
                self.clip_later(sums)
            elif self.plan.options.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.masters.values(), self.plan.options.clip_norm)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        if self.is_scaled:
            self.num_good = self.num_good + 1 if finite else 0
            if not finite:
                self.scale *= 0.5
            elif self.num_good == 2000:
                self.scale, self.num_good = self.scale * 2, 0
        return found

    def clip_later(self, sums: Gradients) -> None:
        """By the norm of the step before, of gradients that were not clipped."""
        assert self.plan.options.clip_norm is not None
        for name, master in self.masters.items():
            master.grad = sums[name] * self.factor
        norm = float(nn.utils.get_total_norm(sums.values()))
        self.factor = min(1.0, self.plan.options.clip_norm / (norm + 1e-6))

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def state(self) -> dict[str, Tensor]:
        buffers = {k: v for k, v in self.model.state_dict().items() if k not in self.masters}
        return {**buffers, **{name: master.detach() for name, master in self.masters.items()}}


def by_plan(
    model_file: ModelFile, plan: Plan, num_steps: int = NUM_STEPS
) -> tuple[list[dict[int, list[Tensor]]], list[Gradients], dict[str, Tensor], list[float]]:
    """Losses by step and replica, gradients by step, the state at the end, and loss scales."""

    given = [batches(plan, model_file, step) for step in range(num_steps)]

    def run(executor: Executor) -> Any:
        losses, gradients, scales = [], [], []
        for step in range(num_steps):
            seen: dict[str, Tensor] = {}

            def observe(state: Any, gradient: Tensor, seen: dict[str, Tensor] = seen) -> None:
                for piece in state.pieces:
                    part = gradient[piece.first - state.first : piece.last - state.first]
                    assert part.dtype == torch.float32
                    if part.numel() == math.prod(state.shapes[piece.name]):
                        seen[piece.name] = part.view(state.shapes[piece.name]).clone()

            executor.observe(observe)
            scales.append(executor.loss_scale.scale if executor.loss_scale else 1.0)
            result = executor.step(given[step][executor.replica])
            losses.append((executor.replica, list(result.losses)))
            gradients.append(seen)
        return losses, gradients, executor.state_dict(), scales

    found = on_every_rank(plan, model_file, run)
    losses: list[dict[int, list[Tensor]]] = [{} for _ in range(num_steps)]
    gradients: list[Gradients] = [{} for _ in range(num_steps)]
    state: dict[str, Tensor] = {}
    for counted, seen, mine, _ in found:
        for step, (replica, values) in enumerate(counted):
            losses[step].setdefault(replica, []).extend(values)
            gradients[step].update(seen[step])
        state |= mine
    return losses, gradients, state, found[0][3]


def assert_same(
    model_file: ModelFile,
    plan: Plan,
    *,
    tolerance: float = 0.0,
    num_steps: int = NUM_STEPS,
    kept: tuple[type[nn.Module], ...] = (),
) -> list[float]:
    """Bitwise, or gradients of the first step and the state within the tolerance; the scales."""
    plain = Plain(model_file, plan, kept)
    losses, gradients, state, scales = by_plan(model_file, plan, num_steps)
    for step in range(num_steps if not tolerance else 1):
        wanted, sums = plain.step(step, batches(plan, model_file, step))
        mine = [loss for _, found in sorted(losses[step].items()) for loss in found]
        assert all(map(torch.equal, mine, wanted)), step
        for name, gradient in gradients[step].items():
            if tolerance:
                assert relative_rms(gradient, sums[name]) <= tolerance, name
            else:
                same = torch.equal(gradient.nan_to_num(7.0), sums[name].nan_to_num(7.0))
                assert same, (step, name)
        assert tolerance or gradients[step].keys() == plain.masters.keys()
    for step in range(1, num_steps) if tolerance else ():
        plain.step(step, batches(plan, model_file, step))
    for name, value in state.items():
        want = plain.state()[name]
        assert value.dtype == want.dtype, name
        if not tolerance:
            assert torch.equal(value, want), name
    if tolerance:
        names = list(plain.masters)
        mine_flat = torch.cat([state[name].reshape(-1) for name in names])
        flat = torch.cat([plain.masters[name].detach().reshape(-1) for name in names])
        assert relative_rms(mine_flat, flat) <= 1e-3
    return scales
