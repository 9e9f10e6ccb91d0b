"""A pipeline from a folder of photographs to triplets: what `vopd data synthesize` runs.

After ZwZ (arXiv 2602.11858), the parent of Vision-OPD-6K: regions are proposed, cropped and enlarged; a multimodal
model asks about the crop and answers itself several times; only what it agrees with itself on becomes a row.
"""
