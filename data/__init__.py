"""The triplets (full image, crop, question): their schema and the generated miniature."""
