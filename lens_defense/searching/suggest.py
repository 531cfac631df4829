"""What to try next, by optuna's multi-objective tree of Parzen estimators (Ozaki et al. 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from lens_defense.searching.outcome import Candidate, Outcome

FIRST_AT_RANDOM = 6
"""Candidates, the default included, before outcomes say where to look."""
_MISSING = "a search needs optuna, which is not installed; pip install 'lens-defense[defend]' gets it"


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """What may be combined."""

    methods: tuple[str, ...]
    windows: tuple[tuple[int, ...], ...]
    """The layers that may be edited together; the first ones are those of the sites."""
    weakest: float = 0.5
    strongest: float = 2.0
    """The strengths between which is searched, evenly in their logarithm."""

    @property
    def default(self) -> Candidate:
        """What is tried first: what `ld.edit` does unless it is told otherwise."""
        return Candidate(self.methods[0], self.windows[0], 1.0)


def suggest(space: SearchSpace, outcomes: Sequence[Outcome], seed: int) -> Candidate:
    """The next candidate; the same one each time for the same outcomes, so that a stopped search goes on.

    Raises:
        ValueError: optuna is not installed.
    """
    if not outcomes:
        return space.default
    optuna: Any = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, Any] = {
        "method": optuna.distributions.CategoricalDistribution(space.methods),
        "window": optuna.distributions.CategoricalDistribution(range(len(space.windows))),
        "strength": optuna.distributions.FloatDistribution(space.weakest, space.strongest, log=True),
    }
    sampler = optuna.samplers.TPESampler(seed=seed + len(outcomes), n_startup_trials=FIRST_AT_RANDOM)
    study = optuna.create_study(directions=("minimize", "minimize", "minimize"), sampler=sampler)
    for outcome in outcomes:
        tried = outcome.candidate
        params = {
            "method": tried.method,
            "window": space.windows.index(tried.layers),
            "strength": tried.strength,
        }
        state = optuna.trial.TrialState
        values = {"state": state.FAIL} if outcome.failure else {"values": list(outcome.objectives)}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, **values))
    params = study.ask(distributions).params
    return Candidate(params["method"], space.windows[params["window"]], round(params["strength"], 3))


def require_optuna() -> ModuleType:
    """The library, which is an extra.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module("optuna")
    except ImportError as error:
        raise ValueError(_MISSING) from error
