"""Hardware sheets: what a device can do at most, from its vendor's documents. Peaks are dense, without sparsity.

A vendor's GB is taken as 10^9 bytes. `on_chip_bytes` is the fast memory of one core (a GPU's multiprocessor) that a fused
attention kernel may fill. A sheet of your own is a `Hardware` value or a JSON file with the same fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from workbench.cost.rates import Rates
from workbench.errors import UserError
from workbench.folders import cache_directory

ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
"""Bytes of one element of each dtype a sheet may have a peak for. TF32 is how float32 is multiplied, not how it is stored."""

TORCH_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""The short name of torch's dtypes, as an anatomy writes them."""

THIS_MACHINE = "this-machine"

_KIB = 1024
_GB = 1e9
_TB = 1e12
_TERA = 1e12


@dataclass(frozen=True)
class Hardware:
    """One device. `rates` is there only for a machine that was measured: what it reaches at which size, by dtype."""

    name: str
    label: str
    peak_flops: Mapping[str, float]
    """Dense FLOP/s of matrix products by dtype."""
    bandwidth: float
    """Bytes a second between memory and the processor."""
    memory_bytes: int
    on_chip_bytes: int
    sources: tuple[str, ...]
    note: str = ""
    rates: Mapping[str, Rates] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    """What a measured sheet was measured on."""

    def __post_init__(self) -> None:
        numbers = {"bandwidth": self.bandwidth, "memory_bytes": self.memory_bytes, "on_chip_bytes": self.on_chip_bytes}
        for name, value in [*numbers.items(), *self.peak_flops.items()]:
            if not value > 0:
                raise UserError(f"The hardware sheet {self.name!r} has {name}={value}; give a positive number.")
        unknown = [dtype for dtype in self.peak_flops if dtype not in ELEMENT_BYTES]
        if unknown or not self.peak_flops:
            found = repr(unknown[0]) if unknown else "nothing"
            raise UserError(f"The hardware sheet {self.name!r} has a peak for {found}; dtypes are {', '.join(ELEMENT_BYTES)}.")

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s of a dtype. Raises UserError if the sheet has none."""
        if dtype not in self.peak_flops:
            raise UserError(f"{self.label} has no {dtype} peak; choose one of its dtypes, {', '.join(self.peak_flops)}.")
        return self.peak_flops[dtype]

    def ridge(self, dtype: str) -> float:
        """FLOPs a byte from which on the peak binds rather than the bandwidth."""
        return self.peak(dtype) / self.bandwidth

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Hardware:
        """The sheet `to_dict` wrote. Raises UserError if fields are missing or unknown."""
        known = {each.name for each in fields(cls)}
        needed = known - {"note", "rates", "environment"}
        wrong = [
            *(f"lacks {name!r}" for name in sorted(needed - data.keys())),
            *(f"has an unknown field {name!r}" for name in data.keys() - known),
        ]
        if wrong:
            raise UserError(f"A hardware sheet {wrong[0]}; its fields are {', '.join(sorted(needed))}, and a note if you like.")
        rates = {dtype: Rates.from_dict(each) for dtype, each in data.get("rates", {}).items()}
        return cls(**{**data, "sources": tuple(data["sources"]), "rates": rates})


def this_machine_file() -> Path:
    """Where `workbench doctor --calibrate` keeps the sheet of this machine."""
    return cache_directory() / "hardware" / f"{THIS_MACHINE}.json"


def hardware(source: str | Path | Hardware) -> Hardware:
    """A hardware sheet: by name, from a JSON file, `this-machine` as it was calibrated, or the sheet given.

    Raises UserError for a name that is none, and for a file that holds no sheet.
    """
    if isinstance(source, Hardware):
        return source
    name = str(source)
    if name in HARDWARE:
        return HARDWARE[name]
    if name == THIS_MACHINE:
        if not this_machine_file().exists():
            raise UserError("This machine has not been measured yet; run `workbench doctor --calibrate` once.")
        return _read(this_machine_file())
    if name.endswith(".json"):
        return _read(Path(name))
    known = ", ".join([*HARDWARE, THIS_MACHINE])
    raise UserError(f"There is no hardware named {name!r}; known are {known}, or give a JSON file of your own.")


def _read(path: Path) -> Hardware:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the hardware sheet {path} ({error.strerror}); give a JSON file.") from None
    except ValueError:
        raise UserError(
            f"{path} is not JSON, so it is no hardware sheet; `workbench hardware h100-sxm --json` shows one."
        ) from None
    if not isinstance(data, dict):
        raise UserError(
            f"{path} holds no JSON object, so it is no hardware sheet; `workbench hardware h100-sxm --json` shows one."
        )
    try:
        return Hardware.from_dict(data)
    except (TypeError, AttributeError, KeyError):
        raise UserError(
            f"A field of the hardware sheet {path} is of the wrong kind; compare `workbench hardware h100-sxm --json`."
        ) from None


_AMPERE = "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"
_A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_HOPPER = "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_A100_PEAKS = {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312, "int8": 624}
_H100_SXM_PEAKS = {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp8": 1978.9, "int8": 1978.9}
_HALVED = "The datasheet gives tensor-core peaks with sparsity only; these are half of them"


def _sheet(
    name: str, label: str, tera: Mapping[str, float], bandwidth: float, memory_gb: float, on_chip_kib: int, sources, note=""
):
    peaks = {dtype: float(round(value * _TERA)) for dtype, value in tera.items()}
    return Hardware(name, label, peaks, bandwidth, int(memory_gb * _GB), on_chip_kib * _KIB, tuple(sources), note)


HARDWARE: dict[str, Hardware] = {
    sheet.name: sheet
    for sheet in (
        _sheet("a100-40", "NVIDIA A100 40GB SXM", _A100_PEAKS, 1.555 * _TB, 40, 192, [_AMPERE]),
        _sheet("a100-80", "NVIDIA A100 80GB SXM", _A100_PEAKS, 2.039 * _TB, 80, 192, [_A100, _AMPERE]),
        _sheet(
            "h100-sxm",
            "NVIDIA H100 SXM 80GB",
            _H100_SXM_PEAKS,
            3.35 * _TB,
            80,
            256,
            ["https://www.nvidia.com/en-us/data-center/h100/", _HOPPER],
            f"{_HALVED}, as in the architecture white paper.",
        ),
        _sheet(
            "h100-pcie",
            "NVIDIA H100 PCIe 80GB",
            {"fp32": 51.2, "tf32": 378, "bf16": 756, "fp16": 756, "fp8": 1513, "int8": 1513},
            2.0 * _TB,
            80,
            256,
            [_HOPPER],
        ),
        _sheet(
            "h200",
            "NVIDIA H200 SXM 141GB",
            _H100_SXM_PEAKS,
            4.8 * _TB,
            141,
            256,
            ["https://www.nvidia.com/en-us/data-center/h200/", _HOPPER],
            f"{_HALVED}; the compute of an H100 SXM.",
        ),
        _sheet(
            "b200",
            "NVIDIA B200 (HGX, 1000 W)",
            {"fp32": 75, "tf32": 1100, "bf16": 2250, "fp16": 2250, "fp8": 4500, "int8": 4500},
            7.7 * _TB,
            180,
            256,
            [
                "https://resources.nvidia.com/en-us-blackwell-architecture/datasheet",
                "https://docs.nvidia.com/cuda/blackwell-tuning-guide/index.html",
            ],
            f"{_HALVED}. One GPU of an HGX B200; its tensor memory (256 KiB a multiprocessor) is not in the on-chip bytes.",
        ),
        _sheet(
            "l40s",
            "NVIDIA L40S 48GB",
            {"fp32": 91.6, "tf32": 183, "bf16": 362.05, "fp16": 362.05, "fp8": 733, "int8": 733},
            864 * _GB,
            48,
            128,
            ["https://www.nvidia.com/en-us/data-center/l40s/", _ADA],
        ),
        _sheet(
            "rtx-4090",
            "NVIDIA GeForce RTX 4090 24GB",
            {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2, "fp8": 330.3, "int8": 660.6},
            1008 * _GB,
            24,
            128,
            [_ADA],
            "Half and FP8 peaks accumulate in FP32, as torch does; FP16 accumulation doubles them.",
        ),
        _sheet(
            "mi300x",
            "AMD Instinct MI300X 192GB",
            {"fp32": 163.4, "tf32": 653.7, "bf16": 1307.4, "fp16": 1307.4, "fp8": 2614.9, "int8": 2614.9},
            5.3 * _TB,
            192,
            64,
            [
                "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf",
                "https://rocm.docs.amd.com/en/latest/reference/gpu-arch-specs.html",
            ],
            "On-chip bytes are the local data share of one compute unit.",
        ),
        _sheet(
            "ascend-910c",
            "Huawei Ascend 910C (two dies)",
            {"bf16": 752, "fp16": 752, "int8": 1504},
            3.2 * _TB,
            128,
            512,
            ["https://arxiv.org/abs/2506.12708", "https://gitee.com/ascend/catlass"],
            "Huawei publishes no datasheet. Peaks, memory and bandwidth are those of its CloudMatrix384 paper, for both dies "
            "together; the on-chip bytes are estimated: the L1 buffer of a 910B core in Huawei's catlass, taken over.",
        ),
        _sheet(
            "m2-pro",
            "Apple M2 Pro (19-core GPU, 32GB)",
            {"fp32": 6.8, "fp16": 6.8},
            200 * _GB,
            32,
            32,
            [
                "https://www.apple.com/newsroom/2023/01/apple-unveils-m2-pro-and-m2-max-next-generation-chips-for-next-level-workflows/",
                "https://developer.apple.com/metal/Metal-Feature-Set-Tables.pdf",
            ],
            "Apple publishes bandwidth, memory and threadgroup memory, no FLOP/s: the peak is estimated as 19 cores x 128 "
            "lanes x 2 x 1.398 GHz.",
        ),
    )
}
