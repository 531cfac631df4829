"""TraceSettings: everything that decides what a trace measures, as one frozen value that the Trace keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lens_defense.arguments import did_you_mean
from lens_defense.prompts.request import READING_ORDER, Role
from lens_defense.sites import COMPONENTS, Component, head_index

Direction = Literal["denoising", "noising"]
DEFAULT_POSITIONS: tuple[Role, ...] = ("subject_first", "subject_last", "next", "last")
"""Where harm is usually stored and read, one token each."""

MIN_DIFFERENCE = 0.1
"""Nats that corrupting a subject must change the answer by, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """What is patched, where, in which direction, and how it is measured."""

    components: Sequence[Component] | Component = ("resid_post",)
    """resid_pre and resid_post (the stream before and after a block), mlp_out and attn_out (what joins it),
    "z.3" (one attention head), "z" (every head by itself)."""
    positions: Sequence[Role] | Literal["all"] = DEFAULT_POSITIONS
    """Roles to patch at, or "all" tokens."""
    layers: Sequence[int] | int | Literal["all"] | None = None
    """Layers, a stride, or "all"; None takes at most 12, evenly spaced from layer 0."""
    direction: Direction = "denoising"
    """denoising restores a clean state in the corrupted run (what suffices); noising puts a corrupted state
    into the clean run (what is necessary)."""
    severed: Literal["mlp_out", "attn_out"] | None = None
    """Hold the MLP or attention outputs that are computed later, at the same token, as they were without the
    patch: what of the effect passes through them is lost (Meng et al. 2022, figure 3)."""
    together: bool = False
    """Patch all tokens of `positions` at once, one cell per layer, which stands at the last of them. With "z"
    and all tokens this maps whole heads."""
    window: int = 7
    """Layers patched at once for mlp_out and attn_out, centred, clipped to the model (ROME takes 10)."""
    answer_tokens: int = 8
    """Length of the model's own answer, where no answer is known; doubled, up to 64, where it does not depend
    on the subject."""
    min_difference: float = MIN_DIFFERENCE
    """The least difference between the clean and the corrupted run, in the metric's unit (nats). A request
    below it, or whose samples differ in its sign, is refused: its effects would be noise over nothing."""
    exact: bool = True
    """False estimates every cell by one gradient (attribution patching), in about the time of three runs."""
    verify: int = 0
    """After an estimate: how many of each request's strongest cells (by the first metric) are measured
    exactly. They take the estimate's place, and `Trace.verified` holds both."""
    chat: bool = True
    """False asks without the model's chat template."""

    def __post_init__(self) -> None:
        for name in ("components", "positions", "layers"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "all":
                value = (value,)  # one component or role by its name
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        known = [name in (*COMPONENTS, "z") or head_index(name) is not None for name in self.components]
        if not known or not all(known):
            guess = did_you_mean(self.components[known.index(False)], COMPONENTS) if known else ""
            raise ValueError(
                f"components must be of {', '.join(COMPONENTS)}, z, or single heads as in z.3; "
                f"got {self.components!r}{guess}"
            )
        unknown_role = self.positions != "all" and not set(self.positions) <= set(READING_ORDER)
        if unknown_role or (isinstance(self.positions, str) and self.positions != "all"):
            raise ValueError(f"positions must be 'all' or a list of {READING_ORDER}, got {self.positions!r}")
        for name in ("answer_tokens", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        allowed = {"direction": get_args(Direction), "severed": (None, "mlp_out", "attn_out")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, values))}, got {getattr(self, name)!r}"
                )
        if self.verify < 0 or (self.verify and self.exact):
            raise ValueError(f"verify is a number of cells to measure after exact=False, got {self.verify}")

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles of `positions`."""
        return READING_ORDER if self.positions == "all" else tuple(self.positions)
