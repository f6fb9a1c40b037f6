"""The laws that every method keeps on every backbone, as plain functions; `check_method` runs all on one method."""

from __future__ import annotations

from deltatune.laws.check import LAWS, Law, LawResult, check_method
from deltatune.laws.subject import LawBroken, Subject

__all__ = ["LAWS", "Law", "LawBroken", "LawResult", "Subject", "check_method"]
