"""The file form of devices, links and clusters, validated with pydantic.

Knows keys, types and ranges, and how a described device or link becomes the type the solver
reads. Does not know where a description comes from, nor what a name refers to.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from planner.cluster.samples import MeasuredSpec, Strict
from planner.cluster.types import (
    Allocator,
    CollectiveAlgorithm,
    Device,
    Link,
    OperatorRates,
)
from planner.profile import OperatorClass

__all__ = [
    "AllocatorSpec",
    "Bytes",
    "ClassRates",
    "ClusterFile",
    "Count",
    "DeviceProfile",
    "DeviceSpec",
    "Figure",
    "Fraction",
    "HostLinkSpec",
    "HostSpec",
    "LinkFile",
    "LinkSpec",
    "RatesSpec",
    "Seconds",
    "UsualHost",
    "UsualNetwork",
]


class Figure(Strict):
    """A number with its source; a bare number is accepted and has no source of its own."""

    value: Annotated[float, Field(gt=0)]
    source: str = ""

    @model_validator(mode="before")
    @classmethod
    def _accept_bare_number(cls, data: Any) -> Any:
        is_number = isinstance(data, int | float) and not isinstance(data, bool)
        return {"value": data} if is_number else data


class Fraction(Figure):
    """A part of a whole: more than 0, at most 1."""

    value: Annotated[float, Field(gt=0, le=1)]


class Seconds(Figure):
    """A time, possibly zero."""

    value: Annotated[float, Field(ge=0)]


class Bytes(Figure):
    """An amount of memory, possibly zero."""

    value: Annotated[float, Field(ge=0)]


class Count(Figure):
    """A whole number, at least 1."""

    value: Annotated[int, Field(ge=1)]


_OVERHEAD = Seconds(value=5e-6, source="assumption: 200 000 operators a second in eager PyTorch")
_COMPUTE = Fraction(value=0.8, source="assumption: 0.8 of the peak in large products")
_MEMORY = Fraction(value=0.87, source="assumption: 0.87 of the memory bandwidth")
_WHOLE = Fraction(value=1.0, source="taken at its word")
_MESSAGE = Seconds(value=0.0, source="assumption: a copy engine moves the bytes")
_NO_HALF = Bytes(value=0.0, source="assumption: kernels of every size reach the rate")
_ISSUE = Seconds(value=0.0, source="assumption: small beside the instructions themselves")


class AllocatorSpec(Strict):
    """A caching allocator. See `planner.cluster.types.Allocator` for the meaning of the sizes."""

    rounding_bytes: Count
    small_limit_bytes: Count
    small_segment_bytes: Count
    large_limit_bytes: Count
    large_segment_bytes: Count
    segment_rounding_bytes: Count

    def to_allocator(self) -> Allocator:
        sizes = {name: getattr(self, name).value for name in type(self).model_fields}
        return Allocator(**sizes)


class RatesSpec(Strict):
    """One class of operators. See `planner.cluster.types.OperatorRates` for the meaning."""

    compute_efficiency: Fraction
    memory_efficiency: Fraction
    half_flop: Bytes = _NO_HALF
    half_bytes: Bytes = _NO_HALF

    def to_rates(self) -> OperatorRates:
        figures = {name: getattr(self, name).value for name in type(self).model_fields}
        return OperatorRates(**figures)


class ClassRates(Strict):
    """Rates of classes of operators; a class without any has the device's efficiencies."""

    product: RatesSpec | None = None
    convolution: RatesSpec | None = None
    attention: RatesSpec | None = None
    normalisation: RatesSpec | None = None
    embedding: RatesSpec | None = None
    elementwise: RatesSpec | None = None

    def by_class(self) -> dict[OperatorClass, RatesSpec]:
        given = {kind: getattr(self, kind.value) for kind in OperatorClass}
        return {kind: rates for kind, rates in given.items() if rates is not None}


def _kind(value: Any) -> str:
    return "name" if isinstance(value, str) else "inline"


NamedOrAllocator = Annotated[
    Annotated[Literal["torch-cuda"], Tag("name")] | Annotated[AllocatorSpec, Tag("inline")],
    Discriminator(_kind),
]
"""`torch-cuda`: the sizes of torch 2.13's c10/core/AllocatorConfig.h."""


class DeviceSpec(Strict):
    """One device. See `planner.cluster.types.Device` for the meaning of the figures."""

    name: Annotated[str, Field(min_length=1)]
    memory_bytes: Bytes
    peak_flops: Annotated[dict[str, Figure], Field(min_length=1)]
    memory_bandwidth: Figure
    reserved_bytes: Bytes
    kernel_overhead_seconds: Seconds = _OVERHEAD
    compute_efficiency: Fraction = _COMPUTE
    memory_efficiency: Fraction = _MEMORY
    instruction_overhead_seconds: Seconds = _ISSUE
    host_bandwidth: Figure | None = None
    allocator: NamedOrAllocator | None = None
    synchronous: bool = False
    random_bandwidth: Figure | None = None
    message_seconds: Seconds = _MESSAGE
    rates: ClassRates | None = None
    launch_seconds: Seconds | None = None

    @model_validator(mode="after")
    def _leaves_memory(self) -> "DeviceSpec":
        if self.reserved_bytes.value >= self.memory_bytes.value:
            raise ValueError(
                f"reserved_bytes {self.reserved_bytes.value:g} leave nothing of memory_bytes "
                f"{self.memory_bytes.value:g}"
            )
        return self

    def to_device(self, where: str) -> Device:
        """The device; `where` is the source of figures that name none."""
        figures = {
            "memory": self.memory_bytes,
            **self.peak_flops,
            "bandwidth": self.memory_bandwidth,
            "overhead": self.kernel_overhead_seconds,
            "compute efficiency": self.compute_efficiency,
            "memory efficiency": self.memory_efficiency,
            "reserved": self.reserved_bytes,
            "issue": self.instruction_overhead_seconds,
            "messages": self.message_seconds,
        }
        if self.host_bandwidth is not None:
            figures["host bandwidth"] = self.host_bandwidth
        if self.random_bandwidth is not None:
            figures["random numbers"] = self.random_bandwidth
        if self.launch_seconds is not None:
            figures["launch"] = self.launch_seconds
        classes = {} if self.rates is None else self.rates.by_class()
        for kind, rates in classes.items():
            figures[f"{kind} compute"] = rates.compute_efficiency
            figures[f"{kind} memory"] = rates.memory_efficiency
            if rates.half_flop.value:
                figures[f"{kind} half flop"] = rates.half_flop
            if rates.half_bytes.value:
                figures[f"{kind} half bytes"] = rates.half_bytes
        allocator = self.allocator
        by_source: dict[str, list[str]] = {}
        for key, figure in figures.items():
            by_source.setdefault(figure.source or where, []).append(key)
        sources = [f"{', '.join(keys)} from {source}" for source, keys in by_source.items()]
        return Device(
            name=self.name,
            memory_bytes=int(self.memory_bytes.value),
            peak_flops={dtype: float(flops.value) for dtype, flops in self.peak_flops.items()},
            memory_bandwidth=self.memory_bandwidth.value,
            kernel_overhead_seconds=self.kernel_overhead_seconds.value,
            compute_efficiency=self.compute_efficiency.value,
            memory_efficiency=self.memory_efficiency.value,
            reserved_bytes=int(self.reserved_bytes.value),
            provenance="; ".join(sources),
            instruction_overhead_seconds=self.instruction_overhead_seconds.value,
            host_bandwidth=None if self.host_bandwidth is None else self.host_bandwidth.value,
            synchronous=self.synchronous,
            random_bandwidth=None if self.random_bandwidth is None else self.random_bandwidth.value,
            message_seconds=self.message_seconds.value,
            rates={kind: rates.to_rates() for kind, rates in classes.items()},
            launch_seconds=0.0 if self.launch_seconds is None else self.launch_seconds.value,
            allocator=Allocator() if isinstance(allocator, str) else _allocator(allocator),
        )


def _allocator(spec: AllocatorSpec | None) -> Allocator | None:
    return None if spec is None else spec.to_allocator()


class LinkSpec(Strict):
    """One link, each direction, per device (of a network: per adapter)."""

    name: Annotated[str, Field(min_length=1)]
    bandwidth: Figure
    """Bytes per second, nominal."""
    latency_seconds: Seconds
    efficiency: Fraction = _WHOLE
    """Part of the nominal bandwidth that large transfers reach."""
    duplex: bool = True
    """False where both directions share the bandwidth."""

    def to_link(self, adapters_per_device: float = 1.0) -> Link:
        """The link at the bandwidth that one device reaches."""
        return Link(
            name=self.name,
            bandwidth=self.bandwidth.value * self.efficiency.value * adapters_per_device,
            latency_seconds=self.latency_seconds.value,
            duplex=self.duplex,
        )


class LinkFile(Strict):
    """The packaged links."""

    links: list[LinkSpec]


class UsualHost(Strict):
    """The machine that a device usually comes in."""

    num_devices: Count
    link: str


class UsualNetwork(Strict):
    """The network between such machines."""

    link: str
    adapters_per_device: Figure


class DeviceProfile(Strict):
    """A packaged device: its figures and its usual surroundings."""

    cuda_names: list[str]
    """Names under which `torch.cuda.get_device_name` reports it."""
    device: DeviceSpec
    host: UsualHost
    network: UsualNetwork


NamedOrDevice = Annotated[
    Annotated[str, Tag("name")] | Annotated[DeviceSpec, Tag("inline")], Discriminator(_kind)
]
NamedOrLink = Annotated[
    Annotated[str, Tag("name")] | Annotated[LinkSpec, Tag("inline")], Discriminator(_kind)
]


class HostSpec(Strict):
    """One machine of a user's cluster, or several that are alike."""

    device: NamedOrDevice
    """Name of a packaged device, `cpu` (measured on this machine), or an inline device."""
    count: Annotated[int, Field(ge=1)]
    link: NamedOrLink | None = None
    """Between its devices; by default the usual one of a named device."""
    adapter_bandwidth: Figure | None = None
    """Of all its network adapters together; by default every device has the network's own."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """What `links` calls it."""
    copies: Annotated[int, Field(ge=1)] = 1
    """How many such machines there are, one after the other."""
    memory_bytes: Bytes | None = None
    """Of the machine itself, for its devices to offload to; by default as much as they need."""
    memory_bandwidth: Figure | None = None
    """That optimizers reach in that memory, for updates on the host (`--update-on host`) of all its
    devices together; by default 1e11 bytes per second, or a `cpu`'s own."""


class HostLinkSpec(Strict):
    """What connects two machines, or each of some with each of others."""

    between: Annotated[list[str], Field(min_length=2, max_length=2)]
    """Names of hosts; twice the same name for the copies of a host."""
    link: NamedOrLink


class ClusterFile(Strict):
    """A user's cluster file."""

    hosts: Annotated[list[HostSpec], Field(min_length=1)]
    name: str | None = None
    """By default the file's name without its ending."""
    network: NamedOrLink | None = None
    """Between hosts; by default the usual one of the first host's named device, where there are no
    `links`."""
    links: list[HostLinkSpec] = Field(default_factory=list)
    """Between hosts by name, where it is not the network."""
    backend: Annotated[str, Field(pattern="^(nccl|gloo)$")] | None = None
    """torch.distributed's backend; by default `gloo` where a device is `cpu`, else `nccl`."""
    collectives: CollectiveAlgorithm = "ring"
    measured: MeasuredSpec | None = None
    """Where `lga-profile --cluster` wrote the file."""
