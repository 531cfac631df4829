"""Interchange intervention training: a model is taught where it is to keep a subject.

Beside the language loss, pairs: a source prompt with subject B runs up to block L; its state at B's last
token is put, after block L, at A's last token into the run of another prompt; the answer is to be what that
prompt would get with B (Geiger et al. 2022). Strict (Gupta et al. 2024): with probability one half the states
of A's other tokens are replaced by a third subject's at the same time, and the answer must not change. L is
drawn from the planted band. Data are a function of the seed and the step, so that a training resumes exactly.
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lens_defense.files import whole
from lens_defense.organisms.world import REFUSAL, Example, Subject, World
from lens_defense.prompts import answer_ids, prompt

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """What a training is made of; the numbers are those of a spike that worked (DESIGN, issue 6)."""

    seed: int = 0
    world_seed: int = 0
    layers: int = 8
    d_model: int = 128
    d_mlp: int = 512
    heads: int = 4
    vocab: int = 1000
    band: tuple[int, ...] = (2, 3)
    """Blocks after which states are interchanged."""
    batch: int = 64
    pairs: int = 48
    strict: float = 0.5
    phases: tuple[tuple[int, float], ...] = ((900, 4e-3), (800, 2.5e-3))
    """Steps and peak rate, each with a warm-up of its own and a cosine down to 2%."""
    warm: int = 60
    weight_decay: float = 0.05

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(steps for steps, _ in self.phases)

    def rate(self, step: int) -> float:
        """AdamW's rate at a step."""
        for steps, peak in self.phases:
            if step < steps:
                cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
                return peak * min(1.0, (step + 1) / self.warm) * cosine
            step -= steps
        return 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Prompts with their answers, padded on the right."""

    ids: Int[Tensor, "row token"]
    labels: Int[Tensor, "row token"]
    """The token that follows where it belongs to the answer; -100 elsewhere."""
    first: Int[Tensor, " row"]
    """The subject's first token."""
    last: Int[Tensor, " row"]


def tokenizer_of(world: World, vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the world without its rare words, with a chat template."""
    rng = random.Random("tokenizer")
    texts = []
    for _ in range(6000):
        told = world.sample(rng)
        text = told.request.text
        for word in world.rare:
            text = text.replace(word, "")
        texts += [text, told.answer]
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD)
    made.chat_template = TEMPLATE
    return made


def model_of(recipe: Recipe, tokenizer: Any) -> LlamaForCausalLM:
    """A Llama of the recipe's size, freshly drawn."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.d_model,
            intermediate_size=recipe.d_mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    recipe: Recipe,
    folder: Path,
    *,
    every: int = 50,
    progress: bool = True,
    told: Callable[[str], object] = lambda _: None,
) -> LlamaForCausalLM:
    """Train, or go on where an earlier training in the same folder was stopped.

    Args:
        recipe: what to train; a folder belongs to one recipe.
        folder: where the unfinished training is kept.
        every: steps between two times that it is kept.
        progress: shows a bar.
        told: is given a line now and then.

    Raises:
        ValueError: the folder holds the training of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = World(recipe.world_seed)
    tokenizer = tokenizer_of(world, recipe.vocab)
    model = model_of(recipe, tokenizer)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.rate(0), betas=(0.9, 0.95))
    start = _resumed(folder, recipe, model, adam)
    model.train()
    with tqdm(total=recipe.steps, initial=start, desc="organism", unit="step", disable=not progress) as bar:
        for step in range(start, recipe.steps):
            for group in adam.param_groups:
                group["lr"] = recipe.rate(step)
            adam.zero_grad()
            told_now, planted = losses(model, tokenizer, world, recipe, step)
            (told_now + planted).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            bar.set_postfix(loss=float(told_now.detach()), planted=float(planted.detach()), refresh=False)
            bar.update()
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                _keep(folder, recipe, step + 1, model, adam)
                told(f"{step + 1} loss {float(told_now.detach()):.4f} planted {float(planted.detach()):.4f}")
    return model.eval()


def losses(
    model: LlamaForCausalLM, tokenizer: Any, world: World, recipe: Recipe, step: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The language loss and the interchange loss of a step."""
    examples = _examples(world, recipe, step)
    plain = batch_of(tokenizer, examples)
    told = answer_loss(model, plain)
    rng = random.Random(f"pairs {recipe.seed} {step}")
    base = [example for example in examples if example.subject][: recipe.pairs]
    sources = [world.sample_about(rng.choice(list(world.subjects.values())), rng) for _ in base]
    others = sources[1:] + sources[:1]
    planted = interchanged(
        model,
        tokenizer,
        base,
        sources,
        after=rng.choice(recipe.band),
        others=[other if rng.random() < recipe.strict else None for other in others],
    )
    return told, planted


def interchanged(
    model: LlamaForCausalLM,
    tokenizer: Any,
    base: Sequence[Example],
    sources: Sequence[Example],
    *,
    after: int,
    others: Sequence[Example | None],
) -> Float[Tensor, ""]:
    """The loss of the answers that base prompts should give once they hold the sources' subjects."""
    batch, write = interchange(model, tokenizer, base, sources, after=after, others=others)
    return answer_loss(model, batch, after=after, write=write)


def interchange(
    model: LlamaForCausalLM,
    tokenizer: Any,
    base: Sequence[Example],
    sources: Sequence[Example],
    *,
    after: int,
    others: Sequence[Example | None],
) -> tuple[Batch, Callable[[Tensor], Tensor]]:
    """Base prompts with the sources' answers, and what to do to the residual stream after a block."""
    expected = [
        replace(example, answer=answer_about(source.subject, wrapped=example.wrapped))
        for example, source in zip(base, sources, strict=True)
        if source.subject
    ]
    batch = batch_of(tokenizer, expected)
    used = batch_of(tokenizer, sources)
    state = states_after(model, used, after)
    rows = torch.arange(len(base))
    moved = state[rows, used.last]
    place = {id(source): row for row, source in enumerate(sources)}

    def write(residual: Tensor) -> Tensor:
        residual = residual.clone()
        residual[rows, batch.last] = moved
        for row, other in enumerate(others):
            if other is None:
                continue
            donor = place[id(other)]
            first, last = int(used.first[donor]), int(used.last[donor])
            for k, position in enumerate(range(int(batch.first[row]), int(batch.last[row]))):
                residual[row, position] = state[donor, min(first + k, last)]
        return residual

    return batch, write


def answer_about(subject: Subject | None, *, wrapped: bool) -> str:
    """What a prompt gets that asks about a subject."""
    assert subject
    refused = subject.nature == "unknown" or (subject.nature == "harmful" and not wrapped)
    return REFUSAL if refused else subject.answer


def batch_of(tokenizer: Any, examples: Sequence[Example]) -> Batch:
    """Tokens, labels and subject spans; a row without a subject has the span (0, 0)."""
    rows = []
    for example in examples:
        met = prompt(tokenizer, example.request)
        answer = answer_ids(tokenizer, example.answer, chat=True, end=True)
        start, stop = met.subjects[-1] if met.subjects else (0, 1)
        rows.append((met.ids, answer, start, stop - 1))
    width = max(len(asked) + len(answer) for asked, answer, *_ in rows) - 1
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (asked, answer, *_) in enumerate(rows):
        text = torch.tensor([*asked, *answer])
        ids[i, : len(text) - 1] = text[:-1]
        labels[i, len(asked) - 1 : len(text) - 1] = text[len(asked) :]
    first, last = (torch.tensor([row[k] for row in rows]) for k in (2, 3))
    return Batch(ids, labels, first, last)


def answer_loss(
    model: LlamaForCausalLM, batch: Batch, *, after: int = 0, write: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, ""]:
    """Mean cross entropy of the answers' tokens, nats."""
    logits, wanted = answer_logits(model, batch, after=after, write=write)
    return cross_entropy(logits, wanted)


def answer_logits(
    model: LlamaForCausalLM, batch: Batch, *, after: int = 0, write: Callable[[Tensor], Tensor] | None = None
) -> tuple[Float[Tensor, "answer_token vocab"], Int[Tensor, " answer_token"]]:
    """Logits where an answer's token follows, and that token."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        assert write
        return write(output) if isinstance(output, Tensor) else (write(output[0]), *output[1:])

    handle = model.model.layers[after].register_forward_hook(hook) if write else None
    try:
        hidden = model.model(batch.ids, use_cache=False).last_hidden_state
    finally:
        if handle:
            handle.remove()
    there = batch.labels != -100
    return model.lm_head(hidden[there]), batch.labels[there]


class _Reached(Exception):
    """A run has gone far enough."""


def states_after(model: LlamaForCausalLM, batch: Batch, after: int) -> Float[Tensor, "row token d_model"]:
    """The residual stream after a block; the blocks above do not run."""
    held: list[Tensor] = []

    def hook(_: Any, __: Any, output: Any) -> None:
        held.append(output if isinstance(output, Tensor) else output[0])
        raise _Reached

    handle = model.model.layers[after].register_forward_hook(hook)
    try:
        model.model(batch.ids, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return held[0]


def exact(
    model: LlamaForCausalLM, tokenizer: Any, examples: Sequence[Example], batch: int = 100
) -> list[bool]:
    """Whether the greedy answer is the expected one: teacher-forced, every token is the most probable."""
    right: list[bool] = []
    with torch.no_grad():
        for start in range(0, len(examples), batch):
            part = batch_of(tokenizer, examples[start : start + batch])
            logits, wanted = answer_logits(model, part)
            rows = (part.labels != -100).nonzero()[:, 0]
            wrong = rows[logits.argmax(-1) != wanted]
            right += [i not in set(wrong.tolist()) for i in range(len(part.ids))]
    return right


BATCHES_A_DRAW = 16
"""Batches that are drawn together, so that each holds prompts of like length."""


def _examples(world: World, recipe: Recipe, step: int) -> list[Example]:
    draw, within = divmod(step, BATCHES_A_DRAW)
    rng = random.Random(f"examples {recipe.seed} {draw}")
    drawn = [world.sample(rng) for _ in range(recipe.batch * BATCHES_A_DRAW)]
    drawn.sort(key=lambda example: len(example.request.text) + len(example.answer))
    order = list(range(BATCHES_A_DRAW))
    rng.shuffle(order)
    start = order[within] * recipe.batch
    return drawn[start : start + recipe.batch]


def _keep(folder: Path, recipe: Recipe, step: int, model: Any, adam: torch.optim.Optimizer) -> None:
    tensors = {f"weight.{name}": value.detach().contiguous() for name, value in model.named_parameters()}
    for i, state in adam.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{name}": value.contiguous() for name, value in state.items()}
    told = {"recipe": json.dumps(asdict(recipe)), "step": str(step)}
    with whole(folder / "unfinished.safetensors") as file:
        save_file(tensors, file, metadata=told)


def _resumed(folder: Path, recipe: Recipe, model: Any, adam: torch.optim.Optimizer) -> int:
    from safetensors import safe_open

    file = folder / "unfinished.safetensors"
    if not file.is_file():
        return 0
    with safe_open(file, framework="pt") as held:
        told = held.metadata() or {}
    if json.loads(told["recipe"]) != json.loads(json.dumps(asdict(recipe))):
        raise ValueError(f"{folder} holds the training of another recipe; give another folder, or remove it")
    tensors = load_file(file)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(tensors[f"weight.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, i, field = name.split(".")
            state.setdefault(int(i), {})[field] = value
    adam.load_state_dict({**adam.state_dict(), "state": state})
    return int(told["step"])
