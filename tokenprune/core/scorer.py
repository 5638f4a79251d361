"""The base class of methods that score the image tokens and keep the highest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from tokenprune.core.apportion import top_by_image
from tokenprune.core.decisions import Decision, Keep
from tokenprune.core.options import layer_of, tokens_of
from tokenprune.core.reads import Read
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.errors import PluginError


class ScorerStrategy(Strategy):
    """A method that scores the image tokens and keeps the highest.

    Subclasses define `name`, `Options` with an option `keep` (and `layer`, if it is not 0), `reads` and `score`.

    Attributes:
        reads: what `score` reads; a property if that depends on options.
        by_image: whether every image of a row keeps its own highest tokens, the row's number divided over the images
            by their sizes; else the row keeps its highest tokens, from any image.

    Examples:
        >>> import tokenprune as tp
        >>> class LargestNorm(tp.ScorerStrategy):
        ...     name = "largest-norm"
        ...     reads = (tp.HiddenStates(),)
        ...
        ...     class Options(tp.StrategyOptions):
        ...         keep: float = 0.25
        ...
        ...     def score(self, stage, tokens):
        ...         return tokens.hidden.norm(dim=-1)
        >>> list(LargestNorm(keep=0.5).stages(tp.Shape(layers=4, image_tokens=16)))
        [Stage(name='prune', layer=0, tokens=8, reads=(HiddenStates(normed=False),), positions=None)]
    """

    budget_option = "keep"
    by_image: ClassVar[bool] = False

    @property
    def reads(self) -> tuple[Read, ...]:
        """None: only what `Tokens` always has."""
        return ()

    @abstractmethod
    def score(self, stage: Stage, tokens: Tokens) -> Tensor:
        """Score the image tokens on entering `stage`.

        Returns float [batch, N], higher = kept; ties go to the lower number. Scores of inactive tokens are
        ignored.
        """

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage, `prune`: option `keep` (see `tokens_of`) of the tokens from option `layer` (else layer 0) on.

        Raises:
            OptionError: the model has no such layer.
            PluginError: there is no option `keep`.
        """
        keep = getattr(self.options, "keep", None)
        if keep is None:
            raise PluginError(
                f"strategy {self.name!r}: Options has no number 'keep', which ScorerStrategy declares its stage by; "
                "add the option, or write stages()"
            )
        layer = layer_of(getattr(self.options, "layer", 0), shape.layers, self.name)
        yield Stage("prune", layer, tokens_of(keep, shape.image_tokens), self.reads)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Keep the highest scores, as many as the stage declares.

        Raises:
            PluginError: `score` did not return real numbers [batch, N], or the stage declares no number.
        """
        scores: object = self.score(stage, tokens)
        wanted = list(tokens.active.shape)
        if not isinstance(scores, Tensor) or list(scores.shape) != wanted or scores.is_complex():
            found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise PluginError(
                f"strategy {self.name!r}, stage {stage.name!r}: score() gave {found}; expected real numbers "
                f"[batch, N] = {wanted}"
            )
        if stage.tokens is None:
            raise PluginError(
                f"strategy {self.name!r}, stage {stage.name!r} declares no number of tokens; ScorerStrategy keeps the "
                "highest of a declared number (or override choose())"
            )
        scores = scores if scores.is_floating_point() else scores.float()  # whole numbers have no −inf
        scores = scores.masked_fill(~tokens.active, float("-inf"))
        if self.by_image:
            return Keep.where(top_by_image(tokens, scores), scores=scores)
        return Keep.top(scores, tokens.target)
