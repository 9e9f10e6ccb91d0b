"""`vopd data prepare vision_opd_6k ...`: see `data.vision_opd_6k.prepare`."""

import sys

from data.vision_opd_6k.prepare import main

if __name__ == "__main__":
    if sys.argv[1:2] != ["prepare"]:
        sys.exit("usage: vopd data prepare vision_opd_6k [--source DIR] --out DIR   (--help lists the rest)")
    sys.exit(main(sys.argv[2:]))
