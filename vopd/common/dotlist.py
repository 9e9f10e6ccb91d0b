"""`key=value` words of commands without Hydra (`vopd.evaluation.evaluate`, `data.synthesize`): read, merged, held to bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vopd.common.overrides import check_interpolations
from vopd.errors import UserError

Bounds = Mapping[str, tuple[float, float]]
TINY = 1e-9  # for what must be above nothing
MOST_SEED = 2**32 - 1
_QUOTES = "a value with brackets, commas or spaces stands in quotes, such as 'KEY=[a, b]'"


def merge(layers: Sequence[DictConfig], words: Sequence[str]) -> DictConfig:
    """The layers, later ones first, with the words on top. Interpolations stay, but can be resolved.

    Raises:
        UserError: a word that is no setting, a key given twice, an unknown key, a wrong type, a missing value.
    """
    seen: set[str] = set()
    for word in words:
        key, is_setting, _ = word.partition("=")
        if not is_setting or not key.strip():
            raise UserError(f"'{word}' is not a setting; write key=value (--help lists the keys); {_QUOTES}.")
        if key in seen:
            raise UserError(f"{key} is given twice; give it once ({_QUOTES}).")
        seen.add(key)
        check_interpolations(f"'{word}'", word)
    try:
        merged = OmegaConf.merge(*layers, OmegaConf.from_dotlist(list(words)))
        OmegaConf.resolve(merged.copy())
    except (OmegaConfBaseException, YAMLError, RecursionError) as error:
        at_fault = getattr(error, "full_key", None)
        where = f"{at_fault}: " if at_fault else ""
        said = str(error).strip().splitlines()[0]
        hint = f"; {_QUOTES}" if isinstance(error, YAMLError) or "ListConfig" in said else ""
        raise UserError(f"Setting not understood: {where}{said}{hint}.") from error
    assert isinstance(merged, DictConfig)
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise UserError(f"The setting '{missing[0]}' has no value; give {missing[0]}=... (--help shows how).")
    return merged


def check_bounds(config: DictConfig, bounds: Bounds) -> None:
    """Refuse a number outside its least and most value, NaN included."""
    for key, (least, most) in bounds.items():
        value = OmegaConf.select(config, key)
        if not least <= value <= most:
            low = "more than 0" if least == TINY else f"at least {least:g}"
            raise UserError(f"{key}={value} cannot be; give a number of {low} and at most {most:.10g}.")
