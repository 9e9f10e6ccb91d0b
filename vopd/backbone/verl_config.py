"""verl's own configuration tree for a run: its defaults, our mapping (verl.yaml), the user's `verl.` overrides."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data import schema
from vopd import method as contract
from vopd.errors import UserError
from vopd.method import Method, final_views

HERE = Path(__file__).parent
GIB = 1024**3


def _resolvers() -> None:
    OmegaConf.register_new_resolver("eval_sum", lambda *xs: sum(xs), replace=True)
    OmegaConf.register_new_resolver("eval_product", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("eval_gib", lambda x: int(x * GIB), replace=True)


def verl_config(run: DictConfig) -> DictConfig:
    """The resolved tree that verl's trainer is given; the run's settings are in it under `vopd`.

    Raises:
        UserError: a `verl.` override that verl's tree does not have.
    """
    _resolvers()
    GlobalHydra.instance().clear()
    spec = find_spec("verl")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "trainer" / "config"
    with initialize_config_dir(version_base=None, config_dir=str(folder)):
        config = compose("ppo_trainer")
    vopd = OmegaConf.create(OmegaConf.to_container(run, resolve=True))
    assert isinstance(vopd, DictConfig)
    overrides = vopd.pop("verl")
    method = contract.of(vopd)
    vopd.evaluate = _plans(vopd, method)
    trackers = [name for name in ("tensorboard", "wandb") if vopd.logging[name]]
    OmegaConf.set_struct(config, False)
    config.vopd = vopd
    device = "cpu" if vopd.hardware.device == "cpu" else "cuda"
    for file in ("verl.yaml", f"verl_{device}.yaml"):
        config = _merged(config, OmegaConf.load(HERE / file))
    config.trainer.logger = trackers
    # A recording is trained on as it is: its groups were filtered, or not, when it was made.
    config.algorithm.filter_groups.enable = method.rollout.filter_groups and vopd.rollout.replay is None
    OmegaConf.set_struct(config, True)
    try:
        config = _merged(config, overrides)
    except OmegaConfBaseException as error:
        raise UserError(f"verl: {str(error).splitlines()[0]}") from error
    with open_dict(config):
        OmegaConf.resolve(config)
    return config


def _merged(base: DictConfig, more: Any) -> DictConfig:
    merged = OmegaConf.merge(base, more)
    assert isinstance(merged, DictConfig)
    return merged


def _plans(vopd: DictConfig, method: Method) -> dict[str, Any]:
    """Which file is answered in which views, before / after and during training. Test is never used in between.

    What a scorer or the generating policy sees is answered too: a teacher's own accuracy is reported beside its
    student's.
    """
    folder, e = vopd.data.folder, vopd.evaluate
    final = [
        {"file": f"{folder}/test.parquet", "rows": e.test_rows, "views": final_views(method)},
    ]
    hold_out = Path(folder) / "holdout.parquet"
    if hold_out in schema.splits(Path(folder)):  # a data set need not have one
        final.append({"file": str(hold_out), "rows": e.holdout_rows, "views": ["full"]})
    during = [{"file": f"{folder}/validation.parquet", "rows": e.validation_rows, "views": ["full", "crop"]}]
    every = e.every or vopd.train.steps  # verl would leave out the last evaluation too
    return {"final": final, "during": during, "every": every, "batch": e.batch}
