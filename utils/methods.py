"""The ways to repair a model, one for each SCORES_TYPE, and what the code has to know of each: one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from utils.settings import RankingType, ScoresType, Strategy


@dataclass(frozen=True)
class Method:
    """What a SCORES_TYPE is.

    Attributes:
        subset: the BOTTOM_K dialogues that are unlearned: the first of the ranking, the diverse ones of step 3, or
            random ones; None where no subset is unlearned.
        ranking: the order of dialogues that it goes by; None where it goes by none.
        step: along a natural gradient, along the gradient itself, or along a change of weights that AdamW trained.
        descends: the loss of TOP_K dialogues goes down.
        weighs_all: every dialogue counts, by its influence score.
        is_fitted: from those weights on, better ones are fitted.
        uses_pairs: it looks at the training pairs, and at no dialogue.
        retains: a term of its loss keeps other dialogues as they are.
        is_control_of_npo: trained like "npo", on the same retained dialogues.
    """

    subset: Literal["ranked", "diverse", "random"] | None = "ranked"
    ranking: RankingType | None = "pure_ekfac"
    step: Literal["natural", "plain", "trained"] = "natural"
    descends: bool = False
    weighs_all: bool = False
    is_fitted: bool = False
    uses_pairs: bool = False
    retains: bool = False
    is_control_of_npo: bool = False

    @property
    def is_trained(self) -> bool:
        """Whether AdamW trains it: there is no gradient to be taken again, and no single token to choose."""
        return self.step == "trained"


METHODS: dict[ScoresType, Method] = {
    # Subsets: the paper's three, then other rankings.
    "pure_ekfac": Method(),
    "dpp": Method(subset="diverse"),
    "random": Method(subset="random", ranking=None),
    "ekfac_cg": Method(ranking="ekfac_cg"),
    "identity": Method(ranking="identity"),
    "representation": Method(ranking="representation"),
    "mean_difference": Method(ranking="mean_difference"),
    "bm25": Method(ranking="bm25"),
    # Beyond the paper.
    "contrast": Method(descends=True),
    "weighted": Method(subset=None, weighs_all=True),
    "fitted": Method(subset=None, weighs_all=True, is_fitted=True),
    "dpp_weighted": Method(subset="diverse"),
    "direct": Method(subset=None, ranking=None, uses_pairs=True),
    # What others do.
    "ga": Method(step="plain"),
    "ga_kl": Method(step="trained", retains=True),
    "npo": Method(step="trained", retains=True),
    "task_vector": Method(step="trained"),
    "dpo": Method(subset=None, ranking=None, step="trained", uses_pairs=True),
    "sft_pairs": Method(subset=None, ranking=None, step="trained", uses_pairs=True),
    # Controls.
    "descent": Method(subset=None, ranking=None, descends=True),
    "direct_shuffled": Method(subset=None, ranking=None, uses_pairs=True),
    "npo_random": Method(subset="random", step="trained", retains=True, is_control_of_npo=True),
    "sft_retained": Method(subset=None, step="trained", retains=True, is_control_of_npo=True),
}
TRAINED = tuple(name for name, method in METHODS.items() if method.is_trained)
INFLUENCE_TYPES: tuple[RankingType, ...] = ("pure_ekfac", "ekfac_cg", "identity")  # rankings by scores of step 1


def fixed_strategy(scores_type: ScoresType) -> Strategy | None:
    """The FACTOR_STRATEGY whose scores a SCORES_TYPE goes by, where its name says so; None where the constant does, or
    where it goes by no score of step 1.
    """
    ranking = METHODS[scores_type].ranking
    return ranking if ranking in get_args(Strategy) else None


def default_strategy(scores_type: ScoresType) -> Strategy | None:
    """The FACTOR_STRATEGY whose scores a SCORES_TYPE goes by, unless it is told another; None where it goes by none."""
    return "ekfac" if METHODS[scores_type].ranking == "pure_ekfac" else fixed_strategy(scores_type)


def factors_for(strategy: Strategy) -> Strategy:
    """The factors that scores of a strategy are made with: those of "ekfac" precondition the conjugate gradients."""
    return "ekfac" if strategy == "ekfac_cg" else strategy
