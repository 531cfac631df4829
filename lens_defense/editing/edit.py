"""Planning an edit: from requests and sites to a change of each layer. No weight is changed.

A method that solves: at the sites' role, the keys of the requests are made to write what starts a refusal.
The value is fitted at the highest of the layers; then, layer by layer, each takes its share of what is still
missing (MEMIT's spread). How keys and residuals become a change is the method's (methods/), which may also
say which of the sites' layers are changed, and by what shares.

A method that tunes: the matrices of the sites' layers go down the method's loss (tuning.py). A learned
method: its network reads the loss's gradients there once, and makes the change of them (learned_change.py).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.arguments import refuse_strength
from lens_defense.editing.contrast import DEFAULT_CONTRAST, Contrast
from lens_defense.editing.defaults import edit_defaults
from lens_defense.editing.edit_plan import Edit, EditWarning, relative_change
from lens_defense.editing.edit_prompts import EditPrompts, group_prompts, refusal_ids
from lens_defense.editing.forecast import measure_forecast
from lens_defense.editing.methods import (
    EditingMethod,
    Factors,
    LearnedMethod,
    Method,
    TuningMethod,
    find_method,
    memit,
)
from lens_defense.editing.solving.covariance import key_covariances, shrink_covariances
from lens_defense.editing.solving.kept_keys import Keep, edits_to_keep, kept_rows
from lens_defense.editing.solving.layer_spread import layer_shares, reach_of_change, spread_over_layers
from lens_defense.editing.solving.target_value import FIT_VERSION, FitSettings, fit_target_values
from lens_defense.editing.solving.value_batch import FitRow
from lens_defense.editing.tuning.answer_rows import AnswerRow, harmless_rows
from lens_defense.editing.tuning.learned_change import learned_change, require_trained_on
from lens_defense.editing.tuning.tuning import tune
from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.context_length import context_length, refuse_too_long
from lens_defense.models.fingerprint import Fingerprint, model_fingerprint
from lens_defense.models.forward import model_device, refuse_hooks
from lens_defense.models.mlp_output import (
    output_modules,
    refuse_uneditable,
    standing_changes,
    without_changes,
)
from lens_defense.progress import ProgressBar
from lens_defense.prompts.chat_template import bound_arguments
from lens_defense.prompts.contexts import Contexts
from lens_defense.prompts.conversation import tokenize_text
from lens_defense.prompts.corpus import Corpus, read_corpus
from lens_defense.prompts.prompt import role_position, tokenize
from lens_defense.prompts.request import Request, Role
from lens_defense.prompts.resolve_requests import Requests, requests_with_subjects
from lens_defense.prompts.surface_forms import Names
from lens_defense.sites import Site, resolve_sites
from lens_defense.storage import cached

_CALL = "ld.edit(model, requests, sites)"
FIT_CONTEXTS = 32
"""Contexts of a request, the first ones, that its value is fitted on; the keys of all are written."""


def edit(
    model: Model,
    requests: Requests,
    sites: Sequence[Site] | Site,
    *,
    method: Method | str = memit,
    contexts: Contexts | None = None,
    contrast: Contrast | Contexts | Sequence[Request] | None = DEFAULT_CONTRAST,
    names: Names | None = None,
    held_out_contexts: int = 2,
    fit: FitSettings | None = None,
    corpus: Corpus | None = None,
    keep: Keep = (),
    strength: int | float = 1.0,
    cache: bool = True,
    progress: bool = True,
) -> Edit:
    """Plan a change after which the requests meet a refusal; no weight is changed.

    Args:
        model: what `load` gave, or a name for it: a pre-norm model with dense MLPs, whose weights are as they
            are meant to stay.
        requests: what shall be refused, each with a subject: requests, rows, or the name of a set. None is of
            the split "check".
        sites: where, of one role; their layers are edited (by ROME and DINM the middle one), their component
            says where the effect was seen.
        method: how the change is made: ld.methods.memit, ld.methods.DELMAN(batch_size=4),
            ld.methods.LoRA(r=4), a name as in ld.methods.METHODS, a learned one that ld.load_editor gave, or
            an object of your own.
        contexts: ways to ask, from a request; varied ones make an edit carry over. None: those of the model's
            language, default_contexts in English. What is too long for the model is left out.
        contrast: harmless uses of the same subjects, which stay answered; your own are a function from a
            request, or a list. None: whatever names a subject is refused, as in MEMIT and DELMAN. The default
            is None where the model's language has none, as the organism's. What has no use for them, as FT,
            FT-L, LED and learned methods, only forecasts what becomes of them.
        names: how else a subject is written or called, from a request. None: its own spelling alone.
        held_out_contexts: how many contexts and harmless uses, from the end, are kept for the forecast.
        fit: how the values are fitted, and the refusal; None takes the defaults of the model's language. A
            method that does not solve takes the refusal alone from here.
        corpus: where C, or the general texts of a method that tunes, come from, see read_corpus; None takes
            the package's own in the model's language. C is that of the model without the edits that stand.
        keep: edits that stand in the model and shall go on working: a ledger, an edit or several. Where they
            share layers with this one, nothing new is written at their keys (solving/kept_keys.py). A method
            that tunes, or a learned one, cannot keep any.
        strength: a factor of the fitted values, which the layers are then solved for; of a method that does
            not solve, of its change.
        cache: keep covariances and values on disk.
        progress: shows bars.

    Raises:
        ValueError: a request without a subject or of the split "check"; sites of several roles, of attention,
            or not in the model; a model that cannot be edited; an unknown method; a contrast of another kind;
            an edit to keep that is of another model or does not know its keys, or one to keep for a method
            that does not solve; a learned method of another model or other layers; a strength that is not
            finite or not above 0; held_out_contexts below 0; a hook in the model.
        TypeError: sites, or keep, of another kind.
    """
    model, requests = resolve_model(model, _CALL), requests_with_subjects(requests, _CALL)
    layers, role = layers_and_role(model, resolve_sites(sites, _CALL))
    method, defaults = find_method(method), edit_defaults(model)
    earlier_edits = edits_to_keep(keep, model, f"{_CALL[:-1]}, keep=ledger)")
    solves = not isinstance(method, TuningMethod | LearnedMethod)
    if earlier_edits and not solves:
        raise ValueError(
            f"the method {method.name} {'tunes' if isinstance(method, TuningMethod) else 'is learned'} and "
            "cannot keep earlier edits; leave out keep, or take a method that solves, as memit"
        )
    if isinstance(method, LearnedMethod):
        require_trained_on(method, model, layers)
    refuse_strength(strength)
    refuse_hooks(model)
    fit, corpus = fit or defaults.fit, corpus or read_corpus(defaults.language)
    if held_out_contexts < 0:
        raise ValueError(f"held_out_contexts must be at least 0, got {held_out_contexts}")
    contrast = defaults.contrast if contrast is DEFAULT_CONTRAST else Contrast.given(contrast)
    groups = group_prompts(
        model.tokenizer,
        requests,
        contexts or defaults.contexts,
        contrast,
        names or (lambda _: ()),
        held_out_contexts,
        longest=room_before_refusal(model, requests, fit),
    )
    rows = _fit_rows(model, requests, groups, role, fit)
    inputs = _Inputs(model, layers, role, groups, rows, corpus, strength, cache, progress)
    settings: dict[str, Any] = {"target": fit.target}
    if isinstance(method, LearnedMethod):
        change = _with_reach(inputs, *learned_change(model, method, inputs.refusals))
    elif isinstance(method, TuningMethod):
        change = _with_reach(inputs, *_tuned(inputs, method))
    else:
        change = _solved(inputs, method, fit, earlier_edits, contrast)
        settings = {**asdict(fit), "contrast_weight": None, **(contrast.settings if contrast else {})}
    factors, layers = change.factors, tuple(change.factors)
    forecast = measure_forecast(
        model,
        factors,
        subjects=[request.subject or "" for request in requests],
        reach=change.reach[: len(requests)],
        reach_harmless=change.reach[len(requests) :],
        value_norm=change.value_norm,
        language=defaults.language,
    )
    plan = Edit(
        layers=layers,
        left={layer: change.left for layer, change in factors.items()},
        right={layer: change.right for layer, change in factors.items()},
        role=role,
        method=method.name,
        settings={
            **settings,
            **_settings_of(method),
            **({"chat_arguments": bound} if (bound := bound_arguments(model.tokenizer)) else {}),
            **({"kept_edits": len(earlier_edits)} if earlier_edits else {}),
            **({"strength": float(strength)} if strength != 1 else {}),
        },
        requests=requests,
        contexts=tuple(groups.conversations(i) for i in range(len(requests))),
        losses=tuple(change.losses),
        relative_change={
            layer: relative_change(model, layer, change.left, change.right)
            for layer, change in factors.items()
        },
        forecast=forecast,
        model=str(model.cfg.model_name),
        fingerprint=model_fingerprint(model, layers),
        request_names=groups.names,
        modules=output_modules(model, layers),
        tuned=not solves,
        key_rows=change.key_rows,
    )
    for sentence in plan.warnings:
        warnings.warn(sentence, EditWarning, stacklevel=2)
    return plan


class _Inputs(NamedTuple):
    """What every method is given."""

    model: TransformerBridge
    layers: Sequence[int]
    """Those of the sites."""
    role: Role
    groups: EditPrompts
    rows: Sequence[FitRow]
    corpus: Corpus
    strength: int | float
    cache: bool
    progress: bool

    @property
    def refusals(self) -> list[AnswerRow]:
        """The contexts of each request with their refusal."""
        return [AnswerRow(row.owner, row.ids, row.target) for row in self.rows if row.target]


class _Change(NamedTuple):
    """What a method makes of them."""

    factors: Mapping[int, Factors]
    """By layer, lowest first."""
    losses: Sequence[float]
    """Of each request."""
    reach: Sequence[float]
    """Of each measured group."""
    value_norm: float
    """The mean norm of the requests' values, as they were fitted."""
    key_rows: Mapping[int, Float[Tensor, "_ d_in"]]
    """By layer, the keys that it was made for; of a method that does not solve none."""


def _solved(
    inputs: _Inputs,
    method: EditingMethod,
    fit: FitSettings,
    earlier_edits: Sequence[Edit],
    contrast: Contrast | None,
) -> _Change:
    """The change that writes fitted values at the keys."""
    model, cache, progress = inputs.model, inputs.cache, inputs.progress
    shares = layer_shares(method, inputs.layers)
    layers = tuple(shares)
    fingerprint = model_fingerprint(model) if cache else Fingerprint("")
    original = None if standing_changes(model) else fingerprint
    with without_changes(model):  # so all edits that stand on one another have the same C
        covariances = key_covariances(
            model, layers, inputs.corpus, fingerprint=original, cache=cache, progress=progress
        )
    ridge = contrast.ridge if contrast else 0.0
    covariances = shrink_covariances(model, covariances, inputs.corpus, ridge)
    values, losses = _target_values(model, inputs.rows, layers[-1], fit, fingerprint, cache, progress)
    spread = spread_over_layers(
        model,
        inputs.groups.written,
        inputs.role,
        shares,
        inputs.strength * values,
        covariances,
        method,
        mean_keys=contrast is None,
        measured=inputs.groups.measured,
        earlier_rows=kept_rows(earlier_edits, layers),
    )
    reach = [inputs.strength * share for share in spread.reach]  # of the values as they were fitted
    return _Change(spread.factors, losses.tolist(), reach, float(values.norm(dim=1).mean()), spread.key_rows)


def _tuned(inputs: _Inputs, method: TuningMethod) -> tuple[Mapping[int, Factors], Sequence[float]]:
    """The change that goes down the method's loss, and what is left of it for each request."""
    model, groups = inputs.model, inputs.groups
    layers = method.tuned_layers(inputs.layers, model.cfg.n_layers)
    refuse_uneditable(model, layers)
    harmless: list[AnswerRow] = []
    if method.uses_harmless:
        uses = [
            (group.owner, prompt) for group in groups.written if group.harmless for prompt in group.prompts
        ]
        with ProgressBar("harmless answers", len(uses), unit="answer", shown=inputs.progress) as bar:
            harmless = harmless_rows(model, uses, inputs.corpus, progress=bar.update)
    with ProgressBar("tuning", method.steps, unit="step", shown=inputs.progress) as bar:

        def show(loss: float) -> None:
            bar.note(loss=f"{loss:.3f}")
            bar.update()

        return tune(model, method, layers, inputs.refusals, harmless, progress=show)


def _with_reach(inputs: _Inputs, factors: Mapping[int, Factors], losses: Sequence[float]) -> _Change:
    """A change that was made without values: at the strength that is wanted, with its measured reach."""
    groups, strength = inputs.groups, inputs.strength
    factors = {layer: change._replace(left=strength * change.left) for layer, change in factors.items()}
    shifts, reach = reach_of_change(inputs.model, factors, groups.written, inputs.role, groups.measured)
    reach = [strength * share for share in reach]
    return _Change(factors, losses, reach, float(shifts.norm(dim=1).mean()) / strength, {})


def _settings_of(method: Method) -> dict[str, Any]:
    """The method's settings as plain values; of a learned one also how long it was trained."""
    if isinstance(method, LearnedMethod):
        assert method.origin is not None
        return {**asdict(method.settings), "trained_steps": method.origin.steps}
    return asdict(method) if is_dataclass(method) else {}


def room_before_refusal(
    model: TransformerBridge, requests: Sequence[Request], fit: FitSettings
) -> int | None:
    """Tokens that a context may have so that a refusal fits behind it; None where a model has no end."""
    limit, refusals = context_length(model), {request.safe_target or fit.target for request in requests}
    return limit and limit - 2 - max(len(tokenize_text(model.tokenizer, text)) for text in refusals)


def layers_and_role(model: TransformerBridge, sites: Sequence[Site]) -> tuple[tuple[int, ...], Role]:
    """The layers of sites, lowest first, and their role.

    Raises:
        ValueError: there are no sites, they are of several roles or of attention, or the model cannot be
            edited there.
    """
    if not sites:
        raise ValueError("no sites were given; ld.locate(trace) finds some")
    roles: list[Role] = sorted({site.role for site in sites})
    if len(roles) > 1:
        raise ValueError(f"the sites have several roles ({', '.join(roles)}); edit at one role")
    if any(site.component == "attn_out" for site in sites):
        raise ValueError("attn_out sites cannot be edited; choose resid_post or mlp_out sites")
    layers = {site.layer for site in sites}
    refuse_uneditable(model, layers)
    return tuple(sorted(layers)), roles[0]


def _fit_rows(
    model: TransformerBridge, requests: Sequence[Request], groups: EditPrompts, role: Role, fit: FitSettings
) -> list[FitRow]:
    """What the values are fitted on: contexts with their refusal, and ROME's essence prompts."""
    rows = []
    for owner, prompts in enumerate(groups.contexts):
        for turn, prompt in enumerate(prompts[:FIT_CONTEXTS]):
            answer_ids = refusal_ids(model.tokenizer, prompt, fit.target)
            rows.append(FitRow(owner, prompt.ids, role_position(prompt, role), turn, answer_ids))
    for owner, request in enumerate(requests if fit.kl_factor else ()):
        essence = tokenize(model.tokenizer, request.paraphrased("{} is a"), chat=False)
        rows.append(FitRow(owner, essence.ids, role_position(essence, "subject_last")))
    whole_rows = ((requests[row.owner].id, len(row.ids) + len(row.target)) for row in rows)
    keys_alone = ((prompt.request.id, len(prompt.ids)) for prompt in groups.prompts)
    refuse_too_long(model, [*whole_rows, *keys_alone])
    return rows


def _target_values(
    model: TransformerBridge,
    rows: Sequence[FitRow],
    layer: int,
    fit: FitSettings,
    fingerprint: Fingerprint,
    cache: bool,
    progress: bool,
) -> tuple[Float[Tensor, "request d_model"], Float[Tensor, " request"]]:
    """The fitted values and what is left of their losses; kept on disk by all that they depend on."""

    def make() -> Mapping[str, Tensor]:
        steps = fit.shared_num_grad_steps + fit.v_num_grad_steps
        with ProgressBar("values", steps, unit="step", shown=progress) as bar:

            def show(loss: float) -> None:
                bar.total = max(steps, bar.done + 1)  # a hard request may take more
                bar.note(loss=f"{loss:.3f}")
                bar.update()

            values, losses = fit_target_values(model, rows, layer, fit, progress=show)
        return {"values": values, "losses": losses}

    key = [FIT_VERSION, fingerprint.parts("weights", "config"), layer, fit, rows]
    tensors = cached("values", key, make, enabled=cache)
    device = model_device(model)
    return tensors["values"].to(device), tensors["losses"].to(device)
