"""What one rank writes of a whole training state, and takes up from one, whatever wrote it.

Names: `model.<parameter or buffer>` and `optimizer.state.<parameter>.<slot>`, as
torch.distributed.checkpoint.state_dict has them. Of several that hold the same, one writes: the
first pipeline rank of a tied unit, and the first partition group, which is replica 0 where nothing
is partitioned. Every rank reads what
it holds. Buffers of modules are replica 0's: each replica keeps running statistics of its own.

This module knows units and their parts. It does not know files.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from planner.errors import UsageError
from runtime.checkpoint.optimizers import put_scheduler, put_settings, scheduler_of, settings_of
from runtime.checkpoint.parts import Part
from runtime.layout import dense_stride, flat
from runtime.shards import Piece, UnitState
from runtime.state import RankState

if TYPE_CHECKING:
    from runtime.checkpoint.read import CheckpointReader

__all__ = ["figures_of", "fill_rank", "parts_of", "put_figures", "put_parameters"]

_STATE = ("optimizer", "state")
_COUNTERS = ("eta", "mu", "mu_product", "step")
"""What torch's optimizers keep one number of, even for a parameter that is itself one number."""


def parts_of(rank: RankState, buffers: Mapping[str, Tensor]) -> list[Part]:
    """Everything that this rank writes; `buffers` are those of its modules that are saved."""
    found: list[Part] = []
    for state in rank.units.values():
        if rank.rank == state.unit.ranks[0] and rank.replica < rank.plan.num_parts:
            found += _parameters(state, _shard(rank, state), state.first)
            found += _moments(rank, state)
    if rank.replica == 0:
        found += [_whole(("model", name), buffer) for name, buffer in buffers.items()]
    return found


def fill_rank(rank: RankState, reader: "CheckpointReader", buffers: Mapping[str, Tensor]) -> None:
    """Parameters, moments and buffers from a checkpoint, one unit at a time.

    Raises:
        UsageError: something is missing, damaged, or of another shape.
    """
    slots = _slots(reader)
    for state in rank.units.values():
        with_weights = _room(rank, state)
        reader.fill(list(_parameters(state, *with_weights)))
        _put_weights(rank, state, with_weights[0])
        if state.unit.name in rank.optimizers:
            moments = {piece.name: _slot_room(rank, state, piece, slots) for piece in state.pieces}
            parts = (p for piece in state.pieces for p in _slot_parts(state, piece, moments))
            reader.fill(list(parts))
            _put_moments(rank, state, moments)
    reader.fill([_whole(("model", name), buffer) for name, buffer in buffers.items()])


def put_parameters(
    rank: RankState, given: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    """Parameters and buffers from whole tensors.

    Raises:
        UsageError: one is missing or of another shape; nothing has been changed then.
    """
    wanted = {n: shape for state in rank.units.values() for n, shape in state.shapes.items()}
    wanted |= {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    for name, shape in wanted.items():
        found = tuple(given[name].shape) if name in given else None
        if found != shape:
            what = "lacks" if found is None else f"has shape {found} for"
            raise UsageError(
                f"the state_dict {what} {name}, which has shape {shape} on this rank",
                hint="give a state_dict of the whole model",
            )
    for state in rank.units.values():
        values, first = _room(rank, state)
        for name, (low, high) in state.ranges.items():
            begin, end = max(low, first), min(high, first + values.numel())
            if begin < end:
                whole = state.in_flat_order(name, given[name].detach().to(rank.device))
                values[begin - first : end - first] = whole[begin - low : end - low]
        _put_weights(rank, state, values)
    for name, buffer in buffers.items():
        buffer.copy_(given[name])


def figures_of(rank: RankState) -> dict[str, Any]:
    """What is no tensor, of this rank's optimizers: plain values."""
    optimizers = rank.optimizers.values()
    numbers: dict[str, dict[str, Any]] = {}
    for name in rank.optimizers:
        for parameter, slots in _kept(rank, name).items():
            plain = {k: v for k, v in slots.items() if not isinstance(v, Tensor)}
            if plain:
                numbers[parameter] = plain
    return {
        "settings": settings_of(optimizers),
        "scheduler": scheduler_of(optimizers),
        "numbers": numbers,
    }


def put_figures(rank: RankState, figures: Mapping[str, Any]) -> None:
    """The union of all ranks' `figures_of`; after `fill_rank`."""
    numbers = figures["numbers"]
    for name, optimizer in rank.optimizers.items():
        moments = _kept(rank, name)
        mine = {piece.name for piece in rank.units[name].pieces if piece.name in numbers}
        if mine:
            merged = {key: dict(slots) for key, slots in moments.items()}
            for key in mine:
                merged.setdefault(key, {}).update(numbers[key])
            _put_moments(rank, rank.units[name], merged)
        put_settings(optimizer, figures["settings"])
        put_scheduler(optimizer, figures["scheduler"])


def _shard(rank: RankState, state: UnitState) -> Tensor:
    """This rank's part of the weights, wherever it lives."""
    if "shard" in rank.plan.offloaded:
        values: Tensor = rank.host.values(f"host:shard:{state.unit.name}")
        return values
    return state.shard


def _kept(rank: RankState, unit: str) -> dict[str, dict[str, Any]]:
    """What the optimizer of a unit keeps, wherever it lives."""
    if "moments" in rank.plan.offloaded:
        values: dict[str, dict[str, Any]] = rank.host.values(f"host:moments:{unit}")
        return values
    return rank.optimizers[unit].moments


def _parameters(state: UnitState, values: Tensor, first: int) -> Iterator[Part]:
    """Parts of parameters in a range of the unit's flat vector that begins at `first`."""
    for name, (low, high) in state.ranges.items():
        begin, end = max(low, first), min(high, first + values.numel())
        if begin < end:
            yield Part(
                key=("model", name),
                shape=state.shapes[name],
                stride=state.strides[name],
                first=begin - low,
                values=values[begin - first : end - first],
            )


def _moments(rank: RankState, state: UnitState) -> Iterator[Part]:
    if state.unit.name not in rank.optimizers:
        return
    moments = _kept(rank, state.unit.name)
    for piece in state.pieces:
        if piece.name in moments:
            yield from _slot_parts(state, piece, moments)


def _slot_parts(
    state: UnitState, piece: Piece, moments: Mapping[str, Mapping[str, Any]]
) -> Iterator[Part]:
    """What the optimizer keeps of one piece: element by element, or otherwise as a whole."""
    name = piece.name
    for slot, value in moments[name].items():
        if not isinstance(value, Tensor):
            continue
        key = (*_STATE, name, slot)
        if tuple(value.shape) != _shape_of(state, piece):
            yield _whole(key, value)
            continue
        dense = state.partitioned or value.stride() == state.strides[name]
        yield Part(
            key=key,
            shape=state.shapes[name],
            stride=state.strides[name],
            first=piece.first - state.ranges[name][0],
            values=flat(value) if dense else state.in_flat_order(name, value),
        )


def _shape_of(state: UnitState, piece: Piece) -> tuple[int, ...]:
    """Of what the optimizer sees of a parameter."""
    return (piece.last - piece.first,) if state.partitioned else state.shapes[piece.name]


def _whole(key: tuple[str, ...], tensor: Tensor) -> Part:
    stride = dense_stride(tuple(tensor.shape), tensor.stride())
    if tensor.stride() != stride:
        tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
    return Part(key=key, shape=tuple(tensor.shape), stride=stride, values=flat(tensor))


def _room(rank: RankState, state: UnitState) -> tuple[Tensor, int]:
    """Where weights that are read go, and which element of the unit is the first of them."""
    if not state.gathered:
        whole = torch.zeros_like(state.whole, dtype=state.shard.dtype)
        return whole if state.has_copy else state.whole, 0
    if "shard" in rank.plan.offloaded:
        example = rank.host.values(f"host:shard:{state.unit.name}")
        return torch.zeros_like(example, device=rank.device), state.first
    return state.shard, state.first


def _put_weights(rank: RankState, state: UnitState, values: Tensor) -> None:
    if "shard" in rank.plan.offloaded:
        rank.host.keep(f"host:shard:{state.unit.name}", values).wait()
    elif state.has_copy and not state.gathered:
        state.shard.copy_(values[state.first : state.last])
        state.whole.copy_(values)


def _put_moments(rank: RankState, state: UnitState, moments: dict[str, dict[str, Any]]) -> None:
    name = state.unit.name
    if "moments" in rank.plan.offloaded:
        rank.host.keep(f"host:moments:{name}", moments).wait()
    else:
        rank.optimizers[name].put_moments({k: v for k, v in moments.items() if v})


def _slots(reader: "CheckpointReader") -> dict[str, dict[str, Tensor]]:
    """Parameter -> slot -> an empty tensor of its shape and dtype."""
    prefix = ".".join(_STATE) + "."
    found: dict[str, dict[str, Tensor]] = {}
    for name, saved in reader.tensors.items():
        if name.startswith(prefix):
            parameter, _, slot = name.removeprefix(prefix).rpartition(".")
            like = torch.empty(saved.size, dtype=saved.properties.dtype, device="meta")
            found.setdefault(parameter, {})[slot] = like
    return found


def _slot_room(
    rank: RankState, state: UnitState, piece: Piece, slots: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors to read what the optimizer keeps of one piece into."""
    found = {}
    for slot, saved in slots.get(piece.name, {}).items():
        shape = tuple(saved.shape)
        if shape == state.shapes[piece.name] and (shape or slot not in _COUNTERS):
            stride = state.strides[piece.name] if not state.partitioned else (1,)
            found[slot] = torch.empty_strided(
                _shape_of(state, piece), stride, dtype=saved.dtype, device=rank.device
            )
        else:
            found[slot] = torch.empty_like(saved, device=_home(rank, state, piece, slot))
    return found


def _home(rank: RankState, state: UnitState, piece: Piece, slot: str) -> torch.device:
    """Optimizers count their steps on the CPU, unless they run as one kernel."""
    for group in rank.optimizers[state.unit.name].optimizer.param_groups:
        mine = any(parameter is piece.parameter for parameter in group["params"])
        if mine and slot == "step" and not (group.get("capturable") or group.get("fused")):
            return torch.device("cpu")
    return rank.device
