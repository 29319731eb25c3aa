"""Memory of one micro-batch in a stage, from the profiles of its layers.

Layers of one stage share: a tensor between two layers is kept once however many of them save it,
and so is what the prologue makes. A layer's own peak stands on what the others hold at that moment:
in forward what earlier layers have kept or made for later ones, in backward what earlier layers
still keep and the gradients that later ones have made. This module does not know ranks.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from planner.graph import LayerNode, ParameterSpec, StageCode, TensorSpec
from planner.profile import LayerProfile, Moment

__all__ = ["StageMemory", "stage_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of one micro-batch; what crosses the ends of the stage is not part of saved bytes."""

    saved_bytes: int
    saving_transient_bytes: int
    """Peak of a forward that saves, above all that it saves; outputs are part of it."""
    unsaved_transient_bytes: int
    """Peak of a forward that saves nothing."""
    backward_transient_bytes: int
    """Peak of backward above what is saved when it begins."""


def stage_memory(
    layers: Sequence[LayerNode],
    profiles: Sequence[LayerProfile],
    code: StageCode,
    tensors: Mapping[str, TensorSpec],
    parameters: Mapping[str, ParameterSpec],
    *,
    recompute: bool,
) -> StageMemory:
    """The memory of consecutive layers that run as one stage.

    `profiles` and `code` are of these layers; `tensors` are all boundary tensors. With `recompute`
    the outputs that backward reads are made a second time, so they count as saved.
    """
    return _Stage(layers, profiles, code, tensors, parameters, recompute=recompute).memory()


class _Stage:
    """Who makes, reads and saves what. A name is of the boundary tensor or the prologue value that
    owns a storage: views of one storage count as one."""

    def __init__(
        self,
        layers: Sequence[LayerNode],
        profiles: Sequence[LayerProfile],
        code: StageCode,
        tensors: Mapping[str, TensorSpec],
        parameters: Mapping[str, ParameterSpec],
        *,
        recompute: bool,
    ) -> None:
        self._layers, self._profiles, self._tensors = layers, profiles, tensors
        self._parameters = parameters
        self._sizes = {name: spec.num_bytes for name, spec in tensors.items()}
        self._owners: dict[str, str] = {}
        for layer, profile in zip(layers, profiles, strict=True):
            storages = profile.memory.output_storages if profile.memory else ()
            for name, (owner, size) in zip(layer.outputs, storages, strict=False):
                self._owners[name] = self._owner(owner)
                self._sizes[self._owner(owner)] = size
        self._makers = {name: i for i, layer in enumerate(layers) for name in layer.outputs}
        self._last_readers = {name: i for i, layer in enumerate(layers) for name in layer.inputs}
        self._code = code
        # A stage that changes an input works on a copy of its own.
        self._copies = set(code.mutated_inputs)
        self._outside = ({*code.inputs, *code.batch_keys} - self._copies) | {""}
        self._outputs = {self._owner(name) for name in code.outputs}
        self._first_savers: dict[str, int] = {}
        self._own: list[int] = []
        self._prologues: list[set[str]] = []
        for index, profile in enumerate(profiles):
            shared = dict(profile.memory.saved_prologue) if profile.memory else {}
            prologue = dict(profile.memory.prologue) if profile.memory else {}
            self._prologues.append(set(prologue))
            self._sizes |= shared | prologue
            self._own.append(profile.saved_bytes - sum(shared.values()))
            for name in map(self._owner, (*profile.saved_tensors, *shared)):
                if name not in self._outside and (recompute or name not in self._outputs):
                    self._first_savers.setdefault(name, index)
        self._excess = 0 if recompute else self._output_excess()

    def memory(self) -> StageMemory:
        saved = sum(self._own) + self._bytes(self._first_savers) + self._excess
        indices = range(len(self._layers))
        saving = max(map(self._saving_peak, indices))
        backward = self._excess + max(map(self._backward_peak, indices))
        return StageMemory(
            saved_bytes=saved,
            saving_transient_bytes=max(0, saving - saved),
            # Recompute will read the buffers that this forward changes: it copies them first.
            unsaved_transient_bytes=sum(
                p.memory.changed_buffer_bytes for p in self._profiles if p.memory
            )
            + max(map(self._unsaved_peak, indices)),
            backward_transient_bytes=max(0, backward - saved),
        )

    def _owner(self, name: str) -> str:
        return self._owners.get(name, name)

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(self._sizes[name] for name in names)

    def _output_excess(self) -> int:
        """Saved bytes around outputs that are views: of the storage, what is not handed on."""
        saved = {self._owner(name) for p in self._profiles for name in p.saved_tensors}
        handed = dict.fromkeys(self._outputs & saved - self._outside, 0)
        for name in self._code.outputs:
            if self._owner(name) in handed and name in self._tensors:
                handed[self._owner(name)] += self._tensors[name].num_bytes
        return sum(max(0, self._sizes.get(n, 0) - number) for n, number in handed.items())

    def _waiting(self, index: int) -> set[str]:
        """Made by earlier layers for this one, later ones or later stages."""
        last = {
            self._owner(name): len(self._layers) if name in self._code.outputs else reader
            for name, reader in sorted(
                ((n, self._last_readers.get(n, -1)) for n in self._makers), key=lambda pair: pair[1]
            )
            if self._makers[name] < index
        }
        return self._copies | {n for n, i in last.items() if i >= index} - self._outside

    def _begun(self, index: int) -> set[str]:
        """Made at the stage's begin for later layers, and not for this one."""
        return set[str]().union(*self._prologues[index + 1 :]) - self._prologues[index]

    def _dying(self, index: int) -> set[str]:
        """Inputs of the layer that nobody reads after it."""
        read = set(map(self._owner, self._layers[index].inputs))
        return read & self._waiting(index) - self._waiting(index + 1) - self._copies

    def _unsaved_peak(self, index: int) -> int:
        profile, waiting, dying = self._profiles[index], self._waiting(index), self._dying(index)
        peaks = profile.memory.unsaved if profile.memory else ()
        return self._bytes((waiting - dying) | self._begun(index)) + self._peak(
            peaks or _alone(profile.forward_transient_bytes, self._layers[index].inputs), dying
        )

    def _saving_peak(self, index: int) -> int:
        profile, memory = self._profiles[index], self._profiles[index].memory
        saved = {name for name, first in self._first_savers.items() if first < index}
        # What the layer makes again itself is part of its own peak.
        again = {name for name, _ in memory.saved_prologue} if memory else set[str]()
        dying = self._dying(index) - saved
        held = (saved | self._waiting(index)) - again - dying | self._begun(index)
        peaks = memory.forward if memory else ()
        return (
            self._bytes(held)
            + sum(self._own[:index])
            + self._peak(
                peaks or _alone(profile.forward_transient_bytes, self._layers[index].inputs), dying
            )
        )

    def _backward_peak(self, index: int) -> int:
        profile, outputs = self._profiles[index], set(self._layers[index].outputs)
        saved = {name for name, first in self._first_savers.items() if first <= index}
        mine = {name for name in saved if self._first_savers[name] == index}
        mine &= set(map(self._owner, profile.saved_tensors))
        gradients = self._gradients(index)
        given = gradients & outputs - set(self._code.outputs)
        dying = mine | {f"gradient:{name}" for name in given}
        peaks = self._backward_moments(index)
        held = self._bytes(saved - mine) + self._bytes(gradients - given)
        return (
            held
            + sum(self._own[: index + 1])
            + self._sums(index)
            + self._peak(peaks or _alone(profile.backward_transient_bytes, dying), dying)
        )

    def _backward_moments(self, index: int) -> tuple[Moment, ...]:
        memory = self._profiles[index].memory
        if memory is None:
            return ()
        is_inside = set(self._code.outputs).isdisjoint(self._layers[index].outputs)
        inner = memory.inner_backward if is_inside else None
        return memory.backward if inner is None else inner

    def _peak(self, moments: Iterable[Moment], dying: Collection[str]) -> int:
        """The highest moment, with those of `dying` that are still held then."""
        found = 0
        for moment in moments:
            held = set(map(self._owner, moment.held)) & set(dying)
            found = max(
                found,
                moment.peak_bytes + self._bytes(name.removeprefix("gradient:") for name in held),
            )
        return found

    def _gradients(self, index: int) -> set[str]:
        """Boundary tensors whose gradient is alive in part when the layer's backward begins."""
        known = {*self._code.inputs, *(n for n, i in self._makers.items() if i <= index)}
        return {
            name
            for name in known
            if self._last_readers.get(name, -1) > index
            and self._tensors[name].requires_grad
            and not self._is_passed(name, index)
        }

    def _is_passed(self, name: str, index: int) -> bool:
        """Whether the gradient that later layers made is in that of an output of the stage."""
        later = zip(self._layers[index + 1 :], self._profiles[index + 1 :], strict=True)
        readers = [profile for layer, profile in later if name in layer.inputs]
        if len(readers) != 1 or readers[0].memory is None:
            return False
        return dict(readers[0].memory.passed_gradients).get(name) in self._code.outputs

    def _sums(self, index: int) -> int:
        """Gradients of parameters that several layers use: parts wait until all are there."""
        later = {name for layer in self._layers[index + 1 :] for name in layer.parameters}
        earlier = {name for layer in self._layers[: index + 1] for name in layer.parameters}
        own = set(self._layers[index].parameters)
        return sum(
            self._parameters[name].compute_bytes
            * (2 if name in own else 1)  # the sum is a new tensor
            for name in later & earlier
            if self._parameters[name].trainable
        )


def _alone(peak_bytes: int, held: Iterable[str]) -> tuple[Moment]:
    """The only moment that is known of a layer."""
    return (Moment(peak_bytes=peak_bytes, held=tuple(held)),)
