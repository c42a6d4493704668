r"""Reference answers of MATH-500 that differ in kind, and where whole data sets may lie."""

import os
from pathlib import Path

DATA = Path(os.environ.get("LIT_SPECRL_DATA", Path(__file__).parents[1].parent / "shared" / "data"))

SAMPLE = [
    r"\left( 3, \frac{\pi}{2} \right)",
    r"\text{Evelyn}",
    "p - q",
    r"\text{(C)}",
    r"\$32,\!348",
    r"11,\! 111,\! 111,\! 100",
    r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
    r"(0,9) \cup (9,36)",
    r"\{1\pm\sqrt{5},-2\}",
    r"137 \frac{1}{2}",
    r"\frac 59",
    ".35625",
    "5x - 7y + 11z + 4 = 0",
    r"x \in [-2,7]",
    "90^\\circ",
    "6+9i",
    "58,500",
    "-10",
]
