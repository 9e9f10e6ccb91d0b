"""What the miniature's base model learns to say: evidence first, in an order that varies, then the letter.

Every statement can be checked in the crop and in the full view. The number of statements varies, and a
geometric tail of repeated looks gives responses a long upper end, so that a response limit is a real limit.
"""

from itertools import pairwise

import numpy as np

from data.miniature.world import Facts, Scene

REPEAT = 0.42
RESPONSE_LIMIT = 40


def _statements(facts: Facts) -> dict[str, str]:
    said = {
        "name": f"The {facts.noun} is {facts.name}.",
        "colour": f"It is {facts.colour}.",
        "size": f"It is {facts.size}.",
        "place": f"It sits {facts.place}.",
        "ground": f"The ground is {facts.ground}.",
    }
    if facts.tilt:
        said["tilt"] = "Upright." if facts.tilt == "upright" else f"Tilted {facts.tilt}."
    return said


def response(facts: Facts, family: str, answer: str, rng: np.random.Generator) -> str:
    """A correct response: two to five statements, the asked one among them, then `Answer: X`."""
    said = _statements(facts)
    asked = "colour" if family == "colour" else "name"
    others = [k for k in said if k != asked]
    chosen = [others[i] for i in rng.permutation(len(others))[: rng.integers(1, 5)]]
    chosen.insert(int(rng.integers(len(chosen) + 1)), asked)
    parts = [said[k] for k in chosen]
    for i, (a, b) in enumerate(pairwise(chosen)):
        if (a, b) == ("size", "colour"):
            parts[i : i + 2] = [f"It is {facts.size} and {facts.colour}."]
            break
    while rng.random() < REPEAT:
        parts.append(f"Again, a {facts.colour} {facts.name}.")
    return " ".join([*parts, f"Answer: {answer}"])


def scene_response(scene: Scene, rng: np.random.Generator) -> str:
    """A correct response to one scene."""
    return response(scene.facts, scene.family, scene.answer, rng)
