"""ReSpec: drafters, how many tokens they draft, and how they learn."""

from lit_specrl.drafting.drafters import (
    Drafter,
    DraftModel,
    Eagle3Drafter,
    HistoryDrafter,
    LookUpDrafter,
    NGramDrafter,
)

__all__ = ["DraftModel", "Drafter", "Eagle3Drafter", "HistoryDrafter", "LookUpDrafter", "NGramDrafter"]
