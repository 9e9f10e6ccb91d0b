"""`python -m vopd`: the same as the command `vopd`."""

import os
import sys

# `python -m` looks into the current folder first, where a folder named `data` would hide ours.
if sys.path and os.path.abspath(sys.path[0]) == os.getcwd() and not os.path.isfile("vopd/__main__.py"):
    del sys.path[0]

from vopd.cli import main

main()
