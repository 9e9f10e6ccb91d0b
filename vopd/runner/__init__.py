"""A run from outside: checks before it starts, its processes watched, its folder resumed, its result shown."""
