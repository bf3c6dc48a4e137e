"""Chat templates that ask what day it is, told one day for a whole run.

Llama 3.2's template and gpt-oss's write today's date into every prompt, through transformers' `strftime_now`. Rows
written on two days would differ, and a run could not be resumed tomorrow. So the template is given a macro of that name
in front, which writes the day the run began, whatever day it is.
"""

import re
from datetime import date, datetime
from datetime import time as time_of_day

_ASKS = re.compile(r"\bstrftime_now\b")
_DIRECTIVE = re.compile(r"%[-_0^#]?[A-Za-z]")
_CHANCE = re.compile(r"""\|\s*random\b|\(\s*["']random["']|\blipsum\b""")


def today() -> str:
    """The day it is here, as `2026-12-31`."""
    return date.today().isoformat()


def asks_date(template: str) -> bool:
    """Whether a chat template asks what day it is."""
    return bool(_ASKS.search(template))


def draws(template: str) -> bool:
    """Whether a chat template draws random numbers, so that it writes no chat twice alike."""
    return bool(_CHANCE.search(template))


def pinned(template: str, day: str) -> str:
    """The template with every `strftime_now` telling midnight of `day`, in whatever format it is asked for."""
    moment = datetime.combine(date.fromisoformat(day), time_of_day())
    cases = "".join(
        f" | replace({directive!r}, {moment.strftime(directive)!r})"
        for directive in sorted(set(_DIRECTIVE.findall(template)), key=len, reverse=True)
    )
    # The line break ends the macro's line for jinja, which drops it: the template's own white space is untouched.
    return f"{{% macro strftime_now(format) %}}{{{{ format{cases} }}}}{{% endmacro %}}\n{template}"
