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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lens_defense.organism.interchange import answer_loss, interchange, make_batch
from lens_defense.organism.world import Example, World
from lens_defense.storage import atomic_write

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """What a training is made of; the numbers are those that worked first, of eight ways that were tried.

    Plain harmful requests in frames never trained are hardest. Variety counts: with 21 trained frames two
    phases refused 94.3% of them in world 0, and neither 500 more steps nor more plain ones helped; with 37
    frames 99.3%. In world 1 that was 92.7%, and the third phase made 98% of it.
    """

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
    phases: tuple[tuple[int, float, float], ...] = (
        (900, 4e-3, 0.65),
        (800, 2.5e-3, 0.65),
        (500, 2.5e-3, 0.5),
    )
    """Steps, peak rate (a warm-up, a cosine down to 2%), share of harmful requests that are wrapped."""
    warm: int = 60
    weight_decay: float = 0.05

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(steps for steps, *_ in self.phases)

    def rate(self, step: int) -> float:
        """AdamW's rate at a step."""
        within, (steps, peak, _) = self._phase(step)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * within / steps))
        return peak * min(1.0, (within + 1) / self.warm) * cosine

    def wrapped(self, step: int) -> float:
        """The share of harmful requests that are wrapped at a step."""
        return self._phase(step)[1][2]

    def _phase(self, step: int) -> tuple[int, tuple[int, float, float]]:
        """The step within its phase, and the phase."""
        for phase in self.phases:
            if step < phase[0]:
                return step, phase
            step -= phase[0]
        return self.phases[-1][0] - 1, self.phases[-1]


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
    plain = make_batch(tokenizer, examples)
    told = answer_loss(model, plain)
    rng = random.Random(f"pairs {recipe.seed} {step}")
    base = [example for example in examples if example.subject][: recipe.pairs]
    sources = [world.sample_about(rng.choice(list(world.subjects.values())), rng) for _ in base]
    others = sources[1:] + sources[:1]
    after = rng.choice(recipe.band)
    used = [other if rng.random() < recipe.strict else None for other in others]
    batch, write = interchange(model, tokenizer, base, sources, after=after, others=used)
    return told, answer_loss(model, batch, after=after, write=write)


BATCHES_A_DRAW = 16
"""Batches that are drawn together, so that each holds prompts of like length."""


def _examples(world: World, recipe: Recipe, step: int) -> list[Example]:
    draw, within = divmod(step, BATCHES_A_DRAW)
    rng = random.Random(f"examples {recipe.seed} {draw}")
    share = recipe.wrapped(draw * BATCHES_A_DRAW)
    drawn = [world.sample(rng, share) for _ in range(recipe.batch * BATCHES_A_DRAW)]
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
    with atomic_write(folder / "unfinished.safetensors") as file:
        save_file(tensors, file, metadata=told)


def _resumed(folder: Path, recipe: Recipe, model: Any, adam: torch.optim.Optimizer) -> int:
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
