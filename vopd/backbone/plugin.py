"""verl's entry point into vopd (group `verl.plugins`): loaded in every process that imports verl.

It only makes the CPU platform known; it is chosen by VERL_PLATFORM=cpu, never detected. verl logs a failing entry
point at DEBUG and continues, so `assert_loaded` is called where a run starts.
"""

from __future__ import annotations


def register() -> None:
    """Register the CPU platform. Idempotent."""
    from verl.plugin.platform import PlatformRegistry

    from vopd.backbone.cpu.platform import PlatformCPU

    if PlatformRegistry.get("cpu") is not PlatformCPU:
        PlatformRegistry.register(platform="cpu")(PlatformCPU)


def assert_loaded() -> None:
    """Raise RuntimeError where verl did not load this plug-in (package not installed, entry point shadowed)."""
    from verl.plugin.platform import PlatformRegistry

    if PlatformRegistry.get("cpu") is None:
        raise RuntimeError("verl did not load the vopd plug-in; run scripts/setup.sh again.")


register()
