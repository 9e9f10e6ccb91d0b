"""The miniature: a generated world, a tiny Qwen3.5-architecture model, and the scripts that make both."""
