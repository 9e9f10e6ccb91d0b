"""What exists for machines without a GPU alone; a reader with GPUs can skip this folder."""
