"""Makes triplets from a folder of images: `vopd data synthesize [SETTINGS.yaml] key=value ...`.

After an interruption, the same command resumes. `--help` prints every key with its default.
"""

import json
import sys

from omegaconf import OmegaConf

from data.synthesis import config
from data.synthesis.pipeline import synthesize
from vopd.common.terminal import say
from vopd.errors import UserError


def main(overrides: list[str]) -> int:
    """Exit code 0; 2 for bad input or a server that does not answer; 1 when single requests stayed unanswered."""
    if "--help" in overrides or "-h" in overrides:
        print(f"{__doc__}\n{OmegaConf.to_yaml(OmegaConf.structured(config.Synthesis))}")
        return 0
    try:
        result = synthesize(config.load(overrides))
    except UserError as error:
        say(f"data.synthesize: {error}")
        return error.exit_code
    except OSError as error:  # a full disk, a folder that cannot be written
        print(
            f"data.synthesize: {error.filename or 'out'}: {error.strerror or error}; what is done is kept.",
            file=sys.stderr,
        )
        return UserError.exit_code
    except KeyboardInterrupt:
        print("data.synthesize: interrupted; the same command resumes from here.", file=sys.stderr)
        return 130
    print(json.dumps(result))
    if result["unanswered"]:
        print(
            "data.synthesize: some requests stayed unanswered; the same command asks them again.",
            file=sys.stderr,
        )
    return 1 if result["unanswered"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
