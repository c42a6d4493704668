"""What a policy talks to between its turns."""

from lit_specrl.environments.base import Environment, Observation
from lit_specrl.environments.calculator import CalculatorEnvironment
from lit_specrl.environments.tools import ToolEnvironment

__all__ = ["CalculatorEnvironment", "Environment", "Observation", "ToolEnvironment"]
