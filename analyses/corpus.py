# %% [markdown]
# # The corpus that C = E[k kᵀ] is taken over
# Chat turns and answers sampled from smollm2 itself, from its bare system prompt on: no text of
# anybody's is needed, and C holds keys of what the model is asked. Turns that are not plain ASCII, or
# that touch a harmful subject of the package, are dropped. Every other benign and safe request of the tune
# split follows with the model's greedy answer, and so do the requests of data/core/harmless.jsonl, so that C
# knows dangerous words in harmless use, and letters, plans and commands; the forecast measures its leak on the
# other half of tune's.
#
#     python analyses/corpus.py

# %%
import itertools
import json
import re
from pathlib import Path

import torch

import lens_defense as ld
from lens_defense.models.generate import generate, greedy
from lens_defense.prompts.conversation import decode_answer
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request
from lens_defense.prompts.request_files import bundled_rows

TURNS, SEED, MAX_BYTES = 400, 0, 57_000
TUNE_TOKENS, ORDINARY_TOKENS = 48, 16
"""Lengths of the answers to tune's harmless requests, and to ordinary ones."""
OUT = Path(__file__).parents[1] / "lens_defense" / "data" / "core" / "corpus.jsonl"
UNWANTED = re.compile(
    r"\b(kill|murder|weapon|bomb|explos|drug|suicid|rape|sex|nude|porn|naz|terror|hack|malware|"
    r"virus|poison|steal|fraud|racis|slur|gun|shoot|abus|assault|attack|blood|death|dead|child)",
    re.IGNORECASE,
)

# %%
model = ld.load("smollm2", device="cpu")  # what is drawn on another device is another text
generator = torch.Generator().manual_seed(SEED)


def sample(logits):
    """One token per row at temperature 1."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


opening = tokenize(model.tokenizer, request("x"))
before = opening.ids[: opening.roles.index("before")]
subjects = [
    row.subject.lower() for split in ("edit", "tune", "check") for row in ld.requests("core", split=split)
]


def is_fit(text):
    """Plain, harmless text of some length."""
    return (
        text.isascii()
        and len(text) >= 20
        and not UNWANTED.search(text)
        and not any(subject in text.lower() for subject in subjects)
    )


turns = generate(model, [before] * TURNS, max_new_tokens=60, pick=sample)
users = [decode_answer(model.tokenizer, ids) for ids in turns if ids[-1] == model.tokenizer.eos_token_id]
users = [text for text in dict.fromkeys(users) if is_fit(text)]
prompts = [tokenize(model.tokenizer, request(text)).ids for text in users]
answer_ids = generate(model, prompts, max_new_tokens=80, pick=sample)
answers = [decode_answer(model.tokenizer, ids) for ids in answer_ids]

# %%
rows = [
    {"user": user, "assistant": answer} for user, answer in zip(users, answers, strict=True) if is_fit(answer)
]
sizes = itertools.accumulate(len(json.dumps(row)) + 1 for row in rows)
rows = [row for row, size in zip(rows, sizes, strict=True) if size <= MAX_BYTES]


def answered(requests, max_new_tokens):
    """Requests with the model's greedy answers."""
    prompts = [tokenize(model.tokenizer, item).ids for item in requests]
    answers = generate(model, prompts, max_new_tokens=max_new_tokens, pick=greedy)
    return [
        {"user": item.text, "assistant": decode_answer(model.tokenizer, ids)}
        for item, ids in zip(requests, answers, strict=True)
    ]


tune = [item for kind in ("benign", "safe") for item in ld.requests("core", split="tune", kind=kind)[::2]]
ordinary = [request(row["text"]) for row in bundled_rows("core", "harmless")]
rows += [*answered(tune, TUNE_TOKENS), *answered(ordinary, ORDINARY_TOKENS)]
with OUT.open("w", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
