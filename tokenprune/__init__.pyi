"""The public names of tokenprune, each with the module that defines it: the only list of them.

Type checkers and editors read this file; `__init__.py` reads it to import a name on first use.
"""

from tokenprune.api import load as load
from tokenprune.api import strategy as strategy
from tokenprune.core.composition.sequence import Sequence as Sequence
from tokenprune.core.decisions import Decision as Decision
from tokenprune.core.decisions import Keep as Keep
from tokenprune.core.decisions import Merge as Merge
from tokenprune.core.decisions import MergeGroup as MergeGroup
from tokenprune.core.decisions import Restore as Restore
from tokenprune.core.reads import AttentionFrom as AttentionFrom
from tokenprune.core.reads import ClipImageEmbeddings as ClipImageEmbeddings
from tokenprune.core.reads import ClipTextEmbeddings as ClipTextEmbeddings
from tokenprune.core.reads import ClsAttention as ClsAttention
from tokenprune.core.reads import ClsFeatures as ClsFeatures
from tokenprune.core.reads import ClsQuery as ClsQuery
from tokenprune.core.reads import Crops as Crops
from tokenprune.core.reads import Embeddings as Embeddings
from tokenprune.core.reads import HiddenStates as HiddenStates
from tokenprune.core.reads import LayerKeys as LayerKeys
from tokenprune.core.reads import LayerRead as LayerRead
from tokenprune.core.reads import LayerValues as LayerValues
from tokenprune.core.reads import LayerView as LayerView
from tokenprune.core.reads import Pixels as Pixels
from tokenprune.core.reads import PositionKernel as PositionKernel
from tokenprune.core.reads import PositionPrior as PositionPrior
from tokenprune.core.reads import Projector as Projector
from tokenprune.core.reads import Read as Read
from tokenprune.core.reads import ReceivedAttention as ReceivedAttention
from tokenprune.core.reads import RotaryTables as RotaryTables
from tokenprune.core.reads import TextEmbeddings as TextEmbeddings
from tokenprune.core.reads import TextKeys as TextKeys
from tokenprune.core.reads import TextStates as TextStates
from tokenprune.core.reads import TextValues as TextValues
from tokenprune.core.reads import TowerFeatures as TowerFeatures
from tokenprune.core.reads import TowerKeys as TowerKeys
from tokenprune.core.reads import TowerStates as TowerStates
from tokenprune.core.reads import TowerValues as TowerValues
from tokenprune.core.scorer import ScorerStrategy as ScorerStrategy
from tokenprune.core.stage import Positions as Positions
from tokenprune.core.stage import Shape as Shape
from tokenprune.core.stage import Stage as Stage
from tokenprune.core.strategy import Strategy as Strategy
from tokenprune.core.strategy import StrategyOptions as StrategyOptions
from tokenprune.core.tokens import Tokens as Tokens
from tokenprune.datasets.by_name import dataset as dataset
from tokenprune.engine import prune as prune
from tokenprune.engine.embedding import embed as embed
from tokenprune.engine.interface.compatibility import Compatibility as Compatibility
from tokenprune.engine.interface.compatibility import compatible as compatible
from tokenprune.errors import TokenPruneError as TokenPruneError
from tokenprune.evaluation.comparison.compare import compare as compare
from tokenprune.loading.adapter import Adapter as Adapter
from tokenprune.loading.model_support import ModelSupport as ModelSupport
from tokenprune.plugins.hookspecs import hookimpl as hookimpl
from tokenprune.plugins.registry import adapters as adapters
from tokenprune.plugins.registry import datasets as datasets
from tokenprune.plugins.registry import models as models
from tokenprune.plugins.registry import strategies as strategies
from tokenprune.recommendation.recommend import recommend as recommend
from tokenprune.sweeps.answers import read_answers as read_answers
from tokenprune.sweeps.results import read_results as read_results
from tokenprune.sweeps.run import sweep as sweep

__version__: str
__all__: list[str]
