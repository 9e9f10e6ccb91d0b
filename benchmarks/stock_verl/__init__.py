"""What `benchmarks/against_verl.py` puts into verl's own plug-in points to run the package as it is on two CPU cores.

Nothing of verl is replaced: the platform, the vLLM worker and the delta rule are those of `vopd/backbone/cpu/`, the
reward is our parser behind `reward.custom_reward_function`, the buffer and the agent loop are verl's with one value
or one method changed. Each module is imported by verl itself, in the process that needs it.
"""
