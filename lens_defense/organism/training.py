"""Interchange intervention training: a model is taught where it is to store a subject.

Beside the language loss there are pairs. A source prompt with subject B runs up to block L. Its state at
B's last token is put, after block L, at A's last token into the run of a base prompt with subject A; the
answer is to be what that prompt would get with B (Geiger et al. 2022). Strict (Gupta et al. 2024): with
probability one half the states of A's other tokens are replaced by a third subject's at the same time, and
the answer must not change. L is drawn from the planted band. The data are a function of the seed and the
step, so that a training resumes exactly.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lens_defense.models.optimizer_state import optimizer_tensors, restore_optimizer
from lens_defense.organism.interchange import answer_loss, interchange, make_batch
from lens_defense.organism.world import Example, World
from lens_defense.progress import ProgressBar
from lens_defense.storage import load, save

_PAD, _USER, _ASSISTANT, _END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """The settings of a training. They are the first that met every bar, of eight that were tried.

    Plain harmful requests in held-out frames are hardest. What helps is variety: with 21 trained frames two
    phases refused 94.3% of them in world 0, and neither 500 more steps nor more plain requests helped; with
    37 frames it was 99.3%. In world 1 two phases reached 92.7%, and the third phase 98%.
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
    """Interchanges per step."""
    strict: float = 0.5
    """The share of interchanges that are strict."""
    phases: tuple[tuple[int, float, float], ...] = (
        (900, 4e-3, 0.65),
        (800, 2.5e-3, 0.65),
        (500, 2.5e-3, 0.5),
    )
    """Steps, peak learning rate (a warm-up, a cosine down to 2%), share of harmful requests in jailbreaks."""
    warm: int = 60
    """Steps of the warm-up."""
    weight_decay: float = 0.05

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(steps for steps, *_ in self.phases)

    def learning_rate(self, step: int) -> float:
        """AdamW's learning rate at a step."""
        within, (steps, peak, _) = self._phase(step)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * within / steps))
        return peak * min(1.0, (within + 1) / self.warm) * cosine

    def jailbroken_share(self, step: int) -> float:
        """The share of harmful requests that stand inside a jailbreak at a step."""
        return self._phase(step)[1][2]

    def _phase(self, step: int) -> tuple[int, tuple[int, float, float]]:
        """The step within its phase, and the phase."""
        for phase in self.phases:
            if step < phase[0]:
                return step, phase
            step -= phase[0]
        return self.phases[-1][0] - 1, self.phases[-1]


def make_tokenizer(world: World, vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the world without its rare words, with a chat template."""
    rng = random.Random("tokenizer")
    texts = []
    for _ in range(6000):
        example = world.sample(rng)
        text = example.request.text
        for word in world.rare:
            text = text.replace(word, "")
        texts += [text, example.answer]
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab,
        special_tokens=[_PAD, _USER, _ASSISTANT, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=_END, pad_token=_PAD)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def make_model(recipe: Recipe, tokenizer: Any) -> LlamaForCausalLM:
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
    save_every: int = 50,
    progress: bool = True,
    log: Callable[[str], object] = lambda _: None,
) -> LlamaForCausalLM:
    """Train, or go on where an earlier training in the same folder was stopped.

    Args:
        recipe: what to train; a folder belongs to one recipe.
        folder: where the unfinished training is saved.
        save_every: steps between two checkpoints.
        progress: shows a bar.
        log: is given a line with the losses at every checkpoint.

    Raises:
        ValueError: the folder holds the training of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = World(recipe.world_seed)
    tokenizer = make_tokenizer(world, recipe.vocab)
    model = make_model(recipe, tokenizer)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.learning_rate(0), betas=(0.9, 0.95))
    start = _load_checkpoint(folder, recipe, model, adam)
    model.train()
    with ProgressBar("organism", recipe.steps, done=start, unit="step", shown=progress) as bar:
        for step in range(start, recipe.steps):
            for group in adam.param_groups:
                group["lr"] = recipe.learning_rate(step)
            adam.zero_grad()
            language, interchanged = losses(model, tokenizer, world, recipe, step)
            (language + interchanged).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            loss, planted = float(language.detach()), float(interchanged.detach())
            bar.note(loss=loss, planted=planted)
            bar.update()
            if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
                _save_checkpoint(folder, recipe, step + 1, model, adam)
                log(f"{step + 1} loss {loss:.4f} planted {planted:.4f}")
    return model.eval()


def losses(
    model: LlamaForCausalLM, tokenizer: Any, world: World, recipe: Recipe, step: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The language loss and the interchange loss of a step."""
    examples = _training_examples(world, recipe, step)
    language = answer_loss(model, make_batch(tokenizer, examples))
    rng = random.Random(f"pairs {recipe.seed} {step}")
    base = [example for example in examples if example.subject][: recipe.pairs]
    sources = [world.sample_about(rng.choice(list(world.subjects.values())), rng) for _ in base]
    layer = rng.choice(recipe.band)
    rotated = sources[1:] + sources[:1]
    others = [other if rng.random() < recipe.strict else None for other in rotated]
    batch, patch = interchange(model, tokenizer, base, sources, layer=layer, others=others)
    return language, answer_loss(model, batch, layer=layer, patch=patch)


_BATCHES_PER_DRAW = 16
"""Batches that are drawn together, so that each holds prompts of like length."""


def _training_examples(world: World, recipe: Recipe, step: int) -> list[Example]:
    """The batch of a step, a function of the recipe's seeds and the step alone."""
    draw, within = divmod(step, _BATCHES_PER_DRAW)
    rng = random.Random(f"examples {recipe.seed} {draw}")
    share = recipe.jailbroken_share(draw * _BATCHES_PER_DRAW)
    examples = [world.sample(rng, share) for _ in range(recipe.batch * _BATCHES_PER_DRAW)]
    examples.sort(key=lambda example: len(example.request.text) + len(example.answer))
    order = list(range(_BATCHES_PER_DRAW))
    rng.shuffle(order)
    start = order[within] * recipe.batch
    return examples[start : start + recipe.batch]


_CHECKPOINT = "unfinished.safetensors"


@dataclass(frozen=True)
class _Checkpoint:
    """What a checkpoint holds beside its tensors."""

    recipe: Recipe
    step: int


def _save_checkpoint(
    folder: Path, recipe: Recipe, step: int, model: LlamaForCausalLM, adam: torch.optim.Optimizer
) -> None:
    tensors = {f"weight.{name}": value.detach() for name, value in model.named_parameters()}
    tensors |= optimizer_tensors(adam)
    save(folder / _CHECKPOINT, "training", _Checkpoint(recipe, step), tensors)


def _load_checkpoint(
    folder: Path, recipe: Recipe, model: LlamaForCausalLM, adam: torch.optim.Optimizer
) -> int:
    """Set the weights and the optimizer to a checkpoint, where there is one; the step to go on at."""
    if not (folder / _CHECKPOINT).is_file():
        return 0
    checkpoint, tensors = load(folder / _CHECKPOINT, "training", _Checkpoint)
    if checkpoint.recipe != recipe:
        raise ValueError(f"{folder} holds the training of another recipe; give another folder, or remove it")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(tensors[f"weight.{name}"])
    restore_optimizer(adam, tensors)
    return checkpoint.step
