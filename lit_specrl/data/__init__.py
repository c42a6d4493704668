"""Prompts: where they come from, how they are rendered, and in which order each rank sees them."""

from lit_specrl.data.arithmetic import ArithmeticSource
from lit_specrl.data.datamodule import PromptDataModule
from lit_specrl.data.files import FileSource
from lit_specrl.data.hub import HubSource
from lit_specrl.data.loader import PromptLoader
from lit_specrl.data.presets import PRESETS
from lit_specrl.data.reasoning import ReasoningGymSource
from lit_specrl.data.rows import RowsSource
from lit_specrl.data.schedule import Curriculum, InOrder, Mixture, PromptSchedule, Shuffled, SkipSolved
from lit_specrl.data.sources import PromptSource
from lit_specrl.data.template import PromptTemplate

__all__ = [
    "PRESETS",
    "ArithmeticSource",
    "Curriculum",
    "FileSource",
    "HubSource",
    "InOrder",
    "Mixture",
    "PromptDataModule",
    "PromptLoader",
    "PromptSchedule",
    "PromptSource",
    "PromptTemplate",
    "ReasoningGymSource",
    "RowsSource",
    "Shuffled",
    "SkipSolved",
]
