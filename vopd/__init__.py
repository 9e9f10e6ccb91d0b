"""vopd: post-training methods that teach a multimodal LLM to see small details, compared on equal terms."""
