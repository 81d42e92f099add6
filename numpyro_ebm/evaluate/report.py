# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What is said of a fit: numbers with their thresholds, and whether anyone wants to hear them unasked."""

import math
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import jax

WIDTH = 100  # of a printed report, but for a line of numbers that is longer
UNCHECKED = (
    "Nothing of this fit was checked: {}. Look whether the losses have settled (result.losses), whether another key ends at the "
    "same parameters, and how well rows do that were not learned from: engines that match scores take validation= rows in run."
)
NOTHING_TO_CHECK = "it has no chains, particles or guide, and no objective of which there is a number"
NO_BOUNDS = "none of the numbers above is told and has a bound"


class Finding(NamedTuple):
    """One number of a :class:`FitReport`."""

    #: the site that it is of, empty for the fit as a whole
    site: str
    #: what was measured
    quantity: str
    #: its value, nan where it cannot be told
    value: float
    #: the least or the most that it should be, or None where the number has no threshold
    least: float | None
    most: float | None
    #: what to do where it is not; or why it cannot be told
    fix: str
    #: whether it is not told only because something was not given, as ``fix`` says
    is_missing: bool = False

    @property
    def is_well(self) -> bool:
        """Whether the value is in bounds, or cannot be told; not where it could be."""
        if self.is_missing:
            return False
        too_small = self.least is not None and self.value < self.least
        return not too_small and not (self.most is not None and self.value > self.most)

    @property
    def is_told(self) -> bool:
        """Whether there is a value."""
        return not math.isnan(self.value)

    @property
    def is_checked(self) -> bool:
        """Whether there is a value, and a threshold to compare it with."""
        return self.is_told and (self.least is not None or self.most is not None)

    @property
    def shown(self) -> str:
        """The value, as it is printed."""
        return self._in_digits(self.value)

    @property
    def wanted(self) -> str:
        """What the value should be, in words."""
        if self.least is not None:
            return f"at least {self._in_digits(self.least)}"
        return "" if self.most is None else f"at most {self._in_digits(self.most)}"

    def _in_digits(self, number: float) -> str:
        """Three digits, or as many as tell the value from its bound: "is 1e+04 and should be at most 1e+04" tells nobody."""
        bound = self.most if self.least is None else self.least
        digits = 3
        while bound is not None and self.value != bound and f"{self.value:.{digits}g}" == f"{bound:.{digits}g}":
            digits += 1
        return f"{number:.{digits}g}"

    def __str__(self) -> str:
        where = f"site '{self.site}': " if self.site else ""
        if not self.is_told:
            return f"{where}{self.quantity} cannot be told: {self.fix}" if self.fix else f"{where}{self.quantity} cannot be told"
        should = f" and should be {self.wanted}: {self.fix}" if self.wanted else ""
        return f"{where}{self.quantity} is {self.shown}{should}"


class Warned(str):
    """A warning that a run gives on its way, and what findings of a report are of the same cause: they are not warned of again."""

    quantities: tuple[str, ...]
    site: str

    def __new__(cls, text: str, *quantities: str, site: str = "") -> "Warned":
        """``site`` is that of the findings, "" where it may be any."""
        self = super().__new__(cls, text)
        self.quantities, self.site = quantities, site
        return self

    def tells(self, finding: Finding) -> bool:
        """Whether it is of the same cause."""
        return finding.quantity in self.quantities and self.site in ("", finding.site)


def not_told(site: str, quantity: str, why: str, *, is_missing: bool = False) -> Finding:
    """A finding without a value."""
    return Finding(site, quantity, math.nan, None, None, why, is_missing)


@jax.tree_util.register_static  # a result of a run is a pytree of arrays, and words are none
@dataclass(frozen=True)
class FitReport:
    """What a fit says of itself, ``result.report``, or :func:`diagnose`; ``print`` it as a table.

    .. doctest::

        >>> from numpyro_ebm import Finding, FitReport
        >>> report = FitReport((Finding("z", "R-hat", 3.2, None, 1.2, "take more num_jumps"),))
        >>> report.is_well
        False
        >>> print(report)
        site  quantity  value  wanted
        z     R-hat     3.2    at most 1.2
              take more num_jumps
        >>> FitReport().is_checked, FitReport().is_well  # of a fit with nothing to look at
        (False, False)
    """

    #: every number, in bounds or not
    findings: tuple[Finding, ...] = ()
    #: the error that kept the report from being made, "" where it was made
    failure: str = ""

    @property
    def is_checked(self) -> bool:
        """Whether at least one number is told and has a threshold. Where none is, nothing is known for the fit or against it."""
        return any(finding.is_checked for finding in self.findings)

    @property
    def is_well(self) -> bool:
        """Whether the report was made, something was checked (:attr:`is_checked`), every number that was is in bounds, and none is
        missing that whoever asks could have had.

        False is not yet a reason to doubt a fit: of one without anything to check, :attr:`trouble` is empty, and nothing is
        warned of.
        """
        return self.is_checked and not self.failure and not self.trouble

    @property
    def trouble(self) -> tuple[Finding, ...]:
        """The findings out of bounds, or missing; none where nothing was checked."""
        return tuple(finding for finding in self.findings if not finding.is_well)

    def warn(self, stacklevel: int = 1, before: Collection[str] = ()) -> None:
        """One warning for every finding out of bounds, and for a report that could not be made.

        :param int stacklevel: as of :func:`warnings.warn`: 1 is the line that calls this.
        :param before: what the run has warned of: what is of the same cause is not said again.
        """
        told = [warning for warning in before if isinstance(warning, Warned)]
        new = [str(finding) for finding in self.trouble if not any(warning.tells(finding) for warning in told)]
        for said in new + [self._failed] * bool(self.failure):
            warnings.warn(said, stacklevel=stacklevel + 1)

    @property
    def _failed(self) -> str:
        return f"nothing is known about whether this fit can be believed, because its report failed: {self.failure}"

    def __str__(self) -> str:
        if self.failure:
            return self._failed
        if not self.findings:
            return textwrap.fill(UNCHECKED.format(NOTHING_TO_CHECK), WIDTH)
        rows, said = [("site", "quantity", "value", "wanted")], [""]
        for finding in self.findings:
            value = finding.shown if finding.is_told else "not told"
            rows.append((finding.site, finding.quantity, value, finding.wanted))
            said.append(finding.fix if not (finding.is_well and finding.is_told) else "")
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        indent = " " * (widths[0] + 2)
        lines = []
        for row, text in zip(rows, said, strict=True):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
            lines += textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False)
        if not self.is_checked:
            lines += textwrap.wrap(UNCHECKED.format(NO_BOUNDS), WIDTH)
        return "\n".join(lines)


def report_of(find: Callable[[], list[Finding]]) -> FitReport:
    """A report that nobody has asked for, and that therefore fails nobody: an error in it is said, and the fit is kept."""
    try:
        return FitReport(tuple(find()))
    except Exception as error:
        return FitReport(failure=f"{type(error).__name__}: {error}")


_are_enabled = True


def enable_reports(is_enabled: bool = True) -> None:
    """Whether ``run`` of an engine reports on its fit where it is not told by ``report=``.

    :param bool is_enabled: True to make reports, False to leave them out, as for loops of many short runs and in tests.

    .. doctest::

        >>> import numpyro_ebm
        >>> numpyro_ebm.enable_reports(False)
        >>> numpyro_ebm.enable_reports()
    """
    global _are_enabled
    _are_enabled = is_enabled


@contextmanager
def reports_enabled(is_enabled: bool = True) -> Iterator[None]:
    """:func:`enable_reports` for a while, as a context manager.

    .. doctest::

        >>> from numpyro_ebm import reports_enabled
        >>> with reports_enabled(False):
        ...     pass  # many short runs
    """
    before = _are_enabled
    enable_reports(is_enabled)
    try:
        yield
    finally:
        enable_reports(before)


def are_reports_enabled() -> bool:
    """Whether runs report on their fits."""
    return _are_enabled
