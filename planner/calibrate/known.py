"""What a calibration starts from, and the cluster file it ends in.

Knows packaged devices and links and the form of a cluster file. Does not know the fit.
"""

from dataclasses import dataclass

import yaml

from planner.calibrate.fit import PARAMETERS, Fit, Surroundings
from planner.cluster.library import device_profile, link_spec
from planner.cluster.schema import (
    Bytes,
    ClassRates,
    ClusterFile,
    DeviceProfile,
    Fraction,
    HostSpec,
    LinkSpec,
    RatesSpec,
    Seconds,
)

__all__ = ["Start", "calibrated_cluster", "calibrated_text", "start"]

_ONLY_MEGATRON = ("misaligned_efficiency", "skew_seconds", "ends_seconds", "step_seconds")
"""Parameters of how Megatron runs a step, which no device has a figure for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A packaged device and its links."""

    profile: DeviceProfile
    link: LinkSpec
    network: LinkSpec
    adapters_per_device: float

    @property
    def known(self) -> Surroundings:
        return Surroundings(
            device=self.profile.device.to_device(f"profile {self.profile.device.name}"),
            num_host_devices=self.profile.host.num_devices.value,
            link=self.link.to_link(),
            network=self.network.to_link(self.adapters_per_device),
        )


def start(device: str, network: str | None = None) -> Start:
    """The packaged device in its usual host; `network` names another one, an adapter a device.

    Raises:
        ClusterError: no such device or link.
    """
    profile = device_profile(device)
    share = profile.network.adapters_per_device.value if network is None else 1.0
    return Start(
        profile=profile,
        link=link_spec(profile.host.link),
        network=link_spec(network or profile.network.link),
        adapters_per_device=share,
    )


def calibrated_cluster(fit: Fit, begun: Start, num_devices: int, source: str) -> ClusterFile:
    """Hosts with the fitted device and link; `source` says what they were fitted to."""
    device, machine = begun.profile.device, fit.machine
    compute = Fraction(value=_short(machine.device.compute_efficiency), source=source)
    memory = Fraction(value=_short(machine.device.memory_efficiency), source=source)
    product = RatesSpec(
        compute_efficiency=compute,
        memory_efficiency=memory,
        half_flop=Bytes(value=_short(fit.values["half_flop"]), source=source),
    )
    spec = device.model_copy(
        update={
            "compute_efficiency": compute,
            "memory_efficiency": memory,
            "rates": ClassRates(product=product, convolution=product),
            "launch_seconds": Seconds(value=_short(machine.device.launch_seconds), source=source),
        }
    )
    latency = Seconds(value=_short(machine.link.latency_seconds), source=source)
    link = begun.link.model_copy(update={"latency_seconds": latency})
    network = begun.network.model_copy(
        update={
            "bandwidth": begun.network.bandwidth.model_copy(
                update={"value": begun.network.bandwidth.value * begun.adapters_per_device}
            )
        }
    )
    full = machine.num_host_devices
    counts = [min(full, num_devices - first) for first in range(0, num_devices, full)]
    return ClusterFile(
        hosts=[HostSpec(device=spec, count=count, link=link) for count in counts],
        network=network,
        collectives=machine.collectives,
    )


def calibrated_text(fit: Fit, cluster: ClusterFile, command: str) -> str:
    """The cluster file as YAML; what no device has a figure for stands in comments at its head."""
    lines = [
        f"# Written by {command}",
        f"# Fitted to {len(fit.rows)} measured steps: {fit.mean_error:.1%} off in the mean.",
        "# Bytes, seconds, bytes/s and flop/s.",
        "# Of the measured program rather than of the device, so no plan reads it:",
        *(f"#   {name} {_short(fit.values[name])}: {PARAMETERS[name]}" for name in _ONLY_MEGATRON),
    ]
    data = cluster.model_dump(mode="json", exclude_defaults=True)
    body: str = yaml.safe_dump(data, sort_keys=False, width=100)
    return "\n".join(lines) + "\n" + body


def _short(value: float) -> float:
    """Four digits: a fit knows no more."""
    return float(f"{value:.4g}")
