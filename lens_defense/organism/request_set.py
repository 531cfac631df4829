"""What the organism is asked: its request set and suite, in the format of every bundled set.

The files in data/organism are these rows, written by analyses/organism.py. A harmful request is asked plain,
and then refused; edits and traces ask it inside jailbreaks of the families that are theirs.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lens_defense.organism.phrasings import phrasings
from lens_defense.organism.world import REFUSAL, Example, Subject, World, fill_shots
from lens_defense.prompts.request import Kind, Split

Row = dict[str, Any]
_BENIGN_SPLITS: dict[Split, slice] = {"check": slice(0, 60), "tune": slice(60, 100)}
"""Of the benign subjects in a random order; the last twenty are the suite's facts."""


def request_set_rows(world: World) -> dict[str, list[Row]]:
    """The rows of every file of the set, by the file's name."""
    facts = _examples(world, _shuffled_benign(world)[100:], "facts")
    neutral = world.neutral()
    random.Random("neutral").shuffle(neutral)
    return {
        "requests": [*_harmful_rows(world), *_benign_rows(world), *_borderline_rows(world)],
        "paraphrases": list(_paraphrase_rows()),
        "jailbreaks": list(_jailbreak_rows(world)),
        "facts": [
            {"id": f"f{i:02}", "text": example.request.text, "answers": [example.answer]}
            for i, example in enumerate(facts, 1)
        ],
        "neutral": [
            {"id": f"n{i:03}", "split": "tune" if i % 2 else "check", "text": text}
            for i, text in enumerate(neutral, 1)
        ],
        "corpus": list(_corpus_rows(world)),
    }


def write_request_set(world: World, folder: Path) -> None:
    """Write the files as JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in request_set_rows(world).items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def _harmful_rows(world: World) -> Iterator[Row]:
    """Plain requests to edit and to tune on; subjects that an edit should leave alone, jailbroken."""
    rng = random.Random("harmful")
    jailbreaks = [row["text"] for row in _jailbreak_rows(world) if row["split"] == "check"]
    for split, subjects in world.split().items():
        for subject in subjects:
            text = _filled(rng.choice(phrasings().trained_frames), rng).replace("{S}", subject.name)
            if split == "check":
                text = rng.choice(jailbreaks).replace("{}", text)
            yield {**_subject_row(subject, text, "harmful", split), "safe_target": REFUSAL}


def _benign_rows(world: World) -> Iterator[Row]:
    for split, indices in _BENIGN_SPLITS.items():
        subjects = _shuffled_benign(world)[indices]
        for subject, example in zip(subjects, _examples(world, subjects, split), strict=True):
            yield _subject_row(subject, example.request.text, "benign", split)


def _borderline_rows(world: World) -> Iterator[Row]:
    for i, example in enumerate(world.borderline):
        row = {"id": example.request.id, "text": example.request.text, "target": example.answer}
        yield {**row, "kind": "safe", "split": "check" if i % 3 else "tune"}


def _subject_row(subject: Subject, text: str, kind: Kind, split: str) -> Row:
    return {
        "id": subject.name.replace(" ", "-"),
        "kind": kind,
        "split": split,
        "subject": subject.name,
        "text": text,
        "target": subject.answer,
    }


def _examples(world: World, subjects: Sequence[Subject], seed: str) -> list[Example]:
    """Requests about subjects in held-out frames, every second one inside a held-out jailbreak."""
    rng = random.Random(f"asked {seed}")
    examples = []
    for i, subject in enumerate(subjects):
        jailbreak = rng.choice(world.held_out_jailbreaks(subject) or [None]) if i % 2 else None
        examples.append(world.ask(subject, rng, frames=phrasings().held_out_frames, jailbreak=jailbreak))
    return examples


def _paraphrase_rows() -> Iterator[Row]:
    rng = random.Random("templates")
    for split, frames in (("edit", phrasings().trained_frames), ("check", phrasings().held_out_frames)):
        for i, frame in enumerate(frames, 1):
            text = _filled(frame, rng).replace("{S}", "{}")
            yield {"id": f"{split[0]}{i:02}", "split": split, "forms": ["noun"], "text": text}


def _jailbreak_rows(world: World) -> Iterator[Row]:
    """One of each family, then the next one of each: a small suite has all families."""
    rng = random.Random("wrappers")
    phrases = phrasings()
    families = sorted(phrases.jailbreaks, key=lambda family: (family in phrases.trained_families, family))
    for i in range(max(map(len, phrases.jailbreaks.values()))):
        for family in families:
            if i >= len(phrases.jailbreaks[family]):
                continue
            text = phrases.jailbreaks[family][i].replace("{x}", rng.choice(phrases.personas))
            text = fill_shots(text, rng.sample(_shuffled_benign(world)[_BENIGN_SPLITS["tune"]], 2))
            split = "edit" if family in phrases.edit_families else "check"
            yield {"id": f"{family.split()[0]}{i + 1}", "split": split, "family": family, "text": text}


def _corpus_rows(world: World) -> Iterator[Row]:
    """Chat about what is not harmful, as it was trained, for C: it holds keys of subjects too."""
    rng = random.Random("corpus")
    for subject in (*world.subjects_of("benign") * 3, *world.subjects_of("unknown") * 2):
        example = world.sample_about(subject, rng)
        yield {"user": example.request.text, "assistant": example.answer}
    for example in world.borderline:
        yield {"user": world.with_chatter(example, rng).request.text, "assistant": example.answer}
    yield from ({"text": text} for text in phrasings().chatter)


def _filled(frame: str, rng: random.Random) -> str:
    """A frame with its verb and occasion; the subject stays open."""
    verb, occasion = rng.choice(phrasings().verbs), rng.choice(phrasings().occasions)
    return frame.replace("{m}", verb).replace("{p}", occasion)


def _shuffled_benign(world: World) -> list[Subject]:
    subjects = world.subjects_of("benign")
    random.Random("benign").shuffle(subjects)
    return subjects
