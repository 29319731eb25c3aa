"""Devices, links and hosts, as the solver and the simulator read them."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

from planner.profile import OperatorClass

__all__ = [
    "HOST_MEMORY_BANDWIDTH",
    "Allocator",
    "Cluster",
    "CollectiveAlgorithm",
    "Device",
    "Host",
    "HostLink",
    "Link",
    "OperatorRates",
]

HOST_MEMORY_BANDWIDTH = 1e11
"""Bytes per second that an optimizer reaches in a server's memory: about half of what eight
channels of DDR4-3200 have (204.8e9)."""

CollectiveAlgorithm = Literal["ring", "tree", "auto"]
"""How collectives travel; `auto`: the quicker of the others, each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocator:
    """A caching allocator: it takes segments from the device and hands out blocks of them."""

    rounding_bytes: int = 512
    """Every request is rounded up to a multiple of this."""
    small_limit_bytes: int = 2**20
    """Requests up to this come from small segments."""
    small_segment_bytes: int = 2 * 2**20
    large_limit_bytes: int = 10 * 2**20
    """Requests below this, and above the small limit, come from large segments."""
    large_segment_bytes: int = 20 * 2**20
    segment_rounding_bytes: int = 2 * 2**20
    """Larger requests get a segment of their own, rounded up to a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRates:
    """How fast one class of operators runs, against the peaks of its device."""

    compute_efficiency: float
    """Part of peak_flops that the largest kernels of the class reach."""
    memory_efficiency: float
    """Part of memory_bandwidth that the largest kernels of the class reach."""
    half_flop: float = 0.0
    """A kernel with this many flop reaches half of the class's rate; 0: every size reaches all."""
    half_bytes: float = 0.0
    """A kernel that moves this many bytes reaches half of the class's rate; likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one process's share of a CPU."""

    name: str
    memory_bytes: int
    peak_flops: dict[str, float]
    """Dense flop/s by dtype (`float32`, `bfloat16`, ...), without sparsity."""
    memory_bandwidth: float
    """Bytes per second."""
    kernel_overhead_seconds: float
    """Least time from one kernel's start to the next one's."""
    compute_efficiency: float
    """Part of peak_flops that large matrix products reach."""
    memory_efficiency: float
    """Part of memory_bandwidth that large element-wise kernels reach."""
    reserved_bytes: int
    """Taken by the driver, the context and communication libraries before any tensor."""
    provenance: str
    """Sources of the figures: one line."""
    synchronous: bool = False
    """Kernels run in the thread that launches them (a CPU): the overhead adds to their time."""
    random_bandwidth: float | None = None
    """Bytes per second of kernels that draw random numbers; None: as other kernels."""
    message_seconds: float = 0.0
    """Compute time that each end of a pipeline transfer loses to it: on a CPU a transfer is CPU
    work; where a copy engine moves the bytes it is nothing."""
    instruction_overhead_seconds: float = 0.0
    """Host time to issue one instruction of a program, whatever its kind."""
    host_bandwidth: float | None = None
    """Bytes per second, each direction, between the device and its host's memory, from where
    batches and offloaded state come; None: such copies are free."""
    allocator: Allocator | None = None
    """None: memory is taken and given back byte by byte (a CPU)."""
    rates: Mapping[OperatorClass, OperatorRates] = field(default_factory=dict)
    """By class of operators; a class without any has the efficiencies above at every size."""
    launch_seconds: float = 0.0
    """Host time to issue one kernel. Kernels run behind the host, so a layer takes the longer of
    its kernels' time and its launches' time; 0: the host is never what a layer waits for."""
    update_efficiency: float | None = None
    """Part of memory_bandwidth that the user's optimizer was measured to reach; None: as large
    element-wise kernels."""

    @property
    def usable_bytes(self) -> int:
        """Memory less what is reserved."""
        return self.memory_bytes - self.reserved_bytes

    def operator_rates(self, kind: OperatorClass) -> OperatorRates:
        """The rates of a class: its own, or the device's efficiencies."""
        return self.rates.get(kind) or OperatorRates(
            compute_efficiency=self.compute_efficiency, memory_efficiency=self.memory_efficiency
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A connection of one device to others."""

    name: str
    bandwidth: float
    """Bytes per second, each direction, per device."""
    latency_seconds: float
    duplex: bool = True
    """False: both directions of a device share the bandwidth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine with equal devices."""

    device: Device
    num_devices: int
    link: Link
    """Between devices of this host."""
    adapter_bandwidth: float | None = None
    """Bytes per second, each direction, of all the host's network adapters together; None: enough
    for every device to use its own share of the network in full."""
    memory_bytes: int | None = None
    """Of the host's own memory, for all its devices to offload to; None: as much as they need."""
    name: str = ""
    """What `HostLink` calls it; equal hosts may share a name."""
    memory_bandwidth: float | None = None
    """Bytes per second that optimizers reach in that memory, for the updates of all its devices
    together; None: HOST_MEMORY_BANDWIDTH, or where the devices are the host's own processor, what
    each of them reaches."""

    @property
    def updater(self) -> Device:
        """What updates a device's part of the state on the host: its share of the memory."""
        device, bandwidth = self.device, self.memory_bandwidth
        if bandwidth is None and device.synchronous:
            return device
        share = (bandwidth or HOST_MEMORY_BANDWIDTH) / self.num_devices
        return replace(
            device, memory_bandwidth=share, memory_efficiency=1.0, update_efficiency=None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLink:
    """A connection of two hosts that is not the cluster's common network."""

    between: tuple[str, str]
    """Names of the hosts; twice the same for those of one name among each other."""
    link: Link
    """Bandwidth is each device's own share. Links of different names have ports of their own."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hosts and the network between them. World ranks fill the hosts in order."""

    name: str
    hosts: tuple[Host, ...]
    network: Link
    """Between hosts: bandwidth is each device's own share of its host's adapters."""
    backend: str
    """torch.distributed's backend: `nccl` or `gloo`."""
    provenance: str
    """Where the description comes from: named by the user, found on this machine, default."""
    collectives: CollectiveAlgorithm = "ring"
    host_links: tuple[HostLink, ...] = ()
    """Pairs of hosts with a link other than the network."""

    @property
    def num_devices(self) -> int:
        return self._ends[-1]

    def host_index(self, rank: int) -> int:
        """Index of the host that world rank `rank` lives on."""
        if rank >= self.num_devices:
            raise IndexError(f"world rank beyond the cluster's {self.num_devices} devices")
        return bisect_right(self._ends, rank)

    def device(self, rank: int) -> Device:
        """The device of world rank `rank`."""
        return self.hosts[self.host_index(rank)].device

    def link(self, rank: int, other: int) -> Link:
        """The link that connects two world ranks."""
        one, two = self.host_index(rank), self.host_index(other)
        if one == two:
            return self.hosts[one].link
        return self._between.get((self.hosts[one].name, self.hosts[two].name), self.network)

    def slowest_link(self, ranks: Sequence[int]) -> Link:
        """The link that bounds a ring of `ranks` in this order (at least one rank)."""
        return min(
            (self.link(one, other) for one, other in pairwise([*ranks, ranks[0]])),
            key=lambda link: link.bandwidth,
        )

    @cached_property
    def _ends(self) -> list[int]:
        """Per host: the world rank behind its last one."""
        return list(accumulate(host.num_devices for host in self.hosts))

    @cached_property
    def _between(self) -> dict[tuple[str, str], Link]:
        pairs = ((own.between, own.link) for own in self.host_links)
        return {names: link for (a, b), link in pairs for names in ((a, b), (b, a))}
