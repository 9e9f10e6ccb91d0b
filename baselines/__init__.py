"""The methods Vision-OPD is compared with, one module each."""
