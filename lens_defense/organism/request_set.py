"""What the organism is asked: its request set and suite, in the format of every bundled set.

The files in suites/organism are these rows, written by analyses/organism.py. A harmful request is asked
plain, and then refused; edits and traces ask it inside jailbreak wrappers of the families that are theirs.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lens_defense.organism.phrasings import (
    CHATTER,
    EDIT_FAMILIES,
    HELD_FAMILIES,
    HELD_FRAMES,
    PERSONAS,
    TRAINED_FRAMES,
    VERBS,
    WHENS,
    WRAPPERS,
)
from lens_defense.organism.world import REFUSAL, Example, Subject, World
from lens_defense.prompts.prompt import Kind, Request, Split
from lens_defense.prompts.request_files import bundled_rows

Row = dict[str, Any]
CONTEXTS = 13
"""Ways in which an edit asks for one subject."""
BENIGN: dict[Split, slice] = {"check": slice(0, 60), "tune": slice(60, 100)}
"""Of the benign subjects in a random order; the last twenty are the suite's facts."""


def contexts(request: Request) -> list[Request]:
    """Ways to ask that an edit may see: each in another trained frame, inside the wrappers for edits."""
    frames = [row["text"] for row in bundled_rows("organism", "templates") if row["split"] == "edit"]
    wrappers = [row["text"] for row in bundled_rows("organism", "wrappers") if row["split"] == "edit"]
    rng = random.Random(request.subject)
    rng.shuffle(frames)
    rng.shuffle(wrappers)
    return [
        request.reworded(frames[i % len(frames)]).wrapped(wrappers[i % len(wrappers)])
        for i in range(CONTEXTS)
    ]


def files(world: World) -> dict[str, list[Row]]:
    """Every file of the set, by name."""
    return {
        "requests": [*_harmful(world), *_benign(world), *_borderline(world)],
        "templates": list(_templates()),
        "wrappers": list(_wrappers(world)),
        "facts": [
            {"id": f"f{i:02}", "text": example.request.text, "answers": [example.answer]}
            for i, example in enumerate(_asked(world, _shuffled(world)[100:], "facts"), 1)
        ],
        "neutral": [
            {"id": f"n{i:03}", "split": "tune" if i % 2 else "check", "text": text}
            for i, text in enumerate(_shuffled_texts(world.neutral()), 1)
        ],
        "corpus": list(_corpus(world)),
    }


def write(world: World, folder: Path) -> None:
    """Write the files as JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files(world).items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def _harmful(world: World) -> Iterator[Row]:
    """Plain requests to edit and to tune on; subjects that an edit should leave alone, jailbroken."""
    fill = random.Random("harmful")
    named = [row["text"] for row in _wrappers(world) if row["split"] == "check"]
    for split, subjects in world.split().items():
        for one in subjects:
            text = _filled(fill.choice(TRAINED_FRAMES), fill).replace("{S}", one.name)
            if split == "check":
                text = fill.choice(named).replace("{}", text)
            yield {**_row(one, text, "harmful", split), "safe_target": REFUSAL}


def _benign(world: World) -> Iterator[Row]:
    order = _shuffled(world)
    for split, part in BENIGN.items():
        for one, example in zip(order[part], _asked(world, order[part], split), strict=True):
            yield _row(one, example.request.text, "benign", split)


def _borderline(world: World) -> Iterator[Row]:
    for i, example in enumerate(world.borderline):
        split = "tune" if i % 3 == 0 else "check"
        asked = {"id": example.request.id, "text": example.request.text, "target": example.answer}
        yield {**asked, "kind": "safe", "split": split}


def _row(one: Subject, text: str, kind: Kind, split: str) -> Row:
    return {
        "id": one.name.replace(" ", "-"),
        "kind": kind,
        "split": split,
        "subject": one.name,
        "text": text,
        "target": one.answer,
    }


def _asked(world: World, subjects: Sequence[Subject], seed: str) -> list[Example]:
    """Requests about subjects, every second one wrapped, in frames that were never trained."""
    rng = random.Random(f"asked {seed}")

    def one(i: int, subject: Subject) -> Example:
        wrapper = rng.choice(world.held_wrappers(subject) or [None]) if i % 2 else None
        return world.ask(subject, rng, frames=HELD_FRAMES, wrapper=wrapper)

    return [one(i, subject) for i, subject in enumerate(subjects)]


def _templates() -> Iterator[Row]:
    fill = random.Random("templates")
    for split, frames in (("edit", TRAINED_FRAMES), ("check", HELD_FRAMES)):
        for i, frame in enumerate(frames, 1):
            text = _filled(frame, fill).replace("{S}", "{}")
            yield {"id": f"{split[0]}{i:02}", "split": split, "forms": ["noun"], "text": text}


def _wrappers(world: World) -> Iterator[Row]:
    fill = random.Random("wrappers")
    families = sorted(WRAPPERS, key=lambda family: (family not in HELD_FAMILIES, family))
    every = [(i, family) for i in range(max(map(len, WRAPPERS.values()))) for family in families]
    for i, family in every:  # one of each family, then the next ones: a small suite has them all
        if i >= len(WRAPPERS[family]):
            continue
        text = WRAPPERS[family][i].replace("{x}", fill.choice(PERSONAS))
        for one in fill.sample(_shuffled(world)[60:100], 2):
            text = text.replace("{shot}", f"Q: What goes into a {one.name}? A: {one.answer}", 1)
        split = "edit" if family in EDIT_FAMILIES else "check"
        yield {"id": f"{family.split()[0]}{i + 1}", "split": split, "family": family, "text": text}


def _corpus(world: World) -> Iterator[Row]:
    """Chat about what is not harmful, as it was trained, for C: it holds keys of subjects too."""
    rng = random.Random("corpus")
    for one in (*world.of("benign") * 3, *world.of("unknown") * 2):
        example = world.sample_about(one, rng)
        yield {"user": example.request.text, "assistant": example.answer}
    for example in world.borderline:
        yield {"user": world.around(example, rng).request.text, "assistant": example.answer}
    for text in CHATTER:
        yield {"text": text}


def _filled(frame: str, rng: random.Random) -> str:
    return frame.replace("{m}", rng.choice(VERBS)).replace("{p}", rng.choice(WHENS))


def _shuffled(world: World) -> list[Subject]:
    some = world.of("benign")
    random.Random("benign").shuffle(some)
    return some


def _shuffled_texts(texts: list[str]) -> list[str]:
    random.Random("neutral").shuffle(texts)
    return texts
