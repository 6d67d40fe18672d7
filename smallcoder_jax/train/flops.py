"""Peak matrix-product rates by device kind, for model FLOPs utilisation (MFU)."""

from __future__ import annotations

# Dense bf16 TFLOP/s from the data sheets, by the prefix of JAX's device kind.
PEAK_TFLOPS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "NVIDIA A100": 312,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
}


def peak_flops(device_kind: str) -> float | None:
    """The peak FLOP/s of one device, or None when no figure is known (a CPU)."""
    for start, tera in PEAK_TFLOPS.items():
        if device_kind.startswith(start):
            return tera * 1e12
    return None
