"""What every other room uses: files, caches, images, text, processes. Imports no other room of vopd."""
