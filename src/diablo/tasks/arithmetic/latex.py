r"""One spelling for a formula that LaTeX can write in several ways, so that answers of MATH can be compared as text.

The differences that are removed are those of the data set's own comparison (Hendrycks et al., "Measuring Mathematical
Problem Solving With the MATH Dataset", 2021). MetaMath's evaluation and the paper's use it as well.
"""

from __future__ import annotations

import re

_LEVELLED = (
    (re.compile(r"\n|\\!|\\left|\\right|\^\{?\\circ\}?|\\\$|\\?%|\$"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\\\"), r"\\"),
    # A unit at the end: \text{ cm}. A word that is the answer has no space in front.
    (re.compile(r"\\text\{\s.*$", re.DOTALL), ""),
    (re.compile(r"(^|[\s{(\[,=])\.(?=\d)"), r"\g<1>0."),
    (re.compile(r"^\s*\w{1,2}\s*=\s*(?=[^=]+$)"), ""),
    (re.compile(r"\s+"), ""),
    (re.compile(r"\\sqrt([^{\[\\])"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac(\d)(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac(\d)\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\{[^{}]*\})(\d)"), r"\1{\2}"),
    (re.compile(r"^(-?\d+)/(-?\d+)$"), r"\\frac{\1}{\2}"),
    (re.compile(r"^0\.5$"), r"\\frac{1}{2}"),
)


def normalise_latex(text: str) -> str:
    """The formula in the one spelling. Two formulas that differ only in layout come out the same."""
    for pattern, spelling in _LEVELLED:
        text = pattern.sub(spelling, text)
    return text
