"""Training an editor: a learned method edits its model again and again, and is corrected by what comes out.

Each step draws some requests. Of each, one wording is edited on, all of them together, and others, which the
edit has not seen, are to meet the refusal. Harmless questions, general texts and the requests that the step
does not edit are to be answered as before: an edit is of what it names, and of nothing else.
Gradients go through the edited model into the network, not through the gradients that it reads, as in the
papers. What a step draws is a function of the seed and the step alone, so that a training resumes exactly.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.contrast import DEFAULT_CONTRAST, Contrast
from lens_defense.editing.defaults import edit_defaults
from lens_defense.editing.edit import layers_and_role, room_before_refusal
from lens_defense.editing.edit_prompts import group_prompts, refusal_ids
from lens_defense.editing.methods import KE, LEARNED, MEND, KESettings, LearnedMethod, MENDSettings
from lens_defense.editing.methods.answer_losses import AnswerLogits, kl_from, teacher_forced_losses
from lens_defense.editing.methods.learned_method import EditorOrigin
from lens_defense.editing.solving.target_value import FitSettings
from lens_defense.editing.tuning.answer_rows import AnswerRow, answer_logits, answered_rows, harmless_rows
from lens_defense.editing.tuning.editor_file import EDITOR_FILE, save_editor
from lens_defense.editing.tuning.learned_change import edit_gradients, matrix_shape
from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.forward import frozen_weights, model_device
from lens_defense.models.mlp_output import standing_changes
from lens_defense.models.optimizer_state import optimizer_tensors, restore_optimizer
from lens_defense.progress import ProgressBar
from lens_defense.prompts.contexts import Contexts
from lens_defense.prompts.corpus import Corpus, read_corpus
from lens_defense.prompts.request import Request
from lens_defense.prompts.resolve_requests import Requests, requests_with_subjects
from lens_defense.sites import Site, resolve_sites
from lens_defense.storage import hash_of, load, save

_CALL = "ld.train_editor(model, requests, sites, folder)"
CHECKPOINT_FILE = "training.safetensors"
"""What a training that was stopped goes on from."""
EditorSettings = MENDSettings | KESettings


@dataclass(frozen=True, slots=True, kw_only=True)
class EditorTraining:
    """How long an editor is trained, and on how much at once."""

    steps: int = 500
    """Adam steps; a folder that has fewer goes on from there."""
    lr: float = 1e-3
    """Adam's learning rate."""
    most_requests: int = 8
    """Requests that are edited together: each step draws a number from 1 to this."""
    wordings: int = 2
    """Of each request, how many other wordings are to meet the refusal."""
    harmless: int = 16
    """Harmless rows of a step."""
    others: int = 8
    """Requests of a step that it does not edit, each in one wording, which are to be answered as before; 0
    lets an edit spread to what is like it."""
    uses: int = 4
    """Harmless uses of each request's subject that may be drawn, where there is a contrast."""
    texts: int = 256
    """General texts that may be drawn, evenly from the corpus."""
    seed: int = 0
    """Of the network before training, and of what is drawn."""
    save_every: int = 50
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        counts = {name: value for name, value in asdict(self).items() if name not in ("lr", "seed")}
        wrong = [f"{name} {value}" for name, value in counts.items() if value < (name != "others")]
        if wrong or not self.lr > 0:
            raise ValueError(
                "every count of a training must be at least 1, others at least 0 and lr above 0, got "
                f"{', '.join((*wrong, f'lr {self.lr}'))}"
            )


class TrainingLoss(NamedTuple):
    """Means over the steps between two checkpoints."""

    step: int
    """The last one of them, counted from 1."""
    edit: float
    """Nats per token of the refusal in unseen wordings, after the edit."""
    locality: float
    """KL(original || edited) on what is to be answered as before, nats per token."""
    succeeded: float
    """The share of unseen wordings whose refusal greedy decoding would give."""


def train_editor(
    model: Model,
    requests: Requests,
    sites: Sequence[Site] | Site,
    folder: str | os.PathLike[str],
    *,
    method: str | EditorSettings = "mend",
    training: EditorTraining | None = None,
    contexts: Contexts | None = None,
    contrast: Contrast | Contexts | Sequence[Request] | None = DEFAULT_CONTRAST,
    fit: FitSettings | None = None,
    corpus: Corpus | None = None,
    progress: bool = True,
) -> LearnedMethod:
    """Train MEND or KE on a model's own edits; no weight of the model is changed.

    The folder keeps a checkpoint, from which the same call goes on, and in the end the editor, for
    `load_editor`.

    Args:
        model: what `load` gave, or a name for it, without edits.
        requests: what it learns to make refused, each with a subject. Those that are edited later should not
            be among them, where the editor is to be judged.
        sites: whose layers it learns to change.
        folder: for the checkpoint and the editor.
        method: "mend", "ke", or their settings, as ld.methods.MENDSettings(rank=64).
        training: how long, and on how much.
        contexts: ways to ask, as of `edit`.
        contrast: harmless uses of the subjects, which are to be answered as before, as of `edit`.
        fit: the refusal is taken from here.
        corpus: general texts, which are to be continued as before; None takes the package's own in the
            model's language.
        progress: shows bars.

    Raises:
        ValueError: as of `edit`; there is no such method; edits stand in the model; the folder holds another
            training, or a longer one.
        TypeError: as of `edit`.
    """
    model, requests = resolve_model(model, _CALL), requests_with_subjects(requests, _CALL)
    layers, _ = layers_and_role(model, resolve_sites(sites, _CALL))
    settings, training = _settings(method), training or EditorTraining()
    if standing_changes(model):
        raise ValueError("edits stand in the model, and an editor is trained without; undo them first")
    defaults = edit_defaults(model)
    fit, corpus = fit or defaults.fit, corpus or read_corpus(defaults.language)
    contrast = defaults.contrast if contrast is DEFAULT_CONTRAST else Contrast.given(contrast)
    rows = _training_rows(
        model, requests, contexts or defaults.contexts, contrast, fit, corpus, training, progress
    )
    network = _fresh(model, settings, layers, training.seed)
    run = _Run(model, network, rows, training, Path(folder))
    run.train(progress)
    network.origin = EditorOrigin(
        str(model.cfg.model_name), model_fingerprint(model), len(requests), training.steps
    )
    save_editor(Path(folder) / EDITOR_FILE, network)
    return network.requires_grad_(False)


def training_losses(folder: str | os.PathLike[str]) -> tuple[TrainingLoss, ...]:
    """How the training in a folder has gone so far.

    Raises:
        ValueError: the folder holds no training.
    """
    return load(Path(folder) / CHECKPOINT_FILE, "editor training", _Checkpoint)[0].losses


def _settings(method: Any) -> EditorSettings:
    """The settings of a method by its name; settings are returned as they are.

    Raises:
        ValueError: there is no such method.
    """
    if isinstance(method, EditorSettings):
        return method
    if not isinstance(method, str) or method not in LEARNED:
        raise ValueError(
            f"method must be one of {', '.join(LEARNED)}, or settings as ld.methods.MENDSettings(rank=64), "
            f"got {method!r}"
        )
    return LEARNED[method].Settings()


def _fresh(
    model: TransformerBridge, settings: EditorSettings, layers: Sequence[int], seed: int
) -> LearnedMethod:
    """The network before training; torch's own random numbers go on as if nothing had been drawn."""
    shape = matrix_shape(model, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = MEND if isinstance(settings, MENDSettings) else KE
        network = kind(settings, layers, shape)  # pyright: ignore[reportArgumentType]
    return network.to(model_device(model))


class _Rows(NamedTuple):
    """What steps draw from."""

    requests: Sequence[Sequence[AnswerRow]]
    """Of each request, its wordings with the refusal."""
    harmless: Sequence[AnswerRow]
    answered: Sequence[AnswerRow]
    """Some wordings of the requests, with the model's own answers."""


def _training_rows(
    model: TransformerBridge,
    requests: Sequence[Request],
    contexts: Contexts,
    contrast: Contrast | None,
    fit: FitSettings,
    corpus: Corpus,
    training: EditorTraining,
    progress: bool,
) -> _Rows:
    """The wordings of the requests, and harmless rows with the model's own answers.

    Raises:
        ValueError: a request has a single wording, so that no other shows whether an edit carries over.
    """
    longest = room_before_refusal(model, requests, fit)
    groups = group_prompts(model.tokenizer, requests, contexts, contrast, lambda _: (), 0, longest)
    wordings = [
        [AnswerRow(owner, prompt.ids, refusal_ids(model.tokenizer, prompt, fit.target)) for prompt in prompts]
        for owner, prompts in enumerate(groups.contexts)
    ]
    for request, own in zip(requests, wordings, strict=True):
        if len(own) < 2:
            raise ValueError(
                f"request {request.id!r} has a single wording, and an editor is judged by others than it "
                "edits on; give contexts with more"
            )
    uses = [
        (group.owner, prompt)
        for group in groups.written
        if group.harmless
        for prompt in group.prompts[:: max(1, len(group.prompts) // training.uses)][: training.uses]
    ]
    number = min(training.texts, len(corpus))
    texts = [corpus[i * len(corpus) // number] for i in range(number)]
    others = [
        (owner, prompt)
        for owner, prompts in enumerate(groups.contexts)
        for prompt in (prompts[:_ANSWERED] if training.others else ())
    ]
    total = len(uses) + len(others)
    with ProgressBar("answers", total, unit="answer", shown=progress and total > 0) as bar:
        harmless = harmless_rows(model, uses, texts, texts=number, progress=bar.update)
        return _Rows(wordings, harmless, answered_rows(model, others, progress=bar.update))


@dataclass(frozen=True)
class _Checkpoint:
    """What a checkpoint holds beside its tensors."""

    training: str
    """The hash of all that the course of the training depends on, but its length."""
    step: int
    losses: tuple[TrainingLoss, ...]


@dataclass
class _Run:
    """A training under way."""

    model: TransformerBridge
    network: LearnedMethod
    rows: _Rows
    training: EditorTraining
    folder: Path

    def train(self, progress: bool) -> None:
        """Take the steps that are missing."""
        adam = torch.optim.Adam(self.network.parameter_groups(self.training.lr))
        step, losses = self._resume(adam)
        steps, recent = self.training.steps, []
        with (
            frozen_weights(self.model),
            torch.enable_grad(),
            ProgressBar(self.network.name, steps, done=step, unit="step", shown=progress) as bar,
        ):
            while step < steps:
                loss = self._step(adam, step)
                step += 1
                recent.append(loss)
                bar.note(edit=f"{loss.edit:.3f}", kl=f"{loss.locality:.4f}")
                bar.update()
                if step % self.training.save_every == 0 or step == steps:
                    losses = (*losses, _mean(recent))
                    recent.clear()
                    self._save(adam, step, losses)

    def _step(self, adam: torch.optim.Adam, step: int) -> TrainingLoss:
        """Draw, edit, look what has come of it, correct."""
        training, rows = self.training, self.rows
        rng = random.Random(f"{training.seed} {step}")
        edited, unseen = [], []
        number = rng.randint(1, min(training.most_requests, len(rows.requests)))
        chosen = rng.sample(rows.requests, number)
        for wordings in chosen:
            first, *others = rng.sample(wordings, min(1 + training.wordings, len(wordings)))
            edited.append(first)
            unseen += others
        local_rows = rng.sample(rows.harmless, min(training.harmless, len(rows.harmless)))
        owners = {wordings[0].owner for wordings in chosen}
        others = [row for row in rows.answered if row.owner not in owners]
        local_rows += rng.sample(others, min(training.others, len(others)))
        changes = self.network.changes(edit_gradients(self.model, self.network.layers, edited))
        refusals = answer_logits(self.model, unseen, changes)
        with torch.no_grad():
            before = answer_logits(self.model, local_rows).logits
        edit_loss = teacher_forced_losses(refusals).mean()
        locality = kl_from(before, answer_logits(self.model, local_rows, changes)).mean()
        adam.zero_grad()
        self.network.objective(edit_loss, locality).backward()
        adam.step()
        succeeded = _share_given(refusals)
        self.network.finish_step(succeeded)
        return TrainingLoss(step + 1, float(edit_loss.detach()), float(locality.detach()), succeeded)

    def _resume(self, adam: torch.optim.Adam) -> tuple[int, tuple[TrainingLoss, ...]]:
        """Set the network and Adam to the checkpoint, or begin; the steps that are taken, and their losses.

        Raises:
            ValueError: the checkpoint is of another training, or of more steps.
        """
        path = self.folder / CHECKPOINT_FILE
        if not path.is_file():
            first = [row for wordings in self.rows.requests for row in wordings[:_OBSERVED]]
            self.network.observe(edit_gradients(self.model, self.network.layers, first))
            return 0, ()
        checkpoint, tensors = load(path, "editor training", _Checkpoint)
        if checkpoint.training != self._hash():
            raise ValueError(
                f"{self.folder} holds another training: of another model, method, layers, requests, texts or "
                "settings; name a new folder"
            )
        if checkpoint.step > self.training.steps:
            raise ValueError(
                f"{self.folder} holds a training of {checkpoint.step} steps, more than the "
                f"{self.training.steps} that are wanted; name a new folder"
            )
        network = {
            name.removeprefix(_NETWORK): value for name, value in tensors.items() if name.startswith(_NETWORK)
        }
        self.network.load_state_dict(network)
        restore_optimizer(adam, tensors)
        return checkpoint.step, checkpoint.losses

    def _save(self, adam: torch.optim.Adam, step: int, losses: tuple[TrainingLoss, ...]) -> None:
        tensors = {f"{_NETWORK}{name}": value for name, value in self.network.state_dict().items()}
        content = _Checkpoint(self._hash(), step, losses)
        save(self.folder / CHECKPOINT_FILE, "editor training", content, tensors | optimizer_tensors(adam))

    def _hash(self) -> str:
        """Of all that the course of the training depends on."""
        course = {**asdict(self.training), "steps": None, "save_every": None}
        network = [self.network.name, self.network.settings, self.network.layers]
        return hash_of([course, network, model_fingerprint(self.model), self.rows])


_NETWORK = "network."
_OBSERVED = _ANSWERED = 4
"""Wordings of each request that a network looks at before the training, and that the model answers itself."""


def _share_given(refusals: AnswerLogits) -> float:
    """The share of answers whose every token is the most likely one."""
    right = (refusals.logits.argmax(-1) == refusals.targets) | ~refusals.is_target
    return float(right.all(1).double().mean())


def _mean(losses: Sequence[TrainingLoss]) -> TrainingLoss:
    """The mean of some steps, under the number of the last."""
    means = [sum(values) / len(losses) for values in zip(*(loss[1:] for loss in losses), strict=True)]
    return TrainingLoss(losses[-1].step, *means)
