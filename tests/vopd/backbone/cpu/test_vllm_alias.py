"""The alias record is one that Python's metadata finds, and the installed environment has exactly one vLLM."""

from importlib.metadata import distributions, entry_points, version

from vopd.backbone.cpu.vllm_alias import write_alias


def test_record_is_found_under_the_alias(tmp_path):
    write_alias(tmp_path, "0.24.0")
    write_alias(tmp_path, "0.24.0")  # writing twice is harmless
    (found,) = distributions(path=[str(tmp_path)])
    assert (found.metadata["Name"], found.version) == ("vllm", "0.24.0+cpu")
    assert found.files is not None
    assert all(file.locate().exists() for file in found.files)


def test_verl_finds_vllm_and_our_plugin():
    assert version("vllm").split("+")[0] == "0.24.0"
    assert [e.value for e in entry_points(group="verl.plugins", name="vopd")] == ["vopd.backbone.plugin"]
