"""Where in a text personal data and secrets stand: candidates by their look, then checked by kept libraries.

python-stdnum knows the check digits of cards, IBANs and national identity numbers, phonenumbers the numbering
plans; so an order number is no card. What cannot be checked (e-mail, keys) has a look of its own.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from phonenumbers import Leniency, PhoneNumberMatcher
from stdnum import iban, luhn
from stdnum.be import nn
from stdnum.br import cpf
from stdnum.ca import sin
from stdnum.ch import ssn as ahv
from stdnum.de import idnr
from stdnum.es import dni, nie
from stdnum.fi import hetu
from stdnum.fr import nir
from stdnum.it import codicefiscale
from stdnum.nl import bsn
from stdnum.pl import pesel
from stdnum.se import personnummer
from stdnum.us import ssn

Check = Callable[[str], Any]


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_card(text: str) -> bool:
    """An issuer's first digit, and the check digit: `stdnum.luhn` alone takes any number in ten."""
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and digits[0] in "23456" and luhn.is_valid(digits) and len(set(digits)) > 1


def _always(_: str) -> bool:
    return True


def _whole(text: str) -> str:
    return text


def _iban_in(text: str) -> str:
    """An IBAN has no mark at its end: words behind it look like more of it. Its length depends on its country."""
    ends = range(len(text), 14, -1)
    return next((text[:end] for end in ends if text[end - 1].isalnum() and iban.is_valid(text[:end])), text)


@dataclass(frozen=True)
class Rule:
    """One kind of data.

    Args:
        look: what candidates look like.
        check: whether a candidate is one.
        cut: the part of a candidate that counts.
    """

    kind: str
    look: re.Pattern[str]
    check: Check = _always
    cut: Callable[[str], str] = _whole


KEY_LOOKS = (
    r"sk-(?:[A-Za-z]+-)*[A-Za-z0-9_-]{16,}",  # OpenAI, Anthropic and those who copied them
    r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}",
    r"glpat-[\w-]{16,}",
    r"(?:AKIA|ASIA)[0-9A-Z]{16}",
    r"AIza[\w-]{30,}",
    r"xox[abeoprs]-[\w-]{10,}",
    r"hf_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{40,}",
    r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",  # Stripe
    r"hs-[\w-]{40,}",  # ours
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}",  # JSON web tokens
    r"(?i:bearer)\s+[\w.~+/-]{16,}=*",
)
RULES = (
    Rule(
        "SECRET",
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
        ),
    ),
    Rule("SECRET", re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(KEY_LOOKS)})")),
    Rule(
        "EMAIL",
        re.compile(
            r"(?<![\w.+-])[\w.!#$%&'*+/=?^`{|}~-]{1,64}@(?:[\w-]{1,63}\.)+[^\W\d_][\w-]{1,62}(?![\w-])"
        ),
    ),
    Rule("IBAN", re.compile(r"(?i)\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}\b"), iban.is_valid, _iban_in),
    Rule("CARD", re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d])"), _is_card),
    Rule("IP", re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d]|\.\d)"), _is_ip),
    Rule(
        "IP",
        re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:\.\d{1,3}){0,3}(?![\w:])"),
        _is_ip,
    ),
    Rule("ID", re.compile(r"\b\d{3}-\d{2}-\d{4}\b"), ssn.is_valid),
    Rule(
        "ID", re.compile(r"(?i)\b[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]\b")
    ),  # UK NINO
    Rule("ID", re.compile(r"(?i)\b[A-Z]{6}\d{2}[A-EHLMPR-T]\d{2}[A-Z]\d{3}[A-Z]\b"), codicefiscale.is_valid),
    Rule("ID", re.compile(r"(?i)\b(?:\d{8}[ -]?[A-Z])\b"), dni.is_valid),
    Rule("ID", re.compile(r"(?i)\b(?:[XYZ][ -]?\d{7}[ -]?[A-Z])\b"), nie.is_valid),
    Rule("ID", re.compile(r"(?i)\b\d{6}[-+A-FU-Y]\d{3}[0-9A-Y]\b"), hetu.is_valid),
    Rule("ID", re.compile(r"\b(?:\d{8}|\d{6})[-+]\d{4}\b"), personnummer.is_valid),
    Rule(
        "ID", re.compile(r"\b[12][ ]?\d{2}[ ]?\d{2}[ ]?\d[\dAB][ ]?\d{3}[ ]?\d{3}[ ]?\d{2}\b"), nir.is_valid
    ),
    Rule("ID", re.compile(r"\b756\.?\d{4}\.?\d{4}\.?\d{2}\b"), ahv.is_valid),
    Rule("ID", re.compile(r"\b\d{3}\.?\d{3}\.?\d{3}-?\d{2}\b"), cpf.is_valid),
    Rule("ID", re.compile(r"\b\d{2}\.?\d{2}\.?\d{2}-?\d{3}\.?\d{2}\b"), nn.is_valid),
    Rule("ID", re.compile(r"\b\d{2} ?\d{3} ?\d{3} ?\d{3}\b"), idnr.is_valid),
    Rule("ID", re.compile(r"\b\d{11}\b"), pesel.is_valid),
    Rule("ID", re.compile(r"\b\d{3}[ -]?\d{3}[ -]?\d{3}\b"), sin.is_valid),
    Rule("ID", re.compile(r"\b\d{4}\.?\d{2}\.?\d{3}\b"), bsn.is_valid),
)
PHONE = "PHONE"
KINDS = (*dict.fromkeys(rule.kind for rule in RULES), PHONE)
_MAY_CALL = re.compile(r"\d(?:[\s().\-/]*\d){6}")


def findings(text: str, phone_region: str | None) -> list[tuple[int, int, str]]:
    """Start, end and kind of everything found, in order and without overlap; earlier rules go before later ones.

    Args:
        phone_region: ISO country code by which numbers without +country are read; None: only those with it.
    """
    taken: list[tuple[int, int, str]] = []
    for start, end, kind in _candidates(text, phone_region):
        if all(end <= other or start >= after for other, after, _ in taken):
            taken.append((start, end, kind))
    return sorted(taken)


def _candidates(text: str, phone_region: str | None) -> Iterator[tuple[int, int, str]]:
    digits = any(character.isdigit() for character in text)
    for rule in RULES if digits or ":" in text else RULES[:3]:
        yield from _found_by(rule, text)
    if digits and _MAY_CALL.search(text):
        for call in PhoneNumberMatcher(text, phone_region, leniency=Leniency.VALID):
            yield call.start, call.end, PHONE


def _found_by(rule: Rule, text: str) -> Iterator[tuple[int, int, str]]:
    place = 0
    while match := rule.look.search(text, place):
        found = rule.cut(match.group())
        if rule.check(found):
            yield match.start(), match.start() + len(found), rule.kind
            place = match.start() + len(found)
        else:  # where the end is open, the next one may begin within what looked like this one
            place = match.end() if rule.cut is _whole else match.start() + 1
