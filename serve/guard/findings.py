"""Where in a text personal data and secrets stand: candidates by their look, then checked by kept libraries.

python-stdnum knows the check digits of IBANs and national identity numbers, phonenumbers the numbering plans; so
an order number is no card. What cannot be checked (e-mail, keys) has a look of its own.

Texts hold JSON as often as prose: `{"note": "gone\\nbob@example.org"}`. An escape is read as what it stands for.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from stdnum.iso7064 import mod_97_10
from stdnum.it import codicefiscale
from stdnum.nl import bsn
from stdnum.pl import pesel
from stdnum.se import personnummer
from stdnum.us import ssn

Check = Callable[[str], Any]
Found = tuple[int, int, str]
"""Start, end and kind."""

_ISSUED = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[0-8]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[0689]\d{12}|35\d{14}|6\d{15,18}"
)
"""Lengths of card numbers by their issuer's first digits (ISO/IEC 7812)."""


# in groups of four, or 4-6-5 and 4-6-4; a row of a table has others, and one point a number
_CARD = (
    r"(?:[2-6]\d{3}(?:[ -]?\d{4}){2,3}(?:[ -]?\d{1,3})?|3\d{3}[ -]\d{6}[ -]\d{4,5}|[2-6]\d{3}(?:\.\d{4}){3})"
)


def _is_card(text: str) -> bool:
    """Not by the check digit alone: that takes one number in ten."""
    digits = re.sub(r"[ .-]", "", text)
    return _ISSUED.fullmatch(digits) is not None and luhn.is_valid(digits)


def _is_iban(text: str) -> bool:
    """The check digits first: they cost a fifth of the rest."""
    compact = re.sub(r"[ -]", "", text).upper()
    return bool(mod_97_10.is_valid(compact[4:] + compact[:4]) and iban.is_valid(compact))


def _is_ip(text: str) -> bool:
    """An address of somebody: `::` and `::2` are parts of programs."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "." in text or text == "::1" or len(re.findall(r"[0-9A-Fa-f]+", text)) > 1


def _is_basic(text: str) -> bool:
    """A name and a password; `basic responsibilities` are none."""
    try:
        return ":" in base64.b64decode(text.split()[1], validate=True).decode()
    except ValueError:
        return False


def _always(_: str) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """One kind of data.

    Args:
        look: what candidates look like.
        check: whether a candidate is one.
        grouped: it is written in groups and has no mark at its end, so what stands behind looks like more of it.
    """

    kind: str
    look: re.Pattern[str]
    check: Check = _always
    grouped: bool = False


KEY_LOOKS = (
    r"sk-(?:[A-Za-z]+-)*[A-Za-z0-9_-]{16,}",  # OpenAI, Anthropic and those who copied them
    r"(?:gsk_|xai-|pplx-|r8_)[A-Za-z0-9]{20,}",
    r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}",
    r"glpat-[\w-]{16,}",
    r"(?:AKIA|ASIA)[0-9A-Z]{16}",
    r"AIza[\w-]{30,}|ya29\.[\w-]{20,}",
    r"xox[abeoprs]-[\w-]{10,}",
    r"hf_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{40,}",
    r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",  # Stripe
    r"SG\.[\w-]{16,}\.[\w-]{16,}",  # SendGrid
    r"hs-[\w-]{40,}",  # ours
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}",  # JSON web tokens
    r"GOCSPX-[\w-]{20,}",  # Google's OAuth clients
    r"whsec_[A-Za-z0-9+/]{20,}=*",  # webhooks of Stripe and others
    r"do[opr]_v1_[0-9a-f]{40,}",  # DigitalOcean
    r"hooks\.slack\.com/\w+/[\w/-]{20,}",
    r"(?i:bearer)\s+[\w.~+/-]{16,}=*",
)
_PEM = r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"
PEM = Rule("SECRET", re.compile(rf"{_PEM}.*?(?:{_PEM.replace('BEGIN', 'END')}|\Z)", re.DOTALL))
KEYS = Rule("SECRET", re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(KEY_LOOKS)})"))
BASIC = Rule("SECRET", re.compile(r"(?<![A-Z0-9])basic\s+[A-Z0-9+/]{16,}={0,2}", re.IGNORECASE), _is_basic)
CREDENTIALS = Rule("SECRET", re.compile(r"(?<=://)[^\s/:@\"'<>]{0,128}:[^\s/@\"'<>]{1,128}(?=@)"))
"""Of an address: postgres://admin:this@host/base."""
EMAIL = Rule(
    "EMAIL",
    re.compile(r"(?<![\w.+-])[\w.!#$%&'*+/=?^`{|}~-]{1,128}@(?:[\w-]{1,63}\.)+[^\W\d_][\w-]{1,62}(?![\w-])"),
)
ENCODED_EMAIL = Rule(
    "EMAIL",
    re.compile(r"(?<![\w.+%-])[\w.+%-]{1,128}%40(?:[\w-]{1,63}\.)+[^\W\d_][\w-]{1,62}(?![\w-])"),
)
"""In an address's query."""
IPV4 = Rule("IP", re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\d|\.\d)"), _is_ip)
IPV6 = Rule(
    "IP",
    re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:\.\d{1,3}){0,3}(?![\w:])"),
    _is_ip,
)


def _number(look: str, check: Check = _always) -> Rule:
    return Rule("ID", re.compile(rf"\b(?:{look})\b", re.IGNORECASE), check)


NUMBERS = (
    Rule("IBAN", re.compile(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}\b", re.I), _is_iban, grouped=True),
    Rule("CARD", re.compile(rf"(?<![\d.]){_CARD}(?!\d)"), _is_card, grouped=True),
    _number(r"\d{3}[ -]\d{2}[ -]\d{4}", ssn.is_valid),
    _number(r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]"),  # UK: no check digit
    _number(r"[A-Z]{6}\d{2}[A-EHLMPR-T]\d{2}[A-Z]\d{3}[A-Z]", codicefiscale.is_valid),
    _number(r"\d{8}[ -]?[A-Z]", dni.is_valid),
    _number(r"[XYZ][ -]?\d{7}[ -]?[A-Z]", nie.is_valid),
    _number(r"\d{6}[-+A-FU-Y]\d{3}[0-9A-Y]", hetu.is_valid),
    _number(r"(?:\d{8}|\d{6})[-+]\d{4}", personnummer.is_valid),
    _number(r"[12] ?\d{2} ?\d{2} ?\d[\dAB] ?\d{3} ?\d{3} ?\d{2}", nir.is_valid),
    _number(r"756\.?\d{4}\.?\d{4}\.?\d{2}", ahv.is_valid),
    _number(r"\d{3}\.?\d{3}\.?\d{3}-?\d{2}", cpf.is_valid),
    _number(r"\d{2}\.?\d{2}\.?\d{2}-?\d{3}\.?\d{2}", nn.is_valid),
    _number(r"\d{2} ?\d{3} ?\d{3} ?\d{3}", idnr.is_valid),
    _number(r"\d{11}", pesel.is_valid),
    _number(r"\d{3}[ -]?\d{3}[ -]?\d{3}", sin.is_valid),
    _number(r"\d{4}\.?\d{2}\.?\d{3}", bsn.is_valid),
)
"""All of these hold six digits with at most two other characters between one and the next."""
PHONE = "PHONE"
KINDS = ("SECRET", "EMAIL", "IP", *dict.fromkeys(rule.kind for rule in NUMBERS), PHONE)

_DENSE = re.compile(r"\d(?:\D{0,2}\d){5,}")
_SPACED = re.compile(
    r"(?<![\d.,+])(?<!\d - )(?:\+\d{1,3}[ -]{1,3}\(?\d{2,4}|\(?0\d{2,4}|\(?\d{3})\)? - \d{3,4} - \d{4,5}(?!\d|[.,]\d| - \d)"
)
"""A phone number may be written so: (212) - 736 - 5000. A list of numbers is longer."""
_ABROAD = re.compile(r"(?<![\w.,+-])00(?=[1-9]\d{0,2}[ /(-]{1,2}\d)(?!\d\d \d{4} \d{4}\b)")
"""What most countries dial, and write, for the + of a phone number. A row of four digits each has more of them."""
_LONGEST_PHONE = 32
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(?:[T ]\d{2}(?::?\d{2}){0,2}(?:[.,]\d{1,9})?)?")
_ROUND = 16
"""Characters around a dense run that may belong to what is found there."""
_ESCAPE = re.compile(r"\\+(u[0-9A-Fa-f]{4}|[nrt\"/])")
_SHORT = {"n": "\n", "r": "\r", "t": "\t"}
_ALIKE = str.maketrans("\u00a0\u2007\u2009\u202f\u2010\u2011\u2012\u2013", "    ----")
_SHORTEST_KEY = 15


def findings(text: str, phone_region: str | None) -> list[Found]:
    """Everything found, in order and without overlap; earlier rules go before later ones.

    Args:
        phone_region: ISO country code by which numbers without +country are read; None: only those with it.
    """
    taken: list[Found] = []
    meant, places = _meant(text)
    if not meant.isascii():
        meant = meant.translate(_ALIKE)
    for start, end, kind in _candidates(meant, phone_region):
        found = places[start], places[end], kind
        at = bisect(taken, found)
        free = at == 0 or taken[at - 1][1] <= found[0]
        if free and (at == len(taken) or found[1] <= taken[at][0]):
            taken.insert(at, found)
    return taken


def _meant(text: str) -> tuple[str, Sequence[int]]:
    """The text with JSON's escapes read, and where each of its characters (and its end) stands in the original."""
    pieces: list[str] = []
    places: list[int] = []
    end = 0
    for escape in _ESCAPE.finditer(text) if "\\" in text else ():
        pieces += [text[end : escape.start()], _character(escape.group(1))]
        places += range(end, escape.start() + 1)
        end = escape.end()
    if not pieces:
        return text, range(len(text) + 1)
    return "".join([*pieces, text[end:]]), [*places, *range(end, len(text) + 1)]


_NO_EXTENSION = str.maketrans(dict.fromkeys(",;xX#~", "\n"))
"""What stands before an extension, and as often before the next number: with it the matcher gives both up."""


def _character(escape: str) -> str:
    return chr(int(escape[1:], 16)) if escape.startswith("u") else _SHORT.get(escape, escape)


def _candidates(text: str, phone_region: str | None) -> Iterator[Found]:
    """What cannot be in the text is not looked for; what has been found already is no part of a phone number."""
    found = list(_all_but_phones(text))
    yield from found
    characters = list(text.translate(_NO_EXTENSION))
    for start, end, _ in found:
        characters[start:end] = "\n" * (end - start)
    windows = [*_windows(text), *(run.span() for run in _SPACED.finditer(text))]
    yield from _phones("".join(characters), phone_region, windows)


def _phones(text: str, region: str | None, windows: Iterable[tuple[int, int]]) -> Iterator[Found]:
    for start, end in windows:
        for call in PhoneNumberMatcher(text[start:end], region, leniency=Leniency.VALID):
            yield start + call.start, start + call.end, PHONE
    for zeros in _ABROAD.finditer(text):
        dialled = "+" + text[zeros.end() : zeros.end() + _LONGEST_PHONE]
        for call in PhoneNumberMatcher(dialled, None, leniency=Leniency.VALID):
            if call.start == 0:
                yield zeros.start(), zeros.end() - 1 + call.end, PHONE


def _all_but_phones(text: str) -> Iterator[Found]:
    if len(text) >= _SHORTEST_KEY:
        if "PRIVATE KEY" in text:
            yield from _found_by(PEM, text)
        if "://" in text:
            yield from _found_by(CREDENTIALS, text)
        yield from _found_by(KEYS, text)
        yield from _found_by(BASIC, text)
    if "@" in text:
        yield from _found_by(EMAIL, text)
    if "%40" in text:
        yield from _found_by(ENCODED_EMAIL, text)
    windows = list(_windows(text))
    for rule in NUMBERS:
        for start, end in windows:
            yield from _found_by(rule, text, start, end)
    if "." in text:
        yield from _found_by(IPV4, text)
    if ":" in text:
        yield from _found_by(IPV6, text)


def _windows(text: str) -> Iterator[tuple[int, int]]:
    """Where numbers may stand: around runs of digits that are no date. They do not overlap."""
    start, end = 0, -1
    for run in _DENSE.finditer(text):
        if _DATE.fullmatch(run.group()):
            continue
        if run.start() - _ROUND > end:
            if end > 0:
                yield start, end
            start = max(0, run.start() - _ROUND)
        end = min(len(text), run.end() + _ROUND)
    if end > 0:
        yield start, end


def _found_by(rule: Rule, text: str, start: int = 0, end: int | None = None) -> Iterator[Found]:
    end = len(text) if end is None else end
    while match := rule.look.search(text, start, end):
        stop = next((at for at in _ends(rule, match) if rule.check(text[match.start() : at])), None)
        if stop is None:  # another may begin within what looked like one
            start = match.start() + 1
        else:
            yield match.start(), stop, rule.kind
            start = stop


def _ends(rule: Rule, match: re.Match[str]) -> Iterator[int]:
    """Where a candidate may end: where it does, and where its groups do, the longest first."""
    yield match.end()
    if rule.grouped:
        candidate = match.group()
        for at in range(len(candidate) - 1, 12, -1):
            if candidate[at] in " -":
                yield match.start() + at
