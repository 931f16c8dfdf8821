"""The stacks of codecs that are compared, as the configuration writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Component = Mapping[str, Any]
CAST: Component = {"name": "cast", "dtype": "bfloat16"}
IDENTITY: Component = {"name": "identity"}
LORA_RANK = 8
BANG_BANG: Component = {"name": "bang_bang"}
OPEN: Component = {**BANG_BANG, "coarse": 4.0, "start": 0.25}
UNCOMPRESSED, RECOMMENDED = "uncompressed", "recommended"


@dataclass(frozen=True)
class Stack:
    """Codecs of a run. `uplink` and `downlink` at the cut; in a U-shape activations take the first and gradients the second, whichever way
    they go. `adapters` both ways."""

    name: str
    title: str
    uplink: Component
    downlink: Component
    adapters: Component = field(default_factory=lambda: CAST)
    controller: Component | None = None
    exit_downlink: Component | None = None
    exit_uplink: Component | None = None

    def values(self, exit_side: str = "client") -> dict[str, Any]:
        """The sections of the configuration; without those of a U-shape's exit where the exit is on the server."""
        sections = {
            "uplink": self.uplink,
            "downlink": self.downlink,
            "adapter_uplink": self.adapters,
            "exit_downlink": self.exit_downlink,
            "exit_uplink": self.exit_uplink,
            "controller": self.controller,
        }
        used = {name: one for name, one in sections.items() if exit_side == "client" or not name.startswith("exit_")}
        return {name: dict(one) for name, one in used.items() if one is not None}

    def is_kept_as(self, codecs: Mapping[str, Any], exit_side: str) -> bool:
        """Whether kept figures of a run with these codecs are this stack's."""
        wanted = self.values(exit_side)
        return wanted == {name: one for name, one in codecs.items() if name in wanted or not name.startswith("exit_")}


def over(name: str, inner: Component, **fields: Any) -> Component:
    """A codec over another one."""
    return {"name": name, "inner": inner, **fields}


def bounded(bound: float, of: str = "rms", zone: float = 0.5) -> Component:
    return {"name": "error_bounded", "bound": bound, "of": of, "dead_zone": zone}


def quantize(bits: int) -> Component:
    return {"name": "quantize", "bits": bits}


def change(bound: float) -> Component:
    """What has changed of a sample, to within a share of the sample's root mean square."""
    return over("residual", bounded(bound, "absolute"))


def alike(name: str, title: str, codec: Component) -> Stack:
    """The same codec both ways."""
    return Stack(name, title, codec, codec)


@dataclass(frozen=True)
class Cached:
    """A tensor sent as changes in its principal axes: the bound of its error, a share of a sample's root mean square, and what is ignored
    of the changes of samples that come again."""

    bound: float
    ignore: float

    def codec(self, scale: float = 1.0) -> Component:
        return over("projection", over("residual", bounded(self.bound * scale, "absolute"), ignore=self.ignore * scale))


@dataclass(frozen=True)
class Preset:
    """What is recommended for a length of run: of activations and gradients at the cut, of both at a U-shape's exit, and the bound of
    adapters' changes (a share of their root mean square)."""

    activations: Cached
    gradients: Cached
    adapters: float
    exit_activations: Cached
    exit_gradients: Cached

    def stack(self, name: str, title: str, scale: float = 1.0, controller: Component | None = None) -> Stack:
        """Its codecs, with errors of tensors `scale` times as large."""
        return Stack(
            name,
            title,
            self.activations.codec(scale),
            self.gradients.codec(scale),
            over("feedback", bounded(self.adapters)),
            controller,
            self.exit_activations.codec(scale),
            self.exit_gradients.codec(scale),
        )


# At the exit every error goes straight into the loss, so its tensors are sent finer.
EXIT = (Cached(0.03, 0.045), Cached(0.15, 0.2))
SHORT_RUN = Preset(Cached(0.125, 0.2), Cached(0.5, 0.7), 0.5, *EXIT)
MEDIUM_RUN = Preset(Cached(0.125, 0.2), Cached(0.5, 0.7), 0.5, *EXIT)
# Where the uplink is what counts: two and a half times the errors of activations at the cut, a little more at the exit.
LONG_COARSE = Preset(Cached(0.25, 0.4), Cached(0.5, 0.7), 1.0, Cached(0.037, 0.055), Cached(0.16, 0.22))
LONG_RUN = Preset(Cached(0.1, 0.15), Cached(0.5, 0.7), 1.0, *EXIT)
PRESETS: Mapping[int, tuple[str, Preset]] = {
    1: ("short", SHORT_RUN),
    3: ("short", SHORT_RUN),
    10: ("medium", MEDIUM_RUN),
    50: ("long", LONG_RUN),
}


def _bounded_stacks() -> list[Stack]:
    found = [alike(f"error_bounded_{bound:g}", f"error_bounded {bound:g}", bounded(bound)) for bound in (0.0625, 0.125, 0.5)]
    found.append(alike("projection_error_bounded", "projection(error_bounded 0.125)", over("projection", bounded(0.125))))
    found += [
        Stack(
            f"residual_{bound:g}",
            f"residual(error_bounded {bound:g}), gradients error_bounded {8 * bound:g}",
            change(bound),
            bounded(8 * bound),
        )
        for bound in (0.0625, 0.125, 0.25)
    ]
    return found


def _published() -> list[Stack]:
    """What papers describe, with their own settings where they give any. Adapters as 16-bit values: they say nothing else."""
    temporal = over("temporal", CAST, threshold=0.98)
    return [
        Stack(
            "splitlite",
            "SplitLite: lowrank 2r 4 bit up, 4r 8 bit down",
            over("lowrank", CAST, rank=2 * LORA_RANK, bits=4),
            over("lowrank", CAST, rank=4 * LORA_RANK, bits=8),
        ),
        Stack("aq_sgd", "AQ-SGD: residual(quantize 4) up, quantize 8 down", over("residual", quantize(4), drift=False), quantize(8)),
        Stack("splitcom", "SplitCom: temporal 0.98 up, 16 bit down", temporal, CAST),
        Stack(
            "splitcom_int8", "SplitCom: temporal 0.98 over int8 up, int8 down", over("temporal", quantize(8), threshold=0.98), quantize(8)
        ),
        Stack("splitcom_bang_bang", "SplitCom: temporal up, bang_bang, 16 bit down", temporal, CAST, controller=OPEN),
    ]


def _sparse() -> list[Stack]:
    return [
        alike("topk", "topk 30 %", over("topk", CAST, share=0.3)),
        alike("feedback_topk", "feedback(topk 10 %)", over("feedback", over("topk", CAST, share=0.1))),
        alike("randk", "randk 30 %", over("randk", CAST, share=0.3)),
        alike("entropy_cast", "entropy(cast)", over("entropy", CAST)),
        alike("entropy_quantize_4", "entropy(quantize 4)", over("entropy", quantize(4))),
    ]


def stacks(epochs: int = 10) -> dict[str, Stack]:
    """All stacks for runs of that length, by name, the uncompressed reference first: every other run is measured against that one."""
    kind, preset = PRESETS[epochs]
    name = f"recommended ({kind})"
    found = [
        Stack(UNCOMPRESSED, "uncompressed", CAST, CAST, IDENTITY),
        preset.stack(RECOMMENDED, name),
        Stack("cast", "cast", CAST, CAST),
        *(alike(f"quantize_{bits}", f"quantize {bits}", quantize(bits)) for bits in (8, 4, 2)),
        *_bounded_stacks(),
        LONG_COARSE.stack("recommended_coarse", "recommended (long, coarse activations)"),
        preset.stack("recommended_half", f"{name}, half the errors", 0.5),
        preset.stack("recommended_twice", f"{name}, twice the errors", 2.0),
        *_published(),
        *_sparse(),
        *(preset.stack(f"recommended_{one}", f"{name} with {one}", controller={"name": one}) for one in ("ddpg", "energy")),
        preset.stack("recommended_bang_bang", f"{name} with bang_bang", controller={**BANG_BANG, "coarse": 1.0, "start": 0.5}),
        preset.stack("recommended_open", f"{name} with bang_bang up to 4", controller=OPEN),
    ]
    return {one.name: one for one in found}
