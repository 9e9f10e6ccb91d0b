"""Settings of a run, a comparison or an evaluation that are refused."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.bad_inputs import Case

Arguments = Callable[[Path], list[str]]


def given(*arguments: str, recipe: str = "vision_opd") -> Arguments:
    """The arguments of a run of a recipe, in the case's own folder."""
    return lambda folder: [recipe, f"run_dir={folder / 'run'}", *arguments]


def run(kind: str, says: str, *arguments: str, recipe: str = "vision_opd") -> Case:
    """A run that is refused for its arguments."""
    return Case(kind, "vopd.runner.run", given(*arguments, recipe=recipe), says)


def compare(kind: str, says: str, *arguments: str) -> Case:
    """A comparison that is refused for its arguments."""
    return Case(kind, "vopd.runner.series", lambda _: ["vision_opd", *arguments], says)


def evaluate(kind: str, says: str, *arguments: str) -> Case:
    """An evaluation that is refused for its arguments."""
    return Case(
        kind, "vopd.evaluation.evaluate", lambda _: ["model=m", "benchmarks=[miniature]", *arguments], says
    )


CASES = (
    run("unknown recipe", "There is no recipe 'vision_odp'", recipe="vision_odp"),
    run("unknown key", "train.setps: there is no such setting (is train.steps meant?)", "train.setps=3"),
    run("unknown section", "hydra.run.dir: there is no such setting", "hydra.run.dir=/x"),
    # ---- bounds
    run("no prompts", "train.prompts=0 is not allowed; give from 1", "train.prompts=0"),
    run("no steps", "train.steps=0 is not allowed; give from 1", "train.steps=0"),
    run("negative steps", "train.steps=-1 is not allowed", "train.steps=-1"),
    run("steps beyond any run", "train.steps=99999999999999999999 is not allowed", "train.steps=99999999999999999999"),
    run("negative learning rate", "train.lr=-1.0 is not allowed; give from 0 to 1", "train.lr=-1"),
    run("learning rate NaN", "train.lr=nan is not allowed", "train.lr=nan"),
    run("learning rate infinite", "train.lr=inf is not allowed", "train.lr=inf"),
    run("one beta", "train.betas=[0.9] is not allowed; give 2 numbers", "train.betas=[0.9]"),
    run("beta of 1", "each from 0 to below 1", "train.betas=[0.9,1]"),
    run("no tokens in a chunk", "train.chunk=0 is not allowed", "train.chunk=0"),
    run("saving every -1 updates", "train.save_every=-1 is not allowed", "train.save_every=-1"),
    run("gradient clipped to nothing", "train.grad_clip=0.0 is not allowed; give above 0", "train.grad_clip=0"),
    run("a test of one question", "evaluate.test_rows=1 allows no interval", "evaluate.test_rows=1"),
    run("one held-out question", "evaluate.holdout_rows=1 allows no interval", "evaluate.holdout_rows=1"),
    run("updates that do not divide a batch", "cannot be dealt out evenly", "train.updates_per_batch=3"),
    run("ranks that do not divide a batch", "on 3 devices", "hardware.devices_per_node=3"),
    run("top_p of 0", "rollout.top_p=0.0 is not allowed; give above 0 to 1", "rollout.top_p=0"),
    run("top_p above 1", "rollout.top_p=1.5 is not allowed", "rollout.top_p=1.5"),
    run("top_p that the trainer does not know", "rollout.top_p=0.9 must be 1", "rollout.top_p=0.9"),
    run("temperature that the trainer does not know", "at temperature 1 over", "rollout.temperature=0.7"),
    run("temperature by verl's key", "rollout.temperature is not to be set",
        "verl.actor_rollout_ref.rollout.temperature=0.7"),
    run("negative temperature", "rollout.temperature=-1.0 is not allowed", "rollout.temperature=-1"),
    run("share above 1", "rollout.train_share=7.0 is not allowed", "rollout.train_share=7"),
    run("no cache on a CPU", "rollout.cache_gib=0", "rollout.cache_gib=0"),
    run("negative cache", "rollout.cache_gib=-1.0 is not allowed", "rollout.cache_gib=-1"),
    run("unknown device", "hardware.device=gpu is not allowed; give one of cpu, cuda", "hardware.device=gpu"),
    run("negative memory", "hardware.memory_gib=-1.0 is not allowed", "hardware.memory_gib=-1"),
    run("several CPU machines", "hardware.nodes=2 needs hardware.device=cuda", "hardware.nodes=2"),
    run("unknown type of weights", "export=float99 is not allowed; give one of float32", "export=float99"),
    run("unknown attention", "model.attention=flash is not allowed", "model.attention=flash"),
    run("a GPU's attention on a CPU", "needs hardware.device=cuda", "model.attention=flash_attention_2"),
    run("negative seed", "seed=-1 is not allowed", "seed=-1"),
    run("seed of 33 bits", "seed=4294967296 is not allowed", "seed=4294967296"),
    run("a truth value for a number", "train.steps: Value 'True'", "train.steps=true"),
    run("negative rows", "evaluate.test_rows=-1 is not allowed", "evaluate.test_rows=-1"),
    run("beta of the divergence above 1", "method.beta=2.0 is not allowed; give from 0 to 1", "method.beta=2"),
    run("top k of 0", "method.top_k=0 is not allowed", "method.top_k=0"),
    run("teacher's rate above 1", "method.teacher_rate=1.5 is not allowed", "method.teacher_rate=1.5"),
    run("unknown view", "method.teacher_view=zoom is not allowed; give one of full, crop", "method.teacher_view=zoom"),
    run("unknown teacher", "method.teacher=ghost is not allowed", "method.teacher=ghost"),
    run("clip range of DAPO", "method.clip_low=2.0 is not allowed", "method.clip_low=2", recipe="dapo"),
    run("negative KL of GRPO", "method.kl=-1.0 is not allowed", "method.kl=-1", recipe="grpo"),
    run("top k above the vocabulary", "its vocabulary has 1,024 entries, and the method needs 5,000",
        "method.top_k=5000", "hardware.memory_gib=0", "hardware.disk_gib=0"),
    run("longer than the model reads", "takes 2,048 tokens", "rollout.max_response_tokens=4096",
        "hardware.memory_gib=0", "hardware.disk_gib=0"),
    # ---- overrides
    run("a key with a plus", "write train.foo=1, without +", "+train.foo=1"),
    run("a key with two pluses", "settings cannot be added", "++train.lr=1e-5"),
    run("a key to remove", "cannot be removed", "~train.lr"),
    run("a key with dashes", "settings have no dashes; write seed=1", "--seed=1"),
    run("a key given twice", "train.lr is given twice", "train.lr=1e-5", "train.lr=1e-4"),
    run("a key in two spellings", "train.lr is given twice", "train={lr: 1e-5}", "train.lr=1e-4"),
    run("two profiles", "profile= is given twice", "profile=miniature", "profile=qwen3_5_4b_8gpu"),
    run("a profile without a name", "profile= has no value", "profile="),
    run("unquoted commas", "commas need brackets or quotes: a list is train.betas=[0.9,0.95]",
        "train.betas=0.9,0.95"),
    run("a sweep", "a key has one value", "seed=1,2"),
    run("an empty value", "'train.lr=' has no value", "train.lr="),
    run("spaces around the equals sign", "without spaces", "train.lr = 3"),
    run("an override without a key", "without spaces", "=3"),
    run("a section replaced by a number", "train is a section", "train=5"),
    run("a Cyrillic letter in a key", "CYRILLIC SMALL LETTER A", "tr\u0430in.lr=1"),
    run("curly quotes", "is not understood", "run_dir=\u201cx\u201d"),
    run("another digit", "is not understood", "train.steps=\uff14"),
    run("null where a value is needed", "export cannot be null", "export=null"),
    run("another module for a recipe", "it belongs to the recipe", "method.module=baselines.grpo"),
    run("a config group", "is not a key", "train@model=x"),
    run("a secret from the environment", "stays out of a run's files", "logging.project=${oc.env:HOME}"),
    run("a secret for verl", "stays out of a run's files", "verl.trainer.project_name=${oc.env:HOME}"),
    run("a reference to no key", "nowhere", "logging.project=${nowhere}"),
    run("circular references", "Setting not understood", "logging.project=${logging.project}"),
    # ---- comparisons and evaluations
    compare("seeds as a range", "seeds=0..1000000 is not understood", "seeds=0..1000000"),
    compare("seeds in brackets", "seeds=[0,1] is not understood", "seeds=[0,1]"),
    compare("no seeds", "seeds= is not understood", "seeds="),
    compare("seeds in other digits", "is not understood", "seeds=\u0663"),
    compare("seeds twice", "seeds= is given twice", "seeds=0", "seeds=1"),
    compare("more seeds than a comparison takes", "at most 100", f"seeds={','.join(map(str, range(101)))}"),
    compare("a folder for all runs", "every run has its own run_dir", "run_dir=x"),
    evaluate("temperature below 0", "temperature=-1.0 is not allowed", "temperature=-1"),
    evaluate("no tokens to answer with", "max_tokens=0 is not allowed", "max_tokens=0"),
    evaluate("no time to answer", "timeout=0.0 is not allowed", "timeout=0"),
    evaluate("an evaluation's key twice", "rows is given twice", "rows=1", "rows=2"),
    evaluate("an evaluation's secret", "stays out of a run's files", "out=${oc.env:HOME}"),
)  # fmt: skip
