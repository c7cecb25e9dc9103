"""Errors of the library in the words of the host's config."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_RENAMED = {  # what the library says, as keys of the host
    r"`(terms[\w.]*)`: `(\w+)`": r"`\1.\2`",
    r"`terms\.\w+\.bridge\.": "`loss.cycle_bridge_",
    r"`terms\.(cycle_\w+)(\.policy|(?=`))": r"`loss.\1_policy",
    r"`terms`: prior: prior='\w+'": "`loss.prior_options`",
    r"`prior` of \d+ texts: `(?!z`)(\w+)`": r"`loss.prior_options.\1`",
    r"give the term weight 0": "set `loss.prior_weight: 0`",
    r"pattern ('[^']*') of freeze\(\)": r"pattern \1 under `freeze` of a `loss.cycle_*_policy`",
    r"non_finite='skip' or 'zero' pass": "`loss.cycle_non_finite: zero` pass",
}


@contextmanager
def host_words() -> Iterator[None]:
    """Raise errors of values inside anew, naming keys under `loss:` in place of options."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        message = str(error)
        for said, key in _RENAMED.items():
            message = re.sub(said, key, message)
        if message == str(error):
            raise
        raise type(error)(message) from error
