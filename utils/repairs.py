"""What makes up a repair beside its model, task and learning rate: which choices go together, and its name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from utils.console import UserError
from utils.methods import METHODS, Method
from utils.settings import ScoresType, Settings

HELPFUL_FOR_EACH_HARMFUL = 5  # dialogues, where TOP_K is None
FIRST_RATE = 0.012  # of the paper, from which the search for a step goes on
TRAINED_RATE = 1.0  # where AdamW left the weights; on the line there perplexity may rise first and fall again

# The constants of steps 4 and 5 that a choice stands for.
CONSTANTS = {
    "scores_type": "SCORES_TYPE",
    "bottom_k": "BOTTOM_K",
    "if_weight": "IF_WEIGHT",
    "top_k": "TOP_K",
    "harmful_tokens_only": "HARMFUL_TOKENS_ONLY",
    "preserve_perplexity": "PRESERVE_PERPLEXITY",
    "preserve_tasks": "PRESERVE_TASKS",
    "num_steps": "NUM_STEPS",
}


@dataclass(frozen=True)
class RepairChoice:
    """A way to repair a model, by the constants of steps 4 and 5 (`CONSTANTS`)."""

    scores_type: ScoresType
    bottom_k: int
    if_weight: float = 10.0
    top_k: int | None = None
    harmful_tokens_only: bool = False
    preserve_perplexity: bool = False
    preserve_tasks: bool = False
    num_steps: int = 1

    @classmethod
    def of(cls, settings: Settings) -> RepairChoice:
        """The choice that a script's constants make; step 4 has no NUM_STEPS."""
        known = {name: constant for name, constant in CONSTANTS.items() if hasattr(settings, constant)}
        return cls(**{name: getattr(settings, constant) for name, constant in known.items()})

    @property
    def constants(self) -> dict[str, Any]:
        """The constants of steps 3 to 5 that make this choice."""
        return {constant: getattr(self, name) for name, constant in CONSTANTS.items()}

    @property
    def method(self) -> Method:
        """What SCORES_TYPE is."""
        return METHODS[self.scores_type]

    @property
    def counts_bottom_k(self) -> bool:
        """Whether BOTTOM_K matters: those dialogues are unlearned, or what a control retains leaves them out."""
        return self.method.subset is not None or self.method.is_control_of_npo

    @property
    def first_rate(self) -> float:
        """The learning rate that a search tries first."""
        return TRAINED_RATE if self.method.is_trained else FIRST_RATE

    @property
    def search_constants(self) -> dict[str, float]:
        """What a search's record says of its beginning: from another one than the paper's it may find another step."""
        return {} if self.first_rate == FIRST_RATE else {"FIRST_RATE": self.first_rate}

    @property
    def num_helpful(self) -> int:
        """Number of dialogues whose loss goes down."""
        return self.top_k or HELPFUL_FOR_EACH_HARMFUL * self.bottom_k

    @property
    def gradient_name(self) -> str:
        """The part of a path that identifies step 4's gradient of a task: `dpp_ifweight10_bottom100`.

        Numbers that a way of choosing does not depend on are left out.
        """
        weight = f"_ifweight{self.if_weight:g}" if self.method.subset == "diverse" else ""
        subset = f"_bottom{self.bottom_k}" if self.counts_bottom_k else ""
        helpful = f"_top{self.num_helpful}" if self.method.descends else ""
        kept = "_preserve" * self.preserve_perplexity + "_preservetasks" * self.preserve_tasks
        return f"{self.scores_type}{weight}{subset}{helpful}{'_tokens' * self.harmful_tokens_only}{kept}"

    @property
    def name(self) -> str:
        """The part of a path that identifies step 5's repair of a task, at any learning rate."""
        return self.gradient_name + (f"_steps{self.num_steps}" if self.num_steps > 1 else "")

    @property
    def label(self) -> str:
        """The method's name in tables."""
        steps = f" in {self.num_steps} steps" if self.num_steps > 1 else ""
        kept = " + preserve" * self.preserve_perplexity + " + preserve tasks" * self.preserve_tasks
        return self.scores_type + " + tokens" * self.harmful_tokens_only + kept + steps

    def require_consistent(self, task: str) -> None:
        """Check that the choices go together.

        Raises:
            UserError: names the constant that does not fit SCORES_TYPE or the task.
        """
        method, of_type = self.method, f"SCORES_TYPE = {self.scores_type!r}"
        if self.harmful_tokens_only and (not method.subset or method.is_trained or method.descends):
            raise UserError(
                f"HARMFUL_TOKENS_ONLY = True: {of_type} does not take single tokens of dialogues; set it to False, or "
                "choose by another SCORES_TYPE, such as 'pure_ekfac'"
            )
        if method.step != "natural" and (self.preserve_perplexity or self.preserve_tasks):
            constant = "PRESERVE_PERPLEXITY" if self.preserve_perplexity else "PRESERVE_TASKS"
            raise UserError(
                f"{constant} = True: {of_type} does without the curvature in which a direction preserves anything; set "
                "it to False, or choose another SCORES_TYPE"
            )
        if self.preserve_tasks and task == "combined":
            raise UserError(
                "PRESERVE_TASKS = True: TASK_NAME = 'combined' repairs for all tasks and leaves none to be preserved; "
                "set it to False, or TASK_NAME to bias, ethics, truth or all"
            )
        if (method.is_trained or method.is_fitted) and self.num_steps > 1:
            what = "a change of the model" if method.is_trained else "weights"
            raise UserError(f"NUM_STEPS = {self.num_steps}: {of_type} is {what} that step 4 makes once; allowed is 1")

    def nearest(self, task: str) -> RepairChoice:
        """The choice without those of its options that do not fit SCORES_TYPE or the task."""
        plain = RepairChoice(self.scores_type, self.bottom_k, self.if_weight, self.top_k)
        fitting = {name: value for name, value in vars(self).items() if replace(plain, **{name: value}).fits(task)}
        return replace(plain, **fitting)

    def fits(self, task: str) -> bool:
        """Whether the choices go together for a task."""
        try:
            self.require_consistent(task)
        except UserError:
            return False
        return True
