"""Settings of a run that cannot be."""

from benchmarks.bad_inputs import Case

CASES = (
    Case("unknown recipe", "vopd.run", lambda _: ["vision_odp"], "There is no recipe 'vision_odp'"),
    Case("unknown key", "vopd.run", lambda _: ["vision_opd", "train.setps=3"], "setps"),
)
