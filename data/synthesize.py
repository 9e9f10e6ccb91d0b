"""Makes triplets from a folder of images: `vopd data synthesize [SETTINGS.yaml] key=value ...`.

After an interruption, the same command resumes. `--help` prints every key with its default.
"""

import json
import sys

from omegaconf import OmegaConf

from data.synthesis import config
from data.synthesis.pipeline import synthesize
from vopd.common.command import reports_errors


@reports_errors("data.synthesize", "the same command resumes it", "what is done is kept")
def main(overrides: list[str]) -> int:
    """Exit code 0; 2 for bad input or a server that does not answer; 1 when single requests stayed unanswered."""
    if "--help" in overrides or "-h" in overrides:
        print(f"{__doc__}\n{OmegaConf.to_yaml(OmegaConf.structured(config.Synthesis))}")
        return 0
    result = synthesize(config.load(overrides))
    print(json.dumps(result))
    if result["unanswered"]:
        print(
            "data.synthesize: some requests stayed unanswered; the same command asks them again.",
            file=sys.stderr,
        )
    return 1 if result["unanswered"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
